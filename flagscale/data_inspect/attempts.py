"""The step lines of logs, sorted into starts, with how many steps each printed loss averages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flagscale.data_inspect.curve import Attempt, Curve, Place, Point, usual_interval

__all__ = ["StepLine", "build_curve"]


@dataclass(frozen=True, slots=True)
class StepLine:
    """A step, as a log has it.

    Args:
        iteration: 1-based.
        train_iters: What stands behind the slash.
        loss: As printed, which may be 0, infinite or NaN; ``None`` if none was printed.
        skipped: Number of skipped iterations.
        nans: Number of NaN iterations.
        skipped_samples: Those of iterations passed over, since the run began.
        beside: The fields around the place of the loss; ``None`` where one was printed.
        text: The line from its iteration on: what two copies of a line have in common.
        origin: What stands in front, without the time: the launcher's mark of the rank.
        time: When it was printed.
        restarted: Whether a checkpoint was loaded since the line before.
        resumed_from: The iteration of that checkpoint.
        source: Where it stands.
    """

    iteration: int
    train_iters: int
    loss: float | None
    skipped: int
    nans: int
    consumed_after: int | None
    skipped_samples: int
    batch_size: int | None
    grad_norm: float | None
    learning_rate: float | None
    loss_scale: float | None
    text: str
    source: Place
    beside: tuple[str, ...] | None = None
    origin: str = ""
    time: str | None = None
    restarted: bool = False
    resumed_from: int | None = None


_Start = list[StepLine]


def build_curve(files: Sequence[Sequence[StepLine]], clears_first: bool) -> Curve:
    """The curve of the step lines of some files.

    Args:
        files: The lines of each; where their lines have no times, in order of time.
        clears_first: Whether the log says that a first line which also ends an interval is not
            averaged again in the second.
    """
    starts = _without_copies([start for lines in files for start in _starts(lines)])
    if all(start[0].time for start in starts):
        starts.sort(key=lambda start: start[0].time or "")
    fallback = usual_interval([line.iteration for line in max(starts, key=len)[1:]])
    intervals = [_interval(start, fallback) for start in starts]
    # Older releases print only where an interval ends.
    prints_first = any(
        start[0].iteration % interval for start, interval in zip(starts, intervals, strict=True)
    )
    points: list[Point] = []
    attempts = []
    for ordinal, (start, interval) in enumerate(zip(starts, intervals, strict=True)):
        covered = _first_interval(start[0], 1 if prints_first else interval)
        mine = list(_points(start, ordinal, interval, covered, clears_first))
        first = start[0]
        attempts.append(
            Attempt(
                ordinal=ordinal,
                first_iteration=mine[0].first_iteration,
                last_iteration=mine[-1].iteration,
                interval=interval,
                train_iters=first.train_iters,
                started=first.time,
                source=first.source,
            )
        )
        points += mine
    return Curve(tuple(points), tuple(attempts))


def _starts(lines: Sequence[StepLine]) -> Iterator[_Start]:
    """The lines of one file, cut where the job was started anew."""
    start: _Start = []
    for line in lines:
        if start and line.iteration <= start[-1].iteration and _copies(line, start[-1]):
            continue
        if start and (line.restarted or line.iteration <= start[-1].iteration):
            yield from _cut_out_of_turn(start)
            start = []
        start.append(line)
    if start:
        yield from _cut_out_of_turn(start)


def _copies(line: StepLine, other: StepLine) -> bool:
    """Whether a line is another, printed by a second rank or into the same file twice."""
    if line.text == other.text:
        return True
    values = (line.iteration, line.loss, line.grad_norm)
    return line.origin != other.origin and values == (other.iteration, other.loss, other.grad_norm)


def _cut_out_of_turn(start: _Start) -> Iterator[_Start]:
    """Only the first line of a start comes out of turn: one further on is another start's."""
    iterations = [line.iteration for line in start]
    interval = usual_interval(iterations[1:])
    in_turn = [iteration % interval == 0 for iteration in iterations[1:]]
    if interval == 1 or sum(in_turn) < 2 or 2 * sum(in_turn) < len(in_turn) or all(in_turn):
        yield start
        return
    cut = 1 + in_turn.index(False)
    yield start[:cut]
    yield from _cut_out_of_turn(start[cut:])


def _without_copies(starts: Sequence[_Start]) -> list[_Start]:
    """Each start once, where several files hold it: the longest, in the order given."""
    seen: set[str] = set()
    kept = []
    for index in sorted(range(len(starts)), key=lambda index: -len(starts[index])):
        texts = {line.text for line in starts[index]}
        if not texts <= seen:
            kept.append(index)
            seen |= texts
    return [starts[index] for index in sorted(kept)]


def _interval(start: _Start, fallback: int) -> int:
    """``--log-interval`` of a start."""
    iterations = [line.iteration for line in start]
    if len(iterations) > 2:
        return usual_interval(iterations[1:])
    if len(iterations) == 1:
        return fallback
    first, second = iterations
    distance = second - first
    out_of_turn = first % distance != 0 and second % (distance + 1) == 0
    return distance + 1 if out_of_turn else distance


def _points(
    start: _Start, ordinal: int, interval: int, covered: int, clears_first: bool
) -> Iterator[Point]:
    first = start[0]
    yield _point(first, ordinal, covered, steps=1)
    again = covered == 1 and not (clears_first and first.iteration % interval == 0)
    for before, line in pairwise(start):
        passed_over = _passed_over(before, line)
        covered = _covered(before, line, interval, bool(passed_over), again and before is first)
        steps = min(line.iteration - before.iteration - passed_over, interval)
        yield _point(line, ordinal, covered, steps)


def _covered(
    before: StepLine, line: StepLine, interval: int, passed_over: bool, again: bool
) -> int:
    """How many iterations up to a line may be in its loss.

    Args:
        before: The line before.
        line: The line.
        interval: Of the start.
        passed_over: Whether iterations between them were passed over.
        again: Whether the step of the line before is averaged again.
    """
    distance = line.iteration - before.iteration
    if passed_over or distance <= interval:  # else lines between them were lost
        if again:
            return distance + 1
        if interval > 1:
            return distance
    return min(distance, interval)


def _first_interval(first: StepLine, otherwise: int) -> int:
    if first.resumed_from is not None:
        return first.iteration - first.resumed_from
    return otherwise


def _passed_over(before: StepLine, line: StepLine) -> int:
    """Iterations between two lines that ``--iterations-to-skip`` passed over."""
    samples = line.skipped_samples - before.skipped_samples
    return max(0, samples) // (line.batch_size or 1)


def _point(line: StepLine, ordinal: int, covered: int, steps: int) -> Point:
    """A point.

    Args:
        line: Its line.
        ordinal: Of its start.
        covered: Iterations which may be in its loss.
        steps: How many of them were certainly run since the line before.
    """
    loss, nan = _loss(line, steps)
    return Point(
        iteration=line.iteration,
        loss=loss,
        nan=nan,
        skipped=line.skipped,
        consumed_after=line.consumed_after,
        batch_size=line.batch_size,
        grad_norm=line.grad_norm,
        learning_rate=line.learning_rate,
        loss_scale=line.loss_scale,
        interval=covered,
        attempt=ordinal,
        source=line.source,
    )


def _loss(line: StepLine, steps: int) -> tuple[float | None, bool]:
    """The loss, and whether one of the steps had none that is a number."""
    if line.loss is None:
        return None, bool(line.nans) or line.skipped < max(1, steps)
    if not abs(line.loss) < float("inf"):
        return None, True
    return line.loss or None, bool(line.nans)
