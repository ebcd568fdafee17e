"""The ledger's rows as a curve, like that of a log: of every step, whatever the log interval."""

from __future__ import annotations

from collections.abc import Iterator

from flagscale.data_inspect.curve import Attempt, Curve, Place, Point
from flagscale.data_inspect.ledger import Attempt as Start
from flagscale.data_inspect.ledger import Ledger, RankFile

__all__ = ["curve_of"]


def curve_of(ledger: Ledger) -> Curve:
    """Loss, gradient norm and learning rate of every step that was written down.

    Raises:
        DataError: A file is damaged.
    """
    points: list[Point] = []
    attempts: list[Attempt] = []
    for start in ledger.attempts:
        iterations = start.iterations
        if not iterations:
            continue
        # Every rank has the loss of the whole batch. The one that wrote longest has all of them.
        file = max(start.files.values(), key=lambda one: len(one.iterations))
        points += _points(file, start, len(attempts))
        attempts.append(
            Attempt(
                ordinal=len(attempts),
                first_iteration=start.start_iteration + 1,
                last_iteration=iterations[-1],
                train_iters=start.segment["args"].get("train_iters"),
                started=start.segment["started"],
                source=Place(str(file.path), file.offsets[0]),
            )
        )
    return Curve(tuple(points), tuple(attempts))


def _points(file: RankFile, start: Start, ordinal: int) -> Iterator[Point]:
    for row, offset in zip(file.rows(), file.offsets, strict=True):
        batch_size = row.micro_batches * row.micro_batch_size * start.dp_size
        yield Point(
            iteration=row.iteration,
            loss=row.loss,
            nan=row.nan,
            skipped=int(row.skipped),
            consumed_after=row.consumed_before + batch_size,
            batch_size=batch_size,
            grad_norm=row.grad_norm,
            learning_rate=row.learning_rate,
            attempt=ordinal,
            source=Place(str(file.path), offset),
        )
