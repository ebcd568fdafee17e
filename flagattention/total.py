"""How much attention each key gets in all: the column sums of the probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from flagattention.masks import masks
from flagattention.sequences import parts

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.problem import Problem

__all__ = ["total_attention"]

_SCORES = 1 << 24
"""Scores held at once, at most (or those of 16 rows)."""


def total_attention(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, lse: Tensor, problem: Problem
) -> Tensor:
    """The sum over the queries of the attention each key gets, for each query head.

    Plain torch on any device, a chunk of rows at a time, from the lse of a forward pass.

    Args:
        q1: [B, H, M, D], packed [T, H, D]; and so q2.
        k1: [B, Hk, N, D], packed [Tk, Hk, D]; and so k2.
        q2: Queries for far keys.
        k2: Keys for far keys.
        lse: [B, H, M], packed [H, T].
        problem: What the forward pass computed.

    Returns:
        [B, H, N], packed [H, Tk], in the dtype of lse.
    """
    packed = problem.cu_seqlens_k is not None
    shape = (q1.shape[1], k1.shape[0]) if packed else (*q1.shape[:2], k1.shape[2])
    total = lse.new_zeros(shape)
    for part in parts(problem, q1.shape[0]):
        queries, keys = [part.queries(x) for x in (q1, q2)], [part.keys(x) for x in (k1, k2)]
        part.col_sums(total).copy_(_dense(queries, keys, part.row_sums(lse), part.problem))
    return total


def _dense(queries: list[Tensor], keys: list[Tensor], lse: Tensor, problem: Problem) -> Tensor:
    batch, heads, n_rows, size = queries[0].shape
    n_groups, n_cols = keys[0].shape[1:3]
    group = heads // n_groups
    queries = [q.reshape(batch, n_groups, group, n_rows, size) for q in queries]
    transposed = [k.to(lse.dtype).unsqueeze(2).mT for k in keys]
    lse = lse.reshape(queries[0].shape[:-1])
    total = lse.new_zeros(batch, n_groups, group, n_cols)
    chunk = max(16, _SCORES // max(1, batch * heads * n_cols))
    for start in range(0, n_rows, chunk):
        rows = slice(start, start + chunk)
        far, seen = masks(_from_row(problem, rows), len(lse[0, 0, 0, rows]), n_cols, lse.device)
        near_scores, far_scores = (
            q[..., rows, :].to(lse.dtype) @ k for q, k in zip(queries, transposed, strict=True)
        )
        scores = torch.where(far, far_scores, near_scores) * problem.sm_scale
        probability = (scores - lse[..., rows, None]).exp_().masked_fill_(~seen, 0)
        total += probability.sum(-2)
    return total.view(batch, heads, n_cols)


def _from_row(problem: Problem, rows: slice) -> Problem:
    threshold = problem.threshold
    if isinstance(threshold, torch.Tensor):
        threshold = threshold[rows]
    return replace(problem, threshold=threshold, q_offset=(problem.q_offset or 0) + rows.start)
