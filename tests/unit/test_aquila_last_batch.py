"""How many steps a batch-size schedule has samples for."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Iterator
from itertools import accumulate, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagscale.errors import ConfigError
from flagscale.patches.apply import apply
from flagscale.patches.last_batch import GROUP

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import training


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    applied = apply([GROUP])
    yield
    applied.undo()


@st.composite
def schedules(draw: st.DrawFn) -> list[tuple[int, int]]:
    """First sample and batch size of each entry, both rising."""
    sizes = draw(st.lists(st.integers(1, 20), min_size=1, max_size=5, unique=True).map(sorted))
    gaps = draw(st.lists(st.integers(1, 40), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    return list(zip(accumulate([0, *gaps]), sizes, strict=True))


def whole_batches(schedule: list[tuple[int, int]], samples: int) -> int:
    """Entry by entry: as many batches as reach the next one, or as the samples fill."""
    steps = consumed = 0
    for (_, size), (end, _) in pairwise([*schedule, (samples, 0)]):
        reach = max(0, -(-(min(end, samples) - consumed) // size))
        fit = min(reach, (samples - consumed) // size)
        steps, consumed = steps + fit, consumed + fit * size
        if fit < reach:
            break
    return steps


def count(schedule: list[tuple[int, int]], samples: int, train_iters: int | None = None) -> int:
    text = " ".join(f"{first}:{size}" for first, size in schedule)
    calculator.init_num_microbatches_calculator(
        rank=1, micro_batch_size=1, data_parallel_size=1, step_batch_size_schedule=text
    )
    try:
        args = Namespace(
            train_iters=train_iters, train_samples=samples, step_batch_size_schedule=text
        )
        training.update_train_iters(args)
        assert args.train_samples == samples
        assert calculator.get_current_global_batch_size() == schedule[0][1]
    finally:
        calculator.unset_num_microbatches_calculator()
    return int(args.train_iters)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schedule=schedules(), samples=st.integers(1, 400))
def test_every_step_has_its_samples_and_no_batch_is_left(
    schedule: list[tuple[int, int]], samples: int
) -> None:
    expected = whole_batches(schedule, samples)
    if expected:
        assert count(schedule, samples) == expected
    else:
        with pytest.raises(ConfigError, match="fewer samples than the first step takes"):
            count(schedule, samples)


def test_what_is_given_or_constant_stays_upstreams() -> None:
    assert count([(0, 4)], 100, train_iters=7) == 7
    args = Namespace(
        train_iters=None, train_samples=103, step_batch_size_schedule=None, global_batch_size=10
    )
    training.update_train_iters(args)
    assert args.train_iters == 10
