"""The operators as torch knows them: what they do, what shapes they give, their gradient.

Every call of the public API ends here, so that ``torch.compile`` sees one opaque operator with a
gradient, whatever the backend. The threshold is an argument like any other: another one does not
compile again.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flagattention.errors import BackendError
from flagattention.problem import Problem
from flagattention.validation import check_cu_seqlens

__all__ = [
    "SETTINGS", "backend_module", "backward_op", "laid_out", "piecewise_op", "problem_of",
    "total_op",
]  # fmt: skip

_MODULES = {
    "cpu": "flagattention.cpu",
    "reference": "flagattention.reference",
    "triton": "flagattention.kernels.launch",
}


SETTINGS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, "
    "SymInt? q_offset, SymInt k_offset, SymInt n_sink, bool causal, float sm_scale, str backend"
)
"""The last arguments of every operator, in the order of :func:`problem_of`, then the backend."""

_PAIRS = "Tensor q1, Tensor k1, Tensor q2, Tensor k2"
_THRESHOLD = "SymInt threshold, Tensor? row_threshold"


@torch.library.custom_op(
    "flagattention::piecewise",
    mutates_args=(),
    schema=f"({_PAIRS}, Tensor v, {_THRESHOLD}, {SETTINGS}) -> (Tensor, Tensor)",
)
def piecewise_op(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor]:
    """Out and lse of a checked call; ``Problem`` says what the arguments mean."""
    *shape, backend = settings
    problem = problem_of((q1, k1), *shape)
    out, lse = backend_module(backend).forward(q1, k1, q2, k2, v, problem)
    return laid_out(out, q1), lse.contiguous()


@piecewise_op.register_fake
def _(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, *settings: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q1), q1.new_empty(_lse_shape(q1), dtype=_lse_dtype(q1))


@torch.library.custom_op(
    "flagattention::piecewise_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dlse, {_PAIRS}, Tensor v, Tensor out, Tensor lse, {_THRESHOLD}, "
    f"{SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *settings: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q1, k1, q2, k2 and v."""
    *shape, backend = settings
    problem = problem_of((q1, k1), *shape)
    tensors = (q1, k1, q2, k2, v)
    grads = backend_module(backend).backward(dout, dlse, *tensors, out, lse, problem)
    dq1, dk1, dq2, dk2, dv = (laid_out(g, x) for g, x in zip(grads, tensors, strict=True))
    return dq1, dk1, dq2, dk2, dv


@backward_op.register_fake
def _(
    dout: Tensor,
    dlse: Tensor | None,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in (q1, k1, q2, k2, v))


@torch.library.custom_op(
    "flagattention::total_attention",
    mutates_args=(),
    schema=f"({_PAIRS}, Tensor lse, {_THRESHOLD}, {SETTINGS}) -> Tensor",
)
def total_op(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    lse: Tensor,
    *settings: Any,
) -> Tensor:
    """The sum over the queries of the attention each key gets; it has no gradient."""
    *shape, backend = settings
    problem = problem_of((q1, k1), *shape)
    total: Tensor = backend_module(backend).total_attention(q1, k1, q2, k2, lse, problem)
    return total.contiguous()


@total_op.register_fake
def _(q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, lse: Tensor, *settings: Any) -> Tensor:
    shape = (q1.shape[1], k1.shape[0]) if q1.dim() == 3 else (*q1.shape[:2], k1.shape[2])
    return lse.new_empty(shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output, *inputs[6:9])
    ctx.threshold, ctx.settings = inputs[5], inputs[9:]


def _differentiate(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    *saved, row_threshold, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(saved[5])
    settings = (ctx.threshold, row_threshold, cu_seqlens_q, cu_seqlens_k, *ctx.settings)
    return (*backward_op(dout, dlse, *saved, *settings), *[None] * len(settings))


piecewise_op.register_autograd(_differentiate, setup_context=_remember)


def problem_of(
    tensors: tuple[Tensor, Tensor],
    threshold: int,
    row_threshold: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    q_offset: int | None,
    k_offset: int,
    n_sink: int,
    causal: bool,
    sm_scale: float,
) -> Problem:
    """The arguments of an operator as the backends take them; ``tensors`` are q and k."""
    lengths = [
        _longest(name, x, cu_seqlens, longest)
        for name, x, cu_seqlens, longest in zip(
            ("cu_seqlens_q", "cu_seqlens_k"),
            tensors,
            (cu_seqlens_q, cu_seqlens_k),
            (max_seqlen_q, max_seqlen_k),
            strict=True,
        )
    ]
    return Problem(
        causal=causal,
        sm_scale=sm_scale,
        threshold=threshold if row_threshold is None else row_threshold,
        q_offset=q_offset,
        k_offset=k_offset,
        n_sink=n_sink,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=lengths[0],
        max_seqlen_k=lengths[1],
    )


def _longest(name: str, x: Tensor, cu_seqlens: Tensor | None, longest: int | None) -> int:
    if cu_seqlens is None:
        return x.shape[2]
    if cu_seqlens.device.type == "cpu":
        check_cu_seqlens(name, cu_seqlens.tolist(), x.shape[0], longest)
    if longest is not None:
        return longest
    lengths = cu_seqlens.diff()
    return int(lengths.max()) if len(lengths) else 0


def backend_module(backend: str) -> Any:
    """The module that serves a backend, imported when it is first asked for."""
    try:
        return import_module(_MODULES[backend])
    except ImportError as error:
        raise BackendError(
            f"the {backend} backend cannot be imported",
            where="backend",
            got=error,
            cure="install what is missing, or take backend='reference'",
        ) from error


def laid_out(result: Tensor, argument: Tensor) -> Tensor:
    """The result in the memory format that the fake operators promise."""
    if result.stride() == torch.empty_like(argument, device="meta").stride():
        return result
    return torch.empty_like(argument).copy_(result)


def _lse_shape(q: Tensor) -> tuple[Any, ...]:
    return (q.shape[1], q.shape[0]) if q.dim() == 3 else tuple(q.shape[:3])


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
