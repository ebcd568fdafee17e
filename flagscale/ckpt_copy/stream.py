"""An output file while it is made: its digest and its holes' checksums, whatever the order."""

from __future__ import annotations

import hashlib
import threading
import zlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from flagscale.ckpt_io.checksum import combine_crc32
from flagscale.ckpt_io.journal import HolePart
from flagscale.ckpt_io.output import OutputFile

__all__ = ["FileDigest", "FileParts", "HoleChecksums", "PartChecksums"]

_CRC_BYTES: Final = 4


class FileParts:
    """What of an output file lies between two of its bytes.

    Args:
        file: The output file; holes and literals are sorted and disjoint.
    """

    def __init__(self, file: OutputFile) -> None:
        self.file = file
        self._holes = [hole.offset for hole in file.holes]
        self._literals = [offset for offset, _ in file.literals]

    def holes(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """``(index, first byte, byte after the last)`` of each hole, cut to the range."""
        for index in range(*_range(self._holes, start, stop)):
            hole = self.file.holes[index]
            first, last = max(start, hole.offset), min(stop, hole.offset + hole.nbytes)
            if first < last:
                yield index, first, last

    def fill(self, start: int, data: memoryview) -> None:
        """Write what is fixed in a part of a file: the literals, and zeros outside the holes."""
        stop = following = start
        stop += len(data)
        for _, first, last in self.holes(start, stop):
            _clear(data[following - start : first - start])
            following = last
        _clear(data[following - start :])
        for index in range(*_range(self._literals, start, stop)):
            offset, literal = self.file.literals[index]
            first, last = max(offset, start), min(offset + len(literal), stop)
            if first < last:
                data[first - start : last - start] = literal[first - offset : last - offset]


def _range(starts: Sequence[int], start: int, stop: int) -> tuple[int, int]:
    """Which of some disjoint stretches can have a part in a range."""
    return max(bisect_right(starts, start) - 1, 0), bisect_left(starts, stop)


def _clear(data: memoryview) -> None:
    if data:
        data[:] = bytes(len(data))


class HoleChecksums:
    """CRC-32 of the holes of a file, put together from parts.

    Args:
        file: The output file.
    """

    def __init__(self, file: OutputFile) -> None:
        self._parts: list[dict[int, HolePart]] = [{} for _ in file.holes]
        self._known: dict[int, int] = {}
        self._places = sorted(
            (at, index) for index, hole in enumerate(file.holes) for at in hole.crc_offsets
        )

    def add(self, part: HolePart) -> None:
        """A part is there."""
        self._parts[part.hole][part.start] = part

    def of(self, hole: int) -> int:
        """The CRC-32 of a hole all of whose parts are there."""
        if hole not in self._known:
            crc = 0
            for _, part in sorted(self._parts[hole].items()):
                crc = combine_crc32(crc, part.crc, part.nbytes)
            self._known[hole] = crc
        return self._known[hole]

    def all(self) -> tuple[int, ...]:
        """Of all holes, all of whose parts are there."""
        return tuple(map(self.of, range(len(self._parts))))

    def places(self) -> Iterator[tuple[int, memoryview]]:
        """``(offset, bytes)`` of every checksum in the file; all holes are there."""
        for at, hole in self._places:
            yield at, memoryview(self.of(hole).to_bytes(_CRC_BYTES, "little"))

    def patch(self, start: int, data: memoryview) -> None:
        """Put in the checksums that lie in a part of the file; what is before it is there."""
        begin = bisect_right(self._places, (start - _CRC_BYTES, len(self._parts)))
        end = bisect_left(self._places, (start + len(data), 0))
        for at, hole in self._places[begin:end]:
            first, last = max(at, start), min(at + _CRC_BYTES, start + len(data))
            value = self.of(hole).to_bytes(_CRC_BYTES, "little")
            data[first - start : last - start] = value[first - at : last - at]


class PartChecksums:
    """CRC-32 of the parts of holes in one unit, fed front to back.

    Args:
        parts: Of the output file.
        start: Bytes from the start of the file.
        stop: First byte after the unit.
    """

    def __init__(self, parts: FileParts, start: int, stop: int) -> None:
        self._todo = [
            (index, parts.file.holes[index].offset, first, last)
            for index, first, last in parts.holes(start, stop)
        ]
        self._crc = 0
        self._next = 0

    def update(self, start: int, data: memoryview) -> Iterator[HolePart]:
        """Take the bytes that follow; yields the parts that they complete."""
        stop = start + len(data)
        while self._next < len(self._todo):
            index, offset, first, last = self._todo[self._next]
            low, high = max(first, start), min(last, stop)
            if low < high:
                self._crc = zlib.crc32(data[low - start : high - start], self._crc)
            if last > stop:
                return
            yield HolePart(index, first - offset, last - first, self._crc)
            self._crc = 0
            self._next += 1


class FileDigest:
    """SHA-256 of a file whose parts are ready in any order.

    A part that is not next waits, and keeps its buffer, until those before it have come.

    Args:
        checksums: Of its holes, each known when the digest gets behind it.
    """

    def __init__(self, checksums: HoleChecksums) -> None:
        self._checksums = checksums
        self._sha = hashlib.sha256()
        self._position = 0
        self._busy = False
        self._parked: dict[int, tuple[memoryview, Callable[[], None]]] = {}
        self._lock = threading.Lock()

    def update(self, start: int, data: memoryview) -> bool:
        """Take the bytes at a place of the file, if they are next and no other thread is at it.

        Call :meth:`take_parked` when there is no more to update with.
        """
        with self._lock:
            if self._busy or self._position != start:
                return False
            self._busy = True
        self._take(start, data)
        return True

    def park(self, start: int, data: memoryview, when_taken: Callable[[], None]) -> None:
        """Leave bytes to be taken in their turn.

        Args:
            start: Bytes from the start of the file.
            data: Not empty; must not change until ``when_taken`` is called.
            when_taken: Called by whichever thread takes them.
        """
        with self._lock:
            self._parked[start] = (data, when_taken)
        self.take_parked()

    def take_parked(self) -> None:
        """Take what was left and whose turn has come."""
        while True:
            with self._lock:
                if self._busy or self._position not in self._parked:
                    return
                start = self._position
                data, when_taken = self._parked.pop(start)
                self._busy = True
            self._take(start, data)
            when_taken()

    def _take(self, start: int, data: memoryview) -> None:
        self._checksums.patch(start, data)
        self._sha.update(data)
        with self._lock:
            self._position = start + len(data)
            self._busy = False

    def hexdigest(self) -> str:
        """Of everything taken."""
        return self._sha.hexdigest()
