"""What is computed, apart from the tensors: the seam between the public API and the backends.

Every backend (``reference``, ``cpu``, ``kernels.launch``) offers the same three functions::

    forward(q1, k1, q2, k2, v, problem) -> (out, lse)
    backward(dout, dlse, q1, k1, q2, k2, v, out, lse, problem) -> (dq1, dk1, dq2, dk2, dv)
    total_attention(q1, k1, q2, k2, lse, problem) -> total

with q [B, H, M, D] and k, v [B, Hk, N, D], or for packed sequences [T, H, D]. ``out`` has the
shape of q1, ``lse`` is the natural logarithm of the row sums [B, H, M] (packed: [H, T]), float32
(float64 for float64 tensors); a row that sees no key has out 0 and lse -inf. ``dlse`` may be None,
which means zero. ``total`` [B, H, N] (packed: [H, T]) is the attention each key gets from all
queries of a head, in the dtype of lse. Results share no memory with the arguments or with each
other, also where the arguments do (q1 is q2, k2 is v). Strides are free: the public API lays the
results out as the arguments are (``torch.empty_like``), without a copy where they already are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NEVER", "Problem"]

NEVER = 1 << 30
"""A threshold no distance reaches: plain attention with pair 1."""


@dataclass(frozen=True)
class Problem:
    """Which keys a query sees, and with which pair.

    Query row m lies at the absolute position ``q_offset + m``, key column n at ``k_offset + n``;
    their distance is d = (q_offset + m) - (k_offset + n), signed. A key with d >= threshold is far
    and scored with pair 2, any other is near and scored with pair 1.

    Attributes:
        causal: Keys with d < 0 are masked.
        sm_scale: What every score is multiplied by.
        threshold: One number, or an int32 tensor with a number for each query row: [M] or [B, M],
            packed [T]. ``NEVER`` and above mean plain attention with pair 1.
        q_offset: Absolute position of the first query (of each packed sequence). None, in packed
            calls only: k_offset + N_i - M_i for each sequence i, the last query on the last key.
        k_offset: Absolute position of the first key (of each packed sequence).
        n_sink: If positive, far keys at absolute positions >= n_sink are masked.
        cu_seqlens_q: Packed calls only: int32 [S + 1], where each sequence's queries begin.
        cu_seqlens_k: Packed calls only: int32 [S + 1], where each sequence's keys begin.
        max_seqlen_q: Queries of the longest sequence; M in dense calls.
        max_seqlen_k: Keys of the longest sequence; N in dense calls.
    """

    causal: bool
    sm_scale: float
    threshold: int | Tensor
    q_offset: int | None
    k_offset: int
    n_sink: int
    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
