"""What ``Problem`` says, as masks over every query and key."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.problem import Problem

__all__ = ["masks"]


def masks(
    problem: Problem, n_rows: int, n_cols: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which keys are scored with pair 2, and which are seen at all.

    Args:
        problem: Dense: no cu_seqlens, its threshold a number, [M] or [B, M].
        n_rows: M.
        n_cols: N.
        device: Where the masks are made.

    Returns:
        ``far`` and ``seen``, bool, each [M, N], or [B, 1, M, N] for a threshold [B, M].
    """
    q_offset = problem.q_offset or 0
    q_position = torch.arange(n_rows, device=device).unsqueeze(1) + q_offset
    k_position = torch.arange(n_cols, device=device) + problem.k_offset
    distance = q_position - k_position
    threshold = problem.threshold
    if isinstance(threshold, torch.Tensor):
        threshold = threshold.unsqueeze(-1).long()
        threshold = threshold.unsqueeze(1) if threshold.dim() == 3 else threshold
    far = distance >= threshold
    seen = torch.ones_like(far)
    if problem.causal:
        seen = seen & (distance >= 0)
    if problem.n_sink > 0:
        seen = seen & ~(far & (k_position >= problem.n_sink))
    return far, seen
