"""Piecewise attention in plain torch: every score materialised, every rule written as a mask.

This is what the other backends are held to. It runs anywhere torch runs, in any floating dtype,
and never imports Triton. Memory grows with M * N.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flagattention.masks import masks
from flagattention.sequences import each_backward, each_forward
from flagattention.total import total_attention

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.problem import Problem

__all__ = ["attend", "backward", "forward", "total_attention"]


def attend(
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    problem: Problem,
    probability_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense attention in the dtype of the tensors, differentiable by autograd.

    Args:
        q1: [B, H, M, D], and so q2.
        k1: [B, Hk, N, D], and so k2 and v.
        q2: Queries for far keys.
        k2: Keys for far keys.
        v: Values.
        problem: Dense: no cu_seqlens.
        probability_dtype: If given, the probabilities are rounded to it before they meet v, as
            every kernel does whose matrix unit takes 16-bit numbers.

    Returns:
        out [B, H, M, D] and lse [B, H, M]; a row that sees no key has out 0 and lse -inf.
    """
    far, seen = masks(problem, q1.shape[2], k1.shape[2], q1.device)
    k1, k2, v = (_every_head(x, q1) for x in (k1, k2, v))
    probability, lse = _softmax(q1, k1, q2, k2, far, seen, problem)
    if probability_dtype is not None:
        probability = probability.to(probability_dtype).to(v.dtype)
    return probability @ v, lse


def _softmax(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, far: Tensor, seen: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    scores = torch.where(far, q2 @ k2.mT, q1 @ k1.mT) * problem.sm_scale
    alive = seen.any(-1)
    # A dead row keeps finite scores, so that no gradient meets inf - inf.
    scores = scores.masked_fill(~seen & alive.unsqueeze(-1), -torch.inf)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.sum(-1)
    probability = torch.softmax(scores, -1) * alive.unsqueeze(-1)
    return probability, lse.masked_fill(~alive, -torch.inf)


def _every_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def forward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """The forward pass, 16-bit tensors computed in float32; shapes as in ``problem``."""
    return each_forward(_dense_forward, q1, k1, q2, k2, v, problem)


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
    """The gradients by the formulas below; shapes as in ``problem``.

    With P the probabilities and dP = dout v^T, a score has the gradient
    P * (dP - sum(dout * out) + dlse). An operator cannot call autograd from within, so that
    autograd through ``attend`` stays a check of this.
    """
    return each_backward(_dense_backward, dout, dlse, q1, k1, q2, k2, v, out, lse, problem)


def _working(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _dense_forward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    a, b, c, d, e = (_working(x) for x in (q1, k1, q2, k2, v))
    out, lse = attend(a, b, c, d, e, problem)
    return out.to(q1.dtype), lse


def _dense_backward(
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
    shape, n_groups, dtype = q1.shape, k1.shape[1], q1.dtype
    dout, q1, k1, q2, k2, v = (_working(x) for x in (dout, q1, k1, q2, k2, v))
    far, seen = masks(problem, shape[2], k1.shape[2], q1.device)
    heads_k1, heads_k2, heads_v = (_every_head(x, q1) for x in (k1, k2, v))
    probability, _ = _softmax(q1, heads_k1, q2, heads_k2, far, seen, problem)
    dprobability = dout @ heads_v.mT
    # Not sum(dout * out): out may have been rounded to 16 bits.
    minus_delta = -(probability * dprobability).sum(-1)
    if dlse is not None:
        minus_delta = minus_delta + dlse
    dscores = probability * (dprobability + minus_delta.unsqueeze(-1)) * problem.sm_scale
    near_scores, far_scores = dscores.masked_fill(far, 0), dscores.masked_fill(~far, 0)

    def summed(heads: Tensor) -> Tensor:
        return (
            heads.view(shape[0], n_groups, shape[1] // n_groups, *heads.shape[2:]).sum(2).to(dtype)
        )

    return (
        (near_scores @ heads_k1).to(dtype),
        summed(near_scores.mT @ q1),
        (far_scores @ heads_k2).to(dtype),
        summed(far_scores.mT @ q2),
        summed(probability.mT @ dout),
    )
