"""Before a resume: do other arguments read other samples, and from which sample on?

Two answers. :func:`drift` compares arguments and says which flag is to blame.
:func:`first_difference` compares two streams of samples, where both can be computed.

What is read is decided in layers: what the datasets hold, how they are mixed, how often each is
read, which of the mixed samples a consumed one is (phase and sampler), where steps begin and end,
which rank draws what, and what is thrown away. A flag can act in several; the worst counts.

Both sides are what a job would read that starts at the resume. With ``--no-data-sharding`` that can
differ from what the job would have read without any restart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect import drift_layers as layers
from flagscale.data_inspect.arguments import DataArguments
from flagscale.data_inspect.drift_layers import Effect, Side, Verdict, windows
from flagscale.data_inspect.order import OrderPlan
from flagscale.data_inspect.steps import Start
from flagscale.errors import DataError, FlagScaleError

__all__ = ["Drift", "Effect", "Finding", "Stream", "drift", "first_difference"]

Stream = Callable[[int, int], npt.NDArray[np.int64]]
"""From a range of consumed samples to ``(dataset, its sample index)`` of each, [samples, 2]."""

SAMPLES = ("train_samples", "train_iters", "global_batch_size", "phase_transition_iterations")
"""What says how many samples the datasets are built for."""
BATCH = ("global_batch_size", "step_batch_size_schedule", "rampup_batch_size")
RANKS = ("micro_batch_size", "dp_size")

LAYERS: tuple[tuple[layers.Layer, tuple[str, ...]], ...] = (
    (layers.seed, ("seed",)),
    (layers.seq_length, ("seq_length",)),
    (layers.split, ("split",)),
    (layers.mixing, ("blend",)),
    (layers.prefixes, ("blend",)),
    (layers.epochs, (*SAMPLES, "blend", "mid_level_dataset_surplus")),
    (layers.phase, ("phase_transition_iterations", "global_batch_size")),
    (layers.sampler, ("dataloader_type", "data_sharding", *RANKS, *SAMPLES, "blend")),
    (layers.steps, (*BATCH, "decrease_batch_size_if_needed", *RANKS, "seq_length")),
    (layers.ranks, RANKS),
    (layers.skipped, ("iterations_to_skip",)),
    (layers.cache, ("data_cache_path",)),
)
"""Each layer with the arguments that act in it; of those that find nothing the first speaks."""

FLAGS = {
    "blend": "--data-path",
    "dp_size": "data-parallel size",
    "data_sharding": "--no-data-sharding",
}


@dataclass(frozen=True)
class Finding:
    """What one changed flag does in one layer.

    Args:
        flag: As it is given on the command line.
        was: Before.
        now: After.
        effect: What that does.
        first_sample: The first consumed sample it acts on; ``None`` if it does nothing.
        first_iteration: The iteration that reads it under the new arguments.
        explanation: One sentence.
    """

    flag: str
    was: object
    now: object
    effect: Effect
    first_sample: int | None
    first_iteration: int | None
    explanation: str


@dataclass(frozen=True)
class Drift:
    """All that changed.

    Args:
        start: Of the resume.
        findings: By argument: one for each layer it acts in, or one that says it does nothing.
    """

    start: Start
    findings: tuple[Finding, ...]

    @property
    def effect(self) -> Effect:
        """The worst of all."""
        return max((f.effect for f in self.findings), key=_rank, default=Effect.NONE)

    @property
    def first_sample(self) -> int | None:
        """Up to which consumed sample nothing is read otherwise; ``None`` if nothing ever is."""
        samples = (
            finding.first_sample
            for finding in self.findings
            if finding.first_sample is not None and _rank(finding.effect) >= _rank(Effect.UNKNOWN)
        )
        return min(samples, default=None)


def drift(
    old: DataArguments,
    new: DataArguments,
    start: Start,
    old_orders: Sequence[OrderPlan] | None = None,
    new_orders: Sequence[OrderPlan] | None = None,
) -> Drift:
    """What a resume with other arguments reads otherwise.

    Args:
        old: The arguments so far.
        new: Those of the resume.
        start: Where it resumes.
        old_orders: How each dataset was read so far; see
            :func:`~flagscale.data_inspect.order.plan_order`, which wants the numbers of samples of
            :func:`~flagscale.data_inspect.blend.plan_blend`. Without both, what a changed number
            of samples does is UNKNOWN.
        new_orders: How each will be read.

    Raises:
        ConfigError: Upstream would have refused the old arguments.
    """
    was = Side.of(old, start, None if old_orders is None else tuple(old_orders))
    orders = None if new_orders is None else tuple(new_orders)
    changed = [name for name in vars(old) if getattr(old, name) != getattr(new, name)]
    verdicts: dict[str, list[Verdict]] = {name: [] for name in changed}
    for layer, names in LAYERS:
        acting = [name for name in names if name in verdicts]
        if acting:
            for name, verdict in _blame(layer, was, new, orders, acting).items():
                verdicts[name].append(verdict)
    findings = [
        _finding(old, new, start, name, verdict)
        for name in changed
        for verdict in _telling(verdicts[name])
    ]
    return Drift(start, tuple(findings))


def _telling(verdicts: list[Verdict]) -> list[Verdict]:
    """One of each layer in which a flag does something, else one that says that it does nothing."""
    acting = [verdict for verdict in verdicts if verdict.effect is not Effect.NONE]
    return list(dict.fromkeys(acting)) or verdicts[:1]


def _blame(
    layer: layers.Layer,
    was: Side,
    new: DataArguments,
    orders: tuple[OrderPlan, ...] | None,
    acting: list[str],
) -> dict[str, Verdict]:
    """A layer's verdict on all new arguments, for those that alone would have changed it."""
    together = _judge(layer, was, new, orders)
    if together.effect is Effect.NONE or len(acting) == 1:
        return dict.fromkeys(acting, together)
    alone = {
        name: _judge(layer, was, replace(was.args, **{name: getattr(new, name)}), orders)
        for name in acting
    }
    harmless = [name for name in acting if alone[name].effect is Effect.NONE]
    if len(harmless) == len(acting):
        return dict.fromkeys(acting, together)
    return {name: alone[name] if name in harmless else together for name in acting}


def _judge(
    layer: layers.Layer, was: Side, new: DataArguments, orders: tuple[OrderPlan, ...] | None
) -> Verdict:
    try:
        now = Side.of(new, was.start, orders)
        if now.blend == was.blend:
            # The given orders are those of all new arguments together.
            now = replace(now, orders=was.orders or orders)
        return layer(was, now)
    except FlagScaleError as error:
        return Verdict(Effect.REFUSED, was.start.consumed, f"upstream does not run: {error.what}")


def _finding(
    old: DataArguments, new: DataArguments, start: Start, name: str, verdict: Verdict
) -> Finding:
    return Finding(
        FLAGS.get(name, f"--{name.replace('_', '-')}"),
        getattr(old, name),
        getattr(new, name),
        verdict.effect,
        verdict.first_sample,
        layers.iteration_at(new, start, verdict.first_sample),
        verdict.explanation,
    )


def _rank(effect: Effect) -> int:
    return list(Effect).index(effect)


def first_difference(
    old: Stream, new: Stream, begin: int, end: int, batch_size: int = 1
) -> int | None:
    """The first consumed sample that two streams differ in, found by comparing them.

    Args:
        old: One stream.
        new: The other.
        begin: First consumed sample to compare.
        end: One past the last.
        batch_size: Samples of a step, whose order among themselves does not matter; then the
            answer is where the step begins.

    Returns:
        ``None`` if they agree up to ``end``.

    Raises:
        DataError: A stream gives another number of samples than it was asked for.
    """
    for first, last in windows(begin, end, batch_size):
        one, two = _read(old, first, last), _read(new, first, last)
        if batch_size > 1:
            one, two = _sorted_in_steps(one, batch_size), _sorted_in_steps(two, batch_size)
        unlike = np.flatnonzero((one != two).any(axis=1))
        if len(unlike):
            return first + int(unlike[0]) // batch_size * batch_size
    return None


def _read(stream: Stream, first: int, last: int) -> npt.NDArray[np.int64]:
    samples = np.asarray(stream(first, last))
    if samples.shape != (last - first, 2):
        raise DataError(
            "a stream of samples is shorter or longer than asked for",
            where=f"consumed samples [{first}, {last})",
            expected=f"{last - first} pairs of dataset and sample",
            got=samples.shape,
            cure="compare fewer samples: up to the end of the shorter training",
        )
    return samples


def _sorted_in_steps(samples: npt.NDArray[Any], batch_size: int) -> npt.NDArray[Any]:
    steps = np.arange(len(samples)) // batch_size
    ranked: npt.NDArray[Any] = samples[np.lexsort((samples[:, 1], samples[:, 0], steps))]
    return ranked
