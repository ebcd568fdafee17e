"""Batch ramps: against the published formula, through upstream's own calculator."""

from __future__ import annotations

import warnings
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.layout.ramp import (
    Ramp,
    ScheduleEntry,
    format_schedule,
    parse_schedule,
    verify_schedule,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.num_microbatches_calculator import StepBatchsizeNumMicroBatchesCalculator

RAMP_34B = Ramp(start=32, end=1024, increment=32, samples=2_000_000)
RAMP_70B = Ramp(start=48, end=1056, increment=48, samples=2_000_000)


def published_batch_size(ramp: Ramp, consumed_samples: int) -> int:
    """The rule of the published ``--rampup-batch-size``: equal stretches of samples."""
    stretch = Fraction(ramp.samples * ramp.increment, ramp.end - ramp.start)
    return min(ramp.end, ramp.start + consumed_samples // stretch * ramp.increment)


def upstream_calculator(
    schedule: str, seq_length: int, samples: int
) -> StepBatchsizeNumMicroBatchesCalculator:
    return StepBatchsizeNumMicroBatchesCalculator(samples, 1, False, 1, schedule, seq_length)


@pytest.mark.parametrize("ramp", [RAMP_34B, RAMP_70B], ids=["34B", "70B"])
def test_every_iteration_of_the_ramp_has_the_published_batch(ramp: Ramp) -> None:
    calculator = upstream_calculator(format_schedule(ramp.schedule(4096)), 4096, ramp.start)
    consumed = 0
    sizes = []
    for _ in range(8219):  # the ramp of 34B, and a hundred iterations more
        calculator.update(consumed, consistency_check=True)
        sizes.append(calculator.get_current_global_batch_size())
        assert sizes[-1] == published_batch_size(ramp, consumed)
        consumed += sizes[-1]
    assert len(set(sizes)) == ramp.rises + 1
    assert sizes[-1] == ramp.end


def test_the_published_schedule_of_34b() -> None:
    schedule = RAMP_34B.schedule(4096)
    assert len(schedule) == 32
    assert schedule[0] == ScheduleEntry(0, 32)
    assert schedule[1] == ScheduleEntry(64517 * 4096, 64)  # 2000000 / 31 = 64516.1
    assert schedule[-1] == ScheduleEntry(2_000_000 * 4096, 1024)


ramps = st.builds(
    lambda start, rises, increment, more: Ramp(
        start, start + rises * increment, increment, rises + more
    ),
    start=st.integers(1, 100),
    rises=st.integers(1, 50),
    increment=st.integers(1, 100),
    more=st.integers(0, 10**7),
)


@settings(max_examples=200, deadline=None)
@given(ramp=ramps, seq_length=st.integers(1, 10**5), data=st.data())
def test_any_ramp_is_the_published_rule(ramp: Ramp, seq_length: int, data: st.DataObject) -> None:
    text = format_schedule(ramp.schedule(seq_length))
    calculator = upstream_calculator(text, seq_length, 1)
    edges = [entry.first_token // seq_length for entry in ramp.schedule(seq_length)]
    near = st.sampled_from(edges).flatmap(lambda edge: st.integers(max(0, edge - 1), edge + 1))
    consumed = data.draw(near | st.integers(0, 2 * ramp.samples))
    calculator.update(consumed, consistency_check=False)
    assert calculator.get_current_global_batch_size() == published_batch_size(ramp, consumed)
    assert parse_schedule(text) == ramp.schedule(seq_length)
    assert verify_schedule(text, 1, 1, seq_length) == []


@pytest.mark.parametrize("text", ["0:768 250B:1536", "0:1,1.5M:2, 2k:3", "4:2,0:1", "0:1,2.01K:2"])
def test_schedules_are_read_as_upstream_reads_them(text: str) -> None:
    ours = [(entry.first_token, entry.batch_size) for entry in parse_schedule(text)]
    assert ours == upstream_calculator(text, 1, 1).schedule


@pytest.mark.parametrize(
    "numbers",
    [(0, 4, 1, 9), (1, 4, 0, 9), (1, 1, 1, 9), (4, 1, 1, 9), (1, 4, 2, 9), (1, 4, 1, 2)],
)
def test_ramps_that_cannot_be(numbers: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        Ramp(*numbers)


@pytest.mark.parametrize(
    ("text", "micro_batch_size", "dp_size", "where", "cure"),
    [
        (format_schedule(RAMP_34B.schedule(4096)), 1, 64, "entry 1 of 32 (0:32)", "8 or 16 or 32"),
        (format_schedule(RAMP_70B.schedule(4096)), 2, 32, "entry 1 of 22 (0:48)", "24"),
        ("0:64,4096000:96", 1, 64, "entry 2 of 2", "32"),
        ("0:3,4096000:4", 2, 1, "entry 1 of 2", "no DP fits"),
        ("0:32,x:64", 1, 1, "--step-batch-size-schedule", "correct"),
        ("0:32,inf:64", 1, 1, "--step-batch-size-schedule", "correct"),
        ("32", 1, 1, "--step-batch-size-schedule", "correct"),
        ("", 1, 1, "--step-batch-size-schedule", "correct"),
        ("5000:32", 1, 1, "--step-batch-size-schedule", "correct"),
        ("0:32,4095:64", 1, 1, "--step-batch-size-schedule", "correct"),
        ("0:32,4096:32", 1, 1, "--step-batch-size-schedule", "correct"),
        ("0:0,4096:32", 1, 1, "--step-batch-size-schedule", "correct"),
    ],
)
def test_each_mistake_is_one_problem_with_its_place_and_cure(
    text: str, micro_batch_size: int, dp_size: int, where: str, cure: str
) -> None:
    (problem,) = verify_schedule(text, micro_batch_size, dp_size, 4096)
    assert where in problem.where
    assert cure in problem.cure
