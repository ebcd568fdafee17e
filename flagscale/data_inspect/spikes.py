"""Where the loss of a run rose as it should not have.

A point is judged by the points before it. They give a baseline (the higher of a short median and of
a line through the window, so that neither a steep descent nor a slow rise alarms) and a noise (the
median absolute deviation of what the baseline missed). A point that stands out by more than the
threshold opens a finding, which lasts until the loss is back; what is inside a finding is kept out
of the window. Where the loss does not come back, the new level becomes the baseline.

The gradient norm never opens a finding: on clean runs it stands out every few hundred steps. It is
listed beside one, with its own score.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from flagscale.data_inspect.baseline import Baseline, SpikeSettings, median, robust_score
from flagscale.data_inspect.curve import Curve, Point, surviving

__all__ = ["Kind", "Spike", "SpikeSettings", "find_spikes", "robust_score"]


class Kind(enum.StrEnum):
    """What a finding is."""

    SPIKE = "SPIKE"
    """The loss rose, and came back, or was coming back when it was last seen."""
    LEVEL_SHIFT = "LEVEL_SHIFT"
    """The loss rose and stayed."""
    NAN = "NAN"
    """The loss was NaN or infinite."""


@dataclass(frozen=True)
class Spike:
    """A finding.

    Args:
        kind: What it is.
        first_iteration: The first iteration that may be part of it (1-based).
        last_iteration: The last.
        suspects: First and last iteration of those that may have begun it: what the first printed
            loss that stands out is a mean of.
        peak: The printed loss that stands out most; ``None`` for NaN.
        baseline: The loss to be expected there; ``None`` for a NaN before there was a loss.
        score: Of the peak, in robust standard deviations above the baseline; infinite for NaN.
        attempt: Ordinal of the start it began in.
        grad_norm_score: The highest score of the gradient norm in it, against the norms before it;
            ``None`` without norms. Evidence only.
        evidence: What else is known, a sentence each.
    """

    kind: Kind
    first_iteration: int
    last_iteration: int
    suspects: tuple[int, int]
    peak: float | None
    baseline: float | None
    score: float
    attempt: int
    grad_norm_score: float | None
    evidence: tuple[str, ...]

    @property
    def width(self) -> int:
        """Iterations that may be part of it."""
        return self.last_iteration - self.first_iteration + 1


def find_spikes(curve: Curve, settings: SpikeSettings | None = None) -> tuple[Spike, ...]:
    """The findings of a run, by iteration; of its surviving points only.

    Args:
        curve: From a log or event files, with all attempts.
        settings: When a rise is an alarm.
    """
    settings = settings or SpikeSettings()
    points = surviving(curve).points
    rises = [*_rises(points, settings), *_nans(points, settings)]
    spikes = [_finding(rise, points, settings) for rise in rises]
    return tuple(sorted(spikes, key=lambda spike: (spike.suspects[1], spike.kind)))


@dataclass(frozen=True)
class _Rise:
    """Points ``first`` to ``last`` of the curve, and why they are a finding."""

    kind: Kind
    first: int
    last: int
    peak: float | None
    baseline: float | None
    score: float
    note: str | None = None


@dataclass(frozen=True, slots=True)
class _Judged:
    """A point inside a rise.

    Args:
        index: Its ordinal in the curve.
        loss: Its loss.
        expected: What was expected, from before the rise.
        score: By how much it is above.
    """

    index: int
    loss: float
    expected: float
    score: float

    @property
    def height(self) -> float:
        return self.loss - self.expected


def _rises(points: Sequence[Point], settings: SpikeSettings) -> Iterator[_Rise]:
    baseline = Baseline(settings)
    usual = _usual_steps(points)
    open_rise: list[_Judged] = []
    for index, point in enumerate(points):
        if point.loss is None:
            continue
        steps = min(point.interval, usual[point.attempt])
        samples = float(steps * (point.batch_size or 1))
        expected = baseline.expected()
        if open_rise:
            begun = open_rise[0]
            expected = begun.expected + baseline.ahead(index - begun.index)
        if expected is None or not baseline.ready:
            baseline.add(point.loss, expected, samples)
            continue
        score = (point.loss - expected) / baseline.noise(expected, samples, steps)
        if not open_rise and score < settings.threshold:
            baseline.add(point.loss, expected, samples)
            continue
        open_rise.append(_Judged(index, point.loss, expected, score))
        if _is_calm(open_rise, settings):
            calm = open_rise[-settings.calm_points :]
            yield _rise(open_rise[: -settings.calm_points], Kind.SPIKE)
            for judged in calm:
                baseline.add(judged.loss, None, samples)
            open_rise = []
        elif len(open_rise) == settings.persist:
            yield _lasting(open_rise, settings)
            baseline.move_to([judged.loss for judged in open_rise[len(open_rise) // 2 :]])
            open_rise = []
    if open_rise:
        yield _rise(open_rise, Kind.SPIKE, "the log ends before the loss is back")


def _usual_steps(points: Sequence[Point]) -> dict[int, int]:
    """Steps in a printed loss, by attempt: the most frequent."""
    counts: dict[int, dict[int, int]] = {}
    for point in points:
        mine = counts.setdefault(point.attempt, {})
        mine[point.interval] = mine.get(point.interval, 0) + 1
    return {
        attempt: max(mine, key=lambda interval: (mine[interval], -interval))
        for attempt, mine in counts.items()
    }


def _is_calm(rise: Sequence[_Judged], settings: SpikeSettings) -> bool:
    last = rise[-settings.calm_points :]
    return len(rise) > len(last) and all(judged.score < settings.calm for judged in last)


def _rise(rise: Sequence[_Judged], kind: Kind, note: str | None = None) -> _Rise:
    peak = max(rise, key=lambda judged: judged.score)
    first, last = rise[0].index, rise[-1].index
    return _Rise(kind, first, last, peak.loss, peak.expected, peak.score, note)


def _lasting(rise: Sequence[_Judged], settings: SpikeSettings) -> _Rise:
    """A rise that is not over: a new level, unless the loss is on its way back."""
    begin, end = rise[: len(rise) // 2], rise[-(len(rise) // 4) :]
    height = median([judged.height for judged in end])
    level = f"{median([judged.loss for judged in end]):.4g}"
    stays = median([judged.score for judged in end]) >= settings.threshold
    if stays and height >= 0.5 * median([judged.height for judged in begin]):
        note = f"the loss stays at about {level}; from there on that is the baseline"
        return _rise(rise, Kind.LEVEL_SHIFT, note)
    return _rise(rise, Kind.SPIKE, f"still coming back after {len(rise)} points, at {level}")


def _nans(points: Sequence[Point], settings: SpikeSettings) -> Iterator[_Rise]:
    for nan, group in groupby(enumerate(points), key=lambda pair: pair[1].nan):
        indices = [index for index, _ in group]
        if not nan:
            continue
        before = _losses_before(points, indices[0], settings.short_window)
        baseline = median(before) if before else None
        yield _Rise(Kind.NAN, indices[0], indices[-1], None, baseline, math.inf)


def _losses_before(points: Sequence[Point], index: int, count: int) -> list[float]:
    losses = (point.loss for point in reversed(points[:index]) if point.loss is not None)
    return list(islice(losses, count))


def _finding(rise: _Rise, points: Sequence[Point], settings: SpikeSettings) -> Spike:
    first, last = points[rise.first], points[rise.last]
    norm_score, norm_text = _grad_norm(rise, points, settings)
    evidence = (
        rise.note,
        _single_step(rise, first),
        norm_text,
        *_changes(rise, points),
    )
    return Spike(
        kind=rise.kind,
        first_iteration=first.first_iteration,
        last_iteration=last.iteration,
        suspects=(first.first_iteration, first.iteration),
        peak=rise.peak,
        baseline=rise.baseline,
        score=rise.score,
        attempt=first.attempt,
        grad_norm_score=norm_score,
        evidence=tuple(text for text in evidence if text),
    )


def _single_step(rise: _Rise, first: Point) -> str | None:
    """What one step's loss was, if a mean of several rose by it alone."""
    if first.interval == 1 or rise.first != rise.last or rise.peak is None or rise.baseline is None:
        return None
    single = rise.baseline + first.interval * (rise.peak - rise.baseline)
    return (
        f"the printed loss is a mean of up to {first.interval} steps: if one of them did it, its "
        f"loss was about {single:.4g}"
    )


def _grad_norm(
    rise: _Rise, points: Sequence[Point], settings: SpikeSettings
) -> tuple[float | None, str | None]:
    """The score of the gradient norm, and that in words."""
    window = points[max(0, rise.first - settings.window) : rise.first]
    before = [math.log(p.grad_norm) for p in window if p.grad_norm]
    inside = [p for p in points[rise.first : rise.last + 1] if p.grad_norm]
    if len(before) < settings.min_points or not inside:
        return None, None
    highest = max(inside, key=lambda point: point.grad_norm or 0.0)
    norm = highest.grad_norm or 1.0
    score = robust_score(math.log(norm), before, floor=settings.floor)
    usual = math.exp(median(before))
    text = (
        f"gradient norm {norm:.4g} at iteration {highest.iteration}, usually {usual:.4g} "
        f"(score {score:.1f} on its logarithm)"
    )
    return score, text


def _changes(rise: _Rise, points: Sequence[Point]) -> Iterator[str]:
    """What else changed where it began."""
    first = points[rise.first]
    before = points[rise.first - 1] if rise.first else None
    skipped = sum(point.skipped for point in points[rise.first : rise.last + 1])
    if skipped:
        yield f"the optimizer skipped {skipped} step(s) in it"
    if before is None:
        return
    if first.attempt != before.attempt:
        yield f"it begins with start {first.attempt}, at iteration {first.first_iteration}"
    if first.batch_size != before.batch_size:
        yield f"the batch size went from {before.batch_size} to {first.batch_size} there"
    if _jumps(before.learning_rate, first.learning_rate):
        yield f"the learning rate went from {before.learning_rate} to {first.learning_rate} there"
    if first.loss_scale != before.loss_scale:
        yield f"the loss scale went from {before.loss_scale} to {first.loss_scale} there"


def _jumps(before: float | None, after: float | None) -> bool:
    """Whether a learning rate changed by more than a schedule changes it in one interval."""
    if not before or not after:
        return before != after
    return abs(after - before) > 0.2 * before
