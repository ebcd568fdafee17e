"""What to copy where: the pieces of a source and of a target become units of work.

A target piece is cut along the source pieces that cover it, and the cuts along the units of its
file. What is left is a list of *copy items*: strided regions of the same shape in a source file and
in a unit. Growing a vocabulary needs no rule of its own: the new rows are one more source piece, a
box whose region is the trained row with a stride of 0.

The plan is pure and made anew, unit by unit, whenever it is asked for: for 34 billion parameters
the items alone would fill hundreds of megabytes. It depends on its inputs only.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import prod
from typing import Final

from flagscale.ckpt_io.output import OutputFile
from flagscale.errors import ConfigError
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import DTYPE_BYTES, Piece, TensorKey

__all__ = ["CONVERSIONS", "CopyItem", "CopyPlan", "Gap", "Unit", "cut_file", "plan_copy"]

CONVERSIONS: Final = frozenset(
    {
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float16"),
        ("float16", "float32"),
    }
)
"""``(source dtype, target dtype)`` that the executor knows beside equal ones; to the nearest, ties
to even."""

_VERSION: Final = 1  # of what a fingerprint stands for


@dataclass(frozen=True, slots=True)
class CopyItem:
    """One region to copy. All offsets and strides are in bytes.

    Args:
        tensor: The canonical tensor it belongs to, for messages.
        shape: Elements in each dimension, outermost in the target first.
        source: The source file; ``None`` fills the region with zeros.
        source_offset: Start of the first element in the source file.
        source_strides: From one index to the next in the source file; 0 repeats.
        source_dtype: Element type there.
        offset: Start of the first element, from the start of the unit.
        strides: From one index to the next in the unit.
        dtype: Element type in the target.
    """

    tensor: TensorKey
    shape: tuple[int, ...]
    source: str | None
    source_offset: int
    source_strides: tuple[int, ...]
    source_dtype: str
    offset: int
    strides: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """Elements in all."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes written."""
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def extent(self) -> int:
        """Bytes of the unit from the first element to the end of the last."""
        return _extent(self.shape, self.strides, DTYPE_BYTES[self.dtype])

    @property
    def source_extent(self) -> int:
        """Bytes of the source file from the first element to the end of the last."""
        return _extent(self.shape, self.source_strides, DTYPE_BYTES[self.source_dtype])

    def rows(self, start: int, stop: int) -> CopyItem:
        """The part from one index of the outermost dimension to another."""
        return replace(
            self,
            shape=(stop - start, *self.shape[1:]),
            source_offset=self.source_offset + start * self.source_strides[0],
            offset=self.offset + start * self.strides[0],
        )

    def row(self, index: int) -> CopyItem:
        """One index of the outermost dimension, without that dimension."""
        return replace(
            self,
            shape=self.shape[1:],
            source_offset=self.source_offset + index * self.source_strides[0],
            source_strides=self.source_strides[1:],
            offset=self.offset + index * self.strides[0],
            strides=self.strides[1:],
        )


@dataclass(frozen=True, slots=True)
class Gap:
    """A part of a target piece that no source covers.

    Args:
        tensor: The canonical tensor.
        box: The part of it.
    """

    tensor: TensorKey
    box: Box


@dataclass(frozen=True, slots=True)
class Unit:
    """The contiguous part of an output file that is made, written and recorded at once.

    Args:
        file: Index of the output file.
        index: Of the unit in its file.
        start: Bytes from the start of the file.
        stop: First byte after it.
        items: What to copy, by offset.
        gaps: What no source covers, of the target pieces that begin in this unit.
    """

    file: int
    index: int
    start: int
    stop: int
    items: tuple[CopyItem, ...]
    gaps: tuple[Gap, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return self.stop - self.start


@dataclass(frozen=True)
class CopyPlan:
    """Source pieces, output files and target pieces, and how to get from one to the other.

    Args:
        sources: By priority: of several that hold an element, the first listed is read.
        files: The output files.
        targets: What their holes hold.
        unit_bytes: No unit is larger.
        conversions: ``(source dtype, target dtype)`` that may differ.
        zero_fill: Tensors whose elements are zero where no source covers them.
        fingerprint: SHA-256 of all of the above, in hexadecimal.
    """

    sources: tuple[Piece, ...]
    files: tuple[OutputFile, ...]
    targets: tuple[Piece, ...]
    unit_bytes: int
    conversions: frozenset[tuple[str, str]]
    zero_fill: frozenset[TensorKey]
    fingerprint: str
    _by_tensor: dict[TensorKey, _Sources]
    _by_file: dict[str, tuple[Piece, ...]]

    @property
    def total_bytes(self) -> int:
        """Bytes of all output files."""
        return sum(file.size for file in self.files)

    @property
    def source_files(self) -> tuple[str, ...]:
        """The files that any source piece lies in, sorted."""
        return tuple(sorted({piece.region.file for piece in self.sources}))

    def sources_of(self, tensor: TensorKey) -> tuple[Piece, ...]:
        """The source pieces of a tensor, without repetitions of a box."""
        sources = self._by_tensor.get(tensor)
        return sources.pieces if sources else ()

    def targets_in(self, path: str) -> tuple[Piece, ...]:
        """The target pieces of an output file, by offset."""
        return self._by_file.get(path, ())

    def units(self, file: int) -> Iterator[Unit]:
        """The units of an output file, front to back."""
        cuts = cut_file(self.files[file], self.unit_bytes)
        pieces = self.targets_in(self.files[file].path)
        holes = {hole.offset for hole in self.files[file].holes}
        following = 0
        active: list[CopyItem] = []  # offsets here are from the start of the file
        for index, (start, stop) in enumerate(pairwise(cuts)):
            gaps: list[Gap] = []
            while following < len(pieces) and pieces[following].region.offset < stop:
                items, missing = self._items(pieces[following])
                active += items
                gaps += missing
                following += 1
            inside: list[CopyItem] = []
            left: list[CopyItem] = []
            for item in active:
                _split(item, stop, inside, left)
            active = left
            inside.sort(key=lambda item: item.offset)
            whole = _coalesced(inside, holes)
            moved = tuple(replace(item, offset=item.offset - start) for item in whole)
            yield Unit(file, index, start, stop, moved, tuple(gaps))

    def _items(self, target: Piece) -> tuple[list[CopyItem], list[Gap]]:
        sources = self._by_tensor.get(target.tensor)
        found, missing = sources.cover(target.box) if sources else ([], [target.box])
        items = [_item(target, source, box) for source, box in found]
        if target.tensor in self.zero_fill:
            return items + [_item(target, None, box) for box in missing], []
        return items, [Gap(target.tensor, box) for box in missing]


def plan_copy(
    sources: Iterable[Piece],
    files: Sequence[OutputFile],
    targets: Iterable[Piece],
    *,
    unit_bytes: int = 16 << 20,
    conversions: Collection[tuple[str, str]] = (),
    zero_fill: Collection[TensorKey] = (),
) -> CopyPlan:
    """Plan how to fill the holes of the output files.

    Args:
        sources: What there is; several may hold an element, and the first listed is read.
        files: What is to be written.
        targets: What the holes hold; several may hold an element, as tied copies do.
        unit_bytes: Upper bound of a unit of work, and so of the memory of a worker.
        conversions: ``(source dtype, target dtype)`` that may differ, of :data:`CONVERSIONS`.
        zero_fill: Tensors whose elements are zero where no source covers them.

    Raises:
        ConfigError: ``unit_bytes`` is too small, or a conversion is none of :data:`CONVERSIONS`.
    """
    if unit_bytes < _LEAST_UNIT:
        raise ConfigError(
            "units of work are too small", expected=f"at least {_LEAST_UNIT} bytes", got=unit_bytes
        )
    if unknown := set(conversions) - CONVERSIONS:
        raise ConfigError("no such conversion", expected=sorted(CONVERSIONS), got=sorted(unknown))
    sources, targets, files = tuple(sources), tuple(targets), tuple(files)
    by_tensor: dict[TensorKey, list[Piece]] = {}
    for piece in sources:
        by_tensor.setdefault(piece.tensor, []).append(piece)
    by_file: dict[str, list[Piece]] = {}
    for piece in targets:
        if piece.box.numel:
            by_file.setdefault(piece.region.file, []).append(piece)
    plan = CopyPlan(
        sources,
        files,
        targets,
        unit_bytes,
        frozenset(conversions),
        frozenset(zero_fill),
        "",
        {tensor: _Sources(pieces) for tensor, pieces in by_tensor.items()},
        {
            path: tuple(sorted(pieces, key=lambda piece: piece.region.offset))
            for path, pieces in by_file.items()
        },
    )
    return replace(plan, fingerprint=_fingerprint(plan))


_LEAST_UNIT: Final = 64


def cut_file(file: OutputFile, unit_bytes: int) -> list[int]:
    """Where the units of a file begin, and its size; no element lies on both sides of a cut."""
    starts = [hole.offset for hole in file.holes]
    cuts = [0]
    while cuts[-1] < file.size:
        cut = min(cuts[-1] + unit_bytes, file.size)
        index = bisect_right(starts, cut) - 1
        if index >= 0 and cut < file.size:
            hole = file.holes[index]
            if hole.offset < cut < hole.offset + hole.nbytes:
                cut -= (cut - hole.offset) % DTYPE_BYTES[hole.dtype]
        cuts.append(cut)
    return cuts


class _Sources:
    """The source pieces of one tensor, to be asked for by box."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        first: dict[Box, Piece] = {}
        for piece in pieces:
            if piece.box.numel:
                first.setdefault(piece.box, piece)
        self.pieces = tuple(first.values())
        ndim = len(self.pieces[0].box.shape) if self.pieces else 0
        distinct = [len({piece.box.offset[dim] for piece in self.pieces}) for dim in range(ndim)]
        # The dimension along which the boxes differ most tells most of them apart.
        self._dim = distinct.index(max(distinct)) if distinct else None
        if self._dim is None:
            return
        dim = self._dim
        self._order = sorted(range(len(self.pieces)), key=self._start_of)
        self._starts = [self._start_of(index) for index in self._order]
        # No box up to here reaches further than this.
        self._reach = list(
            accumulate((self.pieces[index].box.stop[dim] for index in self._order), max)
        )

    def _start_of(self, index: int) -> int:
        return self.pieces[index].box.offset[self._dim or 0]

    def cover(self, box: Box) -> tuple[list[tuple[Piece, Box]], list[Box]]:
        """What to read for a box, each element from one source; and what there is no source for."""
        found: list[tuple[Piece, Box]] = []
        missing = [(box.offset, box.stop)]
        for index in self._candidates(box):
            piece = self.pieces[index]
            first, last = piece.box.offset, piece.box.stop
            still: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
            for low, high in missing:
                inner_low = tuple(map(max, low, first))
                inner_high = tuple(map(min, high, last))
                if any(map(int.__ge__, inner_low, inner_high)):
                    still.append((low, high))
                    continue
                found.append((piece, _box(inner_low, inner_high)))
                still += _around(low, high, inner_low, inner_high)
            missing = still
            if not missing:
                break
        return found, [_box(low, high) for low, high in missing]

    def _candidates(self, box: Box) -> list[int]:
        if self._dim is None:
            return list(range(len(self.pieces)))
        begin = bisect_right(self._reach, box.offset[self._dim])
        end = bisect_left(self._starts, box.stop[self._dim])
        return sorted(self._order[begin:end])


def _box(low: tuple[int, ...], high: tuple[int, ...]) -> Box:
    return Box(low, tuple(map(int.__sub__, high, low)))


def _around(
    low: tuple[int, ...],
    high: tuple[int, ...],
    inner_low: tuple[int, ...],
    inner_high: tuple[int, ...],
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """A box without one inside it, as disjoint boxes."""
    for dim in range(len(low)):
        if low[dim] < inner_low[dim]:
            yield low, (*high[:dim], inner_low[dim], *high[dim + 1 :])
        if inner_high[dim] < high[dim]:
            yield (*low[:dim], inner_high[dim], *low[dim + 1 :]), high
        low = (*low[:dim], inner_low[dim], *low[dim + 1 :])
        high = (*high[:dim], inner_high[dim], *high[dim + 1 :])


def _item(target: Piece, source: Piece | None, box: Box) -> CopyItem:
    """Copy a box, with as few dimensions as will do; offsets are from the start of the file."""
    into = target.part(box)
    if source is None:
        file, start, steps, dtype = None, 0, (0,) * len(box.shape), target.dtype
    else:
        region = source.part(box)
        file, start, steps, dtype = region.file, region.offset, region.strides, source.dtype
    dims = [
        (size, step, source_step)
        for size, step, source_step in zip(box.shape, into.strides, steps, strict=True)
        if size > 1
    ]
    dims.sort(key=lambda dim: -dim[1])
    merged: list[tuple[int, int, int]] = []
    for size, step, source_step in dims:
        if merged:
            above, above_step, above_source = merged[-1]
            if above_step == step * size and above_source == source_step * size:
                merged[-1] = (above * size, step, source_step)
                continue
        merged.append((size, step, source_step))
    return CopyItem(
        target.tensor,
        tuple(size for size, _, _ in merged),
        file,
        start,
        tuple(source_step for _, _, source_step in merged),
        dtype,
        into.offset,
        tuple(step for _, step, _ in merged),
        target.dtype,
    )


def _split(item: CopyItem, cut: int, before: list[CopyItem], after: list[CopyItem]) -> None:
    """Share an item out to both sides of a cut, which goes through no element."""
    if item.offset >= cut:
        after.append(item)
        return
    extent = item.extent
    if item.offset + extent <= cut or not item.shape:
        before.append(item)
        return
    rows, step = item.shape[0], item.strides[0]
    if step <= 0:  # not a region that can be written; for the verification to say
        before.append(item)
        return
    row_extent = extent - (rows - 1) * step
    room = cut - item.offset
    whole = min(max(0, (room - row_extent) // step + 1), rows)
    begun = min(-(-room // step), rows)
    if whole:
        before.append(item.rows(0, whole))
    for index in range(whole, begun):
        _split(item.row(index), cut, before, after)
    if begun < rows:
        after.append(item.rows(begun, rows))


def _coalesced(items: Iterable[CopyItem], holes: Collection[int]) -> Iterator[CopyItem]:
    """Join runs that go on where the run before them ends, in the source and in the hole."""
    last: CopyItem | None = None
    for item in items:
        if last is None:
            last = item
        elif item.offset not in holes and _goes_on(last, item):
            size = DTYPE_BYTES[item.dtype]
            last = replace(
                last,
                shape=(last.numel + item.numel,),
                strides=(size,),
                source_strides=(DTYPE_BYTES[item.source_dtype] if item.source else 0,),
            )
        else:
            yield last
            last = item
    if last is not None:
        yield last


def _goes_on(last: CopyItem, item: CopyItem) -> bool:
    return (
        last.source == item.source
        and last.tensor == item.tensor
        and (last.dtype, last.source_dtype) == (item.dtype, item.source_dtype)
        and last.offset + last.nbytes == item.offset
        and _is_run(last)
        and _is_run(item)
        and (item.source is None or last.source_offset + last.source_extent == item.source_offset)
    )


def _is_run(item: CopyItem) -> bool:
    if len(item.shape) > 1:
        return False
    source = DTYPE_BYTES[item.source_dtype] if item.source else 0
    return item.strides in ((), (DTYPE_BYTES[item.dtype],)) and item.source_strides in (
        (),
        (source,),
    )


def _extent(shape: tuple[int, ...], strides: tuple[int, ...], size: int) -> int:
    return sum((count - 1) * step for count, step in zip(shape, strides, strict=True)) + size


def _fingerprint(plan: CopyPlan) -> str:
    digest = hashlib.sha256()

    def add(*values: object) -> None:
        digest.update(repr(values).encode() + b"\n")

    add(_VERSION, plan.unit_bytes, sorted(plan.conversions), sorted(plan.zero_fill))
    for file in plan.files:
        add("file", file.path, file.size)
        for offset, literal in file.literals:
            add("literal", offset, hashlib.sha256(literal).hexdigest())
        for hole in file.holes:
            add("hole", hole.offset, hole.nbytes, hole.dtype, hole.shape, hole.crc_offsets)
    _add_pieces(plan.sources, add)
    _add_pieces(plan.targets, add)
    return digest.hexdigest()


def _add_pieces(pieces: Iterable[Piece], add: Callable[..., None]) -> None:
    add("pieces")
    for piece in pieces:
        region = piece.region
        add(
            *piece.tensor,
            piece.box.offset,
            piece.box.shape,
            piece.dtype,
            region.file,
            region.offset,
            region.strides,
        )
