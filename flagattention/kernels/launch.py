"""The Triton backend: arguments, grids and results of the kernels.

A launch is planned first, as data, so that what is compiled ahead of time is what is launched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from flagattention.kernels.backward_kv import backward_kv_kernel
from flagattention.kernels.backward_q import backward_q_kernel, prepare_kernel
from flagattention.kernels.configs import Tiles, choose
from flagattention.kernels.forward import forward_kernel
from flagattention.kernels.tiles import Mode, Packing, Thresholds
from flagattention.kernels.total import total_kernel
from flagattention.kernels.views import as_rows, dense, result_like, walkable, walked

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.problem import Problem

__all__ = [
    "Launch",
    "backward",
    "forward",
    "has_far",
    "plan_backward",
    "plan_forward",
    "plan_total",
    "total_attention",
]

# Positions are clamped to this, so that sums of two fit int32; no tensor is as long.
_FAR = 1 << 30
# Rows of a tile of ``prepare_kernel``.
_PREPARE = Tiles(64, 64, 4, 1)


@dataclass(frozen=True)
class Launch:
    """A kernel and what it is launched with; ``arguments`` in the order of its parameters."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    tiles: Tiles

    def __call__(self) -> None:
        """Launches it on the current device, unless there is nothing to do."""
        if all(self.grid):
            self.kernel[self.grid](
                *self.arguments, num_warps=self.tiles.warps, num_stages=self.tiles.stages
            )


@dataclass(frozen=True)
class _Frame:
    """Sizes of a problem, and the arguments that every kernel takes."""

    q: Tensor  # [B, H, M, D], packed [1, H, T, D]
    k: Tensor
    problem: Problem
    arch: str

    @property
    def packed(self) -> bool:
        return self.problem.cu_seqlens_q is not None

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    @property
    def sequences(self) -> int:
        starts = self.problem.cu_seqlens_q
        return self.q.shape[0] if starts is None else len(starts) - 1

    def tiles(self, kernel: str) -> Tiles:
        return choose(self.arch, self.q.shape[3], kernel, self.q.element_size())

    def grid(self, block: int, length: int, heads: int) -> tuple[int, int, int]:
        return -(-length // block), heads, self.sequences

    def mode(self, tiles: Tiles, tma: bool) -> Mode:
        p, size = self.problem, self.q.shape[3]
        values = Mode(
            causal=p.causal,
            far=has_far(p),
            per_row=isinstance(p.threshold, torch.Tensor),
            packed=self.packed,
            flush=p.q_offset is None,
            group=self.group,
            block_m=tiles.block_m,
            block_n=tiles.block_n,
            head_dim=size,
            padded=triton.next_power_of_2(size),
            tma=tma,
            precision=_precision(),
        )
        return Mode(*map(tl.constexpr, values))

    def where(self) -> tuple[Thresholds, Packing]:
        p, rows = self.problem, Thresholds(None, None)
        if isinstance(p.threshold, torch.Tensor):
            given = p.threshold.contiguous()
            rows = Thresholds(given, given.stride(0) if given.dim() == 2 else 0)
        return rows, Packing(p.cu_seqlens_q, p.cu_seqlens_k)

    def numbers(self, *totals: int) -> tuple[float | int, ...]:
        p, far_offset = self.problem, _offset(self.problem)
        if not isinstance(p.threshold, torch.Tensor):
            far_offset = _clamped(far_offset - p.threshold)
        sink_end = _clamped(p.n_sink - p.k_offset) if p.n_sink else _FAR
        return (
            p.sm_scale, self.q.shape[2], self.k.shape[2], *totals, _clamped(_offset(p)),
            far_offset, sink_end,
        )  # fmt: skip


def forward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """The forward pass; shapes as in ``problem``."""
    packed = problem.cu_seqlens_q is not None
    # Tokens behind the last packed sequence belong to none: they are rows that see no key.
    out = result_like(q1, filled=packed)
    shape = q1.shape[:2][::-1] if packed else q1.shape[:3]
    lse = torch.full(shape, -torch.inf, dtype=torch.float32, device=q1.device)
    with _device_of(q1):
        plan_forward((q1, k1, q2, k2, v), out, lse, problem, _arch(q1))()
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


def plan_forward(
    tensors: tuple[Tensor, ...], out: Tensor, lse: Tensor, problem: Problem, arch: str
) -> Launch:
    """The launch that fills out and lse."""
    views, problem = _prepared(tensors, problem)
    q1, k1, q2, k2, v = views
    frame = _Frame(q1, k1, problem, arch)
    tiles = frame.tiles("forward")
    (k1, k2, v), tma = walked((k1, k2, v), tiles.block_n, tiles.tma and not frame.packed)
    arguments = (
        as_rows(q1), k1, as_rows(q2), k2, v, as_rows(dense(out, frame.packed)), lse, *frame.where(),
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
    (q1, k1, q2, k2, v), problem = _prepared(tensors, problem)
    frame = _Frame(q1, k1, problem, arch)
    dout, out = (walkable(dense(x, frame.packed)) for x in (dout, out))
    dq1, dk1, dq2, dk2, dv = (as_rows(dense(x, frame.packed)) for x in grads)
    sums, deltas = (torch.empty_like(lse, memory_format=torch.contiguous_format) for _ in "ab")
    where, numbers = frame.where(), frame.numbers(q1.shape[2])
    dlse = None if dlse is None else dlse.contiguous()
    prepare = Launch(
        prepare_kernel,
        (-(-q1.shape[2] // _PREPARE.block_m), *q1.shape[1::-1]),
        (
            as_rows(out), as_rows(dout), lse.contiguous(), dlse, sums, deltas, q1.shape[2],
            frame.mode(_PREPARE, False),
        ),
        _PREPARE,
    )  # fmt: skip

    tiles = frame.tiles("backward_kv")
    (a1, a2, g), tma = walked((q1, q2, dout), tiles.block_m, tiles.tma and not frame.packed)
    keys = Launch(
        backward_kv_kernel,
        frame.grid(tiles.block_n, problem.max_seqlen_k, k1.shape[1]),
        (
            a1, as_rows(k1), a2, as_rows(k2), as_rows(v), g, sums, deltas, dk1, dk2, dv, *where,
            frame.mode(tiles, tma), *numbers,
        ),
        tiles,
    )  # fmt: skip

    tiles = frame.tiles("backward_q")
    (b1, b2, c), tma = walked((k1, k2, v), tiles.block_n, tiles.tma and not frame.packed)
    queries = Launch(
        backward_q_kernel,
        frame.grid(tiles.block_m, problem.max_seqlen_q, q1.shape[1]),
        (
            as_rows(q1), b1, as_rows(q2), b2, c, as_rows(dout), sums, deltas, dq1, dq2, *where,
            frame.mode(tiles, tma), *numbers,
        ),
        tiles,
    )  # fmt: skip
    return [prepare, keys, queries]


def plan_total(
    tensors: tuple[Tensor, ...], lse: Tensor, totals: Tensor, problem: Problem, arch: str
) -> Launch:
    """The launch that fills the total attention from q1, k1, q2 and k2."""
    (q1, k1, q2, k2), problem = _prepared(tensors, problem)
    frame = _Frame(q1, k1, problem, arch)
    tiles = frame.tiles("total")
    (q1, q2), tma = walked((q1, q2), tiles.block_m, tiles.tma and not frame.packed)
    arguments = (
        q1, as_rows(k1), q2, as_rows(k2), lse.contiguous(), totals, *frame.where(),
        frame.mode(tiles, tma), *frame.numbers(frame.q.shape[2], k1.shape[2]),
    )  # fmt: skip
    grid = frame.grid(tiles.block_n, problem.max_seqlen_k, frame.q.shape[1])
    return Launch(total_kernel, grid, arguments, tiles)


def has_far(problem: Problem) -> bool:
    """Whether a key may be far; if none, the kernels are plain attention."""
    if isinstance(problem.threshold, torch.Tensor):
        return True
    flush = problem.q_offset is None
    return problem.threshold < (
        problem.max_seqlen_k if flush else _offset(problem) + problem.max_seqlen_q
    )


def _offset(problem: Problem) -> int:
    """Position of the first query less that of the first key, what flush sequences add apart."""
    return 0 if problem.q_offset is None else problem.q_offset - problem.k_offset


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


def _clamped(position: int) -> int:
    return max(-_FAR, min(position, _FAR))


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


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
