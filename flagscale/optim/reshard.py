"""A reshard from end to end: open, plan, verify, execute, prove, publish."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from flagscale.ckpt_copy.execute import execute_plan
from flagscale.ckpt_copy.plan import CopyPlan, Unit, plan_copy
from flagscale.ckpt_copy.verify import verify_plan
from flagscale.ckpt_io.claims import Task
from flagscale.ckpt_io.manifest import verify_manifest, write_manifest
from flagscale.ckpt_io.publish import publish
from flagscale.ckpt_io.readback import read_back_holes
from flagscale.errors import CheckpointError
from flagscale.layout.pieces import Piece, TensorKey
from flagscale.optim.carry import Request
from flagscale.optim.proof import compare
from flagscale.optim.source import Source, damage_named
from flagscale.optim.target import CkptFormat, OptimFormat, Target, plan_target

__all__ = ["Outcome", "Reshard", "fill", "measure_speed", "plan", "run"]

_PROBE_BYTES: Final = 64 << 20
_READ_BACK_BYTES: Final = 64 << 20  # of a sample, drawn from all that was written


@dataclass(frozen=True)
class Reshard:
    """What is to be done, all of it, before anything is.

    Args:
        source: The opened checkpoint.
        target: What is to be written.
        plan: How to get from one to the other.
        bytes_read: That the plan reads from the source.
    """

    source: Source
    target: Target
    plan: CopyPlan
    bytes_read: int


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Args:
        directory: Of the iteration, published.
        bytes_read: By this process.
        bytes_written: By this process.
        seconds: From the first read to the publication.
        published: Whether this process, of several, did the last step.
        proved: Parameters whose main copy, read back and rounded, is the weight read back.
    """

    directory: Path
    bytes_read: int
    bytes_written: int
    seconds: float
    published: bool
    proved: int


def plan(
    source: Source,
    request: Request,
    ckpt_format: CkptFormat = "torch_dist",
    optim_format: OptimFormat = "fully_reshardable",
    *,
    unit_bytes: int = 32 << 20,
) -> Reshard:
    """Plan a reshard and check the plan to the last element; touches no file but their sizes.

    Args:
        source: The opened checkpoint.
        request: The layout to go to.
        ckpt_format: Upstream's name of the format to write.
        optim_format: How ``torch_dist`` is to store the optimizer's states.
        unit_bytes: Upper bound of a unit of work.

    Raises:
        ConfigError: The model does not fit the layout.
        CheckpointError: The source does not hold what the target needs.
    """
    with damage_named(source.directory):
        target = plan_target(source, request, ckpt_format, optim_format)
    pieces = (*source.pieces, *target.grown)
    return fill(source, target, pieces, zero_fill=target.zero_fill, unit_bytes=unit_bytes)


def fill(
    source: Source,
    target: Target,
    pieces: Sequence[Piece],
    *,
    zero_fill: Collection[TensorKey],
    conversions: Collection[tuple[str, str]] = (),
    unit_bytes: int = 32 << 20,
) -> Reshard:
    """Plan how to fill a target from pieces of the source, and check it to the last element.

    Args:
        source: The opened checkpoint.
        target: What is to be written.
        pieces: What to fill it from, by priority.
        zero_fill: Tensors that are zero where no piece has them.
        conversions: ``(source type, target type)`` that may differ.
        unit_bytes: Upper bound of a unit of work.

    Raises:
        CheckpointError: The plan would not write every element exactly once.
    """
    made = plan_copy(
        pieces,
        target.files,
        target.pieces,
        unit_bytes=unit_bytes,
        conversions=conversions,
        zero_fill=zero_fill,
    )
    sizes = {file: (source.directory / file).stat().st_size for file in made.source_files}
    read = 0

    def counted(file: int) -> Iterator[Unit]:
        nonlocal read
        for unit in made.units(file):
            read += sum(item.nbytes for item in unit.items if item.source is not None)
            yield unit

    if problems := verify_plan(made, sizes, counted):
        listed = "".join(f"\n    {problem}" for problem in problems[:10])
        raise CheckpointError(
            "the plan does not write every element of the target exactly once",
            where=str(source.directory),
            expected="no problem",
            got=f"{len(problems)}:{listed}",
            cure="nothing was written; the checkpoint does not hold what its arguments say",
        )
    return Reshard(source, target, made, read)


def run(
    reshard: Reshard,
    save_dir: Path,
    *,
    workers: int = 2,
    max_memory: int = 1 << 30,
    verify: Literal["sample", "full"] = "sample",
    restart: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> Outcome:
    """Do what was planned, and publish it when it has proved itself.

    Args:
        reshard: The plan.
        save_dir: As ``--save`` takes it.
        workers: Threads of this process.
        max_memory: Bytes that their buffers may take.
        verify: Whether a sample of each parameter is read back and proved, or every element, and
            every file against its digest.
        restart: Throw away what an earlier run has left.
        on_progress: Called with the bytes finished, of ``reshard.plan.total_bytes``.

    Raises:
        CheckpointError: The destination exists, a source is damaged, the disk is full, or what was
            written does not prove itself: then nothing is published.
    """
    begun = time.perf_counter()
    source, target = reshard.source, reshard.target
    destination = save_dir / f"iter_{source.iteration:07d}"
    done = execute_plan(
        reshard.plan,
        source.directory,
        destination,
        workers=workers,
        max_memory=max_memory,
        restart=restart,
        task=Task.of_environment(),
        on_progress=on_progress,
    )
    proved = 0

    def complete(staged: Path, digests: Mapping[str, str]) -> None:
        nonlocal proved
        proved = _prove(staged, target, full=verify == "full")
        write_manifest(staged, digests)
        if verify == "full":
            problems = list(verify_manifest(staged))
        else:
            files, crcs = reshard.plan.files, done.hole_crcs
            problems = read_back_holes(staged, files, crcs, sample_bytes=_READ_BACK_BYTES)
        if problems:
            raise CheckpointError(
                "a file does not read back as it was written",
                where=str(staged),
                got=problems[0],
                cure="the disk is at fault; nothing was published",
            )

    published = publish(done.staging, source.iteration, dict(done.digests), complete)
    return Outcome(
        destination,
        done.bytes_read,
        done.bytes_written,
        time.perf_counter() - begun,
        published,
        proved,
    )


def _prove(staged: Path, target: Target, *, full: bool) -> int:
    weights = [piece for piece in target.pieces if piece.tensor.kind == "weight"]
    mains = [piece for piece in target.pieces if piece.tensor.kind == "param"]
    wrong = list(compare(staged, weights, mains, full=full))
    if wrong:
        listed = "".join(f"\n    {mismatch}" for mismatch in wrong[:10])
        raise CheckpointError(
            "main copies that were written are not the weights that were written",
            where=str(staged),
            expected="every main copy, rounded, is the weight",
            got=f"{len(wrong)} parameters differ:{listed}",
            cure="nothing was published; --check on the source says how it is damaged",
        )
    return len({piece.tensor for piece in mains})


def measure_speed(source: Source, save_dir: Path) -> float | None:
    """Bytes a second from the source to a file beside the destination, on a sample.

    The file has no name and is gone when it is closed. ``None`` where none can be made.
    """
    place = save_dir
    while not place.is_dir():
        place = place.parent
    largest = max(source.directory.rglob("*"), key=lambda path: path.lstat().st_size)
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
