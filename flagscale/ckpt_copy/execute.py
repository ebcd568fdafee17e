"""Carry out a plan: bounded memory, several threads, several processes, any number of attempts.

The threads of a process share the files that it has claimed: reading, hashing, checksums and
writing all leave the interpreter to the others. A thread has one unit in hand: it gathers a block,
passes it on to checksum, digest and disk while it is still in the processor's cache, and records
the unit when it is written. Whoever runs the same plan at the same time, under Slurm, torchrun or
by hand, shares the work through the staging directory.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from mmap import PAGESIZE, mmap
from pathlib import Path
from typing import Final

from flagscale.ckpt_copy.gather import BLOCK_BYTES, Gatherer, steps
from flagscale.ckpt_copy.plan import CopyItem, CopyPlan, Unit, cut_file
from flagscale.ckpt_copy.stream import FileDigest, FileParts, HoleChecksums, PartChecksums
from flagscale.ckpt_io.claims import Claims, Task
from flagscale.ckpt_io.journal import FileRecord, HolePart, Journal, Staging, UnitRecord
from flagscale.ckpt_io.raw import (
    StagedFile,
    flush_directory,
    require_room,
    stamp_sources,
)
from flagscale.ckpt_io.sources import Sources
from flagscale.errors import CheckpointError, ConfigError

__all__ = ["Execution", "execute_plan"]

_POLL_SECONDS: Final = 0.2
_WRITE_BACK_BYTES: Final = 4 << 20
_WORKER_BYTES: Final = 4 * BLOCK_BYTES  # beside its units: blocks, and room to convert one


@dataclass(frozen=True)
class Execution:
    """What came of a plan.

    Args:
        staging: Where the files are, unless another task has published them.
        digests: SHA-256 of each file by its path, in hexadecimal.
        hole_crcs: CRC-32 of the holes of each file.
        bytes_read: By this process, from the sources.
        bytes_written: By this process.
        units: That this process has made; those an earlier run had finished are not among them.
    """

    staging: Staging
    digests: Mapping[str, str]
    hole_crcs: Mapping[str, tuple[int, ...]]
    bytes_read: int = 0
    bytes_written: int = 0
    units: int = 0


def execute_plan(
    plan: CopyPlan,
    source: Path,
    destination: Path,
    *,
    workers: int = 2,
    max_memory: int = 1 << 30,
    restart: bool = False,
    task: Task | None = None,
    on_progress: Callable[[int], None] | None = None,
    stale_after: float = 60.0,
) -> Execution:
    """Make the output files of a verified plan in the staging directory of a destination.

    Goes on with what an earlier run of the same plan has finished, and returns when all is
    finished, by whichever process. Publish it with :func:`flagscale.ckpt_io.publish.publish`.

    Args:
        plan: The plan; ``verify_plan`` has found nothing wrong with it.
        source: Directory that the source files are relative to; only read.
        destination: The iteration directory to be; must not exist.
        workers: Threads of this process.
        max_memory: Bytes that the buffers of this process may take.
        restart: Throw away what an earlier run has left.
        task: Which of several processes this is; default: as the environment says.
        on_progress: Called now and then, from the calling thread, with the bytes finished of
            ``plan.total_bytes``, by all processes and runs.
        stale_after: Seconds without a sign of life after which a process on another machine counts
            as dead, and its files are taken over.

    Raises:
        CheckpointError: The destination exists, the staging directory is of another plan or of
            other sources, a source file is missing or too short, or the disk is full.
        ConfigError: ``max_memory`` is less than one unit needs, or there are no workers.
        KeyboardInterrupt: Ctrl-C, with a message that says how to go on.
    """
    task = task or Task.of_environment()
    workers, buffers = _affordable(plan, workers, max_memory)
    staging = Staging(destination, plan.fingerprint)
    staging.require_free(task)
    try:
        stamps = stamp_sources(source, plan.source_files)
        staging.open(stamps, task=task, restart=restart)
        if staging.is_published():
            return Execution(staging, {}, {})
        with (
            contextlib.closing(Journal(staging.journal)) as journal,
            Claims(staging.journal, stale_after) as claims,
        ):
            _allocate(plan, staging, journal)
            run = _Run(plan, source, staging, journal, claims, task, buffers)
            run.work(workers, on_progress)
            paths = [file.path for file in plan.files]
            records = [journal.files[index] for index in range(len(paths))]
            return Execution(
                staging,
                {path: record.sha256 for path, record in zip(paths, records, strict=True)},
                {path: record.hole_crcs for path, record in zip(paths, records, strict=True)},
                run.bytes_read,
                run.bytes_written,
                run.units,
            )
    except CheckpointError:
        if staging.is_published():  # by another, who takes the staging directory from under us
            return Execution(staging, {}, {})
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {staging.root} keeps what is finished: run the same command to go on"
        ) from None


def _affordable(plan: CopyPlan, workers: int, max_memory: int) -> tuple[int, int]:
    """How many workers fit in memory, and how many units; two for each worker are of use."""
    if workers < 1:
        raise ConfigError("no workers", expected="at least 1", got=workers)
    least = _buffer_bytes(plan) + _WORKER_BYTES
    workers = min(workers, max_memory // least)
    if not workers:
        raise ConfigError(
            "too little memory for one unit of work",
            expected=f"{least:,} bytes",
            got=f"{max_memory:,} bytes",
        )
    return workers, min(
        2 * workers, (max_memory - workers * _WORKER_BYTES) // (least - _WORKER_BYTES)
    )


def _buffer_bytes(plan: CopyPlan) -> int:
    return max(1, min(plan.unit_bytes, max((file.size for file in plan.files), default=0)))


def _allocate(plan: CopyPlan, staging: Staging, journal: Journal) -> None:
    """Make all files at their full size, so that a full disk shows before any work."""
    needed = 0
    for index, file in enumerate(plan.files):
        path = staging.data / file.path
        try:
            found = path.stat()
        except OSError:
            found = None
        if found is None or found.st_size != file.size:
            journal.forget(index)
        needed += max(0, file.size - (found.st_blocks * 512 if found else 0))
    require_room(staging.data, needed)
    parents = {staging.data}
    for file in plan.files:
        path = staging.make_parent(file.path)
        StagedFile(path, file.size).close()
        parents.update(parent for parent in path.parents if staging.data in parent.parents)
    for parent in parents:
        flush_directory(parent)


class _Stopped(Exception):  # noqa: N818
    """The run is over for another reason."""


class _Output:
    """An output file that this process has claimed."""

    def __init__(self, plan: CopyPlan, index: int, staging: Staging, journal: Journal) -> None:
        file = plan.files[index]
        self.index = index
        self.size = file.size
        self.literals = file.literals
        self.done: Mapping[int, UnitRecord] = dict(journal.units.get(index, {}))
        self.staged = StagedFile(staging.data / file.path, file.size)
        self.parts = FileParts(file)
        self.checksums = HoleChecksums(file)
        # A checksum in front of its hole is not known when the digest would pass it.
        streams = all(
            at >= hole.offset + hole.nbytes for hole in file.holes for at in hole.crc_offsets
        )
        self.digest = FileDigest(self.checksums) if streams else None
        self.left = len(cut_file(file, plan.unit_bytes)) - 1  # units not handed out yet
        self._ends = 2 * self.left  # every unit is to be recorded, and to be digested
        self._units = plan.units(index)
        self._lock = threading.Lock()

    def next_unit(self) -> Unit | None:
        """Units are handed out in their order, so that the digest never waits for long."""
        with self._lock:
            unit = next(self._units, None)
            self.left -= unit is not None
            return unit

    def closes(self, ends: int = 1) -> bool:
        """Count ends; whether the file has no more."""
        with self._lock:
            self._ends -= ends
            return self._ends == 0

    def recall(self, unit: Unit, data: memoryview) -> bool:
        """Read a unit of an earlier run; whether its holes hold what was recorded."""
        record = self.done[unit.index]
        checks = PartChecksums(self.parts, unit.start, unit.stop)
        found: list[HolePart] = []
        for start in range(0, len(data), BLOCK_BYTES):
            block = data[start : start + BLOCK_BYTES]
            self.staged.read(block, unit.start + start)
            found += checks.update(unit.start + start, block)
        if tuple(found) != record.parts:
            return False
        self.parts.fill(unit.start, data)
        for part in found:
            self.checksums.add(part)
        return True

    def sha256(self) -> str:
        """Of the file, in hexadecimal; it is finished."""
        if self.digest is not None:
            return self.digest.hexdigest()
        digest = hashlib.sha256()
        block = memoryview(bytearray(BLOCK_BYTES))
        for start in range(0, self.size, BLOCK_BYTES):
            part = block[: self.size - start]
            self.staged.read(part, start)
            digest.update(part)
        return digest.hexdigest()


class _Run:
    """One process's share of a plan."""

    def __init__(
        self,
        plan: CopyPlan,
        source: Path,
        staging: Staging,
        journal: Journal,
        claims: Claims,
        task: Task,
        buffers: int,
    ) -> None:
        self._plan, self._source, self._staging = plan, source, staging
        self._journal, self._claims = journal, claims
        # Whole pages: the kernel copies from and to them in half the time.
        self._free = [memoryview(mmap(-1, _buffer_bytes(plan))) for _ in range(buffers)]
        by_size = sorted(range(len(plan.files)), key=lambda index: -plan.files[index].size)
        # Every task starts with its own; the rest is for when others are slow, or dead.
        shares = [by_size[first :: task.count] for first in range(task.count)]
        self._order = [*chain(*shares[task.rank :], *shares[: task.rank])]
        self._cuts = [cut_file(file, plan.unit_bytes) for file in plan.files]
        self._outputs: list[_Output] = []
        self._choosing = threading.RLock()
        self._changed = threading.Condition()
        self._stop = False
        self._failure: BaseException | None = None
        self.bytes_read = self.bytes_written = self.units = 0

    def work(self, workers: int, on_progress: Callable[[int], None] | None) -> None:
        """Work until all files are finished, by this process or another."""
        threads = [
            threading.Thread(target=self._guarded, name=f"reshard-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(_POLL_SECONDS)
                    if on_progress is not None:
                        on_progress(self._finished_bytes())
        finally:
            self._end()
            for thread in threads:
                thread.join()
            for output in self._outputs:
                output.staged.close()
        if self._failure is not None:
            raise self._failure

    def _finished_bytes(self) -> int:
        total = 0
        for index, file in enumerate(self._plan.files):
            if index in self._journal.files:
                total += file.size
                continue
            cuts = self._cuts[index]
            units = list(self._journal.units.get(index, ()))
            total += sum(cuts[unit + 1] - cuts[unit] for unit in units)
        return total

    def _end(self, failure: BaseException | None = None) -> None:
        with self._changed:
            self._stop = True
            self._failure = self._failure or failure
            self._changed.notify_all()

    def _guarded(self) -> None:
        try:
            with Sources(self._source) as sources:
                try:
                    self._loop(Gatherer(sources))
                finally:
                    with self._changed:
                        self.bytes_read += sources.bytes_read
        except _Stopped:
            pass
        except BaseException as error:  # work() raises it again
            self._end(error)

    def _loop(self, gatherer: Gatherer) -> None:
        output: _Output | None = None
        while len(self._journal.files) < len(self._plan.files):
            # The buffer first: a unit that is handed out is never without one, so the digest
            # always gets on, and buffers come back.
            buffer = self._take_buffer()
            output, unit = self._choose(output)
            if output is not None and unit is not None:
                self._do(output, unit, buffer, gatherer)
                continue
            self._return_buffer(buffer)
            with self._changed:
                self._changed.wait(_POLL_SECONDS)
            self._journal.refresh()

    def _take_buffer(self) -> memoryview:
        with self._changed:
            while not self._free and not self._stop:
                self._changed.wait()
            if self._stop:
                raise _Stopped
            return self._free.pop()

    def _return_buffer(self, buffer: memoryview) -> None:
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def _choose(self, output: _Output | None) -> tuple[_Output | None, Unit | None]:
        """More of the same file; else a file of one's own; else help where most is left."""
        if output is not None and (unit := output.next_unit()):
            return output, unit
        with self._choosing:
            opened = self._open_another()
            helped = sorted(self._outputs, key=lambda other: -other.left)
            for other in [opened, *helped] if opened else helped:
                if unit := other.next_unit():
                    return other, unit
        return None, None

    def _open_another(self) -> _Output | None:
        for index in self._order:
            name = f"file-{index}"
            if index in self._journal.files or not self._claims.acquire(name):
                continue
            self._journal.refresh()  # its last owner may have come further than we had seen
            if index in self._journal.files:
                self._claims.release(name)
                continue
            output = _Output(self._plan, index, self._staging, self._journal)
            self._outputs.append(output)
            if output.size:
                return output
            self._finish(output)
        return None

    def _do(self, output: _Output, unit: Unit, buffer: memoryview, gatherer: Gatherer) -> None:
        """Make a unit, or read it where an earlier run has; then see to its digest."""
        data = buffer[: unit.nbytes]
        digested = 0
        if unit.index not in output.done or not output.recall(unit, data):
            digested = self._make(output, unit, data, gatherer)

        def when_taken() -> None:
            self._return_buffer(buffer)
            self._close(output)

        if output.digest is None or digested == unit.nbytes:
            when_taken()
        else:
            output.digest.park(unit.start + digested, data[digested:], when_taken)
        if output.digest is not None:
            output.digest.take_parked()
        self._close(output)

    def _make(self, output: _Output, unit: Unit, data: memoryview, gatherer: Gatherer) -> int:
        """Gather a unit, write and record it; how many of its bytes went into the digest."""
        output.parts.fill(unit.start, data)
        checks = PartChecksums(output.parts, unit.start, unit.stop)
        parts = []
        begin = digested = told = 0
        for end in self._gathered(unit, data, gatherer):
            block, start = data[begin:end], unit.start + begin
            for part in checks.update(start, block):
                output.checksums.add(part)
                parts.append(part)
            if output.digest and digested == begin and output.digest.update(start, block):
                digested = end
            output.staged.write(block, start)
            begin = end
            if end - told >= _WRITE_BACK_BYTES or end == len(data):
                output.staged.begin_write_back(unit.start + told, end - told)
                told = end
        self._journal.append(UnitRecord(output.index, unit.index, tuple(parts)))
        with self._changed:
            self.bytes_written += unit.nbytes
            self.units += 1
        return digested

    def _gathered(self, unit: Unit, data: memoryview, gatherer: Gatherer) -> Iterator[int]:
        """Gather; yields how far from the start the unit is finished, a block or more at a time.

        In the file these are ends of pages, but for the last: a page written in parts costs twice.
        """
        told = 0
        for index, item in enumerate(unit.items):
            last = index + 1 == len(unit.items)
            following = len(data) if last else unit.items[index + 1].offset
            for step in steps(item):
                if self._stop:
                    raise _Stopped
                finished = min(step.offset, following)  # nothing later begins before this
                finished -= (unit.start + finished) % PAGESIZE
                if finished - told >= BLOCK_BYTES:
                    yield finished
                    told = finished
                self._copy(step, data, gatherer)
        if told < len(data):
            yield len(data)

    def _copy(self, step: CopyItem, data: memoryview, gatherer: Gatherer) -> None:
        try:
            gatherer.copy(step, data)
        except CheckpointError as error:
            raise CheckpointError(
                error.what,
                where=f"{error.where}, {step.tensor.kind} {step.tensor.name}",
                expected=error.expected,
                got=error.got,
                cure=error.cure,
            ) from error

    def _close(self, output: _Output) -> None:
        if output.closes():
            self._finish(output)

    def _finish(self, output: _Output) -> None:
        """Put the checksums in their places and record the file."""
        if output.done:  # of what an earlier run wrote, only the holes were checked
            for at, literal in output.literals:
                output.staged.write(memoryview(literal), at)
        for at, value in output.checksums.places():
            output.staged.write(value, at)
        output.staged.sync()
        record = FileRecord(output.index, output.sha256(), output.checksums.all())
        self._journal.append(record)
        self._claims.release(f"file-{output.index}")
        with self._choosing:
            self._outputs.remove(output)
        output.staged.close()
        with self._changed:
            self._changed.notify_all()
