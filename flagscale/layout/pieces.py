"""Pieces: which box of which tensor lies where in which file.

Every checkpoint format is read as a table of pieces and written from one. A *canonical tensor* is
whole (no parallel size has a part in it) and belongs to one layer. Its name is the key of the model
in a ``torch_dist`` checkpoint with the global layer number written out, as in
``decoder.layers.7.mlp.linear_fc1.weight``; experts keep their leading expert axis. Whether a file
stacks layers on an axis of their own, splits a tensor between ranks, or strings tensors together in
a flat buffer shows only in the pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from flagscale.layout.boxes import Box

__all__ = ["DTYPE_BYTES", "OPTIMIZER_KINDS", "Piece", "Region", "TensorKey", "dense_strides"]

OPTIMIZER_KINDS: Final = ("param", "exp_avg", "exp_avg_sq")
"""What the optimizer keeps of each parameter: the fp32 main copy and the two moments of Adam."""

DTYPE_BYTES: Final = {
    "float64": 8,
    "float32": 4,
    "bfloat16": 2,
    "float16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}
"""Size of an element, by torch's name of the type."""


class TensorKey(NamedTuple):
    """A canonical tensor.

    Args:
        kind: ``"weight"`` for what the model holds, or one of :data:`OPTIMIZER_KINDS`.
        name: Canonical name of the parameter.
    """

    kind: str
    name: str


@dataclass(frozen=True, slots=True)
class Region:
    """Where the elements of a box lie in a file, which need not be densely.

    Args:
        file: Path relative to the checkpoint's iteration directory, with forward slashes.
        offset: Bytes from the start of the file to the first element.
        strides: Bytes from one index to the next, for each dimension of the box.
    """

    file: str
    offset: int
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a canonical tensor and its place in a file.

    Args:
        tensor: The canonical tensor.
        box: The part of it.
        dtype: Torch's name of the element type, without ``torch.``.
        region: Where the part lies; one stride for each dimension of ``box``.
    """

    tensor: TensorKey
    box: Box
    dtype: str
    region: Region

    def part(self, box: Box) -> Region:
        """Where a box inside this piece lies; ``box`` is in the tensor's coordinates."""
        steps = zip(box.offset, self.box.offset, self.region.strides, strict=True)
        offset = self.region.offset + sum((at - first) * step for at, first, step in steps)
        return Region(self.region.file, offset, self.region.strides)


def dense_strides(shape: tuple[int, ...], itemsize: int = 1) -> tuple[int, ...]:
    """Steps from one index to the next where the elements lie one after another, row by row.

    Args:
        shape: Of the tensor or box.
        itemsize: Bytes of an element; 1 gives the steps in elements, as torch counts them.
    """
    strides: list[int] = []
    step = itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
