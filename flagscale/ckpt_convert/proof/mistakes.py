"""What a wrong tensor may be instead: the mistakes that conversions are known to make."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from flagscale.ckpt_convert.proof.transforms import cut
from flagscale.ckpt_convert.proof.wholes import Wholes
from flagscale.ckpt_convert.tensors import HFTensor, Shape

__all__ = ["Candidate", "candidates"]


class Candidate(NamedTuple):
    """What a tensor may be: for each of its rows one of a canonical tensor.

    Args:
        words: Say so.
        canonical: The canonical tensor.
        expert: Of it.
        rows: Numbers of rows; one out of range stands for anything.
    """

    words: str
    canonical: str
    expert: int | None
    rows: torch.Tensor


def candidates(
    tensor: HFTensor, tensors: Sequence[HFTensor], checkpoint: Wholes, shape: Shape
) -> Iterator[Candidate]:
    """What a tensor may be, the likeliest first.

    Args:
        tensor: The wrong one.
        tensors: All that there should be.
        checkpoint: What they come from.
        shape: The model.
    """
    for words, rows in _misplaced(tensor, checkpoint, shape):
        yield Candidate(words, tensor.canonical, tensor.expert, rows)
    for other in _like(tensor, tensors):
        rows = cut(other.take, _rows(other, checkpoint), shape)
        words = f"it is what {other.name} should be"
        yield Candidate(words, other.canonical, other.expert, rows)


def _misplaced(
    tensor: HFTensor, checkpoint: Wholes, shape: Shape
) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows of the right canonical tensor that were taken in a wrong way."""
    rows = _rows(tensor, checkpoint)
    if tensor.take in ("query", "key") and shape.model.dims.head_dim % 2 == 0:
        other = replace(shape, interleaved=not shape.interleaved)
        words = "left as they are" if shape.interleaved else "reordered, and need not be"
        yield f"its rotary pairs were {words}", cut(tensor.take, rows, other)
    if tensor.take in ("query", "key", "value"):
        first = 0
        for part in ("query", "key", "value"):
            size = len(cut(part, rows, shape))
            if part == tensor.take:
                yield "its rows were not gathered by query group", rows[first : first + size]
            first += size
    if tensor.take == "vocab":
        rows = rows[: tensor.shape[0]]
        yield "each of its rows is the next token's", rows + 1
        yield "each of its rows is the previous token's", rows - 1


def _rows(tensor: HFTensor, checkpoint: Wholes) -> torch.Tensor:
    return torch.arange(checkpoint.num_rows(tensor.canonical, tensor.expert))


def _like(tensor: HFTensor, tensors: Sequence[HFTensor]) -> list[HFTensor]:
    """Others of its shape: those of the same canonical tensor, of the same name, the rest."""

    def distance(other: HFTensor) -> int:
        if other.canonical == tensor.canonical:
            return 0
        return 1 if _unnumbered(other.name) == _unnumbered(tensor.name) else 2

    same_shape = (other for other in tensors if other.shape == tensor.shape)
    return sorted((other for other in same_shape if other.name != tensor.name), key=distance)


def _unnumbered(name: str) -> list[str]:
    return [part for part in name.split(".") if not part.isdigit()]
