"""What the two programs of a conversion have in common: writing, with the proof in between."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from flagscale.ckpt_convert.proof.claim import Claim, Level, prove, verify_tensors
from flagscale.ckpt_copy.run import Copy, run
from flagscale.console import progress

__all__ = ["proved", "written"]


def proved(
    weights: Claim,
    states: Iterable[Claim],
    level: Level,
    on_progress: Callable[[int], None] | None = None,
) -> Iterator[str]:
    """Prove a conversion; what was proved, line by line.

    Args:
        weights: What is to be proved of the model.
        states: And of the states of the optimizer, if there are any.
        level: How much of it; ``"none"`` leaves out the states as well.
        on_progress: Called with the bytes of weights compared.

    Raises:
        VerificationError: It is not true.
    """
    yield from prove(weights, level, on_progress).report()
    for claim in states if level != "none" else ():
        verify_tensors(claim)
        yield f"{claim.kind:<20}{len(claim.tensors):,} tensors: equal"


def written(
    copy: Copy,
    destination: Path,
    tracker: str | None,
    proof: Callable[[Path], Iterable[str]],
    arguments: argparse.Namespace,
) -> list[str]:
    """Carry out a copy under a progress bar; what came of it, line by line.

    Args:
        copy: The plan.
        destination: The directory to be.
        tracker: As :func:`flagscale.ckpt_copy.run.run` takes it.
        proof: Proves the finished files in a directory, and says what it has proved.
        arguments: ``workers``, ``max_memory`` and ``restart``.
    """
    told: list[str] = []
    with progress("writing", copy.plan.total_bytes) as on_progress:
        outcome = run(
            copy,
            destination,
            tracker=tracker,
            prove=lambda staged: told.extend(proof(staged)),
            workers=arguments.workers,
            max_memory=arguments.max_memory,
            restart=arguments.restart,
            on_progress=on_progress,
        )
    return [*outcome.report(), *told]
