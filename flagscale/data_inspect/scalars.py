"""Scalars of a training run, by iteration and tag, as a curve.

What TensorBoard's event files and Weights & Biases' offline files have in common: the training loop
writes the same tags to both. Every value is of one step: nothing is averaged. Whether the optimizer
refused a step is not written, but then there is no gradient norm.

Source: megatron-core 0.19.2, training/training.py, ``training_log``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flagscale.data_inspect.curve import Attempt, Curve, Place, Point, usual_interval

__all__ = ["LARGEST_COUNT", "LOSSES", "TAGS", "ScalarRun", "curve_of"]

LOSSES = ("lm loss", "loss")
TAGS = (*LOSSES, "grad-norm", "learning-rate", "batch-size", "loss-scale")
LARGEST_COUNT = 2**62


@dataclass
class ScalarRun:
    """What the files of one start hold.

    Args:
        file: The file, or the first.
        began: When, in seconds since 1970.
        steps: The values of each iteration, by tag.
        places: Where the first of an iteration stands, in bytes.
        consumed: Samples consumed after each iteration.
        cut: Where the file was cut off.
    """

    file: Path
    began: float = math.inf
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    consumed: dict[int, int] = field(default_factory=dict)
    cut: Place | None = None

    @property
    def has_losses(self) -> bool:
        """Whether it is of training at all."""
        return any(tag in values for values in self.steps.values() for tag in LOSSES)


def curve_of(read: Sequence[ScalarRun]) -> Curve | None:
    """The curve of several starts; ``None`` where no step has a loss."""
    runs = sorted((run for run in read if run.has_losses), key=lambda run: run.began)
    if not runs:
        return None
    points: list[Point] = []
    attempts = []
    for ordinal, run in enumerate(runs):
        mine = _points(run, ordinal)
        points += mine
        attempts.append(_attempt(run, mine, ordinal))
    damaged = tuple(run.cut for run in read if run.cut is not None)
    return Curve(tuple(points), tuple(attempts), damaged)


def _points(run: ScalarRun, ordinal: int) -> list[Point]:
    has_norms = any("grad-norm" in values for values in run.steps.values())
    tag = next(tag for tag in LOSSES if any(tag in values for values in run.steps.values()))
    last = max(run.steps)  # of which the rest may not be on the disk yet, or never come
    points = []
    for iteration, values in sorted(run.steps.items()):
        if tag not in values:  # cut off between two scalars of a step
            continue
        loss = values[tag]
        points.append(
            Point(
                iteration=iteration,
                loss=loss if math.isfinite(loss) and loss != 0.0 else None,
                nan=not math.isfinite(loss),
                skipped=int(has_norms and "grad-norm" not in values and iteration < last),
                consumed_after=run.consumed.get(iteration),
                batch_size=_count(values.get("batch-size")),
                grad_norm=_finite(values.get("grad-norm")),
                learning_rate=_finite(values.get("learning-rate")),
                loss_scale=_finite(values.get("loss-scale")),
                attempt=ordinal,
                source=Place(str(run.file), run.places[iteration]),
            )
        )
    return points


def _attempt(run: ScalarRun, points: list[Point], ordinal: int) -> Attempt:
    return Attempt(
        ordinal=ordinal,
        first_iteration=points[0].iteration,
        last_iteration=points[-1].iteration,
        interval=usual_interval([point.iteration for point in points]),
        started=f"{run.began:.6f}",
        source=points[0].source,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _count(value: float | None) -> int | None:
    finite = _finite(value)
    return int(finite) if finite is not None and 0 < finite < LARGEST_COUNT else None
