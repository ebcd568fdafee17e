"""Attention written down as its definition says: ``--spec harness.reference_attention gpt``.

Nothing of flagattention is in here. Upstream must not rotate (``--position-embedding-type none``):
the core rotates by itself, by the effective distance of every query and key, in float64. Documents
are told apart by the mask of ``--reset-attention-mask``.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.training.models.gpt import default_layer_spec

from harness.attention_model import SETTINGS

__all__ = ["effective_attention", "gpt"]

type Settings = dict[str, Any]


class _Core(MegatronModule):
    def __init__(self, config: Any, **others: Any) -> None:
        super().__init__(config=config)
        self._settings: Settings = json.loads(os.environ[SETTINGS])

    def forward(
        self, query: Any, key: Any, value: Any, attention_mask: Any, **others: Any
    ) -> torch.Tensor:
        out = effective_attention(query, key, value, attention_mask, self._settings)
        return out.flatten(2).to(query.dtype)


def effective_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    settings: Settings,
) -> torch.Tensor:
    """Attention by effective distances.

    Args:
        query: [S, B, H, D], not rotated.
        key: [S, B, Hk, D], not rotated.
        value: Like key.
        hidden: [B, 1, S, S] bool, true where a query does not see a key; what it sees is the
            beginning of its document up to itself.
        settings: What to do with distances from ``window`` on.

    Returns:
        [S, B, H, D] float64.
    """
    size, repeats = query.shape[-1], query.shape[2] // key.shape[2]
    q, k, v = (x.permute(1, 2, 0, 3).double() for x in (query, key, value))
    k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    position = (~hidden).sum(-1).double() - 1  # [B, 1, S], in its document
    distance = _effective(position.unsqueeze(-1), position.unsqueeze(-2), settings)
    theta = settings.get("base", 10000.0) ** -(torch.arange(0, size, 2).double() / size)
    turn = torch.exp(1j * distance.unsqueeze(-1) * theta)
    score = torch.einsum("bhmj,bhnj,bhmnj->bhmn", _complex(q), _complex(k).conj(), turn).real
    if length := settings.get("log_length"):
        scale = torch.clamp(torch.log(position + 1) / math.log(length), min=1)
        score = score * scale.unsqueeze(-1)
    if sinks := settings.get("n_sink"):
        far = position.unsqueeze(-1) - position.unsqueeze(-2) >= settings["window"]
        hidden = hidden | (far & (position.unsqueeze(-2) >= sinks))
    weight = (score / math.sqrt(size)).masked_fill(hidden, -torch.inf).softmax(-1)
    return (weight @ v).permute(2, 0, 1, 3)


def _complex(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(*x.chunk(2, -1))


def _effective(m: torch.Tensor, n: torch.Tensor, settings: Settings) -> torch.Tensor:
    window, distance = settings["window"], m - n
    match settings["name"]:
        case "rerope" | "streaming":
            far = torch.full_like(distance, window)
        case "leaky-rerope":
            far = window + (distance - window) / settings["leak"]
        case "self-extend":
            group = settings["group"]
            far = m // group - n // group + (window - window // group)
        case name:
            raise ValueError(name)
    return torch.where(distance >= window, far, distance)


def gpt(config: Any, vp_stage: int | None = None) -> Any:
    """What the spec names."""
    spec = default_layer_spec(config, vp_stage)
    spec.submodules.self_attention.submodules.core_attention = _Core
    return spec
