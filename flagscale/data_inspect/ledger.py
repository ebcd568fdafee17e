"""The ledger: what a training job wrote down about the data of each step.

    <ledger>/<attempt>/dp00000.ledger       one file a start and data-parallel rank

A file is the eight bytes ``FSLEDGR1`` and records; a record is its payload's length (u32), the
crc32 of its payload (u32), and the payload. The first payload is the segment: JSON that says what
this start ran with. Each later one is a row, the step as this rank saw it, all little-endian:

    u32 iteration          1-based
    u64 consumed_before    samples the whole job had consumed
    u16 micro_batches      drawn by this rank
    u16 micro_batch_size
    u16 blocks             of a sample; 0 without --ledger-blocks
    u16 flags              1 skipped, 2 loss is NaN, 4 repeated by upstream's rerun engine,
                           8 unfinished: an error ended the run in the midst of the step
    f32 loss               mean over the global batch's counted tokens; NaN: none
    f32 grad_norm          NaN: none
    f32 learning_rate      NaN: none
    u32 ids_crc            :func:`flagscale.data_inspect.checksums.ids_crc` of this rank's samples
    u32 tokens_crc         :func:`~flagscale.data_inspect.checksums.tokens_crc` of the same
    u32 counted_tokens     of this rank
    u32 quarantined_tokens of this rank
    f16 [samples]          mean loss of each sample in the order drawn; -1: no token counts
    f16 [samples, blocks]  the same of each block of tokens

Files are only ever appended to, by one process, a record at a time: a killed job leaves whole
records and at most the beginning of one, which readers drop. Attempts sort by the time they began.
"""

from __future__ import annotations

import json
import struct
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import isnan
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from flagscale.errors import DataError

__all__ = [
    "FORMAT",
    "Attempt",
    "Ledger",
    "RankFile",
    "Row",
    "StepRows",
    "encode_row",
    "encode_segment",
    "file_name",
]

FORMAT: Final = 1
_MAGIC: Final = b"FSLEDGR1"
_FRAME: Final = struct.Struct("<II")
_ROW: Final = struct.Struct("<IQHHHHfffIIII")
_SKIPPED, _NAN, _RERUN, _UNFINISHED = 1, 2, 4, 8
_LARGEST_SEGMENT: Final = 1 << 26

type Losses = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Row:
    """One step as one data-parallel rank saw it.

    Args:
        iteration: 1-based.
        consumed_before: Samples the whole job had consumed before it.
        micro_batches: Drawn by this rank.
        micro_batch_size: Samples in each.
        loss: Mean over the counted tokens of the whole global batch; ``None`` if it is NaN or no
            token counted.
        grad_norm: ``None`` if upstream had none.
        learning_rate: ``None`` if upstream had none.
        ids_crc: Of the ids of this rank's samples.
        tokens_crc: Of their tokens.
        counted_tokens: Of this rank.
        quarantined_tokens: Of this rank.
        sample_losses: [micro_batches * micro_batch_size], in the order drawn; NaN where the loss
            was NaN, -1 where no token counted.
        block_losses: [samples, blocks], the same; no column without ``--ledger-blocks``.
        skipped: The optimizer refused the step.
        nan: The loss was NaN or infinite.
        rerun: Upstream's rerun engine had repeated the step; this is of the last time.
        unfinished: An error ended the run in the midst of the step: these are the micro batches
            drawn so far.
    """

    iteration: int
    consumed_before: int
    micro_batches: int
    micro_batch_size: int
    loss: float | None
    grad_norm: float | None
    learning_rate: float | None
    ids_crc: int
    tokens_crc: int
    counted_tokens: int
    quarantined_tokens: int
    sample_losses: Losses
    block_losses: Losses
    skipped: bool = False
    nan: bool = False
    rerun: bool = False
    unfinished: bool = False


def file_name(dp_rank: int) -> str:
    """The name of a data-parallel rank's file within its attempt."""
    return f"dp{dp_rank:05d}.ledger"


def encode_segment(segment: Mapping[str, Any]) -> bytes:
    """The beginning of a file.

    Args:
        segment: JSON-able; see :class:`Attempt`.
    """
    return _MAGIC + _record(json.dumps(segment, sort_keys=True).encode())


def encode_row(row: Row) -> bytes:
    """One record."""
    flags = _SKIPPED * row.skipped | _NAN * row.nan
    flags |= _RERUN * row.rerun | _UNFINISHED * row.unfinished
    head = _ROW.pack(
        row.iteration,
        row.consumed_before,
        row.micro_batches,
        row.micro_batch_size,
        row.block_losses.shape[1],
        flags,
        *(_or_nan(x) for x in (row.loss, row.grad_norm, row.learning_rate)),
        row.ids_crc,
        row.tokens_crc,
        row.counted_tokens,
        row.quarantined_tokens,
    )
    with np.errstate(over="ignore"):  # a loss beyond 65504 is as good as infinite
        return _record(
            head
            + row.sample_losses.astype("<f2").tobytes()
            + row.block_losses.astype("<f2").tobytes()
        )


def _or_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _record(payload: bytes) -> bytes:
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _decode_row(payload: bytes) -> Row | None:
    """A row, or ``None`` if the payload is not as long as it says."""
    if len(payload) < _ROW.size:
        return None
    head = _ROW.unpack_from(payload)
    iteration, consumed_before, micro_batches, micro_batch_size, blocks, flags = head[:6]
    loss, grad_norm, learning_rate = (None if isnan(value) else value for value in head[6:9])
    ids_crc, tokens_crc, counted_tokens, quarantined_tokens = head[9:]
    samples = micro_batches * micro_batch_size
    if len(payload) != _row_bytes(samples, blocks) or not iteration:
        return None
    losses = np.frombuffer(payload, "<f2", offset=_ROW.size).astype(np.float32)
    return Row(
        iteration=iteration,
        consumed_before=consumed_before,
        micro_batches=micro_batches,
        micro_batch_size=micro_batch_size,
        loss=loss,
        grad_norm=grad_norm,
        learning_rate=learning_rate,
        ids_crc=ids_crc,
        tokens_crc=tokens_crc,
        counted_tokens=counted_tokens,
        quarantined_tokens=quarantined_tokens,
        sample_losses=losses[:samples],
        block_losses=losses[samples:].reshape(samples, blocks),
        skipped=bool(flags & _SKIPPED),
        nan=bool(flags & _NAN),
        rerun=bool(flags & _RERUN),
        unfinished=bool(flags & _UNFINISHED),
    )


def _row_bytes(samples: int, blocks: int) -> int:
    return _ROW.size + 2 * samples * (1 + blocks)


class RankFile:
    """One file, read.

    Args:
        path: The file. An empty one is ``empty`` and has nothing else.

    Raises:
        DataError: It is no ledger, or its segment is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes: npt.NDArray[np.uint8] | bytes = np.memmap(path, np.uint8, "r")
        except ValueError:  # an empty file cannot be mapped
            self._bytes = b""
        except OSError as error:
            raise DataError(
                "a ledger cannot be read", where=str(path), got=str(error), cure="restore it"
            ) from error
        self.empty = not len(self._bytes)
        if self.empty:
            return
        if bytes(self._bytes[: len(_MAGIC)]) != _MAGIC:
            raise self._damaged("it does not begin as a ledger does", len(_MAGIC))
        payload = self._payload(len(_MAGIC), _LARGEST_SEGMENT)
        if payload is None:
            raise self._damaged("its segment is cut short or damaged", len(_MAGIC))
        try:
            self.segment: dict[str, Any] = json.loads(payload)
            _verify_segment(self.segment)
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"its segment makes no sense: {error}", len(_MAGIC)) from error
        self._first = len(_MAGIC) + _FRAME.size + len(payload)

    def _damaged(self, what: str, offset: int) -> DataError:
        return DataError(
            f"a ledger is damaged: {what}",
            where=f"{self.path}, byte {offset}",
            got=f"{len(self._bytes)} bytes",
            cure="restore the file, or move it away to do without it",
        )

    def _payload(self, offset: int, largest: int) -> bytes | None:
        """The payload of a record; ``None`` if it is not whole."""
        start = offset + _FRAME.size
        if start > len(self._bytes):
            return None
        length, crc = _FRAME.unpack(bytes(self._bytes[offset:start]))
        if length > min(largest, len(self._bytes) - start):
            return None
        payload = bytes(self._bytes[start : start + length])
        return payload if zlib.crc32(payload) == crc else None

    @cached_property
    def _index(self) -> tuple[list[int], list[int]]:
        """Iterations, rising, and where their records begin.

        Raises:
            DataError: A record in the middle is damaged, or iterations do not rise.
        """
        iterations: list[int] = []
        offsets: list[int] = []
        offset, size = self._first, len(self._bytes)
        view = memoryview(self._bytes)
        while offset + _FRAME.size + _ROW.size <= size:
            length, _ = _FRAME.unpack_from(view, offset)
            end = offset + _FRAME.size + length
            if length < _ROW.size or end > size:
                break
            (iteration,) = struct.unpack_from("<I", view, offset + _FRAME.size)
            before = iterations[-1] if iterations else self.segment["iteration"]
            if iteration <= before:
                raise self._damaged(f"iteration {iteration} follows {before}", offset)
            iterations.append(iteration)
            offsets.append(offset)
            offset = end
        self._whole = offset
        self._verify_torn(bytes(view[offset : offset + _FRAME.size + _ROW.size]), size - offset)
        return iterations, offsets

    def _verify_torn(self, beginning: bytes, torn: int) -> None:
        """Raises unless what is left can be the beginning of one row, or blocks never written."""
        if len(beginning) < _FRAME.size + _ROW.size or not any(self._bytes[-torn:]):
            return
        length, _ = _FRAME.unpack_from(beginning)
        _, _, micro_batches, size, blocks, *_ = _ROW.unpack_from(beginning, _FRAME.size)
        if length != _row_bytes(micro_batches * size, blocks):
            raise self._damaged("a row is not as long as it says", len(self._bytes) - torn)

    @property
    def iterations(self) -> list[int]:
        """Of the rows, rising.

        Raises:
            DataError: The file is damaged.
        """
        return self._index[0]

    @property
    def offsets(self) -> list[int]:
        """Where the records of the rows begin, in bytes.

        Raises:
            DataError: The file is damaged.
        """
        return self._index[1]

    @property
    def torn_bytes(self) -> int:
        """Bytes at the end that are no whole record: what a killed job was just writing."""
        _ = self._index
        return len(self._bytes) - self._whole

    def row(self, iteration: int) -> Row | None:
        """The row of a step, or ``None``.

        Raises:
            DataError: The row is damaged.
        """
        iterations, offsets = self._index
        at = bisect_left(iterations, iteration)
        if at == len(iterations) or iterations[at] != iteration:
            return None
        return self._row(offsets[at])

    def _row(self, offset: int) -> Row:
        payload = self._payload(offset, len(self._bytes))
        row = None if payload is None else _decode_row(payload)
        if row is None:
            raise self._damaged("a row does not agree with its checksum", offset)
        return row

    def rows(self) -> Iterator[Row]:
        """All rows, in order.

        Raises:
            DataError: The file is damaged.
        """
        yield from map(self._row, self._index[1])


_SEGMENT_TYPES: Final = {
    "format": int,
    "attempt": str,
    "started": str,
    "dp_rank": int,
    "dp_size": int,
    "iteration": int,
    "consumed_samples": int,
    "pad_token_id": int,
    "args": dict,
    "argv": list,
    "versions": dict,
    "datasets": list,
}


def _verify_segment(segment: Any) -> None:
    """Raises ``ValueError`` for what a reader would stumble over."""
    if not isinstance(segment, dict):
        raise ValueError("it is no object")
    for name, kind in _SEGMENT_TYPES.items():
        value = segment.get(name)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} is {value!r}")
    if segment["format"] != FORMAT:
        raise ValueError(f"format {segment['format']}, and this reads format {FORMAT}")
    if not 0 <= segment["dp_rank"] < segment["dp_size"] or segment["iteration"] < 0:
        raise ValueError("the rank or the iteration is out of range")
    for dataset in segment["datasets"]:
        if not isinstance(dataset, dict) or not isinstance(dataset.get("prefix"), str):
            raise ValueError("a dataset has no prefix")


@dataclass(frozen=True)
class Attempt:
    """One start of the job.

    Args:
        name: Sorts by the time of the start.
        files: By data-parallel rank, those that are there.
        segment: What the start ran with, as every rank has it: ``args`` by upstream's names,
            ``argv``, ``versions``, ``datasets`` (each ``prefix``, ``num_samples``, ``size``,
            ``num_epochs``, ``separate_final_epoch``, ``description_hash``, ``fingerprint``),
            ``blend`` (``size``, ``description_hash``) or ``None``, ``pad_token_id``, ``load``.
    """

    name: str
    files: Mapping[int, RankFile] = field(repr=False)
    segment: Mapping[str, Any] = field(repr=False)

    @property
    def start_iteration(self) -> int:
        """Iterations done before this start."""
        return int(self.segment["iteration"])

    @property
    def start_consumed(self) -> int:
        """Samples consumed before this start."""
        return int(self.segment["consumed_samples"])

    @property
    def dp_size(self) -> int:
        """Data-parallel ranks, whether or not their files are there."""
        return int(self.segment["dp_size"])

    @cached_property
    def iterations(self) -> list[int]:
        """Those that any rank has a row of, rising."""
        return sorted({i for file in self.files.values() for i in file.iterations})


@dataclass(frozen=True)
class StepRows:
    """What the ledger has of one step.

    Args:
        attempt: The start it ran in.
        rows: By data-parallel rank; those of a job killed just then may be missing.
        superseded: Whether a later start went back before this step and has not done it again.
    """

    attempt: Attempt
    rows: Mapping[int, Row]
    superseded: bool

    @property
    def complete(self) -> bool:
        """Whether every rank's row is there."""
        return len(self.rows) == self.attempt.dp_size

    @property
    def any_row(self) -> Row:
        """That of one of the ranks, for what all have alike."""
        return next(iter(self.rows.values()))

    @property
    def unfinished(self) -> bool:
        """Whether an error ended the run in the midst of the step."""
        return any(row.unfinished for row in self.rows.values())

    def sample_loss(self, rank: int, micro_batch: int, position: int) -> float | None:
        """Of one sample: NaN if it was, ``None`` if no token counted or no row is there."""
        row = self.rows.get(rank)
        if row is None or micro_batch >= row.micro_batches:
            return None
        loss = float(row.sample_losses[micro_batch * row.micro_batch_size + position])
        return None if loss < 0 else loss


class Ledger:
    """All attempts of a run.

    Args:
        directory: Holds one directory an attempt.

    Raises:
        DataError: There is none, or a file is damaged or of another attempt.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            names = sorted(path.name for path in directory.iterdir() if path.is_dir())
        except OSError as error:
            raise DataError(
                "there is no ledger", where=str(directory), got=str(error), cure="check the path"
            ) from error
        found = (_open_attempt(directory / name) for name in names)
        self.attempts = tuple(attempt for attempt in found if attempt is not None)
        if not self.attempts:
            raise DataError(
                "the ledger holds no attempt",
                where=str(directory),
                expected="a directory for each start, with dp*.ledger files",
                cure="check the path; a job writes its ledger when training starts",
            )

    def step(self, iteration: int) -> StepRows | None:
        """What is known of a step, from the newest start that did it.

        Raises:
            DataError: A file is damaged.
        """
        superseded = False
        for attempt in reversed(self.attempts):
            rows = {
                rank: row
                for rank, file in attempt.files.items()
                if (row := file.row(iteration)) is not None
            }
            if rows:
                return StepRows(attempt, rows, superseded)
            # A later start that went back to before the step, and did some of its own.
            superseded |= attempt.start_iteration < iteration and bool(attempt.iterations)
        return None

    def surviving(self) -> Iterator[tuple[Attempt, list[int]]]:
        """Each start with the iterations of it that no later start went back over.

        Raises:
            DataError: A file is damaged.
        """
        cut: int | None = None
        result: list[tuple[Attempt, list[int]]] = []
        for attempt in reversed(self.attempts):
            mine = attempt.iterations
            result.append((attempt, [i for i in mine if cut is None or i <= cut]))
            if mine:
                start = attempt.start_iteration
                cut = start if cut is None else min(cut, start)
        yield from reversed(result)

    def steps(self) -> Iterator[StepRows]:
        """Every surviving step, in order.

        Raises:
            DataError: A file is damaged.
        """
        for attempt, iterations in self.surviving():
            for iteration in iterations:
                rows = {
                    rank: row
                    for rank, file in attempt.files.items()
                    if (row := file.row(iteration)) is not None
                }
                yield StepRows(attempt, rows, superseded=False)

    def attempt_at(self, iteration: int) -> Attempt:
        """The start that did a step, or would have: the last one that began before it.

        Raises:
            DataError: A file is damaged.
        """
        known = self.step(iteration)
        if known is not None:
            return known.attempt
        before = [one for one in self.attempts if one.start_iteration < iteration]
        return (before or list(self.attempts))[-1]


def _open_attempt(directory: Path) -> Attempt | None:
    files: dict[int, RankFile] = {}
    for path in sorted(directory.glob("dp*.ledger")):
        file = RankFile(path)
        if file.empty:
            continue  # opened, and the job was killed before it wrote a byte
        if file.segment["attempt"] != directory.name or path.name != file_name(
            file.segment["dp_rank"]
        ):
            raise DataError(
                "a ledger's file is of another attempt or rank",
                where=str(path),
                expected=f"attempt {directory.name}",
                got=f"attempt {file.segment['attempt']}, rank {file.segment['dp_rank']}",
                cure="put it back where it came from",
            )
        files[file.segment["dp_rank"]] = file
        first = next(iter(files.values())).segment
        for name in ("dp_size", "iteration", "consumed_samples", "args"):
            if file.segment[name] != first[name]:
                raise DataError(
                    "the files of one start disagree",
                    where=f"{path}, {name}",
                    expected=str(first[name]),
                    got=str(file.segment[name]),
                    cure="restore the file, or move it away to do without it",
                )
    if not files:
        return None
    return Attempt(directory.name, files, files[min(files)].segment)
