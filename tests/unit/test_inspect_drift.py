"""Drift: what is said of two sets of arguments, against what each of them really reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect import drift as drift_module
from flagscale.data_inspect.arguments import Blend, DataArguments
from flagscale.data_inspect.blend import BlendOrder, mix_of, plan_blend
from flagscale.data_inspect.drift import Drift, Effect, Finding, drift, first_difference
from flagscale.data_inspect.order import OrderPlan, plan_order
from flagscale.data_inspect.samplers import plan_sampler
from flagscale.data_inspect.steps import (
    FRESH,
    Start,
    last_iteration,
    phase_of,
    plan_schedule,
)
from flagscale.errors import ConfigError, DataError

TOKENS = {"a": 4000, "b": 2500, "c": 9000}
ARGS = DataArguments(
    blend=Blend(("a", "b", "c"), (0.2, 0.3, 0.5)),
    split="98,1,1",
    seed=1,
    seq_length=8,
    train_samples=None,
    train_iters=60,
    global_batch_size=24,
    micro_batch_size=2,
    dp_size=2,
    data_cache_path="cache",
)
ONE = replace(ARGS, blend=Blend(("a",), None))
CYCLIC = replace(ARGS, dataloader_type="cyclic")
START = Start(10, 240)
HARMLESS = {Effect.NONE, Effect.SAME_SAMPLES_OTHER_RANKS}


def orders_of(args: DataArguments, start: Start = START) -> list[OrderPlan]:
    asked = plan_blend(args, phase_of(args, start).num_samples).num_samples
    return [
        plan_order(TOKENS[prefix], samples, args.seq_length)
        for prefix, samples in zip(args.blend.prefixes, asked, strict=True)
    ]


def compare(old: DataArguments, start: Start = START, **changes: Any) -> Drift:
    new = replace(old, **changes)
    return drift(old, new, start, orders_of(old, start), orders_of(new, start))


def only(answer: Drift) -> Finding:
    """The worst finding of the one flag that changed."""
    assert len({finding.flag for finding in answer.findings}) == 1
    return next(finding for finding in answer.findings if finding.effect is answer.effect)


@dataclass(frozen=True)
class Step:
    before: int
    after: int
    skipped: bool
    ranks: tuple[tuple[Any, ...], ...]

    @property
    def samples(self) -> list[Any]:
        return sorted(sample for rank in self.ranks for batch in rank for sample in batch)


def read(args: DataArguments, start: Start, steps: int) -> list[Step]:
    """What a job reads: a sample is known by its dataset, how that is shuffled, and its index."""
    orders, phase = orders_of(args, start), phase_of(args, start)
    plan = plan_blend(args, phase.num_samples)
    lengths = [order.num_samples_total for order in orders]
    blend = BlendOrder(mix_of(plan, lengths)) if plan.has_blend_layer else None
    total = blend.mix.size if blend else lengths[0]
    sampler = plan_sampler(args, total, start.consumed - phase.samples_before)
    schedule = plan_schedule(args)
    result = []
    for iteration in range(start.iteration + 1, min(start.iteration + steps, last_iteration(args))):
        if phase.last_iteration is not None and iteration > phase.last_iteration:
            break
        step = schedule.step_range(start, iteration)
        try:
            drawn = sampler.indices(step.consumed_before - phase.samples_before, step.micro_batches)
        except DataError:
            break
        datasets, samples = (
            blend.lookup(drawn) if blend else (np.zeros(drawn.shape, np.int16), drawn)
        )
        names = [
            (args.blend.prefixes[d], args.seed, args.seq_length, args.split, *map(str, [orders[d]]))
            for d in range(len(orders))
        ]
        ranks = tuple(
            tuple(
                tuple((names[d], i) for d, i in zip(ds, ns, strict=True))
                for ds, ns in zip(datasets[r].tolist(), samples[r].tolist(), strict=True)
            )
            for r in range(args.dp_size)
        )
        result.append(Step(step.consumed_before, step.consumed_after, step.skipped, ranks))
    return result


def stream(steps: list[Step]) -> list[Any]:
    """In the order of consumption: slice after slice, rank after rank."""
    return [
        sample
        for step in steps
        for batches in zip(*step.ranks, strict=True)
        for batch in batches
        for sample in batch
    ]


@st.composite
def changes(draw: st.DrawFn) -> dict[str, Any]:
    all_changes: dict[str, st.SearchStrategy[Any]] = {
        "seed": st.sampled_from([1, 2]),
        "train_iters": st.integers(5, 300),
        "train_samples": st.sampled_from([None, 500, 1500, 6000]),
        "global_batch_size": st.sampled_from([8, 24, 48]),
        "micro_batch_size": st.sampled_from([1, 2, 4]),
        "dp_size": st.sampled_from([1, 2]),
        "mid_level_dataset_surplus": st.sampled_from([0.005, 0.3]),
        "step_batch_size_schedule": st.sampled_from([None, "0:8 4800:24", "0:24"]),
        "iterations_to_skip": st.sampled_from([(), (3,), (20,)]),
        "phase_transition_iterations": st.sampled_from([(), (5,), (15,)]),
        "dataloader_type": st.sampled_from(["single", "cyclic"]),
        "data_sharding": st.booleans(),
        "data_cache_path": st.sampled_from([None, "x"]),
        "blend": st.sampled_from(
            [
                Blend(("a", "b", "c"), (0.2, 0.3, 0.5)),
                Blend(("a", "b", "c"), (2.0, 3.0, 5.0)),
                Blend(("a", "b", "c"), (0.1, 0.4, 0.5)),
                Blend(("a", "b", "c"), None),
            ]
        ),
    }
    names = draw(st.sets(st.sampled_from(sorted(all_changes)), max_size=3))
    return {name: draw(all_changes[name]) for name in sorted(names)}


@given(
    changes(),
    changes(),
    st.sampled_from([ARGS, CYCLIC, replace(CYCLIC, data_sharding=False)]),
    st.sampled_from([FRESH, START]),
)
@settings(max_examples=80, deadline=None)
def test_what_is_said_is_what_happens(
    before: dict[str, Any], change: dict[str, Any], base: DataArguments, start: Start
) -> None:
    old = replace(base, **before)
    new = replace(old, **change)
    try:
        was, orders = read(old, start, 25), orders_of(old, start)
    except (ConfigError, DataError):
        return
    try:
        new_orders = orders_of(new, start)
    except ConfigError:
        new_orders = None
    answer = drift(old, new, start, orders, new_orders)
    try:
        now = read(new, start, 25)
    except (ConfigError, DataError):
        assert answer.effect is Effect.REFUSED
        return
    assert {finding.flag for finding in answer.findings} == {
        {"blend": "--data-path", "dp_size": "data-parallel size",
         "data_sharding": "--no-data-sharding"}.get(name, "--" + name.replace("_", "-"))
        for name in vars(old)
        if getattr(old, name) != getattr(new, name)
    }  # fmt: skip
    steps = min(len(was), len(now))
    effect = answer.effect
    assert effect is not Effect.UNKNOWN
    if effect is Effect.NONE:
        assert was[:steps] == now[:steps]
    if effect in HARMLESS | {Effect.OTHER_STEPS_SKIPPED}:
        same_steps = all(
            finding.effect is not Effect.SAME_ORDER_OTHER_STEPS for finding in answer.findings
        )
        if same_steps:
            for one, two in zip(was, now, strict=False):
                assert (one.before, one.after) == (two.before, two.after)
                assert one.samples == two.samples
    if effect is Effect.SAME_ORDER_OTHER_STEPS and new.dataloader_type == "single":
        length = min(was[-1].after, now[-1].after) - start.consumed if was and now else 0
        assert stream(was)[:length] == stream(now)[:length]
    if effect in {Effect.OTHER_ORDER, Effect.REFUSED} and new.dataloader_type == "single":
        first = answer.first_sample
        assert first is not None
        length = min(first - start.consumed, len(stream(was)), len(stream(now)))
        assert stream(was)[:length] == stream(now)[:length]


@given(changes(), st.sampled_from([ARGS, ONE]))
@settings(max_examples=40, deadline=None)
def test_the_first_sample_is_really_another_one(
    change: dict[str, Any], base: DataArguments
) -> None:
    """Of the loader that keeps the order, where the place is exact."""
    change.pop("dataloader_type", None)
    change.pop("phase_transition_iterations", None)
    if base is ONE:
        change.pop("blend", None)
    new = replace(base, **change)
    try:
        was, now = stream(read(base, START, 25)), stream(read(new, START, 25))
        answer = drift(base, new, START, orders_of(base), orders_of(new))
    except (ConfigError, DataError):
        return
    length = min(len(was), len(now))
    differ = [i for i in range(length) if was[i] != now[i]]
    if answer.effect is Effect.OTHER_ORDER and differ:
        assert answer.first_sample == START.consumed + differ[0]
    if answer.effect is not Effect.REFUSED and not differ:
        first = answer.first_sample
        assert first is None or first >= START.consumed + length


@pytest.mark.parametrize(
    ("flag", "change", "effect"),
    [
        ("--seed", {"seed": 2}, Effect.OTHER_ORDER),
        ("--seq-length", {"seq_length": 16}, Effect.OTHER_ORDER),
        ("--split", {"split": "90,5,5"}, Effect.OTHER_ORDER),
        ("--split", {"split": "98,2,0"}, Effect.NONE),
        ("--split", {"split": "196,2,2"}, Effect.NONE),
        ("--data-path", {"blend": Blend(("a", "b", "c"), (2, 3, 5))}, Effect.NONE),
        ("--data-path", {"blend": Blend(("a", "b", "c"), (2, 4, 4))}, Effect.OTHER_ORDER),
        ("--data-path", {"blend": Blend(("a", "c", "b"), (0.2, 0.3, 0.5))}, Effect.OTHER_ORDER),
        ("--data-cache-path", {"data_cache_path": None}, Effect.NONE),
        ("--no-data-sharding", {"data_sharding": False}, Effect.NONE),
        ("--dataloader-type", {"dataloader_type": "cyclic"}, Effect.OTHER_ORDER),
        ("--micro-batch-size", {"micro_batch_size": 4}, Effect.SAME_SAMPLES_OTHER_RANKS),
        ("data-parallel size", {"dp_size": 3}, Effect.SAME_SAMPLES_OTHER_RANKS),
        ("data-parallel size", {"dp_size": 5}, Effect.REFUSED),
        ("--iterations-to-skip", {"iterations_to_skip": (12,)}, Effect.OTHER_STEPS_SKIPPED),
        ("--iterations-to-skip", {"iterations_to_skip": (2,)}, Effect.NONE),
        ("--train-iters", {"train_iters": 61}, Effect.NONE),
        ("--train-iters", {"train_iters": 500}, Effect.OTHER_ORDER),
        ("--mid-level-dataset-surplus", {"mid_level_dataset_surplus": 0.006}, Effect.NONE),
        ("--mid-level-dataset-surplus", {"mid_level_dataset_surplus": 3.0}, Effect.OTHER_ORDER),
    ],
)
def test_each_flag(flag: str, change: dict[str, Any], effect: Effect) -> None:
    finding = only(compare(ARGS, **change))
    assert (finding.flag, finding.effect) == (flag, effect)
    if effect is Effect.OTHER_ORDER:
        assert finding.first_sample is not None
        assert finding.first_sample >= START.consumed


def test_a_batch_of_another_size_moves_the_steps_and_not_the_order() -> None:
    old = replace(ARGS, train_samples=1440)
    finding = only(compare(old, global_batch_size=48))
    assert finding.effect is Effect.SAME_ORDER_OTHER_STEPS
    assert (finding.first_sample, finding.first_iteration) == (240, 11)
    assert "48 samples instead of 24" in finding.explanation
    later = only(compare(old, step_batch_size_schedule="0:24 3200:48"))
    assert (later.first_sample, later.first_iteration) == (408, 18)
    assert only(compare(old, step_batch_size_schedule="0:24")).effect is Effect.NONE


def test_changes_that_undo_each_other_are_harmless_to_the_order() -> None:
    answer = compare(ARGS, START, train_iters=120, global_batch_size=12)
    effects = {finding.flag: finding.effect for finding in answer.findings}
    assert effects == {
        "--train-iters": Effect.NONE,
        "--global-batch-size": Effect.SAME_ORDER_OTHER_STEPS,
    }


def test_only_the_flag_to_blame_is_blamed() -> None:
    answer = compare(ARGS, START, train_iters=500, mid_level_dataset_surplus=0.0051)
    effects = {finding.flag: finding.effect for finding in answer.findings}
    assert effects == {
        "--train-iters": Effect.OTHER_ORDER,
        "--mid-level-dataset-surplus": Effect.NONE,
    }
    answer = compare(ARGS, START, micro_batch_size=4, data_sharding=False)
    effects = {finding.flag: finding.effect for finding in answer.findings}
    assert effects == {
        "--micro-batch-size": Effect.SAME_SAMPLES_OTHER_RANKS,
        "--no-data-sharding": Effect.NONE,
    }


def test_flags_that_only_together_do_harm_are_all_blamed() -> None:
    old = replace(ARGS, global_batch_size=12)
    answer = compare(old, START, micro_batch_size=3, dp_size=3)
    refused = [f.flag for f in answer.findings if f.effect is Effect.REFUSED]
    assert refused == ["--micro-batch-size", "data-parallel size"]
    alone = compare(old, START, micro_batch_size=3), compare(old, START, dp_size=3)
    assert {answer.effect for answer in alone} == {Effect.SAME_SAMPLES_OTHER_RANKS}


def test_a_flag_is_not_blamed_for_what_another_does_to_the_datasets() -> None:
    old = replace(ONE, dataloader_type="cyclic", dp_size=1)
    answer = compare(old, START, train_iters=2000, data_sharding=False)
    blamed = {f.flag for f in answer.findings if f.effect is not Effect.NONE}
    assert blamed == {"--train-iters"}


def test_a_shared_shuffle_divided_anew_is_the_same_up_to_its_leftovers() -> None:
    def of_size(rest: int) -> tuple[DataArguments, int]:
        """The samples of the blend, divided by those of a slice, leave a rest."""
        sizes = {n: plan_blend(ARGS, n).size or 0 for n in range(1440, 1460)}
        samples = next(n for n, size in sizes.items() if size % 4 == rest)
        args = replace(CYCLIC, data_sharding=False, train_samples=samples)
        return args, sizes[samples]

    old, total = of_size(2)
    answer = compare(old, micro_batch_size=1, dp_size=4)
    assert (answer.effect, answer.first_sample) == (Effect.OTHER_ORDER, total - 2)
    old, _ = of_size(0)
    answer = compare(old, micro_batch_size=1, dp_size=4)
    assert answer.effect is Effect.SAME_SAMPLES_OTHER_RANKS


def test_samples_counted_from_another_transition() -> None:
    old = replace(ARGS, train_samples=6000)
    finding = compare(old, phase_transition_iterations=(5,)).findings[-1]
    assert (finding.effect, finding.first_sample) == (Effect.OTHER_ORDER, 240)
    assert "counted from another phase transition" in finding.explanation


def test_a_dataset_that_is_shuffled_anew_counts_from_its_next_sample() -> None:
    old = replace(ARGS, blend=Blend(("a", "b"), (0.99, 0.01)), train_samples=1440)
    plans = [OrderPlan(1, False, 9, 9), OrderPlan(1, False, 9, 9)]
    new_plans = [plans[0], OrderPlan(2, False, 9, 9)]
    new = replace(old, train_samples=1500)
    finding = only(drift(old, new, START, plans, new_plans))
    blend = BlendOrder(mix_of(plan_blend(new, 1500))).take(240, 1000)[0]
    assert finding.first_sample == 240 + blend.tolist().index(1)
    assert "b is read in 2 epochs instead of 1 epoch" in finding.explanation


def test_the_last_epoch_alone_changes_the_order_of_all() -> None:
    """As many epochs as before, but the last is no longer shuffled by itself."""
    plans = [OrderPlan(2, True, 499, 999), OrderPlan(2, False, 999, 999)]
    new = replace(ONE, train_iters=80)
    finding = only(drift(ONE, new, START, plans[:1], plans[1:]))
    assert (finding.effect, finding.first_sample) == (Effect.OTHER_ORDER, START.consumed)
    assert "2 epochs instead of 2 epochs, the last shuffled by itself" in finding.explanation


def test_weights_in_the_same_proportion_are_the_same() -> None:
    finding = only(compare(ARGS, blend=Blend(("a", "b", "c"), (2, 3, 5))))
    assert finding.explanation == "in proportion the weights are as they were"


def test_without_the_facts_the_answer_is_unknown() -> None:
    answer = drift(ARGS, replace(ARGS, train_iters=61), START)
    assert only(answer).effect is Effect.UNKNOWN
    assert answer.first_sample == START.consumed
    old = replace(CYCLIC, blend=Blend(("a", "b"), None))
    answer = drift(old, replace(old, train_iters=61), START)
    assert only(answer).effect is Effect.UNKNOWN
    assert drift(ARGS, replace(ARGS, seed=3), START).effect is Effect.OTHER_ORDER


def test_a_resume_behind_the_end_is_refused() -> None:
    finding = only(compare(ARGS, train_iters=5))
    assert (finding.effect, finding.first_sample) == (Effect.REFUSED, 240)
    assert "does not start there" in finding.explanation


def test_nothing_changed() -> None:
    answer = drift(ARGS, ARGS, START)
    assert (answer.findings, answer.effect, answer.first_sample) == ((), Effect.NONE, None)


def test_a_phase_transition_to_come() -> None:
    old = replace(ARGS, train_samples=6000)
    finding = only(compare(old, FRESH, phase_transition_iterations=(250 + 0,)))
    assert finding.effect is not Effect.NONE
    both = replace(old, phase_transition_iterations=(20, 40))
    finding = only(compare(both, phase_transition_iterations=(20, 50)))
    assert (finding.effect, finding.first_sample) == (Effect.OTHER_ORDER, 240 + 30 * 24)


def test_orders_of_other_datasets_are_refused() -> None:
    with pytest.raises(ConfigError, match="orders are not those"):
        drift(ARGS, ARGS, START, orders_of(ONE), None)


def pairs(order: np.ndarray) -> Any:
    return lambda begin, end: np.stack([order[begin:end] % 3, order[begin:end]], axis=1)


@given(st.integers(0, 20000), st.integers(1, 50), st.data())
@settings(max_examples=20, deadline=None)
def test_the_first_difference_of_two_streams(begin: int, batch: int, data: st.DataObject) -> None:
    old = np.arange(30000)
    place = data.draw(st.integers(0, 29999))
    new = old.copy()
    new[place] = -3
    expected = place if place >= begin else None
    assert first_difference(pairs(old), pairs(new), begin, 30000) == expected
    # Within a step the order does not matter.
    mixed = new.copy()
    step = begin + (place - begin) // batch * batch
    for first in range(begin, 30000, batch):
        mixed[first : first + batch] = mixed[first : first + batch][::-1]
    found = first_difference(pairs(old), pairs(mixed), begin, 30000, batch)
    assert found == (step if place >= begin else None)


def test_a_stream_that_is_too_short() -> None:
    with pytest.raises(DataError, match="shorter"):
        first_difference(pairs(np.arange(5)), pairs(np.arange(9)), 0, 9)


def test_every_argument_has_a_layer() -> None:
    acting = {name for _, names in drift_module.LAYERS for name in names}
    assert acting == set(vars(ARGS))
