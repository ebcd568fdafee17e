"""Batch sizes: from which consumed sample on a step takes how many.

Constant, by ``--step-batch-size-schedule``, or by the linear ramp that releases before 0.18
obeyed.

Source: megatron-core 0.19.2, core/num_microbatches_calculator.py; 0.17.1 for the ramp.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from flagscale.data_inspect.arguments import DataArguments
from flagscale.errors import ConfigError
from flagscale.layout.ramp import parse_schedule

__all__ = ["BatchSize", "plan_batch_sizes"]

SCHEDULE = "--step-batch-size-schedule"
RAMPUP = "--rampup-batch-size"
MOST = 2**26
"""More samples than any step takes."""


@dataclass(frozen=True)
class BatchSize:
    """From which sample on a step has which size.

    Args:
        first_sample: Consumed samples at which it begins to hold.
        size: As the schedule has it.
        running: Samples that a step really takes, whole micro batches of all ranks; ``None`` if
            the size does not divide, so that the job ends when it comes to it.
    """

    first_sample: int
    size: int
    running: int | None


def plan_batch_sizes(args: DataArguments) -> tuple[BatchSize, ...]:
    """All batch sizes of a run, by first sample, from 0 on.

    Args:
        args: Of one start.

    Raises:
        ConfigError: Upstream would refuse them.
    """
    sizes = (args.global_batch_size, args.micro_batch_size, args.dp_size, args.seq_length)
    if min(sizes) < 1 or args.global_batch_size > MOST:
        raise ConfigError(
            "a batch or sample has an impossible size",
            where="--global-batch-size, --micro-batch-size, data-parallel size, --seq-length",
            expected=f"at least 1 each, and at most {MOST} samples a step",
            got=", ".join(map(str, sizes)),
            cure="give the arguments of the run",
        )
    whole = args.micro_batch_size * args.dp_size
    decrease = args.decrease_batch_size_if_needed
    return tuple(
        BatchSize(first, size, _running_size(size, whole, decrease)) for first, size in _sizes(args)
    )


def _running_size(size: int, whole: int, decrease: bool) -> int | None:
    running = size - size % whole
    return running if running and (decrease or running == size) else None


def _sizes(args: DataArguments) -> list[tuple[int, int]]:
    """``(first sample, batch size)``, in order, from 0 on."""
    if args.step_batch_size_schedule is not None:
        return _step_sizes(args, args.step_batch_size_schedule)
    if args.rampup_batch_size is not None:
        return _ramp_sizes(args.rampup_batch_size, args.global_batch_size)
    return [(0, args.global_batch_size)]


def _step_sizes(args: DataArguments, text: str) -> list[tuple[int, int]]:
    if args.decrease_batch_size_if_needed:
        raise ConfigError(
            "upstream refuses to decrease batches of a schedule",
            where=f"{SCHEDULE}, --decrease-batch-size-if-needed",
            cure="give the arguments of the run",
        )
    try:
        entries = parse_schedule(text)
    except (ValueError, ZeroDivisionError) as error:
        raise _schedule_error(text) from error
    sizes = [(entry.first_token // args.seq_length, entry.batch_size) for entry in entries]
    firsts = [first for first, _ in sizes]
    rises = all(a < b for a, b in pairwise(firsts))
    if not sizes or firsts[0] != 0 or not rises or not all(0 < size <= MOST for _, size in sizes):
        raise _schedule_error(text)
    return sizes


def _schedule_error(text: str) -> ConfigError:
    return ConfigError(
        "the batch-size schedule is not one",
        where=SCHEDULE,
        expected="TOKENS:BATCH,TOKENS:BATCH,... from 0 tokens on, each at another sample",
        got=text,
        cure="give the argument of the run",
    )


def _ramp_sizes(ramp: tuple[int, int, int], end: int) -> list[tuple[int, int]]:
    start, increment, samples = ramp
    rises, rest = divmod(end - start, increment) if increment > 0 else (0, 1)
    if min(start, samples) < 1 or rises < 1 or rest:
        raise ConfigError(
            "the ramp does not lead to the global batch size",
            where=RAMPUP,
            expected=f"START INCREMENT SAMPLES, from START in whole increments to {end}",
            got=" ".join(map(str, ramp)),
            cure="give the arguments of the run",
        )
    per_rise = samples / rises
    sizes = [(_first_at(k, per_rise), start + k * increment) for k in range(rises + 1)]
    # Upstream divides in floating point, and only up to the end of the ramp. Rises less than a
    # sample apart begin together: the last of them holds.
    by_first = dict(sizes)
    by_first = {first: size for first, size in by_first.items() if first <= samples}
    if max(by_first.values()) != end:
        by_first[samples + 1] = end
    return sorted(by_first.items())


def _first_at(rise: int, per_rise: float) -> int:
    """The first sample at which so many rises have happened, by upstream's own division."""
    first = max(0, int(rise * per_rise) - 1)
    while int(first / per_rise) < rise:
        first += 1
    return first
