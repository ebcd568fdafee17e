"""``finished.json``: the last iteration is done and saved, there is nothing left to start for."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from flagscale.runs.records import read_as, write_record

__all__ = ["FINISHED", "Finished", "read_finished", "write_finished"]

FINISHED: Final = "finished.json"


@dataclass(frozen=True)
class Finished:
    """The end of a run.

    Args:
        iteration: The last one, done and saved.
        train_iters: How many were asked for: one who asks for more is not done.
        consumed_samples: By the whole job.
        time: Seconds since the epoch.
    """

    iteration: int
    train_iters: int
    consumed_samples: int
    time: float


def write_finished(
    run_dir: Path,
    *,
    iteration: int,
    train_iters: int,
    consumed_samples: int,
    now: float | None = None,
) -> None:
    """Say that the run is done.

    Raises:
        CheckpointError: The disk refuses.
    """
    moment = time.time() if now is None else now
    write_record(
        run_dir / FINISHED, asdict(Finished(iteration, train_iters, consumed_samples, moment))
    )


def read_finished(run_dir: Path) -> Finished | None:
    """The end of the run; ``None`` if it is not done."""
    return read_as(run_dir / FINISHED, Finished)
