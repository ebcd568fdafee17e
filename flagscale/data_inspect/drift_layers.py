"""The layers that decide what is read: each says what a change of arguments does in it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from flagscale.data_inspect.arguments import DataArguments
from flagscale.data_inspect.blend import BlendOrder, BlendPlan, Mix, mix_of, plan_blend
from flagscale.data_inspect.order import OrderPlan, split_matrix
from flagscale.data_inspect.samplers import CyclicSampler, ShufflingSampler, plan_sampler
from flagscale.data_inspect.steps import (
    Phase,
    Schedule,
    Start,
    last_iteration,
    phase_of,
    plan_schedule,
)
from flagscale.errors import ConfigError, FlagScaleError

__all__ = [
    "Effect",
    "Layer",
    "Side",
    "Verdict",
    "cache",
    "epochs",
    "iteration_at",
    "mixing",
    "phase",
    "prefixes",
    "ranks",
    "sampler",
    "seed",
    "seq_length",
    "skipped",
    "split",
    "steps",
    "windows",
]

WINDOW = 1 << 12
"""Samples compared first; each further window is twice as long."""


class Effect(enum.StrEnum):
    """What a change does, from harmless to fatal."""

    NONE = "NONE"
    """Nothing: the same samples, steps and ranks."""
    SAME_SAMPLES_OTHER_RANKS = "SAME_SAMPLES_OTHER_RANKS"
    """Each step reads the same samples; other ranks or micro batches draw them."""
    SAME_ORDER_OTHER_STEPS = "SAME_ORDER_OTHER_STEPS"
    """The samples come in the same order; steps begin and end elsewhere."""
    OTHER_STEPS_SKIPPED = "OTHER_STEPS_SKIPPED"
    """The same samples are read; others are thrown away."""
    UNKNOWN = "UNKNOWN"
    """It depends on facts that were not given."""
    OTHER_ORDER = "OTHER_ORDER"
    """Other samples are read."""
    REFUSED = "REFUSED"
    """Upstream does not start there, or stops."""


@dataclass(frozen=True)
class Verdict:
    """What a change does in one layer.

    Args:
        effect: In a word.
        first_sample: The first consumed sample it acts on, ``None`` if on none.
        explanation: One sentence.
    """

    effect: Effect
    first_sample: int | None
    explanation: str


@dataclass(frozen=True)
class Side:
    """One side of the comparison: arguments, and what follows from them.

    Args:
        args: The arguments.
        start: Of the resume.
        phase: That it belongs to.
        blend: What is asked of each dataset.
        orders: How each dataset is read, if known.
    """

    args: DataArguments
    start: Start
    phase: Phase
    blend: BlendPlan
    orders: tuple[OrderPlan, ...] | None

    @classmethod
    def of(cls, args: DataArguments, start: Start, orders: tuple[OrderPlan, ...] | None) -> Side:
        """What follows from arguments.

        Raises:
            ConfigError: Upstream would refuse them.
        """
        phase = phase_of(args, start)
        blend = plan_blend(args, phase.num_samples)
        if orders is not None and len(orders) != len(blend.num_samples):
            raise ConfigError(
                "the orders are not those of the blend's datasets",
                where="--data-path",
                expected=f"{len(blend.num_samples)} orders",
                got=len(orders),
                cure="give one for each dataset, or none at all",
            )
        return cls(args, start, phase, blend, orders)

    @property
    def position(self) -> int:
        """Index of the top dataset where the resume goes on, under ``single``."""
        return self.start.consumed - self.phase.samples_before

    @property
    def lengths(self) -> list[int] | None:
        """Samples of each dataset as built, if known."""
        return None if self.orders is None else [o.num_samples_total for o in self.orders]

    @property
    def total_samples(self) -> int | None:
        """Length of the top dataset, if known."""
        if self.blend.size is not None:
            return self.blend.size
        if self.lengths is None:
            return None
        whole = sum(self.lengths)
        return min(self.blend.requested, whole) if self.blend.has_blend_layer else whole

    @property
    def schedule(self) -> Schedule:
        """The batch sizes, beyond phase transitions."""
        return replace(plan_schedule(self.args), phase_transition_iterations=())


Layer = Callable[[Side, Side], Verdict]


def _none(explanation: str) -> Verdict:
    return Verdict(Effect.NONE, None, explanation)


def _other(side: Side, explanation: str) -> Verdict:
    return Verdict(Effect.OTHER_ORDER, side.start.consumed, explanation)


def iteration_at(args: DataArguments, start: Start, sample: int | None) -> int | None:
    """The iteration that reads a sample, ``None`` if that cannot be told."""
    if sample is None or sample < start.consumed:
        return None
    try:
        return plan_schedule(args).iteration_of(start, sample)
    except FlagScaleError:
        return None


def windows(begin: int, end: int, multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``[begin, end)``, each twice the one before, in multiples of a batch."""
    size = -(-WINDOW // multiple) * multiple
    while begin < end:
        yield begin, min(begin + size, end)
        begin, size = begin + size, 2 * size


def seed(was: Side, now: Side) -> Verdict:
    """``--seed``."""
    if was.args.seed == now.args.seed:
        return _none("the seed is as it was")
    return _other(now, "each dataset is shuffled by the seed")


def seq_length(was: Side, now: Side) -> Verdict:
    """``--seq-length``."""
    if was.args.seq_length == now.args.seq_length:
        return _none("the length of a sample is as it was")
    return _other(now, "the datasets are cut into other samples")


def split(was: Side, now: Side) -> Verdict:
    """``--split``: only where the training share begins and ends."""
    if _share(was) == _share(now):
        return _none("the training split holds the same sequences")
    return _other(now, "the training split holds other sequences")


def _share(side: Side) -> tuple[float, float] | None:
    matrix = split_matrix(side.args.split)
    return (0.0, 1.0) if matrix is None else matrix[0]


def prefixes(was: Side, now: Side) -> Verdict:
    """``--data-path``, the datasets themselves."""
    if was.args.blend.prefixes == now.args.blend.prefixes:
        return _none("the datasets are as they were")
    return _other(now, "training reads other datasets (by name: their content was not compared)")


def mixing(was: Side, now: Side) -> Verdict:
    """``--data-path``, the weights: which dataset each sample of the blend is of."""
    if was.args.blend.prefixes != now.args.blend.prefixes or len(was.blend.num_samples) == 1:
        return _none("weights have nothing to do with it")
    old, new = _mix(was), _mix(now)
    if old is None or new is None:
        return Verdict(
            Effect.UNKNOWN,
            now.start.consumed,
            "a blend without weights goes by the lengths of its datasets, which were not given",
        )
    if old.weights == new.weights:
        return _none("in proportion the weights are as they were")
    begin = now.position if _is_single(now) else 0
    one, two = BlendOrder(old), BlendOrder(new)
    for first, last in windows(begin, min(old.size, new.size)):
        unlike = np.zeros(last - first, np.bool_)
        for before, after in zip(one.take(first, last), two.take(first, last), strict=True):
            unlike |= before != after
        if unlike.any():
            sample = first + int(unlike.argmax()) if _is_single(now) else now.position
            return Verdict(
                Effect.OTHER_ORDER,
                sample + now.phase.samples_before,
                "the datasets are mixed in another order",
            )
    return _none("the weights differ too little to mix the datasets otherwise")


def _mix(side: Side) -> Mix | None:
    known = side.blend.weights is not None or side.lengths is not None
    return mix_of(side.blend, side.lengths) if known else None


def _is_single(side: Side) -> bool:
    return side.args.dataloader_type == "single"


def epochs(was: Side, now: Side) -> Verdict:
    """The number of samples: how often each dataset is read, which decides how it is shuffled."""
    if was.blend.num_samples == now.blend.num_samples:
        return _none("as many samples of each dataset are built as before")
    if was.orders is None or now.orders is None:
        return Verdict(
            Effect.UNKNOWN,
            now.start.consumed,
            "a dataset is shuffled anew if it is read in another number of epochs, and how many "
            "it takes was not given",
        )
    pairs = list(zip(was.orders, now.orders, strict=False))
    other = [d for d, (old, new) in enumerate(pairs) if old != new]
    if not other:
        return _none("each dataset is read in as many epochs as before, so in the same order")
    old, new = pairs[other[0]]
    return Verdict(
        Effect.OTHER_ORDER,
        _first_of(now, other),
        f"{now.args.blend.prefixes[other[0]]} is read in {_epochs(new)} instead of {_epochs(old)},"
        " and so shuffled otherwise from its first sample on",
    )


def _epochs(order: OrderPlan) -> str:
    last = ", the last shuffled by itself" if order.separate_final_epoch else ""
    return f"{order.num_epochs} epoch{'s' * (order.num_epochs > 1)}{last}"


def _first_of(side: Side, datasets: list[int]) -> int | None:
    """The first consumed sample that is of one of these datasets; ``None`` if none is left."""
    if not side.blend.has_blend_layer or not _is_single(side):
        return side.start.consumed
    mix = mix_of(side.blend, side.lengths)
    order = BlendOrder(mix)
    for first, last in windows(side.position, mix.size):
        hits = np.flatnonzero(np.isin(order.take(first, last)[0], datasets))
        if len(hits):
            return first + int(hits[0]) + side.phase.samples_before
    return None


def phase(was: Side, now: Side) -> Verdict:
    """``--phase-transition-iterations``: from where samples are counted."""
    if was.phase.samples_before != now.phase.samples_before:
        return _other(now, "samples are counted from another phase transition")
    start = now.start.iteration
    transitions = (set(s.args.phase_transition_iterations) for s in (was, now))
    differ = [t for t in set.symmetric_difference(*transitions) if t > start]
    if not differ:
        return _none("the phase of the resume, and those to come, begin where they did")
    sample = now.schedule.step_range(now.start, min(differ)).consumed_after
    return Verdict(
        Effect.OTHER_ORDER,
        sample,
        f"the datasets are built anew after iteration {min(differ)} on one side only",
    )


def sampler(was: Side, now: Side) -> Verdict:
    """The sampler: which sample of the top dataset a consumed one is.

    Raises:
        DataError: Upstream's sampler does not start there: no samples are left, or their number is
            not one of whole micro batches of all ranks.
    """
    total = now.total_samples
    new = None if total is None else plan_sampler(now.args, total, now.position)
    if was.args.dataloader_type != now.args.dataloader_type:
        return _other(now, "one loader reads the samples in their order, the other shuffles them")
    if _is_single(now):
        return _none("the samples are read from end to end, however many there are")
    if was.total_samples is None or new is None:
        return Verdict(
            Effect.UNKNOWN,
            now.start.consumed,
            "cyclic shuffles all samples there are, and how many was not given",
        )
    old = plan_sampler(was.args, was.total_samples, was.position)
    if isinstance(old, ShufflingSampler) and isinstance(new, ShufflingSampler):
        return _compare_shuffles(now, old, new)
    return _none("the samples are read from end to end")


def _compare_shuffles(now: Side, old: ShufflingSampler, new: ShufflingSampler) -> Verdict:
    one, two = _shuffle_of(old), _shuffle_of(new)
    if one == two and old.started_at == new.started_at:
        if (old.micro_batch_size, old.dp_size) == (new.micro_batch_size, new.dp_size):
            return _none("the samples are shuffled and drawn as before")
        # An order that is all whole slices is read from end to end by all ranks together, and a
        # shard by its rank: how they divide it among micro batches does not matter.
        if one.shards > 1 or one.length == one.epoch_samples:
            return Verdict(
                Effect.SAME_SAMPLES_OTHER_RANKS,
                now.start.consumed,
                "the shuffled order is the same, and divided among ranks or micro batches anew",
            )
    begin = now.start.consumed
    end = min(one.epoch_samples, two.epoch_samples)
    if one.shards == two.shards == 1 and one.length == two.length and now.position < end:
        begin = now.phase.samples_before + end
    return Verdict(
        Effect.OTHER_ORDER,
        begin,
        "cyclic shuffles by the number of samples, the micro batch and the number of ranks",
    )


class _Shuffle(NamedTuple):
    """Parts that are shuffled each by itself, elements of each, and samples of an epoch."""

    shards: int
    length: int
    epoch_samples: int


def _shuffle_of(sampler: ShufflingSampler) -> _Shuffle:
    shards = 1 if isinstance(sampler, CyclicSampler) else sampler.dp_size
    return _Shuffle(shards, sampler.shuffled, sampler.epoch_samples)


def steps(was: Side, now: Side) -> Verdict:
    """The batch size: where each step begins and ends."""
    old, new = was.schedule, now.schedule
    edges = {s.iteration for side in (old, new) for s in side.stretches(now.start)}
    end = max(last_iteration(was.args), last_iteration(now.args))
    for iteration in sorted(edge + 1 for edge in edges if edge < end):
        before = old.step_range(was.start, iteration)
        try:
            after = new.step_range(now.start, iteration)
        except ConfigError as error:
            return Verdict(
                Effect.REFUSED,
                before.consumed_before,
                f"the job stops before iteration {iteration}: {error.what}",
            )
        if before.consumed_after != after.consumed_after:
            return Verdict(
                Effect.SAME_ORDER_OTHER_STEPS,
                before.consumed_before,
                f"iteration {iteration} takes {after.consumed_after - after.consumed_before} "
                f"samples instead of {before.consumed_after - before.consumed_before}",
            )
    return _none("each step takes as many samples as before")


def ranks(was: Side, now: Side) -> Verdict:
    """Micro batch and data-parallel size under ``single``: who draws which part of a step."""
    if not _is_single(now):
        return _none("cyclic looks at them in its shuffle")
    sizes = [(side.args.micro_batch_size, side.args.dp_size) for side in (was, now)]
    if sizes[0] == sizes[1]:
        return _none("each rank draws what it drew before")
    return Verdict(
        Effect.SAME_SAMPLES_OTHER_RANKS,
        now.start.consumed,
        "single gives a step the same samples, divided among ranks and micro batches anew",
    )


def skipped(was: Side, now: Side) -> Verdict:
    """``--iterations-to-skip``: samples that are read and thrown away."""
    differ = set(was.args.iterations_to_skip) ^ set(now.args.iterations_to_skip)
    ahead = [iteration for iteration in differ if iteration > now.start.iteration]
    if not ahead:
        return _none("from the resume on the same iterations are skipped")
    first = min(ahead)
    is_new = first in now.args.iterations_to_skip
    return Verdict(
        Effect.OTHER_STEPS_SKIPPED,
        now.schedule.step_range(now.start, first).consumed_before,
        f"iteration {first} is {'now' if is_new else 'no longer'} read without training on it",
    )


def cache(was: Side, now: Side) -> Verdict:
    """``--data-cache-path``."""
    if was.args.data_cache_path == now.args.data_cache_path:
        return _none("the cache is where it was")
    return _none("where the indices are cached does not change them")
