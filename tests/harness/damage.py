"""Checkpoints damaged before they were written, so that only what is in them tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.layout.boxes import Box
from flagscale.layout.pieces import DTYPE_BYTES, Piece
from harness.elements import Bits, Ranges, element_bits, element_index
from harness.synthetic import Synthetic

__all__ = ["Compacted", "Damage", "Damaged", "overwrite"]

Damage = Callable[[Bits], Bits]
"""The bits of a whole canonical tensor (or of a rank's part of it), damaged."""

_KINDS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Damaged(Synthetic):
    """A checkpoint with damaged tensors.

    Args:
        whole_damage: By kind and canonical name, to the whole tensor.
        part_damage: The same to each part that a rank holds, whole.
    """

    whole_damage: Mapping[tuple[str, str], Damage] = field(default_factory=dict)
    part_damage: Mapping[tuple[str, str], Damage] = field(default_factory=dict)

    def part(self, kind: str, name: str, ranges: Ranges) -> Bits:
        """Elements of a canonical tensor."""
        bits = super().part(kind, name, ranges)
        if damage := self.whole_damage.get((kind, name)):
            tensor = self.whole[name]
            index = np.arange(prod(tensor.shape), dtype=np.uint64).reshape(tensor.shape)
            damaged = damage(element_bits(kind, name, index, tensor.dtype))
            bits = damaged.reshape(-1)[element_index(tensor.shape, ranges).astype(np.int64)]
        if damage := self.part_damage.get((kind, name)):
            bits = damage(bits.copy())
        return bits


@dataclass(frozen=True)
class Compacted(Synthetic):
    """What megatron-core 0.19.2 saves as ``fully_reshardable``: #5077, replayed.

    Source: megatron-core 0.19.2, core/optimizer/distrib_optimizer.py 1790.
    """

    @cached_property
    def saved(self) -> dict[tuple[str, str], Bits]:
        """The states as they are stored, whole, by kind and canonical name."""
        found: dict[tuple[str, str], Bits] = {}
        first: dict[tuple[str, Ranges], object] = {}
        for group in self.groups():
            for *_, buffer, params in group.buffers:
                numbered = list(enumerate(buffer.buckets))
                flats = [self._flat(group, buffer, params, number) for number, _ in numbered]
                cuts = [
                    (bucket.start + start, param, ranges)
                    for (_, bucket), flat in zip(numbered, flats, strict=True)
                    for start, param, ranges in flat.params
                    # Other ranks' replicas are not written.
                    if first.setdefault((param.canonical, ranges), param) is param
                ]
                for kind in _KINDS:
                    compact = np.concatenate(
                        [self._flat_bits(kind, [flat], Box.whole((flat.numel,))) for flat in flats]
                    )
                    for start, param, ranges in cuts:
                        cut = compact[start : start + param.numel]
                        cut = np.pad(cut, (0, param.numel - cut.size))
                        shape = self.whole[param.canonical].shape
                        into = found.setdefault((kind, param.canonical), np.zeros(shape, np.uint32))
                        index = element_index(shape, ranges).astype(np.int64)
                        into.reshape(-1)[index.reshape(-1)] = cut
        return found

    def named_tensors(self) -> dict[str, Any]:
        """What is stored by name; buffers are made from the true elements, as in memory."""
        return _Stored(
            self.args, self.form, self.spec, extra_state=self.extra_state, saved=self.saved
        ).named_tensors()


@dataclass(frozen=True)
class _Stored(Synthetic):
    saved: Mapping[tuple[str, str], Bits] = field(default_factory=dict)

    def part(self, kind: str, name: str, ranges: Ranges) -> Bits:
        if (kind, name) not in self.saved:
            return super().part(kind, name, ranges)
        whole = self.saved[kind, name]
        return whole.reshape(-1)[element_index(whole.shape, ranges).astype(np.int64)]


def overwrite(directory: Path, piece: Piece, bits: Bits, start: int = 0) -> None:
    """Change elements of a dense piece of a written checkpoint, whatever its checksums say."""
    size = DTYPE_BYTES[piece.dtype]
    assert bits.itemsize == size
    with (directory / piece.region.file).open("r+b") as stream:
        stream.seek(piece.region.offset + start * size)
        stream.write(bits.tobytes())
