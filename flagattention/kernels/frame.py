"""What a launch is made of: sizes, modes, and the arguments that all kernels take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from flagattention.kernels.configs import Tiles, choose
from flagattention.kernels.tiles import Mode, Packing, Rows, Thresholds, Turned
from flagattention.kernels.views import as_rows, turned_rows

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.problem import Problem
    from flagattention.turns import Tables

__all__ = ["Frame", "Launch", "has_far"]

# Positions are clamped to this, so that sums of two fit int32; no tensor is as long.
_FAR = 1 << 30


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
class Frame:
    """Sizes of a problem, and the arguments that every kernel takes."""

    q: Tensor  # [B, H, M, D], packed [1, H, T, D]
    k: Tensor
    problem: Problem
    arch: str
    tables: Tables | None = None  # q comes unrotated

    @property
    def packed(self) -> bool:
        """Whether sequences come one after the other."""
        return self.problem.cu_seqlens_q is not None

    @property
    def group(self) -> int:
        """Query heads for each key head."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def sequences(self) -> int:
        """Sequences, or rows of the batch."""
        starts = self.problem.cu_seqlens_q
        return self.q.shape[0] if starts is None else len(starts) - 1

    def tiles(self, kernel: str) -> Tiles:
        """The configuration of a kernel."""
        return choose(self.arch, self.q.shape[3], kernel, self.q.element_size())

    def grid(self, block: int, length: int, heads: int) -> tuple[int, int, int]:
        """A program for each tile of each head of each sequence."""
        return -(-length // block), heads, self.sequences

    def mode(self, tiles: Tiles, tma: bool) -> Mode:
        """What a kernel is compiled for."""
        p, size, tables = self.problem, self.q.shape[3], self.tables
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
            turn=0 if tables is None else 1 + tables.interleaved,
            half=0 if tables is None else tables.far[0].shape[1],
        )
        return Mode(*map(tl.constexpr, values))

    def queries(self, q1: Tensor, q2: Tensor) -> tuple[Rows | Turned, Rows | Turned]:
        """q1 and q2 for a kernel that loads them with ``load_queries``."""
        tables = self.tables
        if tables is None:
            return as_rows(q1), as_rows(q2)
        return turned_rows(q1, q2, tables)

    def where(self) -> tuple[Thresholds, Packing]:
        """The thresholds of the rows, and where sequences begin."""
        p, rows = self.problem, Thresholds(None, None)
        if isinstance(p.threshold, torch.Tensor):
            given = p.threshold.contiguous()
            rows = Thresholds(given, given.stride(0) if given.dim() == 2 else 0)
        return rows, Packing(p.cu_seqlens_q, p.cu_seqlens_k)

    def numbers(self, *totals: int) -> tuple[float | int, ...]:
        """What ends the list of arguments, from ``scale`` on; ``totals`` follow ``columns``."""
        p, far_offset = self.problem, _offset(self.problem)
        if not isinstance(p.threshold, torch.Tensor):
            far_offset = _clamped(far_offset - p.threshold)
        sink_end = _clamped(p.n_sink - p.k_offset) if p.n_sink else _FAR
        return (
            p.sm_scale, self.q.shape[2], self.k.shape[2], *totals, _clamped(_offset(p)),
            far_offset, sink_end,
        )  # fmt: skip


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


def _clamped(position: int) -> int:
    return max(-_FAR, min(position, _FAR))


def _precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
