"""Attention of each method for long texts, from a table of distances: nothing is ever rotated."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flagattention.nlpe import Method, Rotary


def effective_distances(method: Method, m: Tensor, n: Tensor) -> Tensor:
    """How far apart a query at m and a key at n are made to look."""
    m, n, window = m.double(), n.double(), method.window
    distance = m - n
    if method.name == "leaky-rerope":
        assert method.leak is not None
        far = window + (distance - window) / method.leak
    elif method.name == "self-extend":
        assert method.group is not None
        far = (m // method.group) - (n // method.group) + window - window // method.group
    else:
        far = torch.full_like(distance, window)
    return torch.where(distance >= window, far, distance)


def by_distances(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Method,
    rotary: Rotary,
    q_offset: int,
    causal: bool = True,
    k_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    """Out and lse, float64."""
    m = torch.arange(q.shape[2]).unsqueeze(1) + q_offset
    n = torch.arange(k.shape[2]) + k_offset
    angle = effective_distances(method, m, n).unsqueeze(-1) * rotary.inv_freq.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    half = len(rotary.inv_freq)
    if rotary.interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    qa, qb = q[..., first].unsqueeze(3), q[..., second].unsqueeze(3)
    ka, kb = k[..., first].unsqueeze(2), k[..., second].unsqueeze(2)
    turned = (qa * ka + qb * kb) * angle.cos() + (qa * kb - qb * ka) * angle.sin()
    scores = turned.sum(-1) * rotary.attention_scaling**2
    scores = scores + q[..., 2 * half :] @ k[..., 2 * half :].mT
    if method.log_length is not None:
        scores = scores * ((m + 1).double().log() / math.log(method.log_length)).clamp(min=1)
    scores = scores * q.shape[-1] ** -0.5
    hidden = (m < n) if causal else torch.zeros_like(m < n)
    if method.n_sink:
        hidden = hidden | ((m - n >= method.window) & (n >= method.n_sink))
    scores = scores.masked_fill(hidden, -math.inf)
    return torch.softmax(scores, -1).masked_fill(hidden, 0) @ v, scores.logsumexp(-1)
