"""Batch sizes that rise while a model trains: Aquila's ramp, and upstream's step schedule.

Arithmetic on whole numbers is exact. Upstream ignores ``--rampup-batch-size``; what it follows is
``--step-batch-size-schedule "tokens:batch,tokens:batch,..."``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd, isfinite

from flagscale.layout.parallel import Problem

__all__ = ["Ramp", "ScheduleEntry", "format_schedule", "parse_schedule", "verify_schedule"]

_SUFFIXES = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class ScheduleEntry:
    """From which token on a step takes how many samples."""

    first_token: int
    batch_size: int


@dataclass(frozen=True)
class Ramp:
    """A batch size that rises linearly, in equal increments.

    Args:
        start: Samples in the first step.
        end: Samples in a step once the ramp is over.
        increment: Samples a step gains at each rise.
        samples: Consumed samples at which the ramp is over.

    Raises:
        ValueError: A number is not positive, or the increments do not lead from start to end.
    """

    start: int
    end: int
    increment: int
    samples: int

    def __post_init__(self) -> None:
        if min(self.start, self.increment, self.samples) < 1:
            raise ValueError("start, increment and samples must be at least 1")
        if self.end <= self.start or (self.end - self.start) % self.increment:
            raise ValueError("end must be start plus a whole number of increments, at least one")
        if self.samples < self.rises:
            raise ValueError(f"samples must be at least the number of rises, {self.rises}")

    @property
    def rises(self) -> int:
        """How often the batch size rises."""
        return (self.end - self.start) // self.increment

    def schedule(self, seq_length: int) -> tuple[ScheduleEntry, ...]:
        """The ramp in tokens, for samples of ``seq_length`` of them.

        Rise k comes with the first sample at or after k/rises of the ramp.
        """
        return tuple(
            ScheduleEntry(
                -(-k * self.samples // self.rises) * seq_length, self.start + k * self.increment
            )
            for k in range(self.rises + 1)
        )


def format_schedule(schedule: Sequence[ScheduleEntry]) -> str:
    """A schedule as ``--step-batch-size-schedule`` takes it: one word, digits only."""
    return ",".join(f"{entry.first_token}:{entry.batch_size}" for entry in schedule)


def parse_schedule(text: str) -> tuple[ScheduleEntry, ...]:
    """Read what ``--step-batch-size-schedule`` takes, K, M, B and T included, in order.

    Raises:
        ValueError: The text is no schedule.
    """
    entries = []
    for word in text.replace(",", " ").split():
        first_token, colon, batch_size = word.partition(":")
        if not colon:
            raise ValueError(f"{word!r} is not TOKENS:BATCH")
        entries.append(ScheduleEntry(_number(first_token), _number(batch_size)))
    return tuple(sorted(entries, key=lambda entry: entry.first_token))


def verify_schedule(
    text: str, micro_batch_size: int, dp_size: int, seq_length: int
) -> list[Problem]:
    """What upstream would find out about a schedule in mid-run, or never; best empty.

    Args:
        text: As ``--step-batch-size-schedule`` takes it.
        micro_batch_size: Samples in one forward pass.
        dp_size: Replicas.
        seq_length: Tokens a sample.
    """
    where = "--step-batch-size-schedule"
    try:
        schedule = parse_schedule(text)
    except ValueError as error:
        return [
            Problem(
                "the batch-size schedule cannot be read", where,
                "TOKENS:BATCH,TOKENS:BATCH,...", str(error), "correct it",
            )
        ]  # fmt: skip
    samples = [entry.first_token // seq_length for entry in schedule]
    sizes = [entry.batch_size for entry in schedule]
    if (
        not schedule
        or samples[0] != 0
        or any(a >= b for a, b in pairwise(samples))
        or any(a >= b for a, b in pairwise([0, *sizes]))
    ):
        return [
            Problem(
                "the batch sizes of the schedule do not rise from its first token on",
                where,
                f"a first threshold of 0, and later ones at least {seq_length} tokens apart, "
                "each with a larger batch than the one before",
                text,
                "correct it",
            )
        ]
    for index, entry in enumerate(schedule):
        if entry.batch_size % (micro_batch_size * dp_size):
            fitting = _fitting_dp_sizes(sizes, micro_batch_size)
            near = sorted(sorted(fitting, key=lambda dp: abs(dp - dp_size))[:3])
            cure = "no DP fits: use another --micro-batch-size"
            if near:
                cure = f"run with DP {' or '.join(map(str, near))}, or another --micro-batch-size"
            return [
                Problem(
                    "a batch of the schedule does not divide into micro-batches of the replicas",
                    f"{where}, entry {index + 1} of {len(schedule)} "
                    f"({entry.first_token}:{entry.batch_size})",
                    f"a multiple of {micro_batch_size * dp_size} (--micro-batch-size "
                    f"{micro_batch_size} x DP {dp_size})",
                    str(entry.batch_size),
                    cure,
                )
            ]
    return []


def _fitting_dp_sizes(batch_sizes: Sequence[int], micro_batch_size: int) -> list[int]:
    """The data parallel sizes that divide every batch, in order."""
    common, rest = divmod(gcd(*batch_sizes), micro_batch_size)
    return [] if rest else [dp for dp in range(1, common + 1) if not common % dp]


def _number(text: str) -> int:
    """``768``, ``250B``, ``1.5M``; rounded as upstream does, for which 2.01K is 2009."""
    text = text.strip().upper()
    factor = _SUFFIXES.get(text[-1:], 1)
    value = float(text[:-1] if factor > 1 else text) * factor
    if not isfinite(value):
        raise ValueError(f"{text!r} is not a number of tokens or samples")
    return int(value)
