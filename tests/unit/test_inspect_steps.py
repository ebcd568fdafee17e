"""Iterations and consumed samples: against upstream's calculators, stepped as its loop steps."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flagscale.data_inspect.arguments import Blend, DataArguments
from flagscale.data_inspect.steps import (
    FRESH,
    Phase,
    Start,
    StepRange,
    last_iteration,
    num_train_samples,
    phase_of,
    plan_schedule,
)
from flagscale.errors import ConfigError, DataError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import num_microbatches_calculator as upstream
    from megatron.training import training

ARGS = DataArguments(
    blend=Blend(("a",), None),
    split="1",
    seed=1,
    seq_length=8,
    train_samples=None,
    train_iters=100,
    global_batch_size=12,
    micro_batch_size=1,
    dp_size=1,
)


class Ramp:
    """The ramp of releases before 0.18, from its published rule, in floating point as there."""

    def __init__(self, args: DataArguments) -> None:
        assert args.rampup_batch_size is not None
        self.start, self.increment, self.samples = args.rampup_batch_size
        self.end = args.global_batch_size
        self.per_rise = self.samples / ((self.end - self.start) // self.increment)
        self.whole = args.micro_batch_size * args.dp_size

    def update(self, consumed: int, consistency_check: bool) -> None:
        self.size = self.end
        if consumed <= self.samples:
            self.size = self.start + int(consumed / self.per_rise) * self.increment

    def get(self) -> int:
        return self.size // self.whole

    def get_current_global_batch_size(self) -> int:
        return self.size


def calculator(args: DataArguments) -> Any:
    if args.step_batch_size_schedule is None and args.rampup_batch_size is not None:
        return Ramp(args)
    return upstream._build_num_microbatches_calculator(
        1,
        args.global_batch_size,
        args.micro_batch_size,
        args.dp_size,
        args.decrease_batch_size_if_needed,
        args.step_batch_size_schedule,
        args.seq_length,
    )


def loop(args: DataArguments, start: Start) -> Iterator[StepRange]:
    """Upstream's training loop, without the training."""
    sizes = calculator(args)
    iteration, consumed = start.iteration, start.consumed
    while True:
        sizes.update(consumed, consistency_check=not args.decrease_batch_size_if_needed)
        skipped = iteration + 1 in args.iterations_to_skip
        after = consumed + args.dp_size * args.micro_batch_size * sizes.get()
        yield StepRange(iteration + 1, consumed, after, sizes.get(), skipped)
        iteration, consumed = iteration + 1, after
        if not skipped and iteration in args.phase_transition_iterations:
            return


def check(args: DataArguments, start: Start, steps: int) -> None:
    schedule = plan_schedule(args)
    for _, expected in zip(range(steps), loop(args, start), strict=False):
        assert schedule.step_range(start, expected.iteration) == expected
        assert schedule.batch_size(expected.consumed_before) == (
            expected.consumed_after - expected.consumed_before
        )
        for index in {expected.consumed_before, expected.consumed_after - 1}:
            assert schedule.iteration_of(start, index) == expected.iteration


starts = st.one_of(
    st.just(FRESH), st.builds(Start, st.integers(0, 10**7), st.integers(0, 3 * 10**3))
)


@st.composite
def ranks(draw: st.DrawFn) -> dict[str, int]:
    return {"micro_batch_size": draw(st.integers(1, 4)), "dp_size": draw(st.integers(1, 4))}


@given(ranks(), st.integers(1, 40), starts, st.booleans(), st.sets(st.integers(1, 60)))
@settings(deadline=None)
def test_constant_batches(
    sizes: dict[str, int], batch: int, start: Start, decrease: bool, skip: set[int]
) -> None:
    whole = sizes["micro_batch_size"] * sizes["dp_size"]
    batch = max(batch, whole) if decrease else batch * whole
    check(
        replace(
            ARGS,
            **sizes,
            global_batch_size=batch,
            decrease_batch_size_if_needed=decrease,
            iterations_to_skip=tuple(skip),
        ),
        start,
        70,
    )


@st.composite
def schedules(draw: st.DrawFn, whole: int, seq_length: int) -> str:
    firsts = sorted(draw(st.sets(st.integers(1, 900), max_size=5)))
    words = [
        f"{first * seq_length + draw(st.integers(0, seq_length - 1)) * bool(first)}:"
        f"{whole * draw(st.integers(1, 20))}"
        for first in (0, *firsts)
    ]
    return draw(st.sampled_from([" ", ","])).join(draw(st.permutations(words)))


@given(ranks(), st.integers(1, 64), starts, st.data())
@settings(deadline=None)
def test_step_schedules(
    sizes: dict[str, int], seq_length: int, start: Start, data: st.DataObject
) -> None:
    whole = sizes["micro_batch_size"] * sizes["dp_size"]
    text = data.draw(schedules(whole, seq_length))
    args = replace(ARGS, **sizes, seq_length=seq_length, step_batch_size_schedule=text)
    check(args, start, 200)
    args = replace(args, train_iters=None, train_samples=data.draw(st.integers(600, 1500)))
    # Upstream's last step may ask for more samples than there are; ours are whole.
    whole_steps = [s for s in steps_within(args) if s.consumed_after <= (args.train_samples or 0)]
    assert last_iteration(args) == len(whole_steps)


def steps_within(args: DataArguments) -> list[StepRange]:
    steps = []
    for step in loop(args, FRESH):
        if step.consumed_before >= (args.train_samples or 0):
            return steps
        steps.append(step)
    return steps


@given(ranks(), st.integers(1, 5), st.integers(1, 5), st.integers(1, 40), starts, st.data())
@settings(deadline=None)
def test_ramps_of_older_releases(
    sizes: dict[str, int], first: int, increment: int, rises: int, start: Start, data: st.DataObject
) -> None:
    whole = sizes["micro_batch_size"] * sizes["dp_size"]
    ramp = (first * whole, increment * whole, data.draw(st.integers(1, 3000)))
    end = (first + rises * increment) * whole
    args = replace(ARGS, **sizes, global_batch_size=end, rampup_batch_size=ramp)
    check(args, start, 200)
    samples = data.draw(st.integers(1, 8000))
    args = replace(args, train_iters=None, train_samples=samples)
    iterations = consumed = 0
    sizes_of = calculator(args)
    while consumed <= ramp[2] and consumed <= samples:
        sizes_of.update(consumed, False)
        consumed += sizes_of.get_current_global_batch_size()
        iterations += 1
    if samples > consumed:
        iterations += (samples - consumed) // end
    assert last_iteration(args) == iterations


@given(ranks(), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(9, 500))
@settings(deadline=None)
def test_ramps_decreased_to_whole_micro_batches(
    sizes: dict[str, int], first: int, increment: int, rises: int, samples: int
) -> None:
    whole = sizes["micro_batch_size"] * sizes["dp_size"]
    assume(first >= whole)
    args = replace(
        ARGS,
        **sizes,
        global_batch_size=first + rises * increment,
        rampup_batch_size=(first, increment, samples),
        decrease_batch_size_if_needed=True,
    )
    check(args, FRESH, 100)


@pytest.mark.parametrize(("rises", "samples"), [(7, 9), (7, 29), (31, 2000), (40, 7), (3, 1)])
def test_ramps_whose_divisions_round(rises: int, samples: int) -> None:
    """In floating point 29 / (29 / 7) is less than 7: the ramp ends a sample late."""
    args = replace(ARGS, global_batch_size=1 + rises, rampup_batch_size=(1, 1, samples))
    sizes, schedule = calculator(args), plan_schedule(args)
    for consumed in range(samples + 3):
        sizes.update(consumed, consistency_check=True)
        assert schedule.batch_size(consumed) == sizes.get_current_global_batch_size()


def test_the_ramp_of_the_34b_model_over_millions_of_iterations() -> None:
    args = replace(
        ARGS, global_batch_size=1024, rampup_batch_size=(32, 32, 2_000_000), seq_length=4096
    )
    schedule = plan_schedule(args)
    steps = list(zip(range(9000), loop(args, FRESH), strict=False))
    assert schedule.step_range(FRESH, 9000) == steps[-1][1]
    far = schedule.step_range(FRESH, 50_000_000)
    assert schedule.iteration_of(FRESH, far.consumed_after - 1) == 50_000_000


def test_many_samples_at_once() -> None:
    args = replace(ARGS, step_batch_size_schedule="0:4 160:8 800:16", seq_length=8)
    schedule, start = plan_schedule(args), Start(3, 5)
    indices = np.arange(5, 300)
    expected = [schedule.iteration_of(start, int(index)) for index in indices]
    assert schedule.iterations_of(start, indices).tolist() == expected
    assert schedule.iterations_of(start, indices[:0]).tolist() == []


def test_a_size_that_does_not_divide_is_an_error_only_where_it_is_reached() -> None:
    args = replace(ARGS, dp_size=8, step_batch_size_schedule="0:4 160:8 800:12", seq_length=8)
    schedule = plan_schedule(args)
    with pytest.raises(ConfigError, match="whole number of micro batches"):
        schedule.step_range(FRESH, 1)
    start = Start(5, 20)
    assert schedule.step_range(start, 15).consumed_after == 100
    for ask in (schedule.step_range, schedule.iteration_of):
        with pytest.raises(ConfigError, match="whole number of micro batches"):
            ask(start, 116)


@pytest.mark.parametrize(
    "change",
    [
        {"step_batch_size_schedule": "8:4"},
        {"step_batch_size_schedule": "0:4 7:8"},
        {"step_batch_size_schedule": "0:4 80:0"},
        {"step_batch_size_schedule": "0-4"},
        {"step_batch_size_schedule": "0:4 x:8"},
        {"step_batch_size_schedule": ""},
        {"step_batch_size_schedule": "0:4", "decrease_batch_size_if_needed": True},
    ],
)
def test_upstream_refuses_the_same_schedules(change: dict[str, Any]) -> None:
    args = replace(ARGS, **change)
    with pytest.raises((ValueError, AssertionError)):
        calculator(args)
    with pytest.raises(ConfigError):
        plan_schedule(args)


@pytest.mark.parametrize(
    "change",
    [
        {"rampup_batch_size": (12, 4, 100)},
        {"rampup_batch_size": (4, 3, 100)},
        {"rampup_batch_size": (4, 4, 0)},
        {"rampup_batch_size": (4, 0, 100)},
        {"micro_batch_size": 0},
        {"global_batch_size": 0},
    ],
)
def test_arguments_that_no_run_had(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        plan_schedule(replace(ARGS, **change))


def test_what_no_training_reads() -> None:
    schedule = plan_schedule(ARGS)
    with pytest.raises(DataError, match="that many samples"):
        schedule.step_range(FRESH, 10**30)
    with pytest.raises(DataError, match="that many samples"):
        schedule.iteration_of(FRESH, 10**30)
    with pytest.raises(ConfigError, match="impossible size"):
        plan_schedule(replace(ARGS, global_batch_size=10**12))


def test_a_job_answers_only_for_its_own_iterations() -> None:
    schedule = plan_schedule(ARGS)
    start = Start(10, 120)
    with pytest.raises(DataError, match="does not run this iteration"):
        schedule.step_range(start, 10)
    with pytest.raises(DataError, match="before the job started"):
        schedule.iteration_of(start, 119)


@given(
    st.sets(st.integers(1, 30), min_size=1, max_size=4),
    st.integers(0, 40),
    st.integers(1, 50),
    st.sets(st.integers(1, 40), max_size=5),
)
@settings(deadline=None)
def test_phases_are_upstreams(
    transitions: set[int], iteration: int, iterations: int, skip: set[int]
) -> None:
    """Against ``get_train_valid_test_num_samples`` and the lines of the loader that follow it."""
    args = replace(
        ARGS,
        train_iters=None,
        train_samples=iterations * 12,
        phase_transition_iterations=tuple(sorted(transitions)),
        iterations_to_skip=tuple(sorted(skip)),
    )
    start = Start(iteration, iteration * 12)
    theirs = SimpleNamespace(
        train_samples=args.train_samples,
        train_iters=iterations,
        global_batch_size=12,
        full_validation=True,
        eval_iters=0,
        phase_transition_iterations=list(args.phase_transition_iterations),
        iteration=iteration,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "get_args", lambda: theirs)
        try:
            asked = training.get_train_valid_test_num_samples()[0]
        except ValueError:
            with pytest.raises(ConfigError, match="no phase"):
                phase_of(args, start)
            return
    assert num_train_samples(args, start) == asked
    phase = phase_of(args, start)
    last = max(t for t in (0, *args.phase_transition_iterations) if t <= iteration)
    assert phase == Phase(last * 12, asked, phase.last_iteration)
    ran = [step.iteration for _, step in zip(range(50), loop(args, start), strict=False)]
    if phase.last_iteration is not None:
        assert ran[-1] == phase.last_iteration
        with pytest.raises(DataError):
            plan_schedule(args).step_range(start, ran[-1] + 1)
    check(args, start, 50)


def test_a_skipped_transition_does_not_end_the_job() -> None:
    args = replace(
        ARGS, train_samples=1200, phase_transition_iterations=(5, 9), iterations_to_skip=(5,)
    )
    assert phase_of(args, FRESH) == Phase(0, 60, 9)
    assert phase_of(args, Start(9, 108)) == Phase(108, 1200 - 108, None)


def test_how_many_samples_are_asked_for() -> None:
    assert num_train_samples(ARGS) == 1200
    assert num_train_samples(replace(ARGS, train_samples=77)) == 77
    assert phase_of(ARGS, Start(3, 36)) == Phase(0, 1200, None)
    with pytest.raises(ConfigError, match="how long"):
        num_train_samples(replace(ARGS, train_iters=None))
    with pytest.raises(ConfigError, match="no phase"):
        num_train_samples(replace(ARGS, phase_transition_iterations=(5,)))


def test_the_last_iteration_of_constant_batches() -> None:
    assert last_iteration(ARGS) == 100
    assert last_iteration(replace(ARGS, train_iters=None, train_samples=1199)) == 99
    assert last_iteration(replace(ARGS, train_iters=None, train_samples=1200)) == 100


def test_a_release_that_has_the_schedule_ignores_the_ramp() -> None:
    """As in the wheels: 0.17.1 has no schedule and obeys, from 0.18.0 on it is the reverse."""
    printed = {"seed": 1, "seq_length": 8, "global_batch_size": 16, "micro_batch_size": 1}
    printed |= {"data_parallel_size": 1, "data_path": ["x"], "train_iters": 9, "split": "1,0,0"}
    printed |= {"rampup_batch_size": ["4", "4", "100"]}
    older = DataArguments.read(printed)
    assert plan_schedule(older).batch_size(0) == 4
    newer = DataArguments.read(printed | {"step_batch_size_schedule": None})
    assert plan_schedule(newer).batch_size(0) == 16


@pytest.mark.parametrize("argument", ["data_cache_path", "split", "data_path"])
def test_what_no_command_line_can_hold(argument: str) -> None:
    printed = {"seed": 1, "seq_length": 8, "global_batch_size": 16, "micro_batch_size": 1}
    printed |= {"data_parallel_size": 1, "data_path": ["x"], "train_iters": 9, "split": "1,0,0"}
    damaged = ["a\0b"] if argument == "data_path" else "a\0b"
    with pytest.raises(DataError, match="null character"):
        DataArguments.read(printed | {argument: damaged})
