"""One pass over a parameter: its main copy against its weight, its moments against each other.

All of it is counts; what they mean is for :mod:`flagscale.optim.doctor` to say. Memory is bounded
by the block, whatever the size of the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from flagscale.ckpt_io.sources import Sources
from flagscale.layout.boxes import Box, flat_boxes
from flagscale.layout.pieces import Piece
from flagscale.optim.proof import read_box, rounded_bits

__all__ = [
    "Agreement",
    "MomentScan",
    "Values",
    "blocks",
    "compare_copies",
    "copies",
    "momentum_bound",
    "scan_agreement",
    "scan_moments",
    "scan_values",
]

Array = np.ndarray[Any, np.dtype[Any]]

_BLOCK: Final = 1 << 18  # elements, which stay in the processor's cache
_STRETCH: Final = 16  # exact zeros one after another are no chance
_FAINT: Final = 1e-15  # an exp_avg below, and the square of its gradients may have underflown
_HUGE: Final = {"exp_avg": 0x501502F9, "exp_avg_sq": 0x60AD78EC}  # 1e10, 1e20

_FORMATS: Final = {  # bits of the mantissa, of the exponent, of the sign
    "float32": (0x007FFFFF, 0x7F800000, 0x80000000),
    "bfloat16": (0x007F, 0x7F80, 0x8000),
    "float16": (0x03FF, 0x7C00, 0x8000),
}


def blocks(box: Box) -> Iterator[Box]:
    """A box in parts of bounded size, in row-major order."""
    for start in range(0, box.numel, _BLOCK):
        for part in flat_boxes(box.shape, start, min(start + _BLOCK, box.numel)):
            yield part.shifted(box.offset)


def copies(pieces: Iterable[Piece]) -> tuple[tuple[Piece, ...], ...]:
    """Pieces of one tensor and kind, shared out so that no two of a copy hold the same element.

    One copy is the rule; replicas of different ranks, tied ones above all, make more.
    """
    found: list[list[Piece]] = []
    boxes: list[set[Box]] = []
    for piece in pieces:
        for copy, taken in zip(found, boxes, strict=True):
            if piece.box not in taken and not any(piece.box.intersection(box) for box in taken):
                copy.append(piece)
                taken.add(piece.box)
                break
        else:
            found.append([piece])
            boxes.append({piece.box})
    return tuple(tuple(copy) for copy in found)


def overlaps(pieces: Sequence[Piece], box: Box) -> Iterator[tuple[Piece, Box]]:
    """What of a box each piece of a copy holds."""
    for piece in pieces:
        if common := piece.box.intersection(box):
            yield piece, common


@dataclass
class Values:
    """Elements of one kind that should not be as they are.

    Args:
        numel: Elements looked at.
        not_finite: NaN and infinities.
        negative: Below zero; counted for ``exp_avg_sq`` alone.
        huge: Finite, and larger than any gradient makes them.
        denormal: Smaller than the smallest normal number, and not zero.
        zeros: Exact zeros.
    """

    numel: int = 0
    not_finite: int = 0
    negative: int = 0
    huge: int = 0
    denormal: int = 0
    zeros: int = 0

    def add(self, bits: Array, dtype: str, kind: str) -> None:
        """Count a block."""
        mantissa, exponent, sign = _FORMATS[dtype]
        size = bits & (mantissa | exponent)  # orders as the numbers do
        not_finite = int(np.count_nonzero(size >= exponent))
        zeros = size.size - int(np.count_nonzero(size))
        self.numel += size.size
        self.not_finite += not_finite
        self.zeros += zeros
        self.denormal += int(np.count_nonzero(size <= mantissa)) - zeros
        if kind == "exp_avg_sq":
            self.negative += int(np.count_nonzero((bits > sign) & (size < exponent)))
        if limit := _HUGE.get(kind):
            self.huge += int(np.count_nonzero(size > limit)) - not_finite


def scan_values(files: Sources, pieces: Sequence[Piece], kind: str) -> Values:
    """Count the elements of pieces."""
    values = Values()
    for piece in pieces:
        for block in blocks(piece.box):
            values.add(read_box(files, piece, block), piece.dtype, kind)
    return values


@dataclass
class Agreement:
    """A main copy held to a weight.

    Args:
        compared: Elements.
        differing: Those of which the rounded main copy is not the weight.
        main_zero: Differing, and zero in the main copy.
        weight_zero: Differing, and zero in the weight.
        main_not_finite: Differing, and NaN or infinite in the main copy.
        weight_not_finite: Differing, and NaN or infinite in the weight.
        main: Values of the main copy.
        weight: Values of the weight.
        spans: Pieces of the main copy that differ, each with the first and the last element that
            does, in the row-major order of its box.
    """

    compared: int = 0
    differing: int = 0
    main_zero: int = 0
    weight_zero: int = 0
    main_not_finite: int = 0
    weight_not_finite: int = 0
    main: Values = field(default_factory=Values)
    weight: Values = field(default_factory=Values)
    spans: list[tuple[Piece, int, int]] = field(default_factory=list)
    _sums: Array = field(default_factory=lambda: np.zeros(6))

    @property
    def correlation(self) -> float:
        """Of the differing elements, from -1 to 1; 0 where there are too few."""
        n, x, y, xx, yy, xy = self._sums
        spread = (n * xx - x * x) * (n * yy - y * y)
        return float((n * xy - x * y) / math.sqrt(spread)) if n > 1 and spread > 0 else 0.0

    def add(self, main: Array, weight: Array, dtype: str) -> Array:
        """Compare a block; returns where it differs."""
        rounded = rounded_bits(main, dtype)
        differing: Array = rounded != weight
        self.compared += main.size
        if not (count := int(np.count_nonzero(differing))):
            return differing
        self.differing += count
        mantissa, exponent, _ = _FORMATS[dtype]
        ours, theirs = main[differing], weight[differing]
        self.main_zero += int(np.count_nonzero(ours & 0x7FFFFFFF == 0))
        self.weight_zero += int(np.count_nonzero(theirs & (mantissa | exponent) == 0))
        bad_main = ours & 0x7F800000 == 0x7F800000
        bad_weight = theirs & exponent == exponent
        self.main_not_finite += int(np.count_nonzero(bad_main))
        self.weight_not_finite += int(np.count_nonzero(bad_weight))
        finite = ~(bad_main | bad_weight)
        with np.errstate(over="ignore", invalid="ignore"):
            x = ours[finite].view(np.float32).astype(np.float64)
            y = _widened(theirs[finite], dtype)
            self._sums += (x.size, x.sum(), y.sum(), (x * x).sum(), (y * y).sum(), (x * y).sum())
        return differing


def _widened(bits: Array, dtype: str) -> Array:
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return bits.view(np.float16 if dtype == "float16" else np.float32).astype(np.float64)


def scan_agreement(files: Sources, mains: Sequence[Piece], weights: Sequence[Piece]) -> Agreement:
    """Hold a copy of the main copies to a copy of the weights, every element."""
    found = Agreement()
    for main in mains:
        first, last, at = -1, -1, 0
        for block in blocks(main.box):
            bits = read_box(files, main, block)
            found.main.add(bits, "float32", "param")
            for weight, common in overlaps(weights, block):
                inside = tuple(
                    slice(low - start, high - start)
                    for low, high, start in zip(
                        common.offset, common.stop, block.offset, strict=True
                    )
                )
                got = read_box(files, weight, common)
                found.weight.add(got, weight.dtype, "weight")
                mine = np.ascontiguousarray(bits[inside])
                differing = found.add(mine, got.reshape(mine.shape), weight.dtype)
                if differing.any():
                    mask = np.zeros(bits.shape, bool)
                    mask[inside] = differing
                    where = np.flatnonzero(mask)
                    first = at + int(where[0]) if first < 0 else min(first, at + int(where[0]))
                    last = max(last, at + int(where[-1]))
            at += block.numel
        if first >= 0:
            found.spans.append((main, first, last))
    return found


@dataclass
class MomentScan:
    """The two moments of a parameter.

    Args:
        values: By kind.
        stretch: By kind, zeros in stretches that no gradient leaves, whatever its sparsity.
        at_end: Whether the last of these stretches ends with a stored run.
        impossible: Elements whose ``exp_avg`` is larger than any gradients with this ``exp_avg_sq``
            can make it.
        lost: Elements that a repair has set to zero, left out of ``stretch``.
    """

    values: Mapping[str, Values]
    stretch: dict[str, int] = field(default_factory=lambda: {"exp_avg": 0, "exp_avg_sq": 0})
    at_end: bool = False
    impossible: int = 0
    lost: int = 0


def momentum_bound(beta1: float, beta2: float) -> float:
    """Upper bound of ``|exp_avg| / sqrt(exp_avg_sq)`` in Adam, by Cauchy and Schwarz.

    With ``m = (1 - b1) sum b1^i g_i`` and ``v = (1 - b2) sum b2^i g_i^2`` it is
    ``m^2 <= v (1 - b1)^2 / (1 - b2) / (1 - b1^2 / b2)``; infinite where ``b1^2 >= b2``.
    """
    ratio = beta1 * beta1 / beta2 if beta2 > 0 else math.inf
    if ratio >= 1 or beta2 >= 1:
        return math.inf
    return math.sqrt((1 - beta1) ** 2 / (1 - beta2) / (1 - ratio))


def scan_moments(
    files: Sources,
    first: Sequence[Piece],
    second: Sequence[Piece],
    *,
    bound: float,
    sparse_rows: bool,
    lost: Sequence[Box] = (),
) -> MomentScan:
    """Look at a copy of both moments of a parameter.

    Args:
        files: Of the checkpoint.
        first: Pieces of ``exp_avg``.
        second: Pieces of ``exp_avg_sq``.
        bound: Of their ratio.
        sparse_rows: Whether whole rows may have had no gradient at all, as those of an embedding.
        lost: Boxes in which a repair has left zeros.
    """
    found = MomentScan({"exp_avg": Values(), "exp_avg_sq": Values()})
    run = _ZeroRun(found, sparse_rows)
    by_box = {piece.box: piece for piece in second}
    previous: tuple[str, int] | None = None
    for piece in sorted(first, key=lambda piece: (piece.region.file, piece.region.offset)):
        if previous != (piece.region.file, piece.region.offset):
            run.end()
        for block in blocks(piece.box):
            m = read_box(files, piece, block)
            v = np.zeros_like(m)
            twin = by_box.get(piece.box)
            for other, common in overlaps([twin] if twin else second, block):
                inside = tuple(
                    slice(low - start, high - start)
                    for low, high, start in zip(
                        common.offset, common.stop, block.offset, strict=True
                    )
                )
                v[inside] = read_box(files, other, common).reshape(common.shape)
            found.values["exp_avg"].add(m, "float32", "exp_avg")
            found.values["exp_avg_sq"].add(v, "float32", "exp_avg_sq")
            gone = _inside_any(block, lost)
            if gone is not None:
                found.lost += int(np.count_nonzero(gone & (m == 0) & (v == 0)))
            _count(found, m.view(np.float32), v.view(np.float32), bound)
            run.add(m, v, gone, block, piece.box)
        previous = (piece.region.file, piece.region.offset + 4 * piece.box.numel)
    run.end()
    return found


def _count(found: MomentScan, m: Array, v: Array, bound: float) -> None:
    with np.errstate(all="ignore"):
        square = m * m
        limit = min((1.01 * bound) ** 2, 1e30)
        above = (square > limit * v) & (square > _FAINT**2)  # no NaN is
        if above.any():
            above &= np.isfinite(m)
            zero = int(np.count_nonzero(above & (v == 0)))
            found.stretch["exp_avg_sq"] += zero
            found.impossible += int(np.count_nonzero(above & (v >= 0))) - zero


def _inside_any(block: Box, boxes: Sequence[Box]) -> Array | None:
    mask: Array | None = None
    for box in boxes:
        if common := block.intersection(box):
            mask = np.zeros(block.shape, bool) if mask is None else mask
            mask[
                tuple(
                    slice(low - first, high - first)
                    for low, high, first in zip(
                        common.offset, common.stop, block.offset, strict=True
                    )
                )
            ] = True
    return mask


class _ZeroRun:
    """Counts stretches of zeros over blocks that lie one after another in a file."""

    def __init__(self, found: MomentScan, sparse_rows: bool) -> None:
        self._found = found
        self._sparse_rows = sparse_rows
        self._length = 0  # of the stretch that reaches up to here
        self._both = 0  # of which exp_avg_sq is zero, too
        self._head = self._tail = 0  # of which lie in a row that is not zero from end to end

    def add(self, m: Array, v: Array, gone: Array | None, block: Box, whole: Box) -> None:
        zero = (m & 0x7FFFFFFF == 0) if gone is None else ((m & 0x7FFFFFFF == 0) & ~gone)
        zero = zero.reshape(-1)
        if not zero.any():
            self._close()
            return
        both = np.concatenate(([0], np.cumsum(zero & (v.reshape(-1) & 0x7FFFFFFF == 0))))
        edges = np.flatnonzero(np.diff(np.concatenate(([0], zero.view(np.int8), [0]))))
        cols, width = block.shape[-1] if block.shape else 1, whole.shape[-1] if whole.shape else 1
        low = block.offset[-1] - whole.offset[-1] if block.shape else 0

        def column(at: int) -> int:
            return (low + at % cols) % width

        for begin, end in edges.reshape(-1, 2).tolist():
            if begin or not self._length:
                self._close()
                self._head = -column(begin) % width
            self._length += end - begin
            self._both += int(both[end] - both[begin])
            self._tail = (column(end - 1) + 1) % width
            if end < zero.size:
                self._close()

    def end(self) -> None:
        """The stored run is over."""
        if self._length:
            self._close(at_end=True)

    def _close(self, *, at_end: bool = False) -> None:
        partial = max(self._head, self._tail) if self._sparse_rows else self._length
        if min(self._length, partial) >= _STRETCH:
            self._found.stretch["exp_avg"] += self._length
            self._found.stretch["exp_avg_sq"] += self._both
            self._found.at_end = self._found.at_end or at_end
        self._length = self._both = self._head = self._tail = 0


def compare_copies(
    files: Sources, one: Sequence[Piece], other: Sequence[Piece]
) -> tuple[int, int, set[str]]:
    """Compare two copies bit by bit.

    Returns:
        Elements that differ, elements that both hold, and the files of what differs.
    """
    differing = compared = 0
    places: set[str] = set()
    for left in one:
        for block in blocks(left.box):
            for right, common in overlaps(other, block):
                ours, theirs = read_box(files, left, common), read_box(files, right, common)
                compared += common.numel
                if count := int(np.count_nonzero(ours != theirs.reshape(ours.shape))):
                    differing += count
                    places |= {left.region.file, right.region.file}
    return differing, compared, places
