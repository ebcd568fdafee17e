"""Arrays that stay on disk: a few elements are read where they lie, by ``pread``.

A memory map would do the same with one page fault after another, each of which reads ahead, and
keeps what it touched in the process's memory. Here a look-up of a thousand elements costs a
thousand small reads, whatever the size of the file, and no memory that outlives it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from flagscale.errors import DataError

__all__ = ["DiskArray", "Indices", "gather", "open_binary", "read_exactly", "sampled_crc"]

Indices = npt.NDArray[np.int64]

GAP_BYTES = 4096
"""Elements no further apart than a page are read together: it is fetched anyway."""
RUN_BYTES = 1 << 20
"""But never more than this at once."""
SAMPLE_BYTES = 4096
SAMPLES = 16


def open_binary(path: Path, what: str) -> BinaryIO:
    """Open a file that will be read here and there.

    Args:
        path: The file.
        what: Its name in an error, as in ``the index of the dataset``.

    Raises:
        DataError: It cannot be opened.
    """
    try:
        stream = path.open("rb", buffering=0)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{what} cannot be opened",
            where=str(path),
            got=str(error),
            cure="check the path, and that the file is there and readable",
        ) from error
    # Without this each small read drags 128 KiB behind it into the page cache.
    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
    return stream


def read_exactly(descriptor: int, size: int, offset: int, name: str) -> bytes:
    """Exactly ``size`` bytes at ``offset``.

    Raises:
        DataError: The file ends before, or cannot be read.
    """
    try:
        data = os.pread(descriptor, size, offset)
        # One call of the system reads no more than 2 GiB.
        while 0 < len(data) < size and (
            more := os.pread(descriptor, size - len(data), offset + len(data))
        ):
            data += more
    except OSError as error:
        raise DataError("a file cannot be read", where=name, got=str(error)) from error
    if len(data) != size:
        raise DataError(
            "a file ends too early",
            where=name,
            expected=f"{size} bytes at byte {offset}",
            got=f"{len(data)} bytes",
            cure="restore the file; if it is being rewritten, wait for that to end",
        )
    return data


def gather(descriptor: int, offsets: Sequence[int], sizes: Sequence[int], name: str) -> bytes:
    """Many small pieces of a file, one behind the other.

    Raises:
        DataError: The file ends before, or cannot be read.
    """
    places = list(zip(sizes, offsets, strict=True))
    if len(places) > 1:
        # Ask for all before waiting for the first: a disk or a network answers them side by side.
        for size, offset in places:
            os.posix_fadvise(descriptor, offset, size, os.POSIX_FADV_WILLNEED)
    try:
        data = b"".join([os.pread(descriptor, size, offset) for size, offset in places])
    except OSError:
        data = b""
    if len(data) == sum(sizes):
        return data
    return b"".join([read_exactly(descriptor, size, offset, name) for size, offset in places])


def sampled_crc(descriptor: int, size: int, name: str) -> int:
    """What tells a file from another of its size: crc32 of 16 blocks of 4 KiB at fixed shares.

    A file of up to 64 KiB is read as a whole.

    Raises:
        DataError: It ends before ``size``, or cannot be read.
    """
    if size <= SAMPLES * SAMPLE_BYTES:
        return zlib.crc32(read_exactly(descriptor, size, 0, name))
    crc = 0
    for sample in range(SAMPLES):
        start = (size - SAMPLE_BYTES) * sample // (SAMPLES - 1)
        crc = zlib.crc32(read_exactly(descriptor, SAMPLE_BYTES, start, name), crc)
    return crc


class DiskArray:
    """A C-ordered array of one or two dimensions inside a file.

    Args:
        descriptor: Of the open file, which outlives this.
        start: Byte at which the array begins.
        dtype: Of an element.
        shape: [rows] or [rows, columns].
        name: Path of the file, for errors.
    """

    def __init__(
        self, descriptor: int, start: int, dtype: npt.DTypeLike, shape: tuple[int, ...], name: str
    ) -> None:
        self.dtype = np.dtype(dtype)
        self.shape = shape
        self.name = name
        self._descriptor = descriptor
        self._start = start
        self._row_bytes = self.dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))

    def __len__(self) -> int:
        """The number of rows."""
        return self.shape[0]

    def read(self, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows ``[start, stop)``.

        Raises:
            DataError: There are no such rows, or the file was cut since it was opened.
        """
        if not 0 <= start <= stop <= len(self):
            raise self._no_such(f"rows [{start}, {stop})")
        return self._rows(self._read_rows(start, stop))

    def chunks(self, rows: int = 1 << 20) -> Iterator[npt.NDArray[np.generic]]:
        """The whole array, ``rows`` at a time."""
        for start in range(0, len(self), rows):
            yield self.read(start, min(start + rows, len(self)))

    def take(self, indices: npt.ArrayLike) -> npt.NDArray[np.generic]:
        """Single rows, in the order asked for; neighbours are read together.

        Args:
            indices: [n] row numbers, any order, repeated or not.

        Returns:
            [n] or [n, columns].

        Raises:
            DataError: There are no such rows, or the file was cut since it was opened.
        """
        wanted, back = np.unique(np.asarray(indices, np.int64), return_inverse=True)
        if not wanted.size:
            return np.empty((0, *self.shape[1:]), self.dtype)
        if wanted[0] < 0 or wanted[-1] >= len(self):
            raise self._no_such(f"row {wanted[0] if wanted[0] < 0 else wanted[-1]}")
        run, first, last = self._runs(wanted)
        data = self._gather(first, last - first + 1)
        before = np.cumsum(last - first + 1) - (last - first + 1)
        places: Indices = (before[run] + wanted - first[run])[back]
        return self._rows(data)[places]

    def blocks(self, starts: Indices, rows: int) -> npt.NDArray[np.generic]:
        """[n, rows] rows from each start on, all within the array."""
        data = self._gather(starts, np.full(len(starts), rows))
        return self._rows(data).reshape(len(starts), rows, *self.shape[1:])

    def _runs(self, wanted: Indices) -> tuple[Indices, Indices, Indices]:
        """``(run of each row, first row of each run, last row of each run)``; rows are sorted."""
        gap = max(1, GAP_BYTES // self._row_bytes)
        part = wanted // max(1, RUN_BYTES // self._row_bytes)
        breaks = (np.diff(wanted) > gap) | (np.diff(part) > 0)
        run = np.concatenate([[0], np.cumsum(breaks)])
        ends = np.flatnonzero(breaks)
        first = wanted[np.concatenate([[0], ends + 1])]
        last = wanted[np.concatenate([ends, [len(wanted) - 1]])]
        return run, first, last

    def _read_rows(self, start: int, stop: int) -> bytes:
        size = (stop - start) * self._row_bytes
        offset = self._start + start * self._row_bytes
        return read_exactly(self._descriptor, size, offset, self.name)

    def _gather(self, starts: Indices, rows: Indices) -> bytes:
        offsets = (self._start + starts * self._row_bytes).tolist()
        return gather(self._descriptor, offsets, (rows * self._row_bytes).tolist(), self.name)

    def _rows(self, data: bytes) -> npt.NDArray[np.generic]:
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])

    def _no_such(self, got: str) -> DataError:
        return DataError(
            "a look-up leads outside an array on disk",
            where=self.name,
            expected=f"0 <= row < {len(self)}",
            got=got,
            cure="check that the file belongs to this run, and restore it if it is damaged",
        )
