"""Who works in a run directory, how far it is, and what its last attempt left."""

from __future__ import annotations

import functools
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flagscale.launch.plan import LaunchPlan
from flagscale.launch.queue import job_state
from flagscale.runs.attempt import Attempt
from flagscale.runs.complete import MARKER, iteration_directory, newest_complete
from flagscale.runs.finished import FINISHED, Finished, read_finished
from flagscale.runs.lock import (
    Holder,
    LocalHolder,
    SlurmHolder,
    acquire,
    decide,
    local_alive,
    read_holder,
    this_process,
)
from flagscale.runs.records import read_record
from flagscale.runs.status import read_status

__all__ = [
    "alive",
    "cluster_name",
    "error_records",
    "last_iteration",
    "refuse_second_job",
    "slurm_holder",
    "stale_reason",
    "take_finished",
    "verify_lock",
]


def alive(holder: Holder, state_of: Callable[[str], str | None] = job_state) -> bool | None:
    """Whether a job still works, by the queue or by the process; ``None``: nobody can tell."""
    if isinstance(holder, LocalHolder):
        return local_alive(holder)
    state = state_of(holder.job_id)
    return None if state is None else state != ""


def slurm_holder(job_id: str) -> SlurmHolder:
    """A job of this cluster."""
    return SlurmHolder(job_id, cluster_name(), time.time())


@functools.cache
def cluster_name() -> str:
    """What Slurm calls this cluster; empty if it does not say."""
    try:
        done = subprocess.run(
            ["scontrol", "show", "config"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"^ClusterName\s*=\s*(\S+)", done.stdout, re.MULTILINE)
    return match[1] if match else ""


def refuse_second_job(run_dir: Path, ours: Holder) -> None:
    """Take the run directory, which exists, for a job or a process.

    Raises:
        ConfigError: Another works in it, or may.
    """
    acquire(run_dir, ours, alive)


def verify_lock(run_dir: Path) -> Holder | None:
    """Another job that works in a run directory, or may; for one that has no number yet."""
    holder = read_holder(run_dir)
    if holder is None or decide(holder, this_process(), alive).allows:
        return None
    return holder


def take_finished(run_dir: Path, plan: LaunchPlan, say: Callable[[str], object]) -> bool:
    """Whether there is nothing left to train; a stale flag that says so is named and removed."""
    finished = read_finished(run_dir)
    if finished is None:
        return False
    stale = stale_reason(finished, plan)
    if stale is None:
        say(
            f"{run_dir}: training is over, at iteration {finished.iteration} of "
            f"{finished.train_iters}: nothing to do\n"
        )
        return True
    say(f"{stale}: the run goes on, {FINISHED} is removed\n")
    (run_dir / FINISHED).unlink(missing_ok=True)
    return False


def stale_reason(finished: Finished, plan: LaunchPlan) -> str | None:
    """Why a flag that says a run is over is not to be believed; ``None`` if it is."""
    asked = plan.train_iters
    if asked is not None and asked > finished.iteration:
        return f"{FINISHED} says iteration {finished.iteration}, and --train-iters is now {asked}"
    samples = plan.train_samples
    # The last, partial batch may have been left out: it is less than a batch of samples.
    if samples is not None and samples - finished.consumed_samples >= plan.batch.global_batch_size:
        return (
            f"{FINISHED} says {finished.consumed_samples} samples, and --train-samples is now "
            f"{samples}"
        )
    if plan.save_dir is not None and newest_complete(plan.save_dir) is None:
        return f"{FINISHED} says iteration {finished.iteration}, and {plan.save_dir} is empty"
    return None


def last_iteration(run_dir: Path, save_dir: Path | None, attempt: Attempt) -> int | None:
    """The last iteration that an attempt logged or saved; ``None`` if it got nowhere."""
    reached = []
    status = read_status(run_dir)
    if status is not None and status.attempt == attempt.number:
        reached.append(status.iteration)
    saved = None if save_dir is None else newest_complete(save_dir)
    if save_dir is not None and saved is not None:
        marker = read_record(iteration_directory(save_dir, saved) / MARKER) or {}
        if marker.get("attempt") == attempt.number:
            reached.append(saved)
    return max(reached, default=None)


def error_records(directory: Path) -> list[dict[str, Any]]:
    """What ranks have left about their failures, in order of time."""
    records = [read_record(path) for path in directory.glob("rank_*.error")]
    return sorted((r for r in records if r and "time" in r), key=lambda r: float(r["time"]))
