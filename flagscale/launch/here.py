"""A job whose processes this launcher starts itself: the same ownership as in a queue."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TextIO

from flagscale.errors import FlagScaleError
from flagscale.launch.cluster import Cluster
from flagscale.launch.ending import cause_of
from flagscale.launch.local import execute_local, verify_paths, write_run_dir
from flagscale.launch.ownership import (
    error_records,
    last_iteration,
    refuse_second_job,
    take_finished,
)
from flagscale.launch.plan import LaunchPlan
from flagscale.layout.parallel import raise_problems
from flagscale.runs.attempt import ATTEMPT_VARIABLE, begin_attempt, end_attempt
from flagscale.runs.exit_codes import SAVED
from flagscale.runs.finished import read_finished
from flagscale.runs.lock import this_process

__all__ = ["execute_here"]


def execute_here(
    plan: LaunchPlan, cluster: Cluster, *, leads: bool = True, console: TextIO | None = None
) -> int:
    """Run this machine's processes to their end; the exit code as of :func:`execute_local`.

    The first machine of a list of hosts owns the run directory for all of them. The processes of
    the others cannot know which attempt is theirs, and are not fenced.

    Args:
        plan: The processes.
        cluster: All machines.
        leads: Whether this is the first.
        console: Where output is shown.

    Raises:
        ConfigError: A path is missing or cannot be written, or another job works here.
    """
    console = console or sys.stdout
    if not leads:
        return execute_local(plan, console)
    raise_problems(verify_paths(plan))
    write_run_dir(plan)
    refuse_second_job(plan.run_dir, this_process())
    # Where it is not stale, the ranks themselves see that nothing is left.
    take_finished(plan.run_dir, plan, lambda _: None)
    attempt = begin_attempt(
        plan.run_dir,
        hosts=cluster.hosts or ("localhost",),
        layout=plan.checkpoint_layout,
        world_size=plan.layout.world_size,
    )
    workers = tuple(
        replace(worker, env={**worker.env, ATTEMPT_VARIABLE: attempt.token})
        for worker in plan.workers
    )
    code, reason = 1, "the launcher failed"
    try:
        code = execute_local(replace(plan, workers=workers), console)
        finished = read_finished(plan.run_dir) is not None
        reason = cause_of(code, finished, (), error_records(plan.run_dir / "logs")).reason
    except FlagScaleError as error:
        code, reason = error.exit_code, str(error).split("\n")[0]
        raise
    finally:
        end_attempt(
            plan.run_dir,
            attempt.number,
            exit_code=code,
            reason=reason,
            iteration=last_iteration(plan.run_dir, plan.save_dir, attempt),
        )
    if code == SAVED:
        console.write(f"{reason}: start it again to go on\n")
    return code
