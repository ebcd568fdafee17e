"""Samplers: against upstream's own, drawn from as its loop draws, and ``torch.randperm``."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect import randperm as randperm_module
from flagscale.data_inspect.arguments import Blend, DataArguments
from flagscale.data_inspect.randperm import randperm
from flagscale.data_inspect.samplers import Read, plan_sampler
from flagscale.errors import ConfigError, DataError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.training.datasets.data_samplers import (
        MegatronPretrainingRandomSampler,
        MegatronPretrainingSampler,
    )
    from megatron.training.training import cyclic_iter


def arguments(mbs: int, dp_size: int, kind: str, sharding: bool = True) -> DataArguments:
    return DataArguments(
        blend=Blend(("a",), None),
        split="1",
        seed=1,
        seq_length=8,
        train_samples=None,
        train_iters=1,
        global_batch_size=1,
        micro_batch_size=mbs,
        dp_size=dp_size,
        dataloader_type=kind,
        data_sharding=sharding,
    )


def upstream(args: DataArguments, total: int, started_at: int, rank: int) -> Iterator[list[int]]:
    """The micro batches of one rank, one after another, as ``_get_iterator`` makes them."""
    if args.dataloader_type == "single":
        sampler: Any = MegatronPretrainingSampler(
            total, started_at, args.micro_batch_size, rank, args.dp_size
        )
        return iter(sampler)
    sampler = MegatronPretrainingRandomSampler(
        None, total, started_at, args.micro_batch_size, rank, args.dp_size, args.data_sharding
    )
    return iter(cyclic_iter(sampler))


def drawn(args: DataArguments, total: int, started_at: int, count: int) -> np.ndarray:
    """[dp_size, count, micro_batch_size] of upstream."""
    return np.array(
        [
            list(itertools.islice(upstream(args, total, started_at, rank), count))
            for rank in range(args.dp_size)
        ]
    )


@st.composite
def jobs(draw: st.DrawFn, kind: str, sharding: bool = True) -> tuple[DataArguments, int, int]:
    args = arguments(draw(st.integers(1, 5)), draw(st.integers(1, 6)), kind, sharding)
    whole = args.micro_batch_size * args.dp_size
    total = draw(st.integers(whole, whole * 12 + 5))
    if kind == "single":
        return args, total, draw(st.integers(0, total - whole))
    return args, total, whole * draw(st.integers(0, 40))


@given(jobs("single"))
@settings(deadline=None)
def test_single_draws_what_upstream_draws(job: tuple[DataArguments, int, int]) -> None:
    args, total, started_at = job
    whole = args.micro_batch_size * args.dp_size
    count = (total - started_at) // whole
    ours = plan_sampler(args, total, started_at).indices(started_at, count)
    assert np.array_equal(ours, drawn(args, total, started_at, count + 1))
    assert ours.dtype == np.int64


@pytest.mark.parametrize("sharding", [True, False])
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_cyclic_draws_what_upstream_draws_over_epochs(sharding: bool, data: st.DataObject) -> None:
    args, total, started_at = data.draw(jobs("cyclic", sharding))
    whole = args.micro_batch_size * args.dp_size
    count = 40
    theirs = drawn(args, total, started_at, count)
    sampler = plan_sampler(args, total, started_at)
    assert np.array_equal(sampler.indices(started_at, count), theirs)
    first = data.draw(st.integers(0, count - 1))
    part = sampler.indices(started_at + first * whole, count - first)
    assert np.array_equal(part, theirs[:, first:])


@pytest.mark.parametrize("total", [3, 4, 5, 7, 9, 11, 15])
def test_ranks_that_get_more_micro_batches_run_ahead(total: int) -> None:
    args = arguments(1, 2, "cyclic", False)
    ours = plan_sampler(args, total, 0).indices(0, 200)
    assert np.array_equal(ours, drawn(args, total, 0, 200))


@pytest.mark.parametrize(
    ("kind", "sharding"), [("single", True), ("cyclic", True), ("cyclic", False)]
)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_the_inverse_finds_every_read_and_no_other(
    kind: str, sharding: bool, data: st.DataObject
) -> None:
    args, total, started_at = data.draw(jobs(kind, sharding))
    whole = args.micro_batch_size * args.dp_size
    sampler = plan_sampler(args, total, started_at)
    count = (total - started_at) // whole if kind == "single" else 40
    everything = sampler.indices(started_at, count)
    first = data.draw(st.integers(0, count - 1))
    last = data.draw(st.integers(first, count))
    wanted = data.draw(st.lists(st.integers(-1, total + 1), max_size=4))
    expected = [
        Read(int(everything[rank, m, position]), started_at + m * whole, rank, position)
        for m in range(first, last)
        for rank in range(args.dp_size)
        for position in range(args.micro_batch_size)
        if everything[rank, m, position] in wanted
    ]
    begin = started_at + first * whole
    assert sampler.reads(wanted, begin, started_at + last * whole) == expected
    assert sampler.reads(wanted, begin, begin) == []


def test_what_a_rank_reads_late_is_found_where_the_range_begins_there() -> None:
    sampler = plan_sampler(arguments(1, 2, "cyclic", False), 7, 0)
    for consumed in range(0, 40, 2):
        drawn_there = sorted(sampler.indices(consumed, 1).flat)
        found = sampler.reads(range(7), consumed, consumed + 2)
        assert sorted(read.index for read in found) == drawn_there


def test_single_does_not_draw_beyond_the_last_whole_slice() -> None:
    sampler = plan_sampler(arguments(2, 2, "single"), 11, 0)
    assert sampler.indices(4, 1).tolist() == [[[4, 5]], [[6, 7]]]
    assert sampler.reads([10], 0, 100) == []
    with pytest.raises(DataError, match="run out"):
        sampler.indices(8, 1)


@pytest.mark.parametrize("consumed", [0, 5, 6])
def test_what_no_job_drew_is_an_error(consumed: int) -> None:
    with pytest.raises(DataError, match="no micro batch begins"):
        plan_sampler(arguments(2, 2, "cyclic"), 100, 4).indices(consumed, 1)


@pytest.mark.parametrize("sharding", [True, False])
@given(st.integers(1, 30), st.integers(0, 40))
@settings(deadline=None)
def test_upstream_refuses_the_same_starts(sharding: bool, total: int, started_at: int) -> None:
    for kind in ("single", "cyclic"):
        args = arguments(2, 3, kind, sharding)
        try:
            next(upstream(args, total, started_at, 0), None)
        except (AssertionError, ZeroDivisionError):
            with pytest.raises(DataError):
                plan_sampler(args, total, started_at)
        else:
            plan_sampler(args, total, started_at)


def test_an_external_loader_is_named() -> None:
    with pytest.raises(ConfigError, match="samplers"):
        plan_sampler(arguments(1, 1, "external"), 10, 0)
    with pytest.raises(ConfigError):
        plan_sampler(arguments(0, 1, "single"), 10, 0)


def torch_randperm(n: int, seed: int) -> np.ndarray:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()


@given(st.integers(0, 3000), st.integers(0, 2**63 - 1))
@settings(max_examples=200, deadline=None)
def test_randperm_is_torchs(n: int, seed: int) -> None:
    assert np.array_equal(randperm(n, seed), torch_randperm(n, seed))


@pytest.mark.parametrize("n", [*range(200), 4095, 4096, 4097, 100_003, 1_000_000])
def test_randperm_is_torchs_at_sizes(n: int) -> None:
    assert np.array_equal(randperm(n, n % 7), torch_randperm(n, n % 7))


def test_many_elements_are_shuffled_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way for 2**32 / 20 elements and more, at fewer: against its own definition, in a loop."""
    monkeypatch.setattr(randperm_module, "MANY", 0)
    for n in (0, 1, 2, 3, 70, 1000, 5000):
        random = np.random.MT19937()
        random._legacy_seeding(11)
        expected: list[int] = []
        for i in range(n):
            high, low = random.random_raw(2).tolist()
            z = (high << 32 | low) % (i + 1)
            expected.append(i)
            expected[i], expected[z] = expected[z], i
        assert randperm(n, 11).tolist() == expected


def test_nobody_shuffles_that_many() -> None:
    with pytest.raises(DataError, match="too large"):
        randperm(2**32, 0)
