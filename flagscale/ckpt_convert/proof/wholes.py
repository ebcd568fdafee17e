"""Canonical tensors of a checkpoint, put together whole or row by row.

For the verification of conversions, so nothing here is what makes them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from flagscale.errors import CheckpointError
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import DTYPE_BYTES, Piece
from flagscale.optim.source import Source

__all__ = ["Wholes", "row_blocks"]

_BLOCK: Final = 16 << 20  # bytes
_UNSIGNED: Final = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Wholes:
    """The weights of a checkpoint, or the states of its optimizer.

    Args:
        source: The opened checkpoint.
        kind: Of the tensors.
    """

    def __init__(self, source: Source, kind: str = "weight") -> None:
        self._directory = source.directory
        self._pieces: dict[str, dict[Box, Piece]] = defaultdict(dict)
        for piece in source.of_kind(kind):  # the first, where several ranks have the same
            self._pieces[piece.tensor.name].setdefault(piece.box, piece)
        weights = {key.name: at for key, at in source.tensors.items() if key.kind == kind}
        self.shapes = {name: shape for name, (shape, _) in weights.items()}
        self.dtypes = {name: dtype for name, (_, dtype) in weights.items()}

    def num_rows(self, name: str, expert: int | None) -> int:
        """Rows of a canonical tensor, or of one expert of it."""
        return self.shapes[name][0 if expert is None else 1]

    def rows(self, name: str, expert: int | None, start: int, stop: int) -> torch.Tensor:
        """Rows of a canonical tensor, or of one expert of it.

        Args:
            name: Of the tensor.
            expert: Its index; ``None``: the tensor is none of experts, or all of them are wanted.
            start: First row.
            stop: First row past the last.

        Raises:
            CheckpointError: A file cannot be read, or has not every element once.
        """
        if expert is None:
            return self._box(name, _rows_of(self.shapes[name], start, stop))
        inner = _rows_of(self.shapes[name][1:], start, stop)
        return self._box(name, Box((expert, *inner.offset), (1, *inner.shape)))[0]

    def _box(self, name: str, box: Box) -> torch.Tensor:
        dtype, filled = self.dtypes[name], 0
        content = np.empty(box.shape, _UNSIGNED[DTYPE_BYTES[dtype]])
        for piece in self._pieces[name].values():
            if (part := piece.box.intersection(box)) is not None and piece.dtype == dtype:
                self._fill(content[_slices(part, box)], piece, part)
                filled += part.numel
        if filled != box.numel:
            raise CheckpointError(
                "a checkpoint does not hold a tensor exactly once",
                where=f"{self._directory}, {name}",
                expected=f"{box.numel} elements",
                got=filled,
            )
        return torch.from_numpy(content).view(getattr(torch, dtype))

    def _fill(self, into: NDArray[Any], piece: Piece, part: Box) -> None:
        for start, stop in row_blocks(part.shape[0], into.nbytes):
            rows = _rows_of(part.shape, start, stop)
            region = piece.part(rows.shifted(part.offset))
            path = self._directory / region.file
            try:
                mapped = np.memmap(path, np.uint8, "r")
                into[start:stop] = np.ndarray(
                    rows.shape, into.dtype, mapped, region.offset, region.strides
                )
            except (OSError, TypeError, ValueError) as error:
                raise CheckpointError(
                    "a file of the checkpoint cannot be read", where=str(path), got=str(error)
                ) from error


def _rows_of(shape: tuple[int, ...], start: int, stop: int) -> Box:
    return Box((start, *(0 for _ in shape[1:])), (stop - start, *shape[1:]))


def _slices(part: Box, whole: Box) -> tuple[slice, ...]:
    """Where a part of a box lies in it."""
    inner = part.shifted(tuple(-first for first in whole.offset))
    return tuple(slice(*limits) for limits in zip(inner.offset, inner.stop, strict=True))


def row_blocks(rows: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """First row, and first past the last, of blocks that are small enough to be read at once.

    Args:
        rows: Rows in all.
        nbytes: Bytes in all.
    """
    step = max(1, rows * _BLOCK // max(nbytes, 1))
    return ((start, min(start + step, rows)) for start in range(0, rows, step))
