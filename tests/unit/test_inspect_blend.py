"""Blends: against upstream's builder and blended dataset, over stub datasets."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect import blend as blend_module
from flagscale.data_inspect.arguments import Blend, DataArguments
from flagscale.data_inspect.blend import (
    BlendOrder,
    BlendPlan,
    Mix,
    exhaustive_order,
    mix_of,
    mixing_order,
    normalize,
    plan_blend,
)
from flagscale.errors import ConfigError, DataError

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_dataset import BlendedDataset
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.blended_megatron_dataset_config import BlendedMegatronDatasetConfig
    from megatron.core.datasets.megatron_dataset import MegatronDataset
    from megatron.core.datasets.utils import Split

LENGTHS = {"a": 37, "b": 5, "c": 120, "d": 64}


class Stub(MegatronDataset):
    """As long as it is asked to be, at least; its own length if it is not asked."""

    def __init__(
        self, low_level: int, path: str, indices: Any, num_samples: Any, *rest: Any
    ) -> None:
        self.length = low_level if num_samples is None else num_samples + 3
        super().__init__(low_level, path, indices, num_samples, *rest)

    @staticmethod
    def numel_low_level_dataset(low_level: int) -> int:
        return low_level

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: Any) -> int:
        return LENGTHS[dataset_path]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, idx: int) -> dict[str, Any]:
        return {"index": idx}


def arguments(
    prefixes: Sequence[str], weights: Sequence[float] | None, split: str | None, surplus: float
) -> DataArguments:
    return DataArguments(
        blend=Blend(tuple(prefixes), None if weights is None else tuple(weights)),
        split=split,
        seed=1,
        seq_length=8,
        train_samples=None,
        train_iters=1,
        global_batch_size=1,
        micro_batch_size=1,
        dp_size=1,
        mid_level_dataset_surplus=surplus,
    )


def upstream(args: DataArguments, num_samples: int) -> Any:
    """The training dataset of upstream's builder."""
    blend = [list(args.blend.prefixes), args.blend.weights and list(args.blend.weights)]
    config = BlendedMegatronDatasetConfig(
        random_seed=1,
        sequence_length=8,
        split=args.split,
        blend=blend if args.split is not None else None,
        blend_per_split=None if args.split is not None else [blend, None, None],
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        num_dataset_builder_threads=1,
        path_to_cache=None,
    )
    sizes = [num_samples, 0, 0]
    return BlendedMegatronDatasetBuilder(Stub, sizes, lambda: True, config).build()[0]


weights_of = st.floats(1e-3, 1e3, allow_nan=False)


@pytest.mark.parametrize("split", ["100,0,0", None])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_plans_and_orders_are_upstreams(split: str | None, data: st.DataObject) -> None:
    prefixes = data.draw(st.permutations(sorted(LENGTHS)))[: data.draw(st.integers(1, 4))]
    weighted = data.draw(st.booleans())
    weights = [data.draw(weights_of) for _ in prefixes] if weighted else None
    surplus = data.draw(st.sampled_from([0.005, 0.02, 0.5]))
    num_samples = data.draw(st.integers(1, 600))
    args = arguments(prefixes, weights, split, surplus)
    plan = plan_blend(args, num_samples)
    theirs = upstream(args, num_samples)
    assert plan.has_blend_layer == isinstance(theirs, BlendedDataset)
    datasets = theirs.datasets if plan.has_blend_layer else [theirs]
    assert plan.num_samples == tuple(dataset.num_samples for dataset in datasets)
    if plan.has_blend_layer:
        mix = mix_of(plan, [len(dataset) for dataset in datasets])
        assert (mix.size, list(mix.weights)) == (len(theirs), theirs.weights)
        for ours, other in zip(
            mixing_order(mix), (theirs.dataset_index, theirs.dataset_sample_index), strict=True
        ):
            assert np.array_equal(ours, other)
            assert ours.dtype == other.dtype


@pytest.mark.parametrize(
    ("split", "weights", "layer"),
    [("1", None, False), ("1", (3.0,), True), (None, None, False), (None, (3.0,), False)],
)
def test_one_dataset_is_blended_only_if_split_and_weighted(
    split: str | None, weights: tuple[float, ...] | None, layer: bool
) -> None:
    plan = plan_blend(arguments(["a"], weights, split, 0.5), 10)
    assert plan.has_blend_layer == layer
    assert plan.num_samples == ((15,) if layer else (10,))


@given(
    st.lists(weights_of, min_size=1, max_size=40),
    st.integers(0, 3000),
    st.integers(0, 3000),
)
@settings(deadline=None, max_examples=60)
def test_both_loops_agree_and_a_part_is_a_part(raw: list[float], first: int, last: int) -> None:
    first, last = min(first, last), max(first, last)
    mix = Mix(normalize(raw), 3000)
    whole = mixing_order(mix)
    for compiled in (True, False):
        for part, all_ in zip(
            mixing_order(mix, first, last, compiled=compiled), whole, strict=True
        ):
            assert np.array_equal(part, all_[first:last])


@given(st.lists(st.integers(1, 80), min_size=1, max_size=12))
@settings(deadline=None, max_examples=60)
def test_exhaustive_blends_are_upstreams(sizes: list[int]) -> None:
    stubs = [Stub(size, "a", None, None, Split.train, _config()) for size in sizes]
    theirs = BlendedDataset(stubs, sizes, None, _config())
    for compiled in (True, False):
        ours = exhaustive_order(sizes, compiled=compiled)
        assert np.array_equal(ours[0], theirs.dataset_index)
        assert np.array_equal(ours[1], theirs.dataset_sample_index)


def _config() -> Any:
    return BlendedMegatronDatasetConfig(
        random_seed=1, sequence_length=8, split="1", blend=[["a"], None], path_to_cache=None
    )


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_lookups_and_their_inverse(data: st.DataObject) -> None:
    raw = data.draw(st.lists(weights_of, min_size=1, max_size=6))
    mix = Mix(normalize(raw), data.draw(st.integers(1, 5000)))
    datasets, samples = mixing_order(mix)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend_module, "BLOCK", data.draw(st.sampled_from([1, 7, 64, 1 << 16])))
        order = BlendOrder(mix)
        asked = np.array(data.draw(st.lists(st.integers(0, mix.size - 1), max_size=9)), np.int64)
        found = order.lookup(asked)
        assert np.array_equal(found[0], datasets[asked])
        assert np.array_equal(found[1], samples[asked])
        order = BlendOrder(mix)
        dataset = data.draw(st.integers(0, len(raw) - 1))
        wanted = np.array(data.draw(st.lists(st.integers(-2, mix.size), max_size=9)), np.int64)
        expected = [
            next(iter(np.flatnonzero((datasets == dataset) & (samples == n))), -1) for n in wanted
        ]
        assert order.index_of(dataset, wanted).tolist() == expected
        assert order.index_of(len(raw), wanted).tolist() == [-1] * len(wanted)


def test_the_inverse_goes_on_until_it_finds() -> None:
    """How far it must look is a guess from the weight, which these weights mislead."""
    mix = Mix((0.9, 0.9), 5000)
    datasets, samples = mixing_order(mix)
    (place,) = np.flatnonzero((datasets == 1) & (samples == 2000))
    assert BlendOrder(mix).index_of(1, [2000, 2500]).tolist() == [place, -1]


def test_upstream_divides_by_the_sum_twice() -> None:
    """The last bit of a weight counts: a blend is found that comes out otherwise without it."""
    raw = next(
        raw
        for raw in np.random.RandomState(0).rand(100, 7).tolist()
        if normalize(normalize(raw)) != normalize(raw)
    )
    plan = plan_blend(arguments("abcdefg", raw, "1", 0.005), 1000)
    assert plan.weights == normalize(raw)
    assert mix_of(plan).weights == normalize(normalize(raw)) != plan.weights


def test_the_longer_blend_begins_with_the_shorter() -> None:
    args = arguments("abc", (0.2, 0.3, 0.5), "1", 0.005)
    short, long = (mixing_order(mix_of(plan_blend(args, n)), 0, 500) for n in (500, 100_000))
    for one, two in zip(short, long, strict=True):
        assert np.array_equal(one, two)


@pytest.mark.parametrize("weights", [(1.0, 0.0), (1.0, -1.0), (1.0, float("nan")), (1.0,)])
def test_weights_that_no_run_had(weights: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="would not blend"):
        plan_blend(arguments("ab", weights, "1", 0.005), 10)


def test_other_wrong_arguments() -> None:
    args = arguments("ab", (1.0, 2.0), "1", 0.005)
    with pytest.raises(ConfigError):
        plan_blend(args, 0)
    with pytest.raises(ConfigError):
        plan_blend(replace(args, mid_level_dataset_surplus=float("nan")), 10)
    with pytest.raises(ConfigError):
        mix_of(BlendPlan((10,), False, None, None, 10))
    unweighted = plan_blend(arguments("ab", None, "1", 0.005), 10)
    for lengths in (None, [3], [3, 0]):
        with pytest.raises(DataError, match="lengths"):
            mix_of(unweighted, lengths)
    assert mix_of(unweighted, [3, 4]).size == 7
    with pytest.raises(DataError, match="no such samples"):
        mixing_order(Mix((1.0,), 10), 5, 11)


def test_a_blend_that_does_not_fit_into_memory() -> None:
    with pytest.raises(DataError, match="too long"):
        BlendOrder(Mix((0.5, 0.5), 2**40)).lookup([2**33])


def test_a_helper_that_fills_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Idle:
        @staticmethod
        def build_blending_indices(*args: Any) -> None:
            pass

    monkeypatch.setattr(blend_module, "_compiled", lambda: Idle)
    with pytest.raises(DataError, match="did not fill"):
        mixing_order(Mix((1.0,), 10))


def test_the_compiled_loop_is_found_without_torch_or_megatron() -> None:
    code = (
        "import sys\n"
        "from flagscale.data_inspect import blend\n"
        "assert blend._compiled() is not None\n"
        "blend.mixing_order(blend.Mix((0.5, 0.5), 10))\n"
        "raise SystemExit('torch' in sys.modules or 'megatron' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
