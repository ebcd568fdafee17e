"""Whether a plan does what it says: findings, not exceptions; no file is touched.

What is checked is the finished list of copy items, not how it came about: every element of every
hole is written exactly once, what is read lies in its file, and the first and last element of each
item is the same element of the same tensor on both sides.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import Final

from flagscale.ckpt_copy.plan import CopyItem, CopyPlan, Unit
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.layout.pieces import DTYPE_BYTES, Piece, TensorKey

__all__ = ["Problem", "verify_plan"]

_CRC_BYTES: Final = 4


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that a plan gets wrong.

    Args:
        where: The file, and the tensor where it is known.
        what: What is wrong with it.
    """

    where: str
    what: str

    def __str__(self) -> str:
        """As a person reads it."""
        return f"{self.where}: {self.what}"


def verify_plan(
    plan: CopyPlan,
    source_sizes: Mapping[str, int],
    units: Callable[[int], Iterable[Unit]] | None = None,
) -> list[Problem]:
    """Check a plan to the last element; empty when nothing is wrong.

    Args:
        plan: The plan.
        source_sizes: Bytes of each source file, by the name that the pieces give it.
        units: The units of an output file by its index; default: those of the plan.
    """
    paths = [file.path for file in plan.files]
    strays = {piece.region.file for piece in plan.targets} - set(paths)
    problems = [
        Problem(path, f"is planned {count} times")
        for path, count in Counter(paths).items()
        if count > 1
    ]
    problems += [
        Problem(path, "has target pieces, but is not to be written") for path in sorted(strays)
    ]
    places = _Places(plan)
    for index, file in enumerate(plan.files):
        wrong = list(_check_file(file))
        if not wrong:
            check = _FileCheck(plan, index, source_sizes, places)
            wrong = check.run((units or plan.units)(index))
        problems += wrong
    return problems


def _check_file(file: OutputFile) -> Iterator[Problem]:
    """Whether holes, literals and checksums have each their own place in the file."""
    taken = [(offset, offset + len(data), "a literal") for offset, data in file.literals]
    for hole in file.holes:
        size = DTYPE_BYTES.get(hole.dtype)
        if size is None:
            yield Problem(file.path, f"the hole at byte {hole.offset} has dtype {hole.dtype}")
        elif hole.nbytes != prod(hole.shape) * size:
            yield Problem(
                file.path,
                f"the hole at byte {hole.offset} has {hole.nbytes} bytes for "
                f"{hole.dtype} {list(hole.shape)}",
            )
        taken.append((hole.offset, hole.offset + hole.nbytes, "a hole"))
    for what, starts in (
        ("holes", [hole.offset for hole in file.holes]),
        ("literals", [offset for offset, _ in file.literals]),
    ):
        if starts != sorted(starts):
            yield Problem(file.path, f"the {what} are not in the order of their offsets")
    crcs = [(at, at + _CRC_BYTES, "a checksum") for hole in file.holes for at in hole.crc_offsets]
    holes = [place for place in taken if place[2] == "a hole"]
    # A checksum may lie on a literal: that is the header it belongs to.
    for places in (taken, holes + crcs):
        kept = sorted(place for place in places if place[0] < place[1])
        if kept and (kept[0][0] < 0 or max(stop for _, stop, _ in kept) > file.size):
            yield Problem(file.path, f"something lies outside its {file.size} bytes")
        for (_, stop, first), (start, _, second) in pairwise(kept):
            if start < stop:
                yield Problem(file.path, f"{first} and {second} overlap at byte {start}")


class _FileCheck:
    """The units of one output file, one after the other."""

    def __init__(
        self, plan: CopyPlan, index: int, source_sizes: Mapping[str, int], places: _Places
    ) -> None:
        self._plan = plan
        self._file = plan.files[index]
        self._source_sizes = source_sizes
        self._places = places
        self._starts = [hole.offset for hole in self._file.holes]
        self._written = [0] * len(self._file.holes)  # bytes
        self._elements: Counter[TensorKey] = Counter()
        self._gaps: Counter[TensorKey] = Counter()
        self._gap_at: dict[TensorKey, str] = {}
        self._found: Counter[Problem] = Counter()

    def run(self, units: Iterable[Unit]) -> list[Problem]:
        """All findings of the file; alike ones are counted."""
        self._check_targets()
        following = 0
        for unit in units:
            if unit.start != following or not unit.nbytes <= self._plan.unit_bytes:
                self._say(f"unit {unit.index} is bytes {unit.start}:{unit.stop}", None)
            following = unit.stop
            for gap in unit.gaps:
                self._gaps[gap.tensor] += gap.box.numel
                self._gap_at.setdefault(gap.tensor, f"{gap.box.offset}, {gap.box.shape}")
            sound = [item for item in unit.items if self._check_item(unit, item)]
            for offset in _overlaps([_Region.of(item) for item in sound]):
                self._say("is written more than once", self._tensor_at(sound, offset))
        if following != self._file.size:
            self._say(f"the units end at byte {following} of {self._file.size}", None)
        self._check_volumes()
        return [
            Problem(problem.where, problem.what + (f" ({count} times)" if count > 1 else ""))
            for problem, count in self._found.items()
        ]

    def _say(self, what: str, tensor: TensorKey | None) -> None:
        where = f"{self._file.path}: {tensor.kind} {tensor.name}" if tensor else self._file.path
        self._found[Problem(where, what)] += 1

    def _hole_at(self, start: int, stop: int) -> int | None:
        index = bisect_right(self._starts, start) - 1
        if index < 0:
            return None
        hole = self._file.holes[index]
        return index if stop <= hole.offset + hole.nbytes else None

    def _check_targets(self) -> None:
        for piece in self._plan.targets_in(self._file.path):
            region = _Region.of_piece(piece)
            hole = self._hole_at(region.low, region.high) if region else None
            if hole is None or self._file.holes[hole].dtype != piece.dtype:
                self._say(f"a target piece lies in no hole of {piece.dtype}", piece.tensor)

    def _check_item(self, unit: Unit, item: CopyItem) -> bool:
        """Check what can be said of an item alone; whether it is fit to be compared with others."""
        size = DTYPE_BYTES[item.dtype]
        start = unit.start + item.offset
        index = self._hole_at(start, start + item.extent)
        if item.offset < 0 or item.offset + item.extent > unit.nbytes or index is None:
            self._say("a copy item leaves its unit or its hole", item.tensor)
            return False
        hole: Hole = self._file.holes[index]
        steps = [item.offset + unit.start - hole.offset, *item.strides]
        if item.dtype != hole.dtype or any(step % size for step in steps):
            self._say(f"a copy item is not of the hole's {hole.dtype} elements", item.tensor)
            return False
        if _Region.of(item) is None:
            self._say("is written more than once, by one copy item", item.tensor)
            return False
        self._written[index] += item.nbytes
        self._elements[item.tensor] += item.numel
        self._check_source(unit, item)
        return True

    def _check_source(self, unit: Unit, item: CopyItem) -> None:
        if item.source is None:
            if item.tensor not in self._plan.zero_fill:
                self._say("is filled with zeros unasked", item.tensor)
            return
        pair = (item.source_dtype, item.dtype)
        if pair[0] != pair[1] and pair not in self._plan.conversions:
            self._say(f"is {pair[0]} in {item.source}, and {pair[1]} is wanted", item.tensor)
        size = self._source_sizes.get(item.source)
        first, last = item.source_offset, item.source_offset + item.source_extent
        if size is None:
            self._say(f"its source file {item.source} is missing", item.tensor)
        elif first < 0 or any(step < 0 for step in item.source_strides) or last > size:
            self._say(
                f"its source ends at byte {last} of {item.source}, which has {size}", item.tensor
            )
        elif not self._places.agree(self._file.path, unit.start, item):
            self._say(f"is read from the wrong place of {item.source}", item.tensor)

    def _check_volumes(self) -> None:
        for hole, written in zip(self._file.holes, self._written, strict=True):
            if written != hole.nbytes:
                self._say(
                    f"of the {hole.nbytes} bytes of the hole at byte {hole.offset}, "
                    f"{written} are written",
                    None,
                )
        wanted: Counter[TensorKey] = Counter()
        for piece in self._plan.targets_in(self._file.path):
            wanted[piece.tensor] += piece.box.numel
        for tensor, count in wanted.items():
            if gap := self._gaps[tensor]:
                self._say(
                    f"{gap} of {count} elements have no source, the first at "
                    f"{self._gap_at[tensor]}",
                    tensor,
                )
            got = self._elements[tensor] + gap
            if got != count:
                self._say(f"{got} elements are written instead of {count}", tensor)
        for tensor in set(self._elements) - set(wanted):
            self._say("is written, but no target piece is of it", tensor)

    @staticmethod
    def _tensor_at(items: Iterable[CopyItem], offset: int) -> TensorKey | None:
        for item in items:
            if item.offset <= offset < item.offset + item.extent:
                return item.tensor
        return None


@dataclass(frozen=True, slots=True)
class _Region:
    """Bytes of a file: runs of the same length, repeated by strides larger than what they repeat.

    Args:
        low: First byte.
        dims: ``(count, stride)``, outermost first, each count above 1.
        run: Bytes of a run.
        high: First byte past the last run.
    """

    low: int
    dims: tuple[tuple[int, int], ...]
    run: int
    high: int

    @classmethod
    def of(cls, item: CopyItem) -> _Region | None:
        """What an item writes; ``None`` when it writes a byte twice."""
        return cls.make(item.offset, item.shape, item.strides, DTYPE_BYTES[item.dtype])

    @classmethod
    def of_piece(cls, piece: Piece) -> _Region | None:
        """Where a piece lies; ``None`` when two of its elements share a place."""
        region = piece.region
        return cls.make(region.offset, piece.box.shape, region.strides, DTYPE_BYTES[piece.dtype])

    @classmethod
    def make(
        cls, low: int, shape: Sequence[int], strides: Sequence[int], size: int
    ) -> _Region | None:
        dims: list[tuple[int, int]] = []
        extent = run = size
        for step, count in sorted(zip(strides, shape, strict=True)):
            if count == 1:
                continue
            if step < extent:
                return None
            if step == run and not dims:
                run = extent = run * count
                continue
            extent += (count - 1) * step
            dims.insert(0, (count, step))
        return cls(low, tuple(dims), run, low + extent)

    def rows(self) -> Iterator[_Region]:
        """The region without its outermost dimension, at each of its indices."""
        (count, step), *rest = self.dims
        extent = self.high - self.low - (count - 1) * step
        for index in range(count):
            low = self.low + index * step
            yield _Region(low, tuple(rest), self.run, low + extent)


def _overlaps(regions: Sequence[_Region | None]) -> Iterator[int]:
    """A byte of each overlap; regions whose extents only interleave are compared row by row."""
    cluster: list[_Region] = []
    high = 0
    for region in sorted((r for r in regions if r), key=lambda region: region.low):
        if cluster and region.low >= high:
            yield from _overlaps_among(cluster)
            cluster = []
        cluster.append(region)
        high = max(high, region.high) if len(cluster) > 1 else region.high
    yield from _overlaps_among(cluster)


def _overlaps_among(cluster: Sequence[_Region]) -> Iterator[int]:
    """Overlaps among regions whose extents do."""
    if len(cluster) < 2:
        return
    step = max((region.dims[0][1] for region in cluster if region.dims), default=0)
    if not step:  # runs
        yield cluster[1].low
        return
    base = cluster[0].low
    bands: list[tuple[int, int, _Region]] = []  # first row, last row + 1, region within a row
    for region in cluster:
        bands += _bands(region, base, step)
    cuts = sorted({edge for first, last, _ in bands for edge in (first, last)})
    bands.sort(key=lambda band: band[0])
    active: list[tuple[int, int, _Region]] = []
    following = 0
    for cut in cuts:
        active = [band for band in active if band[1] > cut]
        while following < len(bands) and bands[following][0] == cut:
            active.append(bands[following])
            following += 1
        for at in _overlaps([band[2] for band in active]):
            yield base + cut * step + at


def _bands(region: _Region, base: int, step: int) -> Iterator[tuple[int, int, _Region]]:
    """A region as regions within rows of ``step`` bytes, each the same in a range of rows."""
    row, low = divmod(region.low - base, step)
    count, rest = 1, region.dims
    if rest and rest[0][1] == step:
        count, rest = rest[0][0], rest[1:]
    extent = region.high - region.low - (count - 1) * step
    if low + extent <= step:
        yield row, row + count, _Region(low, rest, region.run, low + extent)
    elif rest:
        for each in region.rows():
            yield from _bands(each, base, step)
    elif count > 1:  # a run in each row, which begins in one row of ours and ends in the next
        yield row, row + count, _Region(low, (), step - low, step)
        yield row + 1, row + count + 1, _Region(0, (), low + extent - step, low + extent - step)
    else:  # a run over several rows
        if low:
            yield row, row + 1, _Region(low, (), step - low, step)
            row, extent = row + 1, extent - (step - low)
        if extent >= step:
            yield row, row + extent // step, _Region(0, (), step, step)
        if tail := extent % step:
            yield row + extent // step, row + extent // step + 1, _Region(0, (), tail, tail)


class _Places:
    """Which element of its tensor lies at a byte of a file, from the pieces alone."""

    def __init__(self, plan: CopyPlan) -> None:
        self._plan = plan
        self._index: dict[tuple[bool, str, TensorKey], _Extents] = {}
        for is_source, pieces in ((True, plan.sources), (False, plan.targets)):
            lists: dict[tuple[bool, str, TensorKey], list[Piece]] = {}
            for piece in pieces:
                if piece.box.numel:
                    key = (is_source, piece.region.file, piece.tensor)
                    lists.setdefault(key, []).append(piece)
            self._index.update((key, _Extents(found)) for key, found in lists.items())

    def agree(self, path: str, unit_start: int, item: CopyItem) -> bool:
        """Whether the first and the last element read are the first and the last written."""
        if item.source is None:
            return True
        source = self._index.get((True, item.source, item.tensor))
        target = self._index.get((False, path, item.tensor))
        if source is None or target is None:
            return False
        start = unit_start + item.offset
        last = item.extent - DTYPE_BYTES[item.dtype]
        source_last = item.source_extent - DTYPE_BYTES[item.source_dtype]
        pairs = [(item.source_offset, start)]
        if last or source_last:
            pairs.append((item.source_offset + source_last, start + last))
        return all(
            any(
                _same(ours, theirs)
                for ours in source.elements_at(read)
                for theirs in target.elements_at(written)
            )
            for read, written in pairs
        )


def _same(first: tuple[int | None, ...], second: tuple[int | None, ...]) -> bool:
    return len(first) == len(second) and all(
        a is None or b is None or a == b for a, b in zip(first, second, strict=True)
    )


class _Extents:
    """Pieces of one tensor in one file, to be asked for by a byte of the file."""

    def __init__(self, pieces: list[Piece]) -> None:
        self._pieces = sorted(pieces, key=lambda piece: piece.region.offset)
        self._starts = [piece.region.offset for piece in self._pieces]
        self._reach = list(accumulate((self._stop(piece) for piece in self._pieces), max))

    @staticmethod
    def _stop(piece: Piece) -> int:
        steps = zip(piece.box.shape, piece.region.strides, strict=True)
        extent = sum((count - 1) * step for count, step in steps)
        return piece.region.offset + extent + DTYPE_BYTES[piece.dtype]

    def elements_at(self, byte: int) -> Iterator[tuple[int | None, ...]]:
        """Indices of the elements that begin at a byte; ``None`` along a stride of 0."""
        begin = bisect_right(self._reach, byte)
        for piece in self._pieces[begin : bisect_right(self._starts, byte)]:
            element = _element_at(piece, byte)
            if element is not None:
                yield element


def _element_at(piece: Piece, byte: int) -> tuple[int | None, ...] | None:
    left = byte - piece.region.offset
    strides, shape = piece.region.strides, piece.box.shape
    index: list[int | None] = list(piece.box.offset)
    for dim in sorted(range(len(strides)), key=lambda dim: -strides[dim]):
        if shape[dim] == 1:
            continue
        if strides[dim] == 0:
            index[dim] = None
            continue
        steps = min(left // strides[dim], shape[dim] - 1)
        left -= steps * strides[dim]
        index[dim] = piece.box.offset[dim] + steps
    return None if left else tuple(index)
