"""A causal model of transformers, read at once and token by token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

__all__ = ["decoded", "left_padded", "logits_of"]


@torch.no_grad()
def logits_of(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Logits of one pass, without a cache."""
    found: Tensor = model(ids, use_cache=False, **options).logits
    return found


@torch.no_grad()
def decoded(model: Any, ids: Tensor, n_first: int, mask: Tensor | None = None) -> Tensor:
    """Logits of a prefill and then of one token at a time.

    Args:
        model: The model.
        ids: [B, T].
        n_first: Tokens of the prefill.
        mask: [B, T], 0 for padding; positions then count the other tokens, as in ``generate``.
    """
    cache = DynamicCache(config=model.config)
    parts = [slice(0, n_first), *(slice(i, i + 1) for i in range(n_first, ids.shape[1]))]
    found = []
    for part in parts:
        options: dict[str, Any] = {}
        if mask is not None:
            seen = mask[:, : part.stop]
            positions = (seen.cumsum(1) - 1).clamp(min=0)[:, part]
            options = {"attention_mask": seen, "position_ids": positions}
        found.append(model(ids[:, part], past_key_values=cache, **options).logits)
    return torch.cat(found, 1)


def left_padded(ids: Tensor, paddings: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The tokens with so many places of each row made padding, and the mask of them."""
    mask = torch.ones_like(ids)
    for row, padding in enumerate(paddings):
        mask[row, :padding] = 0
    return ids * mask, mask
