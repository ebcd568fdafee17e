"""What the losses so far lead to expect of the next, robustly."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from flagscale.errors import ConfigError

__all__ = ["Baseline", "SpikeSettings", "median", "robust_score"]

_PER_MAD = 1.4826
"""Standard deviations in a median absolute deviation of normal noise."""

_PART = 25
"""Points over which what a descent adds to the misses is taken for constant."""


@dataclass(frozen=True)
class SpikeSettings:
    """When a rise is an alarm. Points are what was logged: one every ``--log-interval``.

    Args:
        threshold: Robust standard deviations above the baseline that open a finding.
        window: Points that baseline and noise are taken from.
        short_window: Points of the short median. A curve that descends may rise back to it.
        min_points: Points needed before anything but NaN is judged.
        floor: Least noise of a single step, as a share of the baseline. It keeps a curve that is
            smooth by nature from alarming at changes nobody would look at.
        calm: A finding ends once ``calm_points`` in a row are below this score.
        calm_points: See ``calm``.
        persist: Points after which a finding ends in any case, and the baseline is taken anew.
    """

    threshold: float = 5.0
    window: int = 100
    short_window: int = 11
    min_points: int = 20
    floor: float = 0.005
    calm: float = 3.0
    calm_points: int = 3
    persist: int = 100

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: A setting is out of its range.
        """
        limits = (
            ("threshold", self.threshold > self.calm, f"above calm ({self.calm})"),
            ("calm", self.calm > 0, "above 0"),
            ("floor", self.floor >= 0, "0 or more"),
            ("min_points", self.min_points >= 5, "5 or more"),
            ("window", self.window >= self.min_points, f"min_points ({self.min_points}) or more"),
            ("short_window", 1 <= self.short_window <= self.window, "from 1 to window"),
            ("calm_points", self.calm_points >= 1, "1 or more"),
            ("persist", self.persist >= 4 * self.calm_points, "four times calm_points or more"),
        )
        for name, holds, expected in limits:
            if not holds:
                raise ConfigError(
                    "a setting of the spike detector is out of its range",
                    where=name,
                    expected=expected,
                    got=getattr(self, name),
                    cure="leave it out to use the default",
                )


class Baseline:
    """What the points so far lead to expect."""

    def __init__(self, settings: SpikeSettings) -> None:
        self._settings = settings
        self._losses: deque[float] = deque(maxlen=settings.window)
        self._misses: deque[tuple[float, float]] = deque(maxlen=settings.window)

    @property
    def ready(self) -> bool:
        """Whether there are enough points to judge one by."""
        return len(self._misses) >= self._settings.min_points

    def expected(self) -> float | None:
        """The next loss; the higher of two guesses, ``None`` before there was a loss."""
        losses = list(self._losses)
        if not losses:
            return None
        short = median(losses[-self._settings.short_window :])
        return max(short, self._trend(losses))

    def ahead(self, points: int) -> float:
        """How much lower the loss is to be after some more points, by its descent so far.

        The descent is taken to slow down; a rise is not taken to go on.
        """
        reach = self._settings.window / 2
        return min(0.0, self._slope(self._losses)) * reach * (1 - math.exp(-points / reach))

    def _trend(self, losses: Sequence[float]) -> float:
        """The next loss, by a line through the medians of the window's halves."""
        half = len(losses) // 2
        if half < self._settings.short_window:
            return median(losses[-self._settings.short_window :])
        return median(losses[-half:]) + self._slope(losses) * (half + 1) / 2

    def _slope(self, losses: Sequence[float]) -> float:
        half = len(losses) // 2
        if half < self._settings.short_window:
            return 0.0
        early, late = list(losses)[:half], list(losses)[-half:]
        return (median(late) - median(early)) / (len(losses) - half)

    def noise(self, expected: float, samples: float, steps: int) -> float:
        """Standard deviation of the next loss.

        Args:
            expected: Its expected value.
            samples: How many samples it is a mean of.
            steps: In how many steps.
        """
        # A mean of fewer samples is noisier. One of more is trusted to be less noisy only once
        # its own kind fills the window: not all noise is that of samples.
        misses = [miss * max(1.0, math.sqrt(of / samples)) for miss, of in self._misses]
        measured = _PER_MAD * median(_deviations(misses))
        measured *= 1 + 5 / len(misses)  # the MAD of few points is often too small
        return max(measured, self._settings.floor * abs(expected) / math.sqrt(steps))

    def add(self, loss: float, expected: float | None, samples: float) -> None:
        """Take in a point.

        Args:
            loss: Its loss.
            expected: What was expected; ``None`` to learn the level from it, but not the noise.
            samples: How many samples it is a mean of.
        """
        if expected is not None:
            self._misses.append((loss - expected, samples))
        self._losses.append(loss)

    def move_to(self, losses: Sequence[float]) -> None:
        """Take these losses for the level; what is known of the noise stays."""
        self._losses.clear()
        self._losses.extend(losses)


def _deviations(misses: Sequence[float]) -> list[float]:
    """Of each miss from the median of its part of the window: what a descent adds is not noise."""
    parts = max(1, len(misses) // _PART)
    bounds = [len(misses) * part // parts for part in range(parts + 1)]
    deviations = []
    for begin, end in pairwise(bounds):
        middle = median(misses[begin:end])
        deviations += [abs(miss - middle) for miss in misses[begin:end]]
    return deviations


def robust_score(value: float, before: Sequence[float], floor: float = 0.0) -> float:
    """How far a value is above the median of others, in standard deviations by their MAD.

    Args:
        value: The value.
        before: The others; at least one.
        floor: Least standard deviation.
    """
    middle = median(before)
    deviation = max(_PER_MAD * median([abs(other - middle) for other in before]), floor)
    if deviation == 0.0:
        return 0.0 if value == middle else math.copysign(math.inf, value - middle)
    return (value - middle) / deviation


def median(values: Sequence[float]) -> float:
    """Of at least one value; for the few values of a window faster than numpy's."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2
