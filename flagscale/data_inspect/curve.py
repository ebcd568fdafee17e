"""The curve of a run: what was logged of each step, over all its starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

__all__ = ["Attempt", "Curve", "Place", "Point", "average", "surviving", "usual_interval"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a point was read.

    Args:
        file: Path of the log, or of what else it is.
        position: In a text, the line, from 1; else the byte its record starts at.
    """

    file: str
    position: int

    def __str__(self) -> str:
        return f"{self.file}:{self.position}"


@dataclass(frozen=True, slots=True)
class Point:
    """What was logged at one iteration. ``None`` is what was not logged.

    Args:
        iteration: 1-based.
        loss: Mean over the interval's steps that counted; ``None`` if it was no number, or if no
            token counted, or if every step of the interval was skipped.
        nan: Whether the loss of a step of the interval was no number (NaN or infinite).
        skipped: How many steps of the interval the optimizer refused.
        consumed_after: Samples consumed after the iteration.
        batch_size: Samples of the step.
        grad_norm: Norm of the gradient of this step alone, also where the loss is a mean.
        learning_rate: Of this step.
        loss_scale: Of this step.
        interval: How many iterations, up to and including this one, may be in the loss.
        attempt: Ordinal of the start it belongs to, from 0.
        source: Where it was read.
    """

    iteration: int
    loss: float | None
    nan: bool = False
    skipped: int = 0
    consumed_after: int | None = None
    batch_size: int | None = None
    grad_norm: float | None = None
    learning_rate: float | None = None
    loss_scale: float | None = None
    interval: int = 1
    attempt: int = 0
    source: Place = Place("", 0)

    @property
    def first_iteration(self) -> int:
        """The first iteration that may be in the loss."""
        return self.iteration - self.interval + 1


@dataclass(frozen=True, slots=True)
class Attempt:
    """One start of a job, as far as it got to a logged step.

    Args:
        ordinal: From 0, in order of time.
        first_iteration: The first iteration that it ran (1-based), as far as the log tells.
        last_iteration: The last one it logged.
        interval: Iterations between two of its points.
        train_iters: The last iteration it was to run, where the log says so.
        started: Time of its first point, as logged; ``None`` where the log has no times.
        source: Where its first point was read.
    """

    ordinal: int
    first_iteration: int
    last_iteration: int
    interval: int = 1
    train_iters: int | None = None
    started: str | None = None
    source: Place = Place("", 0)


@dataclass(frozen=True)
class Curve:
    """All points of a run.

    Args:
        points: By attempt, then by iteration, which rises within an attempt.
        attempts: By ordinal.
        damaged: Where something was found that is a point but cannot be read as one: a line cut in
            the middle, the end of an event file. What stood there is not in ``points``.
    """

    points: tuple[Point, ...]
    attempts: tuple[Attempt, ...]
    damaged: tuple[Place, ...] = ()


def surviving(curve: Curve) -> Curve:
    """The points that led to the present state of the run, by iteration.

    A start that begins at iteration s goes on from the checkpoint of s - 1: what earlier starts did
    from s on is lost. All attempts stay listed.
    """
    begins = {attempt.ordinal: attempt.first_iteration for attempt in curve.attempts}
    lost_from: int | None = None
    limits: dict[int, int | None] = {}
    for ordinal in sorted(begins, reverse=True):
        limits[ordinal] = lost_from
        first = begins[ordinal]
        lost_from = first if lost_from is None else min(first, lost_from)
    points = [point for point in curve.points if _before(point.iteration, limits[point.attempt])]
    return replace(curve, points=tuple(points))


def _before(iteration: int, limit: int | None) -> bool:
    return limit is None or iteration < limit


def average(curve: Curve, interval: int) -> Curve:
    """The curve as a log with a coarser ``--log-interval`` shows it: one point every ``interval``.

    Args:
        curve: One of interval 1.
        interval: Iterations a point. What is left over at the end of an attempt is not printed.
    """
    points: list[Point] = []
    group: list[Point] = []
    for point in curve.points:
        if group and group[-1].attempt != point.attempt:
            group = []
        group.append(point)
        if point.iteration % interval == 0:
            points.append(_mean(group))
            group = []
    attempts = tuple(replace(attempt, interval=interval) for attempt in curve.attempts)
    return replace(curve, points=tuple(points), attempts=attempts)


def _mean(group: Sequence[Point]) -> Point:
    losses = [point.loss for point in group if point.loss is not None]
    nan = any(point.nan for point in group)
    return replace(
        group[-1],
        loss=sum(losses) / len(losses) if losses and not nan else None,
        nan=nan,
        skipped=sum(point.skipped for point in group),
        interval=group[-1].iteration - group[0].first_iteration + 1,
    )


def usual_interval(iterations: Sequence[int]) -> int:
    """The most frequent distance of neighbours, the smaller one of equals; 1 without any."""
    distances = Counter(after - before for before, after in pairwise(iterations))
    return min(distances, key=lambda distance: (-distances[distance], distance), default=1)
