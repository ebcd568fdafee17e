"""A copy from end to end: plan, verify the plan, execute, prove what was written, publish."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from flagscale.ckpt_copy.execute import execute_plan
from flagscale.ckpt_copy.plan import CopyPlan, Unit, plan_copy
from flagscale.ckpt_copy.verify import verify_plan
from flagscale.ckpt_io.claims import Task
from flagscale.ckpt_io.manifest import verify_manifest, write_manifest
from flagscale.ckpt_io.output import OutputFile
from flagscale.ckpt_io.publish import publish
from flagscale.ckpt_io.readback import read_back_holes
from flagscale.errors import CheckpointError
from flagscale.layout.pieces import Piece, TensorKey

__all__ = ["Copy", "Outcome", "Verify", "conversions", "measure_speed", "prepare", "run"]

Verify = Literal["sample", "full"]
"""How much of what was written is read back: holes of some size, or every file."""

_PROBE_BYTES: Final = 64 << 20
_READ_BACK_BYTES: Final = 64 << 20  # of a sample, drawn from all that was written


@dataclass(frozen=True)
class Copy:
    """A plan that writes every element of its files exactly once.

    Args:
        source: Directory of the source's files.
        plan: The plan.
        bytes_read: That it reads from the source.
    """

    source: Path
    plan: CopyPlan
    bytes_read: int


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        directory: What was published.
        bytes_read: By this process.
        bytes_written: By this process.
        seconds: From the first read to the publication.
        published: Whether this process, of several, did the last step.
    """

    directory: Path
    bytes_read: int
    bytes_written: int
    seconds: float
    published: bool

    def report(self) -> Iterator[str]:
        """Line by line."""
        speed = self.bytes_written / max(self.seconds, 1e-9) / 1e9
        who = "" if self.published else " (published by another task)"
        yield f"done              {self.directory}{who}"
        yield (
            f"                  {self.bytes_written:,} bytes in {self.seconds:.1f} s, "
            f"{speed:.2f} GB/s"
        )


def conversions(sources: Iterable[Piece], targets: Iterable[Piece]) -> set[tuple[str, str]]:
    """The ``(source type, target type)`` that differ between pieces of the same tensors."""
    wanted: dict[TensorKey, set[str]] = {}
    for piece in targets:
        wanted.setdefault(piece.tensor, set()).add(piece.dtype)
    return {
        (piece.dtype, dtype)
        for piece in sources
        for dtype in wanted.get(piece.tensor, ())
        if dtype != piece.dtype
    }


def prepare(
    source: Path,
    pieces: Sequence[Piece],
    files: Sequence[OutputFile],
    targets: Sequence[Piece],
    *,
    zero_fill: Collection[TensorKey] = (),
    conversions: Collection[tuple[str, str]] = (),
    unit_bytes: int = 32 << 20,
) -> Copy:
    """Plan a copy and check the plan to the last element; touches no file but the sources' sizes.

    Args:
        source: Directory of the source's files.
        pieces: What to fill the target from, by priority.
        files: The output files.
        targets: What their holes hold.
        zero_fill: Tensors that are zero where no piece has them.
        conversions: ``(source type, target type)`` that may differ.
        unit_bytes: Upper bound of a unit of work.

    Raises:
        CheckpointError: The plan would not write every element exactly once.
    """
    plan = plan_copy(
        pieces,
        files,
        targets,
        unit_bytes=unit_bytes,
        conversions=conversions,
        zero_fill=zero_fill,
    )
    sizes = {file: (source / file).stat().st_size for file in plan.source_files}
    read = 0

    def counted(file: int) -> Iterator[Unit]:
        nonlocal read
        for unit in plan.units(file):
            read += sum(item.nbytes for item in unit.items if item.source is not None)
            yield unit

    if problems := verify_plan(plan, sizes, counted):
        listed = "".join(f"\n    {problem}" for problem in problems[:10])
        raise CheckpointError(
            "the plan does not write every element of the target exactly once",
            where=str(source),
            expected="no problem",
            got=f"{len(problems)}:{listed}",
            cure="nothing was written; the checkpoint does not hold what its arguments say",
        )
    return Copy(source, plan, read)


def run(
    copy: Copy,
    destination: Path,
    *,
    tracker: int | str | None,
    prove: Callable[[Path], None],
    workers: int = 2,
    max_memory: int = 1 << 30,
    verify: Verify = "sample",
    restart: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Do what was planned, and publish it when it has proved itself.

    Args:
        copy: The plan.
        destination: The directory to be.
        tracker: For the file beside it that names the last checkpoint: an iteration, or
            ``"release"``; ``None``: there is no such file.
        prove: Called with the directory that holds the finished files; raises if they are wrong.
        workers: Threads of this process.
        max_memory: Bytes that their buffers may take.
        verify: What is read back and held against its checksums.
        restart: Throw away what an earlier run has left.
        on_progress: Called with the bytes finished, of ``copy.plan.total_bytes``.

    Raises:
        CheckpointError: The destination exists, a source is damaged, the disk is full, or what was
            written does not prove itself: then nothing is published.
    """
    begun = time.perf_counter()
    done = execute_plan(
        copy.plan,
        copy.source,
        destination,
        workers=workers,
        max_memory=max_memory,
        restart=restart,
        task=Task.of_environment(),
        on_progress=on_progress,
    )

    def complete(staged: Path, digests: Mapping[str, str]) -> None:
        prove(staged)
        write_manifest(staged, digests)
        if verify == "full":
            problems = list(verify_manifest(staged))
        else:
            files, crcs = copy.plan.files, done.hole_crcs
            problems = read_back_holes(staged, files, crcs, sample_bytes=_READ_BACK_BYTES)
        if problems:
            raise CheckpointError(
                "a file does not read back as it was written",
                where=str(staged),
                got=problems[0],
                cure="the disk is at fault; nothing was published",
            )

    published = publish(done.staging, tracker, dict(done.digests), complete)
    seconds = time.perf_counter() - begun
    return Outcome(destination, done.bytes_read, done.bytes_written, seconds, published)


def measure_speed(source: Path, place: Path) -> float | None:
    """Bytes a second from the files of a source to one at another place, on a sample.

    The file has no name and is gone when it is closed. ``None`` where none can be made.
    """
    while not place.is_dir():
        place = place.parent
    largest = max(source.rglob("*"), key=lambda path: path.lstat().st_size)
    try:
        with largest.open("rb") as reader, tempfile.TemporaryFile(dir=place) as writer:
            begun = time.perf_counter()
            data = reader.read(_PROBE_BYTES)
            writer.write(data)
            writer.flush()
            os.fsync(writer.fileno())
            return len(data) / max(time.perf_counter() - begun, 1e-6)
    except OSError:
        return None
