"""The rotations of NLPE from unrotated queries and keys, made once for a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from flagattention.positions import consecutive, log_scale
from flagattention.rotary import Rotary, angles, turn

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.problem import Problem

__all__ = ["Tables", "Turns"]


@dataclass(frozen=True)
class Tables:
    """Rotations that kernels do while they load queries.

    Attributes:
        near: Cosines and sines for pair 1, float32 [M, R / 2] (packed [T, R / 2]), contiguous.
        far: Those for pair 2, [1, R / 2].
        scales: What rows are multiplied by, float32 [M] or packed [T]; None for nothing.
        interleaved: Dims 2i and 2i + 1 make a pair; else dims i and i + R / 2.
    """

    near: tuple[Tensor, Tensor]
    far: tuple[Tensor, Tensor]
    scales: Tensor | None
    interleaved: bool


class Turns:
    """The rotations of one call, forward and back.

    Attributes:
        rotary: How the model rotates.
        row_scale: What queries are multiplied by, float64 [M] or packed [T]; None for nothing.
        near_q: Angles of the queries of pair 1, float64 [M, R / 2] or packed [T, R / 2].
        near_k: Angles of the keys of pair 1.
        far_q: The one angle of the queries of pair 2, [1, R / 2].
        far_k: That of its keys, 0.
    """

    def __init__(
        self, q: Tensor, k: Tensor, rotary: Rotary, log_length: int | None, problem: Problem
    ) -> None:
        window = int(problem.threshold)
        cu_seqlens = (problem.cu_seqlens_q, problem.cu_seqlens_k)
        rows, cols = consecutive((q, k), cu_seqlens, problem.q_offset, problem.k_offset)
        self.rotary = rotary
        self.row_scale = log_scale(rows, log_length)
        self.near_q, self.near_k, self.far_q, self.far_k = (
            angles(positions, rotary, q.dtype)
            for positions in (rows, cols, rows.new_full((1,), window), cols.new_zeros(1))
        )

    def queries(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """q1 and q2."""
        return (
            self._turned(q, self.near_q, self.row_scale),
            self._turned(q, self.far_q, self.row_scale),
        )

    def keys(self, k: Tensor, k1: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """k1, made unless given, and k2, which is k where that is not scaled."""
        return (
            self._turned(k, self.near_k) if k1 is None else k1,
            k if self.rotary.attention_scaling == 1.0 else self._turned(k, self.far_k),
        )

    def tables(self) -> Tables:
        """What makes q1 and q2 of q."""
        return self._tables(self.near_q, self.far_q, self.row_scale)

    def tables_back(self) -> tuple[Tables, Tables]:
        """What makes the gradients of q and of k from those of the pairs."""
        return (
            self._tables(-self.near_q, -self.far_q, self.row_scale),
            self._tables(-self.near_k, -self.far_k),
        )

    def gradients(
        self, dq1: Tensor, dk1: Tensor, dq2: Tensor, dk2: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of q and k, from those of the pairs: turned back and added."""
        dtype = dq1.dtype
        # In float32, so that the sums are rounded once.
        dq1, dk1, dq2, dk2 = (
            x.to(torch.promote_types(dtype, torch.float32)) for x in (dq1, dk1, dq2, dk2)
        )
        dq1 = self._turned(dq1, -self.near_q, self.row_scale)
        dk1 = self._turned(dk1, -self.near_k)
        dq2 = self._turned(dq2, -self.far_q, self.row_scale)
        dk2 = self._turned(dk2, -self.far_k)
        return (dq1 + dq2).to(dtype), (dk1 + dk2).to(dtype)

    def _turned(self, x: Tensor, angle: Tensor, row_scale: Tensor | None = None) -> Tensor:
        return turn(x, angle, self.rotary, self.rotary.attention_scaling, row_scale)

    def _tables(self, near: Tensor, far: Tensor, row_scale: Tensor | None = None) -> Tables:
        scaling = self.rotary.attention_scaling
        (a, b), (c, d) = (
            [(x * scaling).float().contiguous() for x in (angle.cos(), angle.sin())]
            for angle in (near, far)
        )
        scales = None if row_scale is None else row_scale.float()
        return Tables((a, b), (c, d), scales, self.rotary.interleaved)
