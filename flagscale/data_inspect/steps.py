"""Iterations and the samples they consume: which of the stream's samples a step reads.

A step reads ``[consumed_before, consumed_after)``: its batch size is that of the schedule at
``consumed_before``. While the size stays the same, so does the number of samples from one step to
the next; such a run of steps is a *stretch*, and all here is arithmetic on stretches, whatever the
number of iterations.

Source: megatron-core 0.19.2, core/num_microbatches_calculator.py and training/training.py; the
linear ramp as releases before 0.18 had it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.arguments import DataArguments
from flagscale.data_inspect.batch_sizes import BatchSize, plan_batch_sizes
from flagscale.errors import ConfigError, DataError

__all__ = [
    "FRESH",
    "Phase",
    "Schedule",
    "Start",
    "StepRange",
    "Stretch",
    "last_iteration",
    "num_train_samples",
    "phase_of",
    "plan_schedule",
]


@dataclass(frozen=True)
class Start:
    """The state that a start of the training job begins from.

    Args:
        iteration: Iterations done: a checkpoint's; 0 for a fresh run and for ``--finetune``.
        consumed: Samples consumed by them.
    """

    iteration: int
    consumed: int


FRESH = Start(0, 0)
MOST_SAMPLES = 2**62
"""More than any training reads: what asks for as many is a mistake."""


@dataclass(frozen=True)
class StepRange:
    """What one step reads.

    Args:
        iteration: 1-based, as logged.
        consumed_before: The first sample.
        consumed_after: One past the last.
        micro_batches: On each rank.
        skipped: Whether the samples are thrown away (``--iterations-to-skip``).
    """

    iteration: int
    consumed_before: int
    consumed_after: int
    micro_batches: int
    skipped: bool


@dataclass(frozen=True)
class Stretch:
    """Steps of one size, one after another.

    Args:
        iteration: Iterations done before the first of them.
        consumed: Samples consumed before it.
        size: As the schedule has it.
        running: Samples that each step takes; see :class:`BatchSize`.
    """

    iteration: int
    consumed: int
    size: int
    running: int | None


@dataclass(frozen=True)
class Schedule:
    """How many samples each step of one start takes.

    Args:
        batch_sizes: By first sample, from 0 on.
        micro_batch_size: Samples of a forward pass.
        dp_size: Data-parallel ranks.
        iterations_to_skip: Read, but not trained on.
        phase_transition_iterations: The job ends at each, to be started again.
    """

    batch_sizes: tuple[BatchSize, ...]
    micro_batch_size: int
    dp_size: int
    iterations_to_skip: frozenset[int] = frozenset()
    phase_transition_iterations: tuple[int, ...] = ()

    def batch_size(self, consumed: int) -> int:
        """Samples of the step that begins at a number of consumed samples.

        Raises:
            ConfigError: That size is not a whole number of micro batches of all ranks.
        """
        entry = self.batch_sizes[_last_at_or_before(self._first_samples(), consumed)]
        return self._running(entry)

    def stretches(self, start: Start) -> tuple[Stretch, ...]:
        """The steps from a start on, by size; the last stretch has no end."""
        return _stretches(self.batch_sizes, start)

    def step_range(self, start: Start, iteration: int) -> StepRange:
        """What an iteration reads.

        Args:
            start: Where the job that ran it had started.
            iteration: 1-based.

        Raises:
            ConfigError: The batch size there is not a whole number of micro batches.
            DataError: A job started there does not run that iteration.
        """
        self._check_ran(start, iteration)
        stretches = self.stretches(start)
        iterations = [stretch.iteration for stretch in stretches]
        stretch = stretches[_last_at_or_before(iterations, iteration - 1)]
        size = self._running(stretch)
        before = stretch.consumed + (iteration - 1 - stretch.iteration) * size
        _check_possible(before, f"iteration {iteration}")
        return StepRange(
            iteration,
            before,
            before + size,
            size // (self.micro_batch_size * self.dp_size),
            iteration in self.iterations_to_skip,
        )

    def iteration_of(self, start: Start, index: int) -> int:
        """The iteration that reads a sample of the stream; the inverse of :meth:`step_range`.

        Args:
            start: Where the job had started.
            index: Samples consumed before it.

        Raises:
            ConfigError: The batch size there is not a whole number of micro batches.
            DataError: The sample was consumed before the start.
        """
        _check_possible(index, "consumed samples")
        return int(self.iterations_of(start, np.array([index], np.int64))[0])

    def iterations_of(self, start: Start, indices: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """:meth:`iteration_of` of many; it may lie beyond the end of the phase or of training."""
        if len(indices) and indices.min() < start.consumed:
            raise DataError(
                "a sample was consumed before the job started",
                where="consumed samples",
                expected=f"at least {start.consumed}",
                got=int(indices.min()),
                cure="ask the start before",
            )
        stretches = self.stretches(start)
        which = np.searchsorted([s.consumed for s in stretches], indices, "right") - 1
        result = np.empty(len(indices), np.int64)
        for ordinal in np.unique(which):
            stretch, mask = stretches[ordinal], which == ordinal
            steps = (indices[mask] - stretch.consumed) // self._running(stretch)
            result[mask] = stretch.iteration + 1 + steps
        return result

    def last_of_phase(self, start: Start) -> int | None:
        """The iteration after which the job ends for a phase transition, ``None`` if none is ahead.

        A transition that is skipped over does not end it: upstream looks only after a trained step.
        """
        return _transition_ahead(
            self.phase_transition_iterations, self.iterations_to_skip, start.iteration
        )

    def _check_ran(self, start: Start, iteration: int) -> None:
        last = self.last_of_phase(start)
        if iteration <= start.iteration or (last is not None and iteration > last):
            raise DataError(
                "a job that starts there does not run this iteration",
                where=f"the start at iteration {start.iteration}",
                expected=f"iteration {start.iteration + 1} to {last or 'the last of training'}",
                got=iteration,
                cure="ask the start that ran it",
            )

    def _first_samples(self) -> list[int]:
        return [entry.first_sample for entry in self.batch_sizes]

    def _running(self, entry: BatchSize | Stretch) -> int:
        if entry.running is None:
            raise ConfigError(
                "a batch is not a whole number of micro batches of all ranks",
                where="--global-batch-size, --micro-batch-size, data-parallel size",
                expected=f"a multiple of {self.micro_batch_size} x {self.dp_size}",
                got=entry.size,
                cure="give the arguments the run was made with: with these it stops there",
            )
        return entry.running


def _check_possible(consumed: int, where: str) -> None:
    if consumed >= MOST_SAMPLES:
        raise DataError(
            "no training reads that many samples",
            where=where,
            expected=f"less than {MOST_SAMPLES}",
            got=consumed,
            cure="check the iteration or the sample asked for",
        )


@lru_cache(maxsize=64)
def _stretches(batch_sizes: tuple[BatchSize, ...], start: Start) -> tuple[Stretch, ...]:
    return tuple(_walk(batch_sizes, start))


def _walk(batch_sizes: tuple[BatchSize, ...], start: Start) -> Iterator[Stretch]:
    """The stretches from a start on; the last has no end, or a size that does not divide."""
    iteration, consumed = start.iteration, start.consumed
    for entry, after in zip(batch_sizes, (*batch_sizes[1:], None), strict=True):
        if after is not None and consumed >= after.first_sample:
            continue
        yield Stretch(iteration, consumed, entry.size, entry.running)
        if after is None or entry.running is None:
            return
        steps = -(-(after.first_sample - consumed) // entry.running)
        iteration, consumed = iteration + steps, consumed + steps * entry.running


def _transition_ahead(
    transitions: Iterable[int], skipped: Container[int], iteration: int
) -> int | None:
    ahead = (t for t in transitions if t > iteration and t not in skipped)
    return min(ahead, default=None)


def _last_at_or_before(ascending: list[int], value: int) -> int:
    return max(0, bisect_right(ascending, value) - 1)


def plan_schedule(args: DataArguments) -> Schedule:
    """The schedule that upstream follows.

    Args:
        args: Of one start.

    Raises:
        ConfigError: Upstream would refuse the batch sizes.
    """
    batch_sizes = plan_batch_sizes(args)
    return Schedule(
        batch_sizes,
        args.micro_batch_size,
        args.dp_size,
        frozenset(args.iterations_to_skip),
        tuple(sorted(args.phase_transition_iterations)),
    )


@dataclass(frozen=True)
class Phase:
    """What upstream builds its datasets for, and from where in them a start goes on.

    Without ``--phase-transition-iterations`` training is one phase. Otherwise the job ends at each
    transition; the next start builds the datasets anew and counts their samples from the
    transition.

    Args:
        samples_before: Consumed samples that belong to earlier phases: what is to be subtracted
            from a number of consumed samples for a place in the top dataset.
        num_samples: To build the datasets for.
        last_iteration: After which the job ends for a transition, ``None`` if none is ahead.
    """

    samples_before: int
    num_samples: int
    last_iteration: int | None


def phase_of(args: DataArguments, start: Start) -> Phase:
    """The phase a start belongs to.

    Raises:
        ConfigError: Upstream could not build datasets for it.
    """
    last = _transition_ahead(
        args.phase_transition_iterations, args.iterations_to_skip, start.iteration
    )
    if not args.phase_transition_iterations:
        return Phase(0, _all_train_samples(args), last)
    begin = max(t for t in (0, *args.phase_transition_iterations) if t <= start.iteration)
    before = start.consumed - (start.iteration - begin) * args.global_batch_size
    return Phase(before, _phase_samples(args, start), last)


def num_train_samples(args: DataArguments, start: Start = FRESH) -> int:
    """How many training samples upstream asks its dataset builder for.

    Raises:
        ConfigError: Neither ``--train-samples`` nor ``--train-iters`` says how long training is,
            or no phase is left.
    """
    if args.phase_transition_iterations:
        return _phase_samples(args, start)
    return _all_train_samples(args)


def _all_train_samples(args: DataArguments) -> int:
    if args.train_samples:
        return args.train_samples
    if args.train_iters:
        return args.train_iters * args.global_batch_size
    raise ConfigError(
        "nothing says how long training is",
        where="--train-samples, --train-iters",
        cure="give the arguments of the run: the order of the samples depends on it",
    )


def _phase_samples(args: DataArguments, start: Start) -> int:
    """From the last transition to the next, or to the end of training."""
    transitions = [t * args.global_batch_size for t in args.phase_transition_iterations]
    # Upstream counts the end as a transition, and cannot do without it.
    if args.train_samples:
        edges = [0, *transitions, args.train_samples]
        current = start.iteration * args.global_batch_size
        after = [edge for edge in edges if edge > current]
        if after:
            return min(after) - max(edge for edge in edges if edge <= current)
    raise ConfigError(
        "no phase of training is left",
        where="--phase-transition-iterations, --train-samples",
        expected=f"--train-samples beyond iteration {start.iteration}",
        got=args.train_samples,
        cure="give the arguments of the run",
    )


def last_iteration(args: DataArguments) -> int:
    """The last iteration of training, over all its starts.

    Counted by whole batches: what is left of ``--train-samples`` behind the last is never read.

    Raises:
        ConfigError: Nothing says how long training is.
    """
    if args.train_iters:
        return args.train_iters
    samples = _all_train_samples(args)
    # Upstream counts with the sizes asked for, even where it decreases those it runs.
    sizes = tuple(replace(b, running=b.size) for b in plan_batch_sizes(args))
    schedule = Schedule(sizes, 1, 1)
    if args.step_batch_size_schedule is not None or len(sizes) == 1:
        return schedule.iteration_of(FRESH, samples) - 1
    ramp = args.rampup_batch_size or (0, 0, 0)
    # Older releases count the steps that begin within the ramp, even where the samples end in it.
    steps = schedule.iteration_of(FRESH, min(ramp[2], samples))
    rest = samples - schedule.step_range(FRESH, steps).consumed_after
    return steps + max(0, rest) // args.global_batch_size
