"""Flat buffers and boxes: what a run of a rank's buffer is of which canonical tensor.

The optimizer keeps its states in flat buffers, and ``dp_reshardable`` and legacy checkpoints hold
these. Here they become pieces, of a source or of a target alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from flagscale.layout.model import LocalParam
from flagscale.layout.pieces import DTYPE_BYTES, Piece, Region, TensorKey, dense_strides

__all__ = ["FlatParam", "FlatRun", "flat_pieces", "gaps", "local_pieces"]


@dataclass(frozen=True, slots=True)
class FlatParam:
    """A parameter in a flat tensor.

    Args:
        param: The parameter, as the rank has it.
        start: First element of it, in the flat tensor.
    """

    param: LocalParam
    start: int

    @property
    def stop(self) -> int:
        """First element past it."""
        return self.start + self.param.numel


@dataclass(frozen=True, slots=True)
class FlatRun:
    """A part of a flat tensor that lies densely in a file.

    Args:
        start: First element, in the flat tensor.
        numel: Elements.
        file: Path relative to the iteration's directory.
        offset: Bytes from the start of the file.
    """

    start: int
    numel: int
    file: str
    offset: int


def flat_pieces(
    kind: str, dtype: str, params: Sequence[FlatParam], runs: Sequence[FlatRun]
) -> Iterator[Piece]:
    """The pieces that the runs of a flat tensor hold.

    Args:
        kind: What the elements are of their parameters.
        dtype: Torch's name of the element type, without ``torch.``.
        params: By ``start``, disjoint.
        runs: By ``start``, disjoint.
    """
    itemsize = DTYPE_BYTES[dtype]
    first = 0
    for run in runs:
        stop = run.start + run.numel
        while first < len(params) and params[first].stop <= run.start:
            first += 1
        for flat in params[first:]:
            if flat.start >= stop:
                break
            begin, end = max(run.start, flat.start), min(stop, flat.stop)
            for box, at in flat.param.boxes(begin - flat.start, end - flat.start):
                offset = run.offset + (flat.start + at - run.start) * itemsize
                yield Piece(
                    TensorKey(kind, flat.param.canonical),
                    box,
                    dtype,
                    Region(run.file, offset, dense_strides(box.shape, itemsize)),
                )


def gaps(params: Sequence[FlatParam], numel: int) -> Iterator[tuple[int, int]]:
    """The elements of a flat tensor that belong to no parameter: first, and first past them."""
    at = 0
    for flat in params:
        if flat.start > at:
            yield at, flat.start
        at = flat.stop
    if numel > at:
        yield at, numel


def local_pieces(param: LocalParam, file: str, offset: int) -> Iterator[Piece]:
    """The pieces of a weight that a rank holds as a dense tensor of its own.

    Args:
        param: The parameter.
        file: Path relative to the iteration's directory.
        offset: Bytes from the start of the file to its first element.
    """
    itemsize = DTYPE_BYTES[param.dtype]
    for box, at in param.boxes():
        region = Region(file, offset + at * itemsize, dense_strides(box.shape, itemsize))
        yield Piece(TensorKey("weight", param.canonical), box, param.dtype, region)
