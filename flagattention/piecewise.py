"""The public calls: arguments checked, defaults filled in, then one operator."""

from __future__ import annotations

import math

from torch import Tensor

from flagattention.call import Call, chosen_backend
from flagattention.operators import piecewise_op, total_op
from flagattention.problem import NEVER
from flagattention.validation import check

__all__ = ["flash_attention", "piecewise_attention"]


def piecewise_attention(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    dist_threshold: int | float | Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    return_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    q_offset: int | None = None,
    k_offset: int = 0,
    n_sink: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention whose far keys are scored with another pair of queries and keys than the near.

    A query at position p and a key at position n lie d = p - n apart. Where d >= dist_threshold
    the score is q2 . k2, else q1 . k1; one softmax runs over both. The distance has a sign: without
    ``causal``, keys ahead of the query are near (unless the threshold is negative).

    The result, and the lse if asked for, are differentiable in all five tensors. Tensors may be
    the same (k2 is k1, v is k2) and may have any strides. A row that sees no key has out 0, lse
    -inf and no gradient. Results do not depend on the order of threads.

    Args:
        q1: Queries for near keys: [B, H, M, D], packed [T, H, D].
        k1: Keys for near keys: [B, Hk, N, D], packed [Tk, Hk, D]; H is a multiple of Hk.
        q2: Queries for far keys, shaped like q1.
        k2: Keys for far keys, shaped like k1.
        v: Values, shaped like k1.
        dist_threshold: From which distance on a key is far: one number (math.inf: never, plain
            attention with pair 1), or int32 for each query row: [M] or [B, M], packed [T].
        causal: Mask keys ahead of the query.
        sm_scale: What scores are multiplied by; None for D ** -0.5.
        return_lse: Also return the logarithm of the row sums.
        cu_seqlens_q: For packed sequences: int32 [S + 1], where each one's queries begin.
        cu_seqlens_k: For packed sequences: int32 [S + 1], where each one's keys begin.
        max_seqlen_q: Queries of the longest packed sequence; None reads it from cu_seqlens_q,
            which waits for the device.
        max_seqlen_k: Keys of the longest packed sequence; None as above.
        q_offset: Position of the first query (of each sequence). None puts the last query on the
            last key: k_offset + N - M.
        k_offset: Position of the first key (of each sequence).
        n_sink: If positive, far keys at positions from n_sink on are masked.
        backend: "triton", "cpu" or "reference"; None chooses by the device of the tensors.

    Returns:
        The output, shaped like q1; with ``return_lse`` also the lse, float32 (float64 for float64
        tensors): [B, H, M], packed [H, T].

    Raises:
        AttentionError: An argument is not as described; see ``validation``.

    Source: the semantics of FlagAttention's piecewise_attention, whose code takes the far pair at
    d = dist_threshold.
    """
    call = Call(
        (q1, k1, q2, k2, v),
        _threshold(dist_threshold),
        causal,
        sm_scale,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        (q_offset, k_offset),
        n_sink,
        chosen_backend(backend, q1),
    )
    check(call)
    out, lse = piecewise_op(*call.tensors, *call.settings)
    return (out, lse) if return_lse else out


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    sm_scale: float | None = None,
    *,
    return_lse: bool = False,
    return_total_attention: bool = False,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    q_offset: int | None = None,
    k_offset: int = 0,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Plain attention, by the code of ``piecewise_attention`` with a threshold beyond the length.

    Args:
        q: Queries, [B, H, M, D], packed [T, H, D].
        k: Keys, [B, Hk, N, D], packed [Tk, Hk, D].
        v: Values, shaped like k.
        causal: Mask keys ahead of the query.
        sm_scale: What scores are multiplied by; None for D ** -0.5.
        return_lse: Also return the logarithm of the row sums.
        return_total_attention: Also return the attention each key gets in all, a number without
            gradient.
        cu_seqlens_q: As for ``piecewise_attention``, and so all below.
        cu_seqlens_k: See there.
        max_seqlen_q: See there.
        max_seqlen_k: See there.
        q_offset: See there.
        k_offset: See there.
        backend: See there.

    Returns:
        The output, shaped like q; then, each if asked for, the lse, float32 (float64 for float64
        tensors) [B, H, M], packed [H, T]; and the total attention, in the dtype of the lse: for
        each query head (not key head) the sum over its queries, [B, H, N], packed [H, Tk].

    Raises:
        AttentionError: An argument is not as described; see ``validation``.
    """
    call = Call(
        (q, k, q, k, v),
        NEVER,
        causal,
        sm_scale,
        (cu_seqlens_q, cu_seqlens_k),
        (max_seqlen_q, max_seqlen_k),
        (q_offset, k_offset),
        0,
        chosen_backend(backend, q),
    )
    check(call)
    # Pair 2 is never scored, so that it needs no gradient either.
    far = (q.detach(), k.detach())
    out, lse = piecewise_op(q, k, *far, v, *call.settings)
    results = [out]
    if return_lse:
        results.append(lse)
    if return_total_attention:
        results.append(total_op(*far, *far, lse.detach(), *call.settings))
    return tuple(results) if len(results) > 1 else out


def _threshold(threshold: int | float | Tensor) -> int | float | Tensor:
    return NEVER if isinstance(threshold, float) and threshold == math.inf else threshold
