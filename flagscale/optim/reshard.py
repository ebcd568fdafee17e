"""A reshard from end to end: what is to be done, and that it was done right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from flagscale.ckpt_copy import run as copying
from flagscale.ckpt_copy.run import Copy, Outcome, Verify
from flagscale.errors import CheckpointError
from flagscale.optim.carry import Request
from flagscale.optim.proof import compare
from flagscale.optim.source import Source, damage_named
from flagscale.optim.target import CkptFormat, OptimFormat, Target, plan_target

__all__ = ["Reshard", "plan", "run"]


@dataclass(frozen=True)
class Reshard:
    """What is to be done, all of it, before anything is.

    Args:
        source: The opened checkpoint.
        target: What is to be written.
        copy: How to get from one to the other.
    """

    source: Source
    target: Target
    copy: Copy


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
    copy = copying.prepare(
        source.directory,
        (*source.pieces, *target.grown),
        target.files,
        target.pieces,
        zero_fill=target.zero_fill,
        unit_bytes=unit_bytes,
    )
    return Reshard(source, target, copy)


def run(
    reshard: Reshard,
    save_dir: Path,
    *,
    workers: int = 2,
    max_memory: int = 1 << 30,
    verify: Verify = "sample",
    restart: bool = False,
    on_progress: Callable[[int], None] | None = None,
) -> tuple[Outcome, int]:
    """Do what was planned, and publish it when it has proved itself.

    Args:
        reshard: The plan.
        save_dir: As ``--save`` takes it.
        workers: Threads of this process.
        max_memory: Bytes that their buffers may take.
        verify: Whether a sample of each parameter is read back and proved, or every element, and
            every file against its digest.
        restart: Throw away what an earlier run has left.
        on_progress: Called with the bytes finished, of ``reshard.copy.plan.total_bytes``.

    Returns:
        What came of it, and how many parameters this process has proved: their main copy, read back
        and rounded, is the weight read back.

    Raises:
        CheckpointError: The destination exists, a source is damaged, the disk is full, or what was
            written does not prove itself: then nothing is published.
    """
    proved = 0

    def prove(staged: Path) -> None:
        nonlocal proved
        proved = _prove(staged, reshard.target, full=verify == "full")

    iteration = reshard.source.iteration
    outcome = copying.run(
        reshard.copy,
        save_dir / f"iter_{iteration:07d}",
        tracker=iteration,
        prove=prove,
        workers=workers,
        max_memory=max_memory,
        verify=verify,
        restart=restart,
        on_progress=on_progress,
    )
    return outcome, proved


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
