"""Where the states of a ``fully_reshardable`` checkpoint really lie, if upstream's #5077 saved it.

megatron-core 0.16.1 to 0.19.2 gather a buffer without the padding at the ends of its buckets, and
then cut each parameter out of it where it would lie *with* that padding. So what is stored under a
parameter's name are the elements of the gathered buffer from the parameter's padded position on;
past the end of the buffer, zeros. The gathered positions of all that was stored are known, and with
them which elements of which parameter it is. What was cut out for no parameter is lost: as many
elements as the padding and the gaps between parameters.

This is pure: pieces to pieces. That the slices are these is proved by the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from flagscale.layout.boxes import Box
from flagscale.layout.model import LayerSpec, LocalParam, layer_specs
from flagscale.layout.pieces import DTYPE_BYTES, OPTIMIZER_KINDS, Piece
from flagscale.optim.flat import FlatParam, FlatRun, flat_pieces
from flagscale.optim.job import Job

__all__ = ["Mending", "Slice", "mendings", "subtract"]


@dataclass(frozen=True)
class Slice:
    """What was stored under the name of a parameter, as one rank had it.

    Args:
        name: Canonical name of the parameter.
        numel: Elements.
        shift: How many elements too far it was cut out; with 0 it is right.
        zeros: Elements past the end of the buffer, stored as zeros.
    """

    name: str
    numel: int
    shift: int
    zeros: int


@dataclass(frozen=True)
class Mending:
    """One reading of all slices.

    Args:
        spec: The layer spec, which decides in which order parameters lie in a buffer.
        slices: Those that were stored; replicas are stored once.
        pieces: The states of all parameters, where they really lie.
        lost: What of each parameter was stored nowhere; parameters of which all was are left out.
    """

    spec: LayerSpec
    slices: tuple[Slice, ...]
    pieces: tuple[Piece, ...]
    lost: Mapping[str, tuple[Box, ...]]

    @property
    def shifted(self) -> dict[str, tuple[Slice, ...]]:
        """The slices that were cut out too far, by parameter."""
        found: dict[str, list[Slice]] = {}
        for one in self.slices:
            if one.shift:
                found.setdefault(one.name, []).append(one)
        return {name: tuple(slices) for name, slices in found.items()}

    def numel_lost(self, name: str) -> int:
        """Elements of a parameter that were stored nowhere."""
        return sum(box.numel for box in self.lost.get(name, ()))


def mendings(job: Job, pieces: Iterable[Piece]) -> Iterator[Mending]:
    """The readings for each layer spec, the likelier first; none where no buffer has padding.

    Args:
        job: That saved the checkpoint.
        pieces: Of the checkpoint, as stored.

    Raises:
        ConfigError: The arguments do not give the layout of the buffers.
    """
    stored: dict[str, dict[str, list[Piece]]] = {kind: {} for kind in OPTIMIZER_KINDS}
    for piece in pieces:
        if piece.tensor.kind in stored:
            stored[piece.tensor.kind].setdefault(piece.tensor.name, []).append(piece)
    seen: set[tuple[Slice, ...]] = set()
    for spec in layer_specs(job.args):
        mending = _mending(job, spec, stored)
        if mending.shifted and mending.slices not in seen:
            seen.add(mending.slices)
            yield mending


def _mending(job: Job, spec: LayerSpec, stored: Mapping[str, Mapping[str, list[Piece]]]) -> Mending:
    slices: list[Slice] = []
    mended: list[Piece] = []
    claimed: set[tuple[str, Box]] = set()
    for group in job.groups():
        for buffer, params in job.buffers(group, spec):
            own = []
            for slot in buffer.slots:
                param = params[slot.param]
                parts = {(param.canonical, box) for box, _ in param.parts}
                if not parts & claimed:  # of replicas, the first rank's is stored
                    claimed |= parts
                    own.append(slot)
            total = buffer.numel_unpadded
            for slot in own:
                shift = slot.start - buffer.compact(slot)[0]
                zeros = min(max(0, slot.end - total), slot.end - slot.start)
                name = params[slot.param].canonical
                slices.append(Slice(name, slot.end - slot.start, shift, zeros))
            flat = [FlatParam(params[slot.param], buffer.compact(slot)[0]) for slot in buffer.slots]
            for kind in OPTIMIZER_KINDS:
                runs = [
                    run
                    for slot in own
                    for run in _runs(
                        params[slot.param],
                        slot.start,
                        stored[kind].get(params[slot.param].canonical, ()),
                    )
                ]
                runs.sort(key=lambda run: run.start)
                mended += flat_pieces(kind, "float32", flat, runs)
    return Mending(spec, tuple(slices), tuple(mended), _lost(job, mended))


def _runs(param: LocalParam, start: int, pieces: Sequence[Piece]) -> Iterator[FlatRun]:
    """Where the slice of a parameter lies in files, in positions of the gathered buffer.

    Those past the end of the buffer are the zeros, and no parameter's.

    Args:
        param: Under whose name it is stored.
        start: Position at which the slice was cut out.
        pieces: Of the parameter, as stored.
    """
    for box, first in param.parts:
        for piece in pieces:
            common = piece.box.intersection(box)
            if common is None:
                continue
            for at, numel, offset in _dense_runs(box, common, piece):
                yield FlatRun(start + first + at, numel, piece.region.file, offset)


def _dense_runs(box: Box, common: Box, piece: Piece) -> Iterator[tuple[int, int, int]]:
    """A part of a box in runs that lie densely in it and in a piece.

    Yields:
        First element in the box, in row-major order; elements; first byte in the file.
    """
    itemsize = DTYPE_BYTES[piece.dtype]
    region = piece.part(common)
    steps = [prod(box.shape[dim + 1 :]) for dim in range(len(box.shape))]
    run, outer = 1, len(box.shape)
    for dim in reversed(range(len(box.shape))):
        dense = (steps[dim], region.strides[dim]) == (run, run * itemsize)
        if common.shape[dim] > 1 and not dense:
            break
        run *= common.shape[dim]
        outer = dim
    inside = [low - first for low, first in zip(common.offset, box.offset, strict=True)]
    begin = sum(low * step for low, step in zip(inside, steps, strict=True))
    for index in product(*(range(size) for size in common.shape[:outer])):
        at = begin + sum(i * step for i, step in zip(index, steps, strict=False))
        offset = region.offset + sum(i * s for i, s in zip(index, region.strides, strict=False))
        yield at, run, offset


def _lost(job: Job, mended: Iterable[Piece]) -> dict[str, tuple[Box, ...]]:
    """What of each parameter no piece covers; the same for every kind of state."""
    covered: dict[str, set[Box]] = {}
    for piece in mended:
        if piece.tensor.kind == "param":
            covered.setdefault(piece.tensor.name, set()).add(piece.box)
    lost = {
        name: subtract(Box.whole(tensor.shape), covered.get(name, set()))
        for name, tensor in job.tensors.items()
        if tensor.trained
    }
    return {name: boxes for name, boxes in lost.items() if boxes}


def subtract(whole: Box, parts: Iterable[Box]) -> tuple[Box, ...]:
    """A box without other boxes, as disjoint boxes."""
    rest = [whole]
    for part in sorted(parts, key=lambda box: (box.offset, box.shape)):
        rest = [box for one in rest for box in _around(one, part)]
    return tuple(rest)


def _around(box: Box, part: Box) -> Iterator[Box]:
    inner = box.intersection(part)
    if inner is None:
        yield box
        return
    low, high = list(box.offset), list(box.stop)
    for dim, (first, last) in enumerate(zip(inner.offset, inner.stop, strict=True)):
        for begin, end in ((low[dim], first), (last, high[dim])):
            if begin < end:
                start = (*low[:dim], begin, *low[dim + 1 :])
                stop = (*high[:dim], end, *high[dim + 1 :])
                yield Box(start, tuple(b - a for a, b in zip(start, stop, strict=True)))
        low[dim], high[dim] = first, last
