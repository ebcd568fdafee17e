"""A tokenised dataset: ``<prefix>.idx`` says where each sequence lies in ``<prefix>.bin``.

    bytes 0-8     MMIDIDX, two zeros
    8 bytes       version 1
    1 byte        code of the token type
    8 bytes       number of sequences n
    8 bytes       number of document bounds d: documents + 1
    int32 [n]     tokens of each sequence
    int64 [n]     first byte of each sequence in the .bin
    int64 [d]     first sequence of each document, then n

A document is a run of sequences, mostly of one. All numbers are little-endian.
Source: megatron-core 0.19.2, core/datasets/indexed_dataset.py.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal, Self, cast

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.arrays import (
    DiskArray,
    Indices,
    gather,
    open_binary,
    read_exactly,
    sampled_crc,
)
from flagscale.errors import DataError

__all__ = ["FileChange", "IndexedFile"]

HEADER = struct.Struct("<9sQBQQ")
MAGIC = b"MMIDIDX\x00\x00"
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Codes 6 and 7 are floating-point, which no token is."""
RESTORE = "restore both files of the dataset, or preprocess it again"
SEARCH_ROWS = 512
"""Document bounds read at once when one is looked for: a page."""

Fingerprint = dict[str, dict[str, int]]


@dataclass(frozen=True)
class FileChange:
    """One of a dataset's files is not as it was recorded.

    Args:
        path: The file.
        kind: ``changed`` if the content is another, ``touched`` if only its time is: it was copied,
            or rewritten in places that were not sampled.
        recorded: Size, time and checksum then.
        found: And now.
    """

    path: str
    kind: Literal["changed", "touched"]
    recorded: Mapping[str, int]
    found: Mapping[str, int]

    def __str__(self) -> str:
        """As a person reads it."""
        if self.kind == "touched":
            return f"{self.path} has another time of change, but size and sampled content agree"
        return (
            f"{self.path} is not the file the run read: "
            f"{self.recorded['size']} bytes then, {self.found['size']} now"
            + ("" if self.recorded["size"] != self.found["size"] else ", with other content")
        )


class IndexedFile:
    """One tokenised dataset, read here and there.

    Args:
        prefix: Its two files without ``.idx`` and ``.bin``, as ``--data-path`` names them.

    Raises:
        DataError: A file is missing, cut short, or not what its header says.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        self.index_path, self.data_path = f"{self.prefix}.idx", f"{self.prefix}.bin"
        self._index = open_binary(Path(self.index_path), "the index of a dataset")
        try:
            self._data = open_binary(Path(self.data_path), "the tokens of a dataset")
        except BaseException:
            self._index.close()
            raise
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        size = os.fstat(self._index.fileno()).st_size
        if size < HEADER.size:
            raise self._malformed("it is shorter than a header", f"{HEADER.size} bytes", size)
        head = read_exactly(self._index.fileno(), HEADER.size, 0, self.index_path)
        magic, version, code, sequences, bounds = HEADER.unpack(head)
        if (magic, version) != (MAGIC, 1):
            raise self._malformed(
                "it is of another format", f"{MAGIC!r}, 1", f"{magic!r}, {version}"
            )
        if code not in TOKEN_TYPES:
            raise self._malformed("its tokens are not whole numbers", sorted(TOKEN_TYPES), code)
        expected = HEADER.size + 12 * sequences + 8 * bounds
        # Datasets with images in between end with a byte a sequence, which text readers pass over.
        if bounds < 1 or size not in (expected, expected + sequences):
            raise self._malformed(
                "it was cut short or damaged", f"{expected} bytes", f"{size} bytes"
            )
        self.dtype = np.dtype(TOKEN_TYPES[code])
        self.num_sequences: int = sequences
        self.num_documents: int = bounds - 1
        self._lay_out()
        self._check_ends()

    def _lay_out(self) -> None:
        count, start = self.num_sequences, HEADER.size
        file = self._index.fileno()
        self._lengths = DiskArray(file, start, "<i4", (count,), self.index_path)
        self._pointers = DiskArray(file, start + 4 * count, "<i8", (count,), self.index_path)
        self._bounds = DiskArray(
            file, start + 12 * count, "<i8", (self.num_documents + 1,), self.index_path
        )

    def _check_ends(self) -> None:
        """The first and last of everything fit each other and the ``.bin``."""
        self.data_bytes = os.fstat(self._data.fileno()).st_size
        ends = self._bounds.take([0, self.num_documents]).tolist()
        if ends != [0, self.num_sequences]:
            raise self._malformed(
                "its documents are not its sequences", [0, self.num_sequences], ends
            )
        if self.num_sequences:
            last = self.num_sequences - 1
            length, pointer = (
                int(self._lengths.take([last])[0]),
                int(self._pointers.take([last])[0]),
            )
            end = pointer + length * self.dtype.itemsize
            # Training does not mind what lies behind, so neither does opening.
            if min(length, pointer) < 0 or end > self.data_bytes:
                raise self._malformed("its tokens are not there", f"{end} bytes", self.data_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close both files."""
        self._index.close()
        self._data.close()

    def lengths(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.int32]:
        """Tokens of each sequence in ``[start, stop)``: of all, 4 bytes each, by default.

        Raises:
            DataError: There are no such sequences, or the index is damaged.
        """
        stop = self.num_sequences if stop is None else stop
        lengths = cast(npt.NDArray[np.int32], self._lengths.read(start, stop))
        if len(lengths) == 0:
            return lengths
        # The pointers say the same in another way, so that one damaged number is seen.
        first = int(self._pointers.take([start])[0])
        end = self._end_of(stop - 1)
        total = int(lengths.sum(dtype=np.int64)) * self.dtype.itemsize
        if int(lengths.min()) < 0 or first + total != end:
            raise self._malformed(
                f"lengths and places of the sequences [{start}, {stop}) contradict each other",
                f"{end - first} bytes",
                f"{total} bytes",
            )
        return lengths

    def _end_of(self, sequence: int) -> int:
        _, pointers, sizes = self._extents(np.array([sequence]))
        return int(pointers[0] + sizes[0])

    def length(self, sequence: int) -> int:
        """Tokens of one sequence.

        Raises:
            DataError: There is no such sequence, or the index is damaged there.
        """
        return int(self.lengths_of([sequence])[0])

    def lengths_of(self, sequences: npt.ArrayLike) -> Indices:
        """[n] tokens of each.

        Raises:
            DataError: There is no such sequence, or the index is damaged there.
        """
        return self.extents_of(sequences)[0]

    def extents_of(self, sequences: npt.ArrayLike) -> tuple[Indices, Indices]:
        """``(tokens, first byte in the .bin)`` [n] of each.

        Raises:
            DataError: There is no such sequence, or the index is damaged there.
        """
        lengths, pointers, _ = self._extents(np.asarray(sequences, np.int64))
        return lengths, pointers

    def byte_offsets_of(self, sequences: npt.ArrayLike) -> Indices:
        """[n] first byte of each in the ``.bin``.

        Raises:
            DataError: There is no such sequence, or the index is damaged there.
        """
        return self.extents_of(sequences)[1]

    def byte_offset(self, sequence: int, offset: int = 0) -> int:
        """The byte of the ``.bin`` where token ``offset`` of a sequence begins."""
        return int(self.byte_offsets_of([sequence])[0]) + offset * self.dtype.itemsize

    def _extents(self, sequences: Indices) -> tuple[Indices, Indices, Indices]:
        """``(tokens, first byte, bytes)`` [n] of each, proved by where the next one begins."""
        lengths = self._lengths.take(sequences).astype(np.int64)
        after = np.minimum(sequences + 1, self.num_sequences - 1)
        both = self._pointers.take(np.concatenate([sequences, after])).astype(np.int64)
        pointers, following = np.split(both, 2)
        sizes = lengths * self.dtype.itemsize
        last = sequences == self.num_sequences - 1
        # Nothing lies between sequences, nor behind the last.
        ends = np.where(last, self.data_bytes, following)
        wrong = (lengths < 0) | (pointers < 0) | (pointers != ends - sizes)
        if wrong.any():
            at = int(np.argmax(wrong))
            raise DataError(
                "the index of a dataset does not fit its tokens",
                where=f"{self.index_path}, sequence {sequences[at]}",
                expected=f"whole sequences, one after the other, in {self.data_bytes} bytes",
                got=f"{lengths[at]} tokens at byte {pointers[at]}, followed at byte {ends[at]}",
                cure=RESTORE,
            )
        return lengths, pointers, sizes

    def read(
        self, sequence: int, offset: int = 0, length: int | None = None
    ) -> npt.NDArray[np.integer[Any]]:
        """Tokens of a sequence.

        Args:
            sequence: Ordinal, from 0.
            offset: First token.
            length: How many; ``None`` for all that follow.

        Returns:
            [length], of the dataset's own type.

        Raises:
            DataError: The sequence is shorter, or a file is damaged.
        """
        tokens, pointers, _ = self._extents(np.array([sequence], np.int64))
        length = int(tokens[0]) - offset if length is None else length
        if min(offset, length) < 0 or offset + length > tokens[0]:
            raise DataError(
                "a sequence is shorter than what is asked of it",
                where=f"{self.prefix}, sequence {sequence}",
                expected=f"within {tokens[0]} tokens",
                got=f"tokens [{offset}, {offset + length})",
                cure="check that the dataset is the one the run read",
            )
        start = int(pointers[0]) + offset * self.dtype.itemsize
        size = length * self.dtype.itemsize
        return np.frombuffer(
            read_exactly(self._data.fileno(), size, start, self.data_path), self.dtype
        )

    def read_parts(self, offsets: Indices, counts: Indices) -> npt.NDArray[np.integer[Any]]:
        """Runs of tokens, one behind the other.

        Args:
            offsets: [n] first byte of each.
            counts: [n] number of tokens of each.

        Raises:
            DataError: The file ends before.
        """
        sizes = (counts * self.dtype.itemsize).tolist()
        data = gather(self._data.fileno(), offsets.tolist(), sizes, self.data_path)
        return np.frombuffer(data, self.dtype)

    def tokens_in(self, first: int, stop: int) -> int:
        """Tokens of the sequences ``[first, stop)``, told from where they begin and end."""
        if first >= stop:
            return 0
        _, pointers, sizes = self._extents(np.array([first, stop - 1], np.int64))
        return int(pointers[1] + sizes[1] - pointers[0]) // self.dtype.itemsize

    def document_of(self, sequence: int) -> int:
        """The document a sequence belongs to."""
        return int(self.documents_of([sequence])[0])

    def documents_of(self, sequences: npt.ArrayLike) -> Indices:
        """[n] the document each sequence belongs to.

        Raises:
            DataError: There is no such sequence, or the index is damaged on the way.
        """
        wanted, back = np.unique(np.asarray(sequences, np.int64), return_inverse=True)
        if wanted.size and (wanted[0] < 0 or wanted[-1] >= self.num_sequences):
            raise self._no_such("sequence", self.num_sequences, [wanted[0], wanted[-1]])
        return self._search(wanted)[back]

    def _search(self, wanted: Indices) -> Indices:
        """The last bound that is not above each.

        Each is guessed from where it would lie if all documents had as many sequences, and closed
        in on from there.
        """
        found = np.full(len(wanted), -1, np.int64)
        # Bound `low` is known to be at or below what is wanted, bound `high` above it.
        low, high = np.zeros_like(wanted), np.full_like(wanted, self.num_documents)
        below, above = np.zeros_like(wanted), np.full_like(wanted, self.num_sequences)
        rounds = 0
        while (left := np.flatnonzero(found < 0)).size:
            share = (
                (wanted - below)[left] / np.maximum(above - below, 1)[left] if rounds < 4 else 0.5
            )
            # A little more, lest a whole number come out a bit less.
            guess = low[left] + (share * (high - low)[left] + 1e-4).astype(np.int64)
            # If each document is one sequence, the first guess is right.
            rows = min(SEARCH_ROWS if rounds else 2, self.num_documents + 1)
            starts = np.clip(guess - rows // 2 + 1, 0, self.num_documents + 1 - rows)
            block = self._bounds.blocks(starts, rows).astype(np.int64)
            self._check_bounds(block, starts)
            place = (block <= wanted[left][:, None]).sum(axis=1)
            inside = (place > 0) & (place < rows)
            found[left[inside]] = starts[inside] + place[inside] - 1
            under, over = place == 0, place == rows
            high[left[under]], above[left[under]] = starts[under], block[under, 0]
            low[left[over]], below[left[over]] = starts[over] + rows - 1, block[over, -1]
            rounds += 1
            if rounds > 80:
                raise self._malformed(
                    "its documents are out of order", "rising bounds", wanted[left][0]
                )
        return found

    def _check_bounds(self, block: Indices, starts: Indices) -> None:
        falling = (np.diff(block, axis=1) < 0).any(axis=1)
        if falling.any():
            near = int(starts[np.argmax(falling)])
            raise self._malformed("its documents are out of order", "rising bounds", f"near {near}")

    def sequences_of(self, document: int) -> tuple[int, int]:
        """``(first, one past the last)`` sequence of a document.

        Raises:
            DataError: There is no such document, or the index is damaged there.
        """
        if not 0 <= document < self.num_documents:
            raise self._no_such("document", self.num_documents, document)
        first, stop = self._bounds.read(document, document + 2).tolist()
        if not 0 <= first <= stop <= self.num_sequences:
            raise self._malformed("its documents are out of order", "rising bounds", [first, stop])
        return first, stop

    def first_sequences_of(self, documents: npt.ArrayLike) -> Indices:
        """[n] the first sequence of each document."""
        return self._bounds.take(documents).astype(np.int64)

    def fingerprint(self) -> Fingerprint:
        """What tells these files from others of the same name, in under two milliseconds.

        Returns:
            For ``idx`` and ``bin`` each ``size`` in bytes, ``mtime_ns``, and ``crc`` of sampled
            blocks, of all of it up to 64 KiB.
        """
        return {
            "idx": _fingerprint(self._index, self.index_path),
            "bin": _fingerprint(self._data, self.data_path),
        }

    def verify_fingerprint(self, recorded: Mapping[str, Mapping[str, int]]) -> list[FileChange]:
        """What has changed since a fingerprint was taken.

        Raises:
            DataError: The record is not a fingerprint.
        """
        try:
            then = {
                ending: {name: int(recorded[ending][name]) for name in ("size", "mtime_ns", "crc")}
                for ending in ("idx", "bin")
            }
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                "a recorded fingerprint of a dataset is malformed",
                where=self.prefix,
                expected="idx and bin, each with size, mtime_ns and crc",
                got=str(recorded)[:200],
                cure="restore the record it came from",
            ) from error
        return [
            FileChange(f"{self.prefix}.{ending}", kind, then[ending], found)
            for ending, found in self.fingerprint().items()
            if (kind := _change(then[ending], found)) is not None
        ]

    def _malformed(self, what: str, expected: object, got: object) -> DataError:
        return DataError(
            f"the index of a dataset is no good: {what}",
            where=self.index_path,
            expected=expected,
            got=got,
            cure=RESTORE,
        )

    def _no_such(self, what: str, count: int, got: object) -> DataError:
        return DataError(
            f"no such {what}",
            where=self.prefix,
            expected=f"0 <= {what} < {count}",
            got=got,
            cure="check that this is the dataset meant",
        )


def _change(
    recorded: Mapping[str, int], found: Mapping[str, int]
) -> Literal["changed", "touched"] | None:
    if any(recorded[name] != found[name] for name in ("size", "crc")):
        return "changed"
    return "touched" if recorded["mtime_ns"] != found["mtime_ns"] else None


def _fingerprint(file: BinaryIO, name: str) -> dict[str, int]:
    stat = os.fstat(file.fileno())
    crc = sampled_crc(file.fileno(), stat.st_size, name)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "crc": crc}
