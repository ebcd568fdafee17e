"""From a whole canonical tensor to a Hugging Face tensor, by torch's own reshaping.

This says a second time, in another way, what :mod:`flagscale.ckpt_convert.tensors` says with boxes:
a conversion is made by the one and verified by the other. All act on the first dimension, so a
tensor of rows, a bias, and a list of row numbers are cut alike; views where that is possible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch

from flagscale.ckpt_convert.tensors import HFTensor, Shape, Take
from flagscale.errors import ConfigError

__all__ = ["cut", "take"]


def take(tensor: HFTensor, canonical: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A Hugging Face tensor.

    Args:
        tensor: The tensor wanted.
        canonical: The canonical tensor it comes from, whole; experts on the first dimension.
        shape: The model.

    Raises:
        ConfigError: It is not known how it is taken.
    """
    return cut(tensor.take, canonical if tensor.expert is None else canonical[tensor.expert], shape)


def cut(what: Take, whole: torch.Tensor, shape: Shape) -> torch.Tensor:
    """A part of a canonical tensor, or of one expert of it.

    Args:
        what: The part.
        whole: [rows, ...].
        shape: The model.

    Raises:
        ConfigError: It is not known how it is taken.
    """
    if what not in _CUTS:
        raise ConfigError(
            "it is not known how a part of a tensor is taken", expected=", ".join(_CUTS), got=what
        )
    return _CUTS[what](whole, shape)


def _all(whole: torch.Tensor, _: Shape) -> torch.Tensor:
    return whole


def _vocab(whole: torch.Tensor, shape: Shape) -> torch.Tensor:
    return whole[: shape.vocab_size]


def _gate(whole: torch.Tensor, _: Shape) -> torch.Tensor:
    return whole.chunk(2)[0]


def _up(whole: torch.Tensor, _: Shape) -> torch.Tensor:
    return whole.chunk(2)[1]


def _query(whole: torch.Tensor, shape: Shape) -> torch.Tensor:
    return _halves_from_pairs(_heads(whole, shape)[:, :-2], shape)


def _key(whole: torch.Tensor, shape: Shape) -> torch.Tensor:
    return _halves_from_pairs(_heads(whole, shape)[:, -2:-1], shape)


def _value(whole: torch.Tensor, shape: Shape) -> torch.Tensor:
    return _heads(whole, shape)[:, -1:].flatten(0, 2)


def _heads(whole: torch.Tensor, shape: Shape) -> torch.Tensor:
    """[groups, queries + key + value, head_dim, ...]."""
    dims = shape.model.dims
    return whole.reshape(dims.num_query_groups, -1, dims.head_dim, *whole.shape[1:])


def _halves_from_pairs(heads: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Rows [heads * head_dim, ...] whose rotary pairs are a half of a head apart.

    Args:
        heads: [groups, heads, head_dim, ...]; pairs are neighbours where the model has them so.
        shape: The model.
    """
    if shape.interleaved:
        pairs = heads.reshape(*heads.shape[:2], -1, 2, *heads.shape[3:])
        heads = pairs.transpose(2, 3).flatten(2, 3)
    return heads.flatten(0, 2)


_CUTS: Final[Mapping[Take, Callable[[torch.Tensor, Shape], torch.Tensor]]] = {
    "whole": _all,
    "query": _query,
    "key": _key,
    "value": _value,
    "gate": _gate,
    "up": _up,
    "vocab": _vocab,
}
