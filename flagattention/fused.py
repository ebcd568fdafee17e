"""NLPE from unrotated queries and keys as one operator, which keeps one rotated tensor only.

Pair 1 is q and k rotated at their positions, pair 2 is q at the window and k as it is. Kept for
the backward pass are q, k, v, the output and the rotated k: queries are rotated again.

A backend may offer both passes itself, with the rotation inside its kernels::

    nlpe_forward(q, k, v, rotary, log_length, problem) -> (out, lse, k1)
    nlpe_backward(dout, dlse, q, k, k1, v, out, lse, rotary, log_length, problem) -> (dq, dk, dv)

with the shapes and the meaning of ``problem`` as for ``forward`` and ``backward`` there, and the
threshold a number; k1 is contiguous. The Triton backend does; for one that does not, they are put
together here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flagattention.operators import SETTINGS, backend_module, laid_out, problem_of
from flagattention.rotary import Rotary
from flagattention.turns import Turns

__all__ = ["nlpe_backward_op", "nlpe_op"]


_ROTATION = "Tensor inv_freq, bool interleaved, float attention_scaling, SymInt? log_length"
_REST = f"{_ROTATION}, SymInt threshold, {SETTINGS}"


@torch.library.custom_op(
    "flagattention::nlpe",
    mutates_args=(),
    schema=f"(Tensor q, Tensor k, Tensor v, {_REST}) -> (Tensor, Tensor, Tensor)",
)
def nlpe_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    inv_freq: Tensor,
    interleaved: bool,
    attention_scaling: float,
    log_length: int | None,
    threshold: int,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """Out, lse and the rotated keys of a checked call."""
    *shape, backend = settings
    problem = problem_of((q, k), threshold, None, *shape)
    rotary = Rotary(inv_freq, interleaved, attention_scaling)
    module = backend_module(backend)
    if hasattr(module, "nlpe_forward"):
        out, lse, k1 = module.nlpe_forward(q, k, v, rotary, log_length, problem)
    else:
        turns = Turns(q, k, rotary, log_length, problem)
        (q1, q2), (k1, k2) = turns.queries(q), turns.keys(k)
        out, lse = module.forward(q1, k1, q2, k2, v, problem)
    return laid_out(out, q), lse.contiguous(), k1


@nlpe_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor, Tensor]:
    shape = (q.shape[1], q.shape[0]) if q.dim() == 3 else tuple(q.shape[:3])
    lse = q.new_empty(shape, dtype=torch.promote_types(q.dtype, torch.float32))
    return torch.empty_like(q), lse, k.new_empty(k.shape)


@torch.library.custom_op(
    "flagattention::nlpe_backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor k1, Tensor v, Tensor out, "
    f"Tensor lse, {_REST}) -> (Tensor, Tensor, Tensor)",
)
def nlpe_backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    k1: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    inv_freq: Tensor,
    interleaved: bool,
    attention_scaling: float,
    log_length: int | None,
    threshold: int,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    *shape, backend = settings
    problem = problem_of((q, k), threshold, None, *shape)
    rotary = Rotary(inv_freq, interleaved, attention_scaling)
    module = backend_module(backend)
    if hasattr(module, "nlpe_backward"):
        grads = module.nlpe_backward(dout, dlse, q, k, k1, v, out, lse, rotary, log_length, problem)
    else:
        turns = Turns(q, k, rotary, log_length, problem)
        (q1, q2), (_, k2) = turns.queries(q), turns.keys(k, k1)
        *pair_grads, dv = module.backward(dout, dlse, q1, k1, q2, k2, v, out, lse, problem)
        grads = (*turns.gradients(*pair_grads), dv)
    dq, dk, dv = (laid_out(grad, x) for grad, x in zip(grads, (q, k, v), strict=True))
    return dq, dk, dv


@nlpe_backward_op.register_fake
def _(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, k1: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    out, lse, k1 = output
    q, k, v, inv_freq = inputs[:4]
    ctx.save_for_backward(q, k, k1, v, out, lse, inv_freq, *inputs[8:10])
    ctx.rotation, ctx.settings = inputs[4:8], inputs[10:]


def _differentiate(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, dk1: Tensor | None
) -> tuple[Any, ...]:
    *saved, inv_freq, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(saved[4])
    rest = (inv_freq, *ctx.rotation, cu_seqlens_q, cu_seqlens_k, *ctx.settings)
    return (*nlpe_backward_op(dout, dlse, *saved, *rest), *[None] * len(rest))


nlpe_op.register_autograd(_differentiate, setup_context=_remember)
