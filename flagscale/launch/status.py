"""``python -m flagscale.launch status RUN_DIR``: where a run is, and how it has come there."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, NoReturn, TextIO

from flagscale.errors import ConfigError
from flagscale.launch.ownership import alive
from flagscale.launch.queue import job_state
from flagscale.runs.attempt import PastAttempt, current, history
from flagscale.runs.complete import MARKER, iteration_directory, newest_complete
from flagscale.runs.finished import Finished, read_finished
from flagscale.runs.lock import Holder, SlurmHolder, read_holder
from flagscale.runs.records import read_record
from flagscale.runs.status import Status, read_status, render_status

__all__ = ["RunStatus", "describe_run", "main", "read_run"]

_QUIET: Final = 30 * 60.0
"""Seconds without a logged step after which it is said that there was none."""


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as the project's own errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="command line", cure=self.format_usage().strip())


@dataclass(frozen=True)
class RunStatus:
    """Where a run is.

    Args:
        run_dir: The run directory.
        state: ``queued``, ``running``, ``finished``, ``ended``, or ``unknown`` where nobody can be
            asked about the job.
        holder: The job that works here, or did last.
        queue_state: What Slurm calls the state of its job.
        attempts: All of them, in order.
        status: What the ranks said last.
        finished: The end, if it has come.
    """

    run_dir: Path
    state: str
    holder: Holder | None
    queue_state: str | None
    attempts: tuple[PastAttempt, ...]
    status: Status | None
    finished: Finished | None


def read_run(run_dir: Path) -> RunStatus:
    """Look at a run directory, and ask the queue about its job.

    Raises:
        ConfigError: It is no run directory.
    """
    holder, attempts, finished = read_holder(run_dir), history(run_dir), read_finished(run_dir)
    status = read_status(run_dir)
    if holder is None and current(run_dir) is None and status is None and finished is None:
        raise ConfigError(
            "this is not a run directory, or nothing was ever started in it",
            where=str(run_dir),
            expected="lock.json, attempt.json, status.json or finished.json",
            got="none of them" if run_dir.is_dir() else "no such directory",
            cure="give the directory that --output-dir named (outputs/RECIPE by default)",
        )
    if status is not None:
        # Newer than what was logged, after the last one.
        saved = newest_complete(run_dir / "checkpoints")
        marker = read_record(iteration_directory(run_dir / "checkpoints", saved or 0) / MARKER)
        if saved is not None and marker is not None:
            status = replace(status, last_checkpoint=saved, last_checkpoint_time=marker["time"])
    queue_state = None
    if isinstance(holder, SlurmHolder):
        queue_state = job_state(holder.job_id)
    works = None if holder is None else alive(holder, lambda _: queue_state)
    return RunStatus(
        run_dir,
        state_of(works, queue_state, finished is not None, holder is not None),
        holder,
        queue_state,
        attempts,
        status,
        finished,
    )


def state_of(works: bool | None, queue_state: str | None, finished: bool, held: bool) -> str:
    """The state of a run in one word; pure.

    Args:
        works: Whether its job still works; ``None`` if there is no telling.
        queue_state: Slurm's word for it.
        finished: Whether the last iteration is done and saved.
        held: Whether a job was ever recorded.
    """
    if finished:
        return "finished"
    if works:
        queued = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
        return "queued" if queue_state in queued else "running"
    return "unknown" if works is None and held else "ended"


def describe_run(run: RunStatus, now: float) -> str:
    """It for people."""
    word = f"{run.state} ({run.queue_state})" if run.queue_state else run.state
    lines = [
        f"run directory    {run.run_dir}",
        f"state            {word}{f', {run.holder}' if run.holder else ''}",
    ]
    if run.finished is not None:
        lines.append(
            f"finished         at iteration {run.finished.iteration}, {_moment(run.finished.time)}"
        )
    if run.status is not None:
        lines += render_status(run.status, now, running=run.state == "running")
        quiet = now - run.status.time
        if run.state == "running" and quiet > _QUIET:
            lines.append(f"warning          no step was logged for {quiet / 60:.0f} minutes")
    if run.attempts:
        lines += ["", "attempt  began                 machines  restart  ended because"]
    lines += [_row(past, run.state) for past in run.attempts]
    return "\n".join(lines)


def _row(past: PastAttempt, state: str) -> str:
    attempt, end = past.attempt, past.end
    if end is None:
        why = "not ended" if state == "running" else "nobody wrote it down: its launcher was lost"
    else:
        reached = "" if end.iteration is None else f", at iteration {end.iteration}"
        why = f"{end.reason} (exit code {end.exit_code}{reached})"
    return (
        f"{attempt.number:7}  {_moment(attempt.started)}  {len(attempt.hosts):8}  "
        f"{attempt.restart:7}  {why}"
    )


def _moment(seconds: float) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%SZ}"


def _record(run: RunStatus) -> dict[str, Any]:
    """It as JSON can hold it."""
    return {
        "run_dir": str(run.run_dir),
        "state": run.state,
        "queue_state": run.queue_state,
        "job": None if run.holder is None else asdict(run.holder),
        "restarts": max((past.attempt.restart for past in run.attempts), default=0),
        "attempts": [
            {**asdict(past.attempt), "end": None if past.end is None else asdict(past.end)}
            for past in run.attempts
        ],
        "status": None
        if run.status is None
        else {**asdict(run.status), "seconds_left": run.status.seconds_left},
        "finished": None if run.finished is None else asdict(run.finished),
    }


def main(argv: Sequence[str], console: TextIO | None = None) -> int:
    """Say where a run is; the exit code.

    Raises:
        ConfigError: The directory is none of a run.
    """
    parser = _Parser(
        prog="python -m flagscale.launch status", description="Where a run is.", allow_abbrev=False
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory")
    parser.add_argument("--json", action="store_true", help="for programs")
    arguments = parser.parse_args(argv)
    run = read_run(arguments.run_dir.absolute())
    text = json.dumps(_record(run)) if arguments.json else describe_run(run, time.time())
    (console or sys.stdout).write(text + "\n")
    return 0
