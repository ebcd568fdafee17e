"""The Triton backend: arguments, grids and results of the kernels.

A launch is planned first, as data, so that what is compiled ahead of time is what is launched.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import triton

from flagattention.kernels.backward_kv import backward_kv_kernel
from flagattention.kernels.backward_q import backward_q_kernel, prepare_kernel
from flagattention.kernels.configs import Tiles
from flagattention.kernels.forward import forward_kernel
from flagattention.kernels.frame import Frame, Launch, has_far
from flagattention.kernels.total import total_kernel
from flagattention.kernels.turn_back import turn_back_kernel
from flagattention.kernels.views import as_rows, dense, result_like, turned_rows, walkable, walked
from flagattention.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from flagattention.problem import Problem
    from flagattention.rotary import Rotary
    from flagattention.turns import Tables

__all__ = [
    "Launch",
    "backward",
    "forward",
    "has_far",
    "nlpe_backward",
    "nlpe_forward",
    "plan_backward",
    "plan_forward",
    "plan_keys",
    "plan_prepare",
    "plan_queries",
    "plan_total",
    "plan_turn_back",
    "total_attention",
]

# Rows of a tile of the kernels that go over all rows once.
_PREPARE = Tiles(64, 64, 4, 1)
_TURN_BACK = Tiles(32, 32, 8, 1)


def forward(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    problem: Problem,
    tables: Tables | None = None,
) -> tuple[Tensor, Tensor]:
    """The forward pass; shapes as in ``problem``. With ``tables`` both queries come unrotated."""
    packed = problem.cu_seqlens_q is not None
    # Tokens behind the last packed sequence belong to none: they are rows that see no key.
    out = result_like(q1, filled=packed)
    shape = q1.shape[:2][::-1] if packed else q1.shape[:3]
    lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=q1.device)
    with _device_of(q1):
        plan_forward((q1, k1, q2, k2, v), out, lse, problem, _arch(q1), tables)()
    return out, lse


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients; shapes as in ``problem``."""
    tensors = (q1, k1, q2, k2, v)
    packed = problem.cu_seqlens_q is not None
    far = has_far(problem)
    filled = (packed, packed, packed or not far, packed or not far, packed)
    grads = tuple(result_like(x, filled=fill) for x, fill in zip(tensors, filled, strict=True))
    with _device_of(q1):
        for launch in plan_backward(tensors, dout, dlse, out, lse, grads, problem, _arch(q1)):
            launch()
    dq1, dk1, dq2, dk2, dv = grads
    if problem.sm_scale <= 0:
        dq1, dq2 = dq1 * _sign(problem.sm_scale), dq2 * _sign(problem.sm_scale)
    return dq1, dk1, dq2, dk2, dv


def total_attention(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, lse: Tensor, problem: Problem
) -> Tensor:
    """The attention each key gets; shapes as in ``problem``."""
    packed = problem.cu_seqlens_k is not None
    shape = (q1.shape[1], k1.shape[0]) if packed else (*q1.shape[:2], k1.shape[2])
    totals = lse.new_zeros(shape)
    with _device_of(q1):
        plan_total((q1, k1, q2, k2), lse, totals, problem, _arch(q1))()
    return totals


def nlpe_forward(
    q: Tensor, k: Tensor, v: Tensor, rotary: Rotary, log_length: int | None, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass of NLPE; as ``flagattention.fused`` has it.

    Queries are rotated in the kernel: of rotated tensors there is only k1.
    """
    turns = Turns(q, k, rotary, log_length, problem)
    k1, k2 = turns.keys(k)
    out, lse = forward(q, k1, q, k2, v, problem, turns.tables())
    return out, lse, k1


def nlpe_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    k1: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    rotary: Rotary,
    log_length: int | None,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of NLPE; as ``flagattention.fused`` has it.

    dk/dv walks queries in its loops, where a rotation would be done again for every tile of keys:
    q1 and q2 exist while it runs. They are gone before dq, which rotates as the forward pass does,
    stores dq1 and dq2. Those are turned back and added by a kernel of their own, since the other
    element of a pair is in an accumulator of another thread.
    """
    turns, sign = Turns(q, k, rotary, log_length, problem), _sign(problem.sm_scale)
    (query, *views), problem = _prepared((q, k1, q, turns.keys(k, k1)[1], v), problem)
    packed = problem.cu_seqlens_q is not None
    dk1, dk2, dv = (result_like(x, filled=packed) for x in (k1, k, v))
    dq, dk = (result_like(x) for x in (q, k))
    with _device_of(q):
        frame = Frame(query, views[0], problem, _arch(q))
        prepare, begun = plan_prepare(frame, dout, dlse, out, lse)
        prepare()
        q1, q2 = turns.queries(query)
        plan_keys(frame, (q1, views[0], q2, *views[2:]), begun, (dk1, dk2, dv))()
        del q1, q2
        dq1, dq2 = (result_like(q, filled=packed) for _ in "12")
        frame = replace(frame, tables=turns.tables())
        plan_queries(frame, (query, *views), begun, (dq1, dq2))()
        back_q, back_k = turns.tables_back()
        plan_turn_back(frame, dq1, dq2, dq, back_q)()
        plan_turn_back(frame, dk1, dk2, dk, back_k)()
    return (dq if sign > 0 else dq * sign), dk, dv


def plan_forward(
    tensors: tuple[Tensor, ...],
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    arch: str,
    tables: Tables | None = None,
) -> Launch:
    """The launch that fills out and lse."""
    views, problem = _prepared(tensors, problem)
    q1, k1, q2, k2, v = views
    frame = Frame(q1, k1, problem, arch, tables)
    near, far = frame.queries(q1, q2)
    tiles = frame.tiles("forward")
    (k1, k2, v), tma = walked((k1, k2, v), tiles.block_n, tiles.tma and not frame.packed)
    arguments = (
        near, k1, far, k2, v, as_rows(dense(out, frame.packed)), lse, *frame.where(),
        frame.mode(tiles, tma), *frame.numbers(q1.shape[2]),
    )  # fmt: skip
    grid = frame.grid(tiles.block_m, problem.max_seqlen_q, q1.shape[1])
    return Launch(forward_kernel, grid, arguments, tiles)


def plan_backward(
    tensors: tuple[Tensor, ...],
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, ...],
    problem: Problem,
    arch: str,
) -> list[Launch]:
    """The launches that fill dq1, dk1, dq2, dk2 and dv, in order."""
    views, problem = _prepared(tensors, problem)
    frame = Frame(views[0], views[1], problem, arch)
    dq1, dk1, dq2, dk2, dv = grads
    prepare, begun = plan_prepare(frame, dout, dlse, out, lse)
    return [
        prepare,
        plan_keys(frame, views, begun, (dk1, dk2, dv)),
        plan_queries(frame, views, begun, (dq1, dq2)),
    ]


def plan_prepare(
    frame: Frame, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Launch, tuple[Tensor, Tensor, Tensor]]:
    """The launch that begins a backward pass, and what the others need of it.

    Returns:
        The launch; dout as kernels can address it, and the row statistics that will be filled.
    """
    dout, out = (walkable(dense(x, frame.packed)) for x in (dout, out))
    sums, deltas = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in "ab")
    batch, heads, rows, _ = frame.q.shape
    arguments = (
        as_rows(out), as_rows(dout), lse.contiguous(), None if dlse is None else dlse.contiguous(),
        sums, deltas, rows, frame.mode(_PREPARE, False),
    )  # fmt: skip
    grid = (-(-rows // _PREPARE.block_m), heads, batch)
    return Launch(prepare_kernel, grid, arguments, _PREPARE), (dout, sums, deltas)


def plan_keys(
    frame: Frame,
    views: Sequence[Tensor],
    begun: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor, Tensor],
) -> Launch:
    """The launch that fills dk1, dk2 and dv; q1 and q2 come rotated."""
    q1, k1, q2, k2, v = views
    dout, sums, deltas = begun
    dk1, dk2, dv = (as_rows(dense(x, frame.packed)) for x in grads)
    tiles = frame.tiles("backward_kv")
    (a1, a2, g), tma = walked((q1, q2, dout), tiles.block_m, tiles.tma and not frame.packed)
    arguments = (
        a1, as_rows(k1), a2, as_rows(k2), as_rows(v), g, sums, deltas, dk1, dk2, dv,
        *frame.where(), frame.mode(tiles, tma), *frame.numbers(q1.shape[2]),
    )  # fmt: skip
    grid = frame.grid(tiles.block_n, frame.problem.max_seqlen_k, k1.shape[1])
    return Launch(backward_kv_kernel, grid, arguments, tiles)


def plan_queries(
    frame: Frame,
    views: Sequence[Tensor],
    begun: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
) -> Launch:
    """The launch that fills dq1 and dq2."""
    q1, k1, q2, k2, v = views
    dout, sums, deltas = begun
    dq1, dq2 = (as_rows(dense(x, frame.packed)) for x in grads)
    near, far = frame.queries(q1, q2)
    tiles = frame.tiles("backward_q")
    (b1, b2, c), tma = walked((k1, k2, v), tiles.block_n, tiles.tma and not frame.packed)
    arguments = (
        near, b1, far, b2, c, as_rows(dout), sums, deltas, dq1, dq2, *frame.where(),
        frame.mode(tiles, tma), *frame.numbers(q1.shape[2]),
    )  # fmt: skip
    grid = frame.grid(tiles.block_m, frame.problem.max_seqlen_q, q1.shape[1])
    return Launch(backward_q_kernel, grid, arguments, tiles)


def plan_turn_back(
    frame: Frame, near: Tensor, far: Tensor, result: Tensor, tables: Tables
) -> Launch:
    """The launch that fills the gradient of q or k from those of pair 1 and pair 2."""
    near, far, result = (dense(x, frame.packed) for x in (near, far, result))
    batch, heads, rows, _ = near.shape
    mode = replace(frame, tables=tables).mode(_TURN_BACK, False)
    arguments = (*turned_rows(near, far, tables), as_rows(result), rows, mode)
    grid = (-(-rows // _TURN_BACK.block_m), heads, batch)
    return Launch(turn_back_kernel, grid, arguments, _TURN_BACK)


def plan_total(
    tensors: tuple[Tensor, ...], lse: Tensor, totals: Tensor, problem: Problem, arch: str
) -> Launch:
    """The launch that fills the total attention from q1, k1, q2 and k2."""
    (q1, k1, q2, k2), problem = _prepared(tensors, problem)
    frame = Frame(q1, k1, problem, arch)
    tiles = frame.tiles("total")
    (q1, q2), tma = walked((q1, q2), tiles.block_m, tiles.tma and not frame.packed)
    arguments = (
        q1, as_rows(k1), q2, as_rows(k2), lse.contiguous(), totals, *frame.where(),
        frame.mode(tiles, tma), *frame.numbers(frame.q.shape[2], k1.shape[2]),
    )  # fmt: skip
    grid = frame.grid(tiles.block_n, problem.max_seqlen_k, frame.q.shape[1])
    return Launch(total_kernel, grid, arguments, tiles)


def _prepared(tensors: tuple[Tensor, ...], problem: Problem) -> tuple[list[Tensor], Problem]:
    """Views [B, H, M, D] that the kernels can address, and a scale > 0."""
    packed, scale = problem.cu_seqlens_q is not None, problem.sm_scale
    q1, k1, q2, *rest = (walkable(dense(x, packed)) for x in tensors)
    if scale <= 0:
        # The kernels take the maximum of the scores before they scale them.
        q1, q2 = q1 * _sign(scale), q2 * _sign(scale)
        problem = replace(problem, sm_scale=-scale or 1.0)
    return [q1, k1, q2, *rest], problem


def _sign(scale: float) -> int:
    return (scale > 0) - (scale < 0)


def _device_of(x: Tensor) -> torch.cuda.device:
    """Makes the GPU that holds a tensor the current one, for a while."""
    return torch.cuda.device(x.device.index if x.is_cuda else -1)


def _arch(x: Tensor) -> str:
    if x.device.type == "cpu":
        return "interpreter"
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda":
        return f"sm_{target.arch}"
    return str(target.arch).partition(":")[0]
