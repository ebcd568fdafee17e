"""Ways to read beyond the trained length: each makes two pairs of queries and keys.

Near keys keep the distances a model was trained with, far keys get others, and
``piecewise_attention`` joins the two. With W the window and d a key's distance from the query:

==============  =================================  ============================
method          effective distance of a far key    queries and keys of pair 2
==============  =================================  ============================
rerope (NLPE)   W                                  q at W, k at 0
leaky-rerope    W + (d - W) / leak                 q at m / leak + W - W / leak, k at n / leak
self-extend     m // G - n // G + W - W // G       q at m // G + W - W // G, k at n // G
streaming       W, the first n_sink keys only      q at W, k at 0
==============  =================================  ============================

Sources: ReRoPE and Leaky ReRoPE, J. Su 2023; NLPE, Aquila2 technical report; Self-Extend,
arXiv 2401.01325; streaming with sinks, arXiv 2309.17453, at the clamped distance of LM-Infinite,
arXiv 2308.16137.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from flagattention.call import Call, chosen_backend
from flagattention.errors import AttentionError
from flagattention.fused import nlpe_op
from flagattention.operators import piecewise_op
from flagattention.positions import consecutive, log_scale, offsets
from flagattention.rotary import Rotary, angles, check_rotary, rotate, turn
from flagattention.validation import check

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["METHODS", "Method", "Pairs", "Rotary", "nlpe_attention", "pairs", "rotate"]


@dataclass(frozen=True)
class Method:
    """A way to read beyond the trained length.

    Attributes:
        name: "rerope" (NLPE), "leaky-rerope", "self-extend" or "streaming".
        window: Keys at this distance and beyond are far.
        leak: leaky-rerope only: distances beyond the window grow this many times slower.
        group: self-extend only: so many neighbouring positions become one.
        n_sink: streaming only: how many of the first keys stay visible when far.
        log_length: If given, a query at position m is multiplied by
            max(1, log(m + 1) / log(log_length)); the trained length is what to give.

    Raises:
        AttentionError: A setting is missing, out of range, or none of the method's.
    """

    name: str
    window: int
    leak: float | None = None
    group: int | None = None
    n_sink: int = 0
    log_length: int | None = None

    def __post_init__(self) -> None:
        if self.name not in METHODS:
            raise AttentionError(
                "there is no such method",
                where="name",
                expected=f"one of {', '.join(METHODS)}",
                got=repr(self.name),
            )
        _check_number("window", self.window, 1, whole=True)
        if self.log_length is not None:
            _check_number("log_length", self.log_length, 2, whole=True)
        for setting, (owner, least, whole) in _SETTINGS.items():
            value = getattr(self, setting)
            if owner == self.name:
                _check_number(setting, value, least, whole=whole)
            elif value not in (None, 0):
                raise AttentionError(
                    f"the method {self.name} does not use {setting}",
                    where=setting,
                    got=repr(value),
                    cure=f"leave it out, or choose {owner}",
                )

    @property
    def fixed(self) -> bool:
        """Whether pair 2 is q at the window and k at 0, which is what can be fused."""
        return METHODS[self.name] is _fixed


@dataclass(frozen=True, eq=False)
class Pairs:
    """What ``piecewise_attention`` takes, but for the values.

    Attributes:
        q1: Queries for near keys.
        k1: Keys for near keys.
        q2: Queries for far keys.
        k2: Keys for far keys.
        threshold: From which distance on a key is far.
        n_sink: If positive, how many of the first keys stay visible when far.
    """

    q1: Tensor
    k1: Tensor
    q2: Tensor
    k2: Tensor
    threshold: int
    n_sink: int


def pairs(
    q: Tensor,
    k: Tensor,
    q_positions: Tensor,
    k_positions: Tensor,
    method: Method,
    rotary: Rotary,
    *,
    rotated: bool,
) -> Pairs:
    """Makes both pairs of queries and keys.

    Each is computed in float32 from q and k, and rounded to their dtype once; where nothing
    changes, it is the same tensor.

    Args:
        q: [B, H, M, D], packed [T, H, D].
        k: [B, Hk, N, D], packed [Tk, Hk, D].
        q_positions: [M] or [B, M], packed [T].
        k_positions: [N] or [B, N], packed [Tk].
        method: Where far keys are put.
        rotary: How the model rotates.
        rotated: q and k come from the model already rotated at their positions; pair 2 is then
            made by turning them on by the difference.

    Returns:
        The pairs; q1, q2 shaped like q, and k1, k2 like k.

    Raises:
        AttentionError: The rotation does not fit.
    """
    check_rotary(rotary, q)
    row_scale = log_scale(q_positions, method.log_length)
    far_q, far_k = METHODS[method.name](method, q_positions, k_positions)
    begin_q, begin_k = (q_positions, k_positions) if rotated else (None, None)
    return Pairs(
        q1=_moved(q, begin_q, q_positions, rotary, row_scale),
        k1=_moved(k, begin_k, k_positions, rotary),
        q2=_moved(q, begin_q, far_q, rotary, row_scale),
        k2=_moved(k, begin_k, far_k, rotary),
        threshold=method.window,
        n_sink=method.n_sink,
    )


def nlpe_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method,
    rotary: Rotary,
    *,
    rotated: bool,
    q_positions: Tensor | int | None = None,
    k_positions: Tensor | int = 0,
    causal: bool = True,
    sm_scale: float | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention that reads beyond the trained length.

    Where pair 2 is q at the window and k at 0 (rerope, streaming) and q, k come unrotated, the
    backward pass keeps q, k, v, the output and one rotated copy of k, and rotates q again.

    Args:
        q: [B, H, M, D], packed [T, H, D].
        k: [B, Hk, N, D], packed [Tk, Hk, D].
        v: Shaped like k.
        method: Where far keys are put.
        rotary: How the model rotates.
        rotated: q and k come already rotated at their positions.
        q_positions: Position of the first query (of each packed sequence); None puts the last
            query on the last key. Or a tensor [M], [B, M], packed [T], which must be consecutive
            numbers alike for all rows of the batch; looking at it waits for the device.
        k_positions: Position of the first key, or a tensor [N], [B, N], packed [Tk].
        causal: Mask keys ahead of the query.
        sm_scale: What scores are multiplied by; None for D ** -0.5.
        cu_seqlens_q: As for ``piecewise_attention``, and so all below.
        cu_seqlens_k: See there.
        max_seqlen_q: See there.
        max_seqlen_k: See there.
        return_lse: Also return the logarithm of the row sums.
        backend: See there.

    Returns:
        The output, shaped like q; with ``return_lse`` also the lse.

    Raises:
        AttentionError: An argument is not as described.
    """
    tensors = (q, k, q, k, v)
    cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
    call = Call(
        tensors,
        method.window,
        causal,
        sm_scale,
        cu_seqlens,
        (max_seqlen_q, max_seqlen_k),
        (None, 0),
        method.n_sink,
        chosen_backend(backend, q),
    )
    check(call)
    check_rotary(rotary, q)
    call = replace(call, offsets=offsets(tensors, cu_seqlens, q_positions, k_positions))
    check(call)
    if method.fixed and not rotated:
        threshold, _, *rest = call.settings
        rotation = (rotary.inv_freq, rotary.interleaved, rotary.attention_scaling)
        out, lse, _ = nlpe_op(q, k, v, *rotation, method.log_length, threshold, *rest)
    else:
        rows, cols = consecutive(tensors, cu_seqlens, *call.settings[6:8])
        both = pairs(q, k, rows, cols, method, rotary, rotated=rotated)
        out, lse = piecewise_op(both.q1, both.k1, both.q2, both.k2, v, *call.settings)
    return (out, lse) if return_lse else out


def _moved(
    x: Tensor, begin: Tensor | None, end: Tensor, rotary: Rotary, row_scale: Tensor | None = None
) -> Tensor:
    """Queries or keys at the positions ``end``; ``begin`` is where they are, None for unrotated."""
    if begin is end and row_scale is None:
        return x
    angle = angles(end, rotary, x.dtype)
    if begin is None:
        return turn(x, angle, rotary, rotary.attention_scaling, row_scale)
    return turn(x, angle - angles(begin, rotary, x.dtype), rotary, 1.0, row_scale)


def _fixed(method: Method, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_full((1,), method.window), cols.new_zeros(1)


def _leaky(method: Method, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    leak = method.leak or 1.0
    return rows.double() / leak + (method.window - method.window / leak), cols.double() / leak


def _grouped(method: Method, rows: Tensor, cols: Tensor) -> tuple[Tensor, Tensor]:
    group = method.group or 1
    return rows // group + (method.window - method.window // group), cols // group


METHODS: dict[str, Callable[[Method, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "rerope": _fixed,
    "leaky-rerope": _leaky,
    "self-extend": _grouped,
    "streaming": _fixed,
}
"""Method, positions of queries and keys -> the positions of pair 2, [T], [B, T] or [1]."""

# Setting: the one method that needs it, the least it may be, whether it is a whole number.
_SETTINGS = {
    "leak": ("leaky-rerope", 1, False),
    "group": ("self-extend", 1, True),
    "n_sink": ("streaming", 1, True),
}


def _check_number(setting: str, value: object, least: int, *, whole: bool) -> None:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < math.inf:
        raise AttentionError(
            f"{setting} is missing" if value is None else f"{setting} is out of range",
            where=setting,
            expected=f"a {'whole ' if whole else ''}number from {least} on",
            got=repr(value),
        )
