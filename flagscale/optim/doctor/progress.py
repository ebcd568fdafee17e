"""Whether what all ranks share of a checkpoint agrees with itself: how far the training was.

Iteration, samples, the scheduler (in samples) and the optimizer's steps count the same thing. An
iteration without a step of the optimizer (an overflow of fp16, one that was skipped, or those
before a start without the optimizer's states) leaves steps and scheduler behind, both of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flagscale.optim.doctor.findings import Finding, Kind
from flagscale.optim.source import Source

__all__ = ["check_common", "param_groups"]


def check_common(source: Source, iteration: int) -> tuple[list[Finding], list[str]]:
    """What does not agree, and what is odd.

    Args:
        source: The opened checkpoint.
        iteration: That its directory names; 0 for a release, which names none.
    """
    notes: list[str] = []
    findings = [
        Finding(Kind.COMMON, where, what)
        for where, what in _disagreements(source, iteration, notes)
    ]
    return findings, notes


def _disagreements(source: Source, iteration: int, notes: list[str]) -> Iterator[tuple[str, str]]:
    stored = source.common.get("iteration")
    if type(stored) is not int or (iteration and stored != iteration):
        yield "iteration", f"{stored!a} is stored, and the directory is of iteration {iteration}"
        stored = iteration
    steps = {group.get("step") for group in param_groups(source)} - {None}
    steps = steps or {source.steps}
    step = min(steps, default=None, key=str)
    if len(steps) != 1 or type(step) is not int:
        shown = ", ".join(sorted(map(ascii, steps)))
        yield "optimizer, step", f"the parameter groups have done {shown[:200]} steps"
        return
    args = vars(source.args)
    consumed = _number(args.get("consumed_train_samples"))
    skipped = _number(args.get("skipped_train_samples")) or 0
    scheduler = source.common.get("opt_param_scheduler")
    done = _number(scheduler.get("num_steps")) if isinstance(scheduler, dict) else None
    if not stored:  # a release
        return
    if consumed is None or done is None:
        what = "consumed_train_samples" if consumed is None else "opt_param_scheduler"
        yield what, "is not stored, or is no number of samples"
        return
    if step > stored:
        yield "optimizer, step", f"{step} steps were done in {stored} iterations"
    behind, missing = stored - step, consumed - skipped - done
    if missing < 0:
        yield (
            "opt_param_scheduler, num_steps",
            f"it is at sample {done}, and {consumed} were consumed, {skipped} of them skipped",
        )
    elif behind > 0 and not missing and not skipped:
        yield (
            "optimizer, step",
            f"{step} steps in {stored} iterations, but the scheduler has seen all {done} samples",
        )
    elif missing and behind <= 0:
        yield (
            "opt_param_scheduler, num_steps",
            f"it is at sample {done} of {consumed - skipped} after {step} steps in as many "
            "iterations: it or consumed_train_samples is wrong",
        )
    elif missing or behind > 0:
        notes.append(
            f"{behind} of {stored} iterations were no step of the optimizer (overflow, skipped, or "
            "a start without its states)"
        )
    batch = _number(args.get("global_batch_size"))
    if batch and not _varies(args) and consumed != stored * batch:
        notes.append(
            f"{consumed} samples are not {stored} iterations of {batch}: right only if the batch "
            "size was another one once"
        )


def _varies(args: dict[str, Any]) -> bool:
    return bool(args.get("step_batch_size_schedule") or args.get("rampup_batch_size"))


def _number(value: object) -> int | None:
    return value if type(value) is int and value >= 0 else None


def param_groups(source: Source) -> list[Mapping[str, Any]]:
    """The parameter groups of all optimizers."""
    states = [state.get("optimizer") for state in source.optimizers]
    groups = [state.get("param_groups") for state in states if isinstance(state, dict)]
    lists = [some for some in groups if isinstance(some, list)]
    return [group for some in lists for group in some if isinstance(group, dict)]
