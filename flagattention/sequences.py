"""Takes a packed or batched problem apart into dense ones with one threshold a row at most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from flagattention.problem import Problem

__all__ = ["Backward", "Forward", "Part", "each_backward", "each_forward", "parts"]


type Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Problem], tuple[Tensor, Tensor]]
"""Dense q1, k1, q2, k2, v, problem -> out, lse."""

type Backward = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
"""Dense dout, dlse, q1, k1, q2, k2, v, out, lse, problem -> dq1, dk1, dq2, dk2, dv."""


@dataclass(frozen=True)
class Part:
    """One dense problem inside a larger one.

    Attributes:
        packed: The tensors are [T, H, D], and the slices select tokens; else they are
            [B, H, M, D], and the slices select entries of the batch.
        rows: Which part of q1, q2, out and lse.
        cols: Which part of k1, k2 and v.
        problem: What is computed there: dense, its threshold a number or [M].
    """

    packed: bool
    rows: slice
    cols: slice
    problem: Problem

    def queries(self, x: Tensor) -> Tensor:
        """A view [b, H, m, D] of a tensor that is laid out like q1."""
        return self._dense(x, self.rows)

    def keys(self, x: Tensor) -> Tensor:
        """A view [b, Hk, n, D] of a tensor that is laid out like k1."""
        return self._dense(x, self.cols)

    def row_sums(self, lse: Tensor) -> Tensor:
        """A view [b, H, m] of the lse, [B, H, M] or packed [H, T]."""
        return self._numbers(lse, self.rows)

    def col_sums(self, total: Tensor) -> Tensor:
        """A view [b, H, n] of a number for each key and query head, [B, H, N] or packed [H, T]."""
        return self._numbers(total, self.cols)

    def _numbers(self, x: Tensor, where: slice) -> Tensor:
        return x[:, where].unsqueeze(0) if self.packed else x[where]

    def _dense(self, x: Tensor, where: slice) -> Tensor:
        return x[where].transpose(0, 1).unsqueeze(0) if self.packed else x[where]


def parts(problem: Problem, batch: int) -> Iterator[Part]:
    """The dense problems a problem is made of: its sequences, or entries of the batch.

    Args:
        problem: Any problem.
        batch: Entries of the batch; not used for packed tensors.
    """
    threshold = problem.threshold
    if problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None:
        yield from _sequences(problem, problem.cu_seqlens_q, problem.cu_seqlens_k)
    elif isinstance(threshold, torch.Tensor) and threshold.dim() == 2:
        for b in range(batch):
            entry = slice(b, b + 1)
            yield Part(False, entry, entry, replace(problem, threshold=threshold[b]))
    else:
        everything = slice(0, batch)
        yield Part(False, everything, everything, problem)


def _sequences(problem: Problem, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Iterator[Part]:
    starts = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    for (q_start, q_stop), (k_start, k_stop) in starts:
        n_rows, n_cols = q_stop - q_start, k_stop - k_start
        threshold, q_offset = problem.threshold, problem.q_offset
        if isinstance(threshold, torch.Tensor):
            threshold = threshold[q_start:q_stop]
        if q_offset is None:
            q_offset = problem.k_offset + n_cols - n_rows
        dense = replace(
            problem,
            threshold=threshold,
            q_offset=q_offset,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=n_rows,
            max_seqlen_k=n_cols,
        )
        yield Part(True, slice(q_start, q_stop), slice(k_start, k_stop), dense)


def each_forward(
    forward: Forward, q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """Runs a dense forward pass on every part of a problem; shapes as in ``problem``."""
    todo = list(parts(problem, q1.shape[0]))
    if len(todo) == 1 and not todo[0].packed:
        return forward(q1, k1, q2, k2, v, todo[0].problem)
    exact = torch.float64 if q1.dtype == torch.float64 else torch.float32
    # Tokens behind the last sequence belong to none: they are rows that see no key.
    out = torch.zeros_like(q1)
    shape = q1.shape[:2][::-1] if problem.cu_seqlens_q is not None else q1.shape[:3]
    lse = torch.full(shape, -torch.inf, dtype=exact, device=q1.device)
    for part in todo:
        queries, keys = [part.queries(x) for x in (q1, q2)], [part.keys(x) for x in (k1, k2, v)]
        part_out, part_lse = forward(
            queries[0], keys[0], queries[1], keys[1], keys[2], part.problem
        )
        part.queries(out).copy_(part_out)
        part.row_sums(lse).copy_(part_lse)
    return out, lse


def each_backward(
    backward: Backward,
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
    """Runs a dense backward pass on every part of a problem; shapes as in ``problem``."""
    todo = list(parts(problem, q1.shape[0]))
    if len(todo) == 1 and not todo[0].packed:
        return backward(dout, dlse, q1, k1, q2, k2, v, out, lse, todo[0].problem)
    dq1, dq2 = torch.zeros_like(q1), torch.zeros_like(q2)
    dk1, dk2, dv = torch.zeros_like(k1), torch.zeros_like(k2), torch.zeros_like(v)
    for part in todo:
        grads = backward(
            part.queries(dout),
            None if dlse is None else part.row_sums(dlse),
            part.queries(q1),
            part.keys(k1),
            part.queries(q2),
            part.keys(k2),
            part.keys(v),
            part.queries(out),
            part.row_sums(lse),
            part.problem,
        )
        for total, grad in zip((dq1, dq2), (grads[0], grads[2]), strict=True):
            part.queries(total).copy_(grad)
        for total, grad in zip((dk1, dk2, dv), (grads[1], grads[3], grads[4]), strict=True):
            part.keys(total).copy_(grad)
    return dq1, dk1, dq2, dk2, dv
