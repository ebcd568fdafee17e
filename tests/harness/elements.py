"""Elements that are a function of what they are elements of, and which of them a rank has.

Whoever reads an element of a synthetic checkpoint can tell whether it is the right one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch

from flagscale.layout.boxes import Box

__all__ = [
    "Bits",
    "Content",
    "Ranges",
    "box_ranges",
    "element_bits",
    "element_index",
    "local_ranges",
]

Bits = np.ndarray[Any, np.dtype[Any]]
Ranges = tuple[tuple[range, ...], ...]
"""For each dimension of a whole tensor, the indices that a part has, one range after another."""

_EXPONENTS = {"param": 118, "exp_avg": 98, "exp_avg_sq": 80, "buffer": 124}


def element_bits(kind: str, name: str, index: Bits, dtype: str = "float32") -> Bits:
    """The bits of elements.

    Args:
        kind: ``weight``, ``param``, ``exp_avg`` or ``exp_avg_sq``; ``buffer``: a weight that is not
            trained. A weight is the main parameter, rounded by torch.
        name: Canonical name.
        index: Of each element in the whole tensor, in row-major order.
        dtype: Of a weight.
    """
    source = "param" if kind == "weight" else kind
    seed = hashlib.blake2b(f"{source} {name}".encode(), digest_size=4).digest()
    bits = np.asarray(index).astype(np.uint32) * np.uint32(0x9E3779B1)
    bits ^= np.uint32(int.from_bytes(seed, "little"))
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits ^= bits >> np.uint32(shift)
        bits *= np.uint32(factor)
    if source == "param":  # one in eight lies between two numbers of bfloat16
        bits = np.where(bits & 0x70 == 0, bits & np.uint32(0xFFFF0000) | 0x8000, bits)
    exponents = (bits >> np.uint32(23) & np.uint32(7)) + np.uint32(_EXPONENTS.get(source, 100))
    kept = np.uint32(0x7FFFFF if source == "exp_avg_sq" else 0x807FFFFF)
    bits = bits & kept | exponents << np.uint32(23)
    if kind != "weight" or dtype == "float32":
        return bits
    main = torch.from_numpy(bits.view(np.int32)).view(torch.float32)
    return main.to(getattr(torch, dtype)).view(torch.int16).numpy().view(np.uint16)


def element_index(shape: Sequence[int], ranges: Ranges) -> Bits:
    """Row-major indices of a part of a whole tensor."""
    index = np.zeros((1,) * len(shape), np.uint64)
    for dim, parts in enumerate(ranges):
        along = np.concatenate([np.arange(p.start, p.stop, dtype=np.uint64) for p in parts])
        side = [1] * len(shape)
        side[dim] = along.size
        index = index + along.reshape(side) * np.uint64(prod(shape[dim + 1 :]))
    return index


def box_ranges(box: Box) -> Ranges:
    return tuple((range(o, o + n),) for o, n in zip(box.offset, box.shape, strict=True))


def local_ranges(
    name: str, shape: tuple[int, ...], gated: bool, rank: int, size: int, expert: int | None
) -> Ranges:
    """The part of a whole tensor that a rank has of it.

    Args:
        name: Canonical name.
        shape: Of the whole tensor.
        gated: Whether first layers of feed-forward networks are a gate over another half.
        rank: Tensor parallel rank, of experts their own.
        size: Tensor parallel size, of experts their own.
        expert: Number of the expert; ``None`` for a tensor of none.
    """
    ranges: list[tuple[range, ...]] = [(range(n),) for n in shape]
    lead = 0
    if expert is not None:
        ranges[0] = (range(expert, expert + 1),)
        lead = 1
    blocks = 1
    if re.search(r"(word_embeddings|output_layer)\.weight$|linear_qkv\.(weight|bias)$", name):
        dim = lead
    elif re.search(r"linear_fc1\.(weight|bias)$", name):
        dim, blocks = lead, 2 if gated else 1
    elif re.search(r"linear_(proj|fc2)\.weight$", name):
        dim = lead + 1
    else:
        return tuple(ranges)
    part, rest = divmod(shape[dim], blocks * size)
    assert not rest, f"{name}: {shape} over {size} ranks"
    starts = [block * part * size + rank * part for block in range(blocks)]
    ranges[dim] = tuple(range(start, start + part) for start in starts)
    return tuple(ranges)


@dataclass(frozen=True)
class Content:
    """A tensor of a checkpoint.

    Args:
        dtype: Torch's name of the element type, without ``torch.``.
        shape: Of all of it.
        bits: Gives a box of it.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: Callable[[Box], Bits]

    def whole(self) -> Bits:
        """All of it."""
        return self.bits(Box.whole(self.shape))
