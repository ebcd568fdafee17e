"""The proof that an optimizer's main copies are those of the weights: rounded, they are equal.

Upstream keeps ``weight == main.to(weight.dtype)`` after every step, so it holds in every sound
checkpoint, to the bit. In fp32 both are the same number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from flagscale.ckpt_io.sources import Sources
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import DTYPE_BYTES, Piece, Region

__all__ = ["Mismatch", "compare", "read_box", "rounded_bits", "sample_rows"]

Array = np.ndarray[Any, np.dtype[Any]]

_SAMPLE: Final = 4096  # elements of a row
_BITS: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK: Final = 1 << 22  # elements compared at once


@dataclass(frozen=True)
class Mismatch:
    """A parameter whose main copy is not its weight.

    Args:
        name: Canonical name.
        differing: Elements that differ.
        compared: Elements that were compared.
    """

    name: str
    differing: int
    compared: int

    def __str__(self) -> str:
        """As a report says it."""
        return f"{self.name}: {self.differing:,} of {self.compared:,} elements differ"


def compare(
    directory: Path, weights: Iterable[Piece], mains: Iterable[Piece], *, full: bool = False
) -> Iterator[Mismatch]:
    """Compare main copies with weights; what is equal is not told.

    Args:
        directory: Of the iteration that both lie in.
        weights: Pieces of the weights.
        mains: Pieces of the optimizer's main copies.
        full: Whether every element is compared; by default the first and the last row of every
            piece are.

    Yields:
        One for each parameter that differs, in the order of ``mains``.

    Raises:
        CheckpointError: A file ends too early.
    """
    by_name: dict[str, list[Piece]] = {}
    for piece in weights:
        by_name.setdefault(piece.tensor.name, []).append(piece)
    grouped: dict[str, list[Piece]] = {}
    for piece in mains:
        grouped.setdefault(piece.tensor.name, []).append(piece)
    with Sources(directory) as files:
        for name, pieces in grouped.items():
            differing = compared = 0
            for main in pieces:
                for box in _blocks(main.box) if full else sample_rows(main.box):
                    for weight, common in _overlaps(by_name.get(name, ()), box):
                        got = rounded_bits(read_box(files, main, common), weight.dtype)
                        want = read_box(files, weight, common).reshape(got.shape)
                        differing += int(np.count_nonzero(got != want))
                        compared += common.numel
            if differing or not compared:
                yield Mismatch(name, differing, compared)


def sample_rows(box: Box) -> Iterator[Box]:
    """The beginning of the first row of a box, and of its last."""
    if not box.numel:
        return
    if not box.shape:
        yield box
        return
    ones, size = (1,) * (len(box.shape) - 1), min(box.shape[-1], _SAMPLE)
    yield Box(box.offset, (*ones, size))
    last = (*(stop - 1 for stop in box.stop[:-1]), box.offset[-1])
    if last != box.offset:
        yield Box(last, (*ones, size))


def read_box(files: Sources, piece: Piece, box: Box) -> Array:
    """The bits of a box of a piece, as unsigned integers of the element's size.

    Raises:
        CheckpointError: The file ends too early.
    """
    region: Region = piece.part(box)
    itemsize = DTYPE_BYTES[piece.dtype]
    extent = itemsize + sum(
        (size - 1) * step for size, step in zip(box.shape, region.strides, strict=True)
    )
    raw = bytearray(extent)
    files.read_into(region.file, region.offset, memoryview(raw))
    flat = np.frombuffer(raw, dtype=np.uint8)
    return np.ascontiguousarray(
        np.lib.stride_tricks.as_strided(
            flat[:itemsize].view(_BITS[itemsize]), box.shape, region.strides
        )
    )


def rounded_bits(bits: Array, dtype: str) -> Array:
    """The bits of float32 numbers rounded to another type, to the nearest, ties to even.

    Args:
        bits: Of float32 numbers.
        dtype: ``"bfloat16"``, ``"float16"`` or ``"float32"``.
    """
    if dtype == "float32":
        return bits
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return bits.view(np.float32).astype(np.float16).view(np.uint16)
    if dtype != "bfloat16":
        raise ValueError(f"no rounding to {dtype}")
    # Adding carries into the exponent as rounding must; a NaN keeps a bit of its payload.
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, ((bits >> 16) | 0x40).astype(np.uint16), rounded)


def _overlaps(pieces: Sequence[Piece], box: Box) -> Iterator[tuple[Piece, Box]]:
    """What of a box each piece holds, no element twice where pieces are replicas of each other."""
    seen: set[Box] = set()
    for piece in pieces:
        common = piece.box.intersection(box)
        if common is not None and common not in seen:
            seen.add(common)
            yield piece, common


def _blocks(box: Box) -> Iterator[Box]:
    """A box in parts of bounded size along its longest outer dimension."""
    if box.numel <= _CHUNK or not box.shape:
        yield box
        return
    dim = next((i for i, size in enumerate(box.shape) if size > 1), 0)
    rows = max(1, box.shape[dim] * _CHUNK // box.numel)
    for start in range(0, box.shape[dim], rows):
        size = min(rows, box.shape[dim] - start)
        offset = (*box.offset[:dim], box.offset[dim] + start, *box.offset[dim + 1 :])
        yield Box(offset, (*box.shape[:dim], size, *box.shape[dim + 1 :]))
