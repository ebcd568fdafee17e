"""Carry out copy items: from source files into the buffer of a unit.

Bytes that lie densely on both sides are read straight to their place. Others are read into a small
buffer, which stays in the processor's cache, and spread out from there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flagscale.ckpt_copy.plan import CopyItem
from flagscale.ckpt_io.sources import Sources
from flagscale.layout.pieces import DTYPE_BYTES, dense_strides

__all__ = ["BLOCK_BYTES", "Gatherer", "steps"]

BLOCK_BYTES: Final = 512 << 10
"""Of a step. Measured: hashing, checksum and writing find this much still in the cache."""

_PAGE_BYTES: Final = 4096
_UNSIGNED: Final[dict[int, Any]] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def steps(item: CopyItem) -> Iterator[CopyItem]:
    """Cut an item into parts of about :data:`BLOCK_BYTES`, in the order of the unit."""
    cost = max(item.nbytes, _read_bytes(item))
    if cost <= BLOCK_BYTES or not item.shape:
        yield item
        return
    rows = item.shape[0] * BLOCK_BYTES // cost
    if not rows:
        for index in range(item.shape[0]):
            yield from steps(item.row(index))
        return
    for start in range(0, item.shape[0], rows):
        yield item.rows(start, min(start + rows, item.shape[0]))


def _run_bytes(item: CopyItem) -> int:
    """Length of the runs of an item in its source; 0 when its elements do not touch."""
    size = DTYPE_BYTES[item.source_dtype]
    if not item.shape or item.source_strides[-1] != size:
        return 0
    return item.shape[-1] * size


def _by_runs(item: CopyItem) -> bool:
    """Whether to read the runs one by one, and not what lies between them.

    Runs shorter than a page are not worth it: the disk gives no less than pages.
    """
    dense = item.numel * DTYPE_BYTES[item.source_dtype]
    return item.source_extent > dense and _run_bytes(item) >= _PAGE_BYTES


def _read_bytes(item: CopyItem) -> int:
    if item.source is None:
        return 0
    if _by_runs(item):
        return item.numel * DTYPE_BYTES[item.source_dtype]
    return item.source_extent


class Gatherer:
    """Fills buffers; one for each thread.

    Args:
        sources: Where to read.
    """

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._block = memoryview(bytearray(BLOCK_BYTES))

    def copy(self, item: CopyItem, unit: memoryview) -> None:
        """Carry out an item, or a step of one.

        Args:
            item: Its offset is from the start of ``unit``.
            unit: The buffer to write to.

        Raises:
            CheckpointError: The source cannot be read.
        """
        target = _view(unit, item.offset, item.shape, item.strides, item.dtype)
        if item.source is None:
            target[...] = 0
            return
        dense = item.numel * DTYPE_BYTES[item.source_dtype]
        if item.dtype == item.source_dtype and item.extent == dense and _in_order(item):
            self._read(item.source, item, unit[item.offset : item.offset + dense])
            return
        if _by_runs(item):
            block = self._scratch(dense)
            self._read(item.source, item, block)
            strides = dense_strides(item.shape, DTYPE_BYTES[item.source_dtype])
        else:
            block = self._scratch(item.source_extent)
            self._sources.read_into(item.source, item.source_offset, block)
            strides = item.source_strides
        source = _view(block, 0, item.shape, strides, item.source_dtype)
        np.copyto(target, _converted(source, item.source_dtype, item.dtype))

    def _read(self, path: str, item: CopyItem, into: memoryview) -> None:
        """Read an item's runs, one after the other, into a dense buffer."""
        if len(into) == item.source_extent:
            self._sources.read_into(path, item.source_offset, into)
            return
        run = _run_bytes(item)
        starts = np.zeros((), np.int64)
        for count, step in zip(item.shape[:-1], item.source_strides[:-1], strict=True):
            starts = starts[..., None] + np.arange(count) * step
        for index, start in enumerate(starts.ravel().tolist()):
            part = into[index * run : (index + 1) * run]
            self._sources.read_into(path, item.source_offset + start, part)

    def _scratch(self, nbytes: int) -> memoryview:
        if len(self._block) < nbytes:
            self._block = memoryview(bytearray(nbytes))
        return self._block[:nbytes]


def _in_order(item: CopyItem) -> bool:
    """Whether the elements follow each other alike in the unit, which is dense, and as read."""
    size = DTYPE_BYTES[item.dtype]
    if item.strides != dense_strides(item.shape, size):
        return False
    return item.source_strides == item.strides or _by_runs(item)


def _view(
    buffer: memoryview, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str
) -> npt.NDArray[Any]:
    """Elements in a buffer as unsigned integers, which copy any bit pattern as it is."""
    kind = _UNSIGNED[DTYPE_BYTES[dtype]]
    return np.ndarray(shape, kind, buffer=buffer, offset=offset, strides=strides)


def _converted(values: npt.NDArray[Any], source: str, target: str) -> npt.NDArray[Any]:
    """Bit patterns of one type as those of another, rounded to the nearest, ties to even."""
    if source == target:
        return values
    if (source, target) == ("bfloat16", "float32"):
        return values.astype(np.uint32) << np.uint32(16)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are right, and NaN are NaN
        if (source, target) == ("float32", "bfloat16"):
            odd = values >> np.uint32(16) & np.uint32(1)
            rounded = (values + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            is_nan = values & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000)
            return np.where(is_nan, np.uint32(0x7FC0), rounded).astype(np.uint16)
        if source == "float32":
            return values.view(np.float32).astype(np.float16).view(np.uint16)
        return values.view(np.float16).astype(np.float32).view(np.uint32)
