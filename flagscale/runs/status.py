"""``status.json``: where a run is, written by one of its ranks at each log interval."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from flagscale.runs.records import read_as, write_record

__all__ = ["STATUS", "Status", "read_status", "render_status", "write_status"]

STATUS: Final = "status.json"


@dataclass(frozen=True)
class Status:
    """Where a run is.

    Args:
        attempt: Its number; ``None`` where no launcher has given one.
        iteration: The last one done, counted from 1.
        train_iters: How many there will be.
        consumed_samples: By the whole job since its beginning.
        tokens: In these samples.
        train_tokens: How many there will be at the end.
        tokens_per_second: Of the whole job since the status before, saves and evaluations included.
        loss: Of the last iteration; ``None`` where it is not finite.
        last_checkpoint: The iteration a start would go on from; ``None`` if there is none.
        last_checkpoint_time: When it was complete, in seconds since the epoch.
        time: Of this status, in seconds since the epoch.
    """

    attempt: int | None
    iteration: int
    train_iters: int
    consumed_samples: int
    tokens: int
    train_tokens: int
    tokens_per_second: float
    loss: float | None
    last_checkpoint: int | None
    last_checkpoint_time: float | None
    time: float

    @property
    def seconds_left(self) -> float | None:
        """To the end, at the speed of now; ``None`` while that is not known."""
        if self.tokens_per_second <= 0:
            return None
        return max(0, self.train_tokens - self.tokens) / self.tokens_per_second


def write_status(run_dir: Path, status: Status) -> None:
    """Replace the status.

    Raises:
        CheckpointError: The disk refuses.
    """
    write_record(run_dir / STATUS, asdict(status))


def read_status(run_dir: Path) -> Status | None:
    """The last status written; ``None`` if there is none yet."""
    return read_as(run_dir / STATUS, Status)


def render_status(status: Status, now: float, *, running: bool = True) -> tuple[str, ...]:
    """What people read, line by line.

    Args:
        status: The last one written.
        now: Seconds since the epoch.
        running: Whether it trains now; else no moment of its end can be told.
    """
    share = 100 * status.iteration / status.train_iters if status.train_iters else 100.0
    loss = "not finite" if status.loss is None else f"{status.loss:.4f}"
    checkpoint = "none yet"
    if status.last_checkpoint is not None:
        checkpoint = f"iteration {status.last_checkpoint}"
        if status.last_checkpoint_time is not None:
            checkpoint += f", {_duration(now - status.last_checkpoint_time)} ago"
    left = status.seconds_left
    end = "unknown"
    if left is not None:
        moment = datetime.fromtimestamp(status.time + left, UTC)
        when = f"about {moment:%Y-%m-%d %H:%M} UTC" if running else "of training"
        end = f"{_duration(left)}, {when}" if left else "none is left"
    return (
        f"iteration        {status.iteration} of {status.train_iters} ({share:.1f} %), "
        f"{_duration(now - status.time)} ago",
        f"loss             {loss}",
        f"tokens           {status.tokens:,} of {status.train_tokens:,}, "
        f"{status.tokens_per_second:,.0f} a second",
        f"last checkpoint  {checkpoint}",
        f"time to the end  {end}",
    )


def _duration(seconds: float) -> str:
    """Days, hours and minutes; below a minute, seconds."""
    if seconds < 60:
        return f"{max(0, round(seconds))} s"
    whole = timedelta(minutes=round(seconds / 60))
    hours, minutes = divmod(whole.seconds // 60, 60)
    days = f"{whole.days} d " if whole.days else ""
    return f"{days}{hours} h {minutes} min" if days or hours else f"{minutes} min"
