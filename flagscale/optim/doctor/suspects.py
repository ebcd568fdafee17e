"""What a main copy that is not its weight may be instead: one hypothesis after another.

Both are read as rows, in blocks; of a whole tensor only one number a row is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from flagscale.ckpt_io.sources import Sources
from flagscale.layout.boxes import Box, flat_boxes
from flagscale.layout.pieces import Piece
from flagscale.optim.doctor.scan import overlaps
from flagscale.optim.proof import read_box, rounded_bits

__all__ = ["Permutation", "Shift", "find_permutation", "find_shift", "find_swap"]

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK: Final = 1 << 20  # elements
_WINDOW: Final = 48  # elements that do not occur twice in a row in trained weights
_ENOUGH: Final = 0.9  # of the elements, where a zeroed or lost end has no counterpart


@dataclass(frozen=True)
class Permutation:
    """Rows that are those of the weight in another order.

    Args:
        rows: That are not where they should be.
        example: The first of them, and the row of the weight that it is.
    """

    rows: int
    example: tuple[int, int]


@dataclass(frozen=True)
class Shift:
    """Elements that are others of a weight, all as far off.

    Args:
        name: Canonical name of the weight.
        by: Element ``i`` is the weight's ``i + by``, in the order in which they are stored.
        matching: Elements that are.
        compared: Elements from the first that differs to the last.
    """

    name: str
    by: int
    matching: int
    compared: int


def find_swap(
    files: Sources, mains: Sequence[Piece], weights: Sequence[Piece], shape: tuple[int, ...]
) -> int:
    """Elements of a gated layer that lie in the other half, gate for up; 0 if that is not it.

    Args:
        files: Of the checkpoint.
        mains: A copy of the main copies.
        weights: A copy of the weights.
        shape: Of the tensor; its last dimension but one has the two halves.
    """
    if len(shape) < 2 or shape[-2] % 2:
        return 0
    half, swapped = shape[-2] // 2, 0
    for block in _row_blocks(shape):
        main, weight = _read(files, mains, block, weights[0].dtype), _read(files, weights, block)
        if (main == weight).all():
            continue
        first = block.offset[-2]
        for start in (0, half):
            low, high = max(first, start), min(first + block.shape[-2], start + half)
            if low >= high:
                continue
            ahead = half if start == 0 else -half
            other = Box(
                (*block.offset[:-2], low + ahead, 0), (*block.shape[:-2], high - low, shape[-1])
            )
            rows = slice(low - first, high - first)
            mine, own = main[..., rows, :], weight[..., rows, :]
            wrong = (mine != own).any(axis=-1)
            theirs = _read(files, weights, other)
            if (mine != theirs)[wrong].any():
                return 0
            swapped += int(np.count_nonzero(wrong)) * shape[-1]
    return swapped


def find_permutation(
    files: Sources, mains: Sequence[Piece], weights: Sequence[Piece], shape: tuple[int, ...]
) -> Permutation | None:
    """Whether the rows of a main copy are those of the weight, in another order."""
    if len(shape) < 2:
        return None
    factors = np.random.default_rng(0).integers(1, 1 << 62, shape[-1], dtype=np.uint64) | 1
    ours, theirs = [], []
    for block in _row_blocks(shape):
        ours.append(_hashes(_read(files, mains, block, weights[0].dtype), factors))
        theirs.append(_hashes(_read(files, weights, block), factors))
    main, weight = np.concatenate(ours), np.concatenate(theirs)
    moved = np.flatnonzero(main != weight)
    if not moved.size or (np.sort(main[moved]) != np.sort(weight[moved])).any():
        return None
    first = int(moved[0])
    return Permutation(int(moved.size), (first, int(np.flatnonzero(weight == main[first])[0])))


def _hashes(rows: Array, factors: Array) -> Array:
    """A number for each row, which another row does not have."""
    with np.errstate(over="ignore"):
        mixed = (rows.astype(np.uint64) + np.uint64(1)) * factors
        mixed ^= mixed >> np.uint64(29)
        return (mixed * factors).sum(axis=-1, dtype=np.uint64).reshape(-1)


def find_shift(
    files: Sources,
    main: Piece,
    span: tuple[int, int],
    weights: Sequence[tuple[str, Sequence[Piece], Box]],
) -> Shift | None:
    """Whether a part of a main copy is a weight from another element on.

    Args:
        files: Of the checkpoint.
        main: A piece of the main copy.
        span: First element that differs, and last, in the row-major order of its box.
        weights: Where to look: a name, a copy of the weight, and the box of it to take, which is
            numbered like the piece's.
    """
    first, last = span
    dtype = next((pieces[0].dtype for _, pieces, _ in weights if pieces), "")
    for begin in (first, (first + last) // 2):
        window = _flat(files, [main], main.box, begin, min(begin + _WINDOW, main.box.numel), dtype)
        if window.size < _WINDOW // 2 or len(np.unique(window)) < window.size // 4:
            continue
        for name, pieces, box in weights:
            for at in _occurrences(files, pieces, box, window):
                by = at - begin
                if by == 0 and box == main.box:
                    continue
                matching = _matching(files, main, span, pieces, box, by)
                compared = last + 1 - first
                enough = max(compared - abs(by), compared // 2)
                if matching >= min(_ENOUGH * compared, enough):
                    return Shift(name, by, matching, compared)
    return None


def _occurrences(files: Sources, pieces: Sequence[Piece], box: Box, window: Array) -> Iterator[int]:
    wanted, size = window.tobytes(), window.itemsize
    for start in range(0, box.numel, _BLOCK):
        stop = min(start + _BLOCK + window.size, box.numel)
        text = _flat(files, pieces, box, start, stop).tobytes()
        at = text.find(wanted)
        while at >= 0:
            if at % size == 0:
                yield start + at // size
                break
            at = text.find(wanted, at + 1)


def _matching(
    files: Sources,
    main: Piece,
    span: tuple[int, int],
    pieces: Sequence[Piece],
    box: Box,
    by: int,
) -> int:
    matching = 0
    low, high = max(span[0], -by), min(span[1] + 1, box.numel - by)
    for start in range(low, high, _BLOCK):
        stop = min(start + _BLOCK, high)
        ours = _flat(files, [main], main.box, start, stop, pieces[0].dtype)
        theirs = _flat(files, pieces, box, start + by, stop + by)
        matching += int(np.count_nonzero(ours == theirs))
    return matching


def _row_blocks(shape: tuple[int, ...]) -> Iterator[Box]:
    """A tensor in boxes of whole rows."""
    rows = max(1, _BLOCK // max(1, shape[-1]))
    for outer in np.ndindex(*shape[:-2]):
        for start in range(0, shape[-2], rows):
            size = min(rows, shape[-2] - start)
            yield Box((*outer, start, 0), (*(1 for _ in outer), size, shape[-1]))


def _read(files: Sources, pieces: Sequence[Piece], box: Box, dtype: str | None = None) -> Array:
    """A box of a tensor as bits; rounded to another type, if one is given."""
    parts = [(common, read_box(files, piece, common)) for piece, common in overlaps(pieces, box)]
    whole = np.zeros(box.shape, parts[0][1].dtype if parts else np.uint32)
    for common, bits in parts:
        whole[
            tuple(
                slice(low - first, high - first)
                for low, high, first in zip(common.offset, common.stop, box.offset, strict=True)
            )
        ] = bits.reshape(common.shape)
    return whole if dtype is None else rounded_bits(whole, dtype)


def _flat(
    files: Sources,
    pieces: Sequence[Piece],
    box: Box,
    start: int,
    stop: int,
    dtype: str | None = None,
) -> Array:
    """A range of the elements of a box in row-major order."""
    parts = [
        _read(files, pieces, part.shifted(box.offset), dtype).reshape(-1)
        for part in flat_boxes(box.shape, start, stop)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint16)
