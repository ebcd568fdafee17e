"""Slurm: submit a job, and become one of its ranks.

The same launcher runs three times: outside of any job it submits a script that runs it; in the
job's script (:mod:`flagscale.launch.job`) it runs itself once a rank, through srun; in each of
those it turns into the training process. Which of the three it is, :mod:`flagscale.launch.start`
tells.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from flagscale.errors import ConfigError
from flagscale.launch.cluster import Cluster, expand_nodelist, slurm_port
from flagscale.launch.elastic import NodeRange
from flagscale.launch.local import log_header, verify_paths, write_run_dir
from flagscale.launch.ownership import (
    refuse_second_job,
    slurm_holder,
    take_finished,
    verify_lock,
)
from flagscale.launch.paths import local_file_system
from flagscale.launch.plan import LaunchPlan, Worker
from flagscale.launch.queue import submit
from flagscale.layout.parallel import raise_problems

__all__ = [
    "SIGNAL_SECONDS",
    "Submission",
    "allocated_cluster",
    "execute_submission",
    "execute_task",
    "plan_step",
    "plan_submission",
    "require_address",
    "task_command",
    "worker_of_task",
]

SIGNAL_SECONDS: Final = 120
"""Before the time limit, the ranks get the signal on which they save and end."""


@dataclass(frozen=True)
class Submission:
    """A job to be submitted.

    Args:
        command: sbatch and its options, the script's path last.
        launcher: What the script runs.
        path: Where the script goes.
        script: Its text.
    """

    command: tuple[str, ...]
    launcher: tuple[str, ...]
    path: Path
    script: str


def allocated_cluster(environ: Mapping[str, str], nproc: int | None) -> Cluster:
    """The machines of the allocation this process runs in.

    Args:
        environ: The environment, with what Slurm puts there.
        nproc: Processes a machine, where the allocation does not say it.

    Raises:
        ConfigError: Slurm's variables are missing or make no sense.
    """
    try:
        # A step may have fewer nodes than the job.
        hosts = environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]
        job_id = int(environ["SLURM_JOB_ID"])
        restart = int(environ.get("SLURM_RESTART_COUNT") or 0)
        tasks = int(environ.get("SLURM_NTASKS_PER_NODE") or nproc or 1)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "Slurm's environment is incomplete",
            where=f"SLURM_JOB_ID={environ.get('SLURM_JOB_ID')}",
            expected="SLURM_JOB_ID and SLURM_JOB_NODELIST, as inside of any job",
            got=error,
        ) from error
    names = expand_nodelist(hosts)
    return Cluster(len(names), tasks, names, slurm_port(job_id, restart))


def plan_submission(
    run_dir: Path,
    cluster: Cluster,
    *,
    name: str,
    python: str,
    work_dir: Path,
    sbatch_options: Sequence[str],
    gpus: bool,
    nodes: NodeRange | None = None,
    exit_signal: str = "SIGUSR1",
) -> Submission:
    """The script to submit, and the command that does it.

    The job runs the resolved recipe from the run directory, so that what is edited while it waits
    in the queue changes nothing.

    Args:
        run_dir: The run directory, absolute.
        cluster: The machines to ask for.
        name: The job's name.
        python: The interpreter, by the same path on every machine.
        work_dir: Where the launcher was started.
        sbatch_options: Over those of the script and of SBATCH_* variables.
        gpus: Whether to ask for as many GPUs as processes.
        nodes: How many machines to ask for, if not exactly those.
        exit_signal: On which the ranks save and end.
    """
    launcher = task_command(
        python, run_dir / "recipe.resolved.yaml", cluster.nodes, cluster.nproc, run_dir
    )
    nodes = nodes or NodeRange(cluster.nodes, cluster.nodes)
    # With a number of tasks, Slurm would give the least of a range of machines.
    tasks = [f"--ntasks-per-node={cluster.nproc}"] if nodes.least == nodes.most else []
    options = [
        f"--job-name={name}",
        f"--nodes={nodes}",
        *tasks,
        *([f"--gpus-per-node={cluster.nproc}"] if gpus else []),
        "--exclusive",
        f"--output={run_dir}/logs/slurm_%j.log",
        "--open-mode=append",  # a job that is queued again goes on in its log
        "--requeue",  # when a machine is lost
        # To the ranks, not to this script.
        f"--signal={exit_signal.removeprefix('SIG')}@{SIGNAL_SECONDS}",
    ]
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {shlex.quote(option)}" for option in options),
        "set -euo pipefail",
        f"cd {shlex.quote(str(work_dir))}",
        f"exec {shlex.join(launcher)}",
        "",
    ]
    path = run_dir / "job.sh"
    command = ("sbatch", "--parsable", *sbatch_options, str(path))
    return Submission(command, tuple(launcher), path, "\n".join(lines))


def task_command(
    python: str, recipe: Path, nodes: int, nproc: int, run_dir: Path
) -> tuple[str, ...]:
    """The launcher's command line inside of a job."""
    words = (python, "-m", "flagscale.launch", str(recipe), "--nodes", str(nodes))
    return (*words, "--nproc", str(nproc), "--output-dir", str(run_dir))


def plan_step(
    launcher: Sequence[str],
    run_dir: Path,
    nodes: int,
    nproc: int,
    *,
    hosts: Sequence[str] = (),
    options: Sequence[str] = (),
) -> tuple[str, ...]:
    """The srun command that runs the launcher once a rank.

    Args:
        launcher: Its command line.
        run_dir: The run directory.
        nodes: Machines.
        nproc: Ranks a machine.
        hosts: Which machines; empty for all of the job's.
        options: Further ones for srun.
    """
    return (
        "srun",
        f"--nodes={nodes}",
        *([f"--nodelist={','.join(hosts)}"] if hosts else []),
        f"--ntasks={nodes * nproc}",
        f"--ntasks-per-node={nproc}",
        "--distribution=block",  # ranks in order of the machines, as the layout has it
        "--cpu-bind=none",  # data loaders and libraries have threads of their own
        "--kill-on-bad-exit=1",
        *options,
        f"--output={run_dir}/logs/rank_%t.log",
        "--open-mode=append",
        *launcher,
    )


def worker_of_task(plan: LaunchPlan, environ: Mapping[str, str]) -> Worker:
    """The rank that this task of a step is.

    Raises:
        ConfigError: The step has another number of tasks, or another order.
    """
    place = {name: environ.get(f"SLURM_{name}") for name in ("NTASKS", "PROCID", "LOCALID")}
    for worker in plan.workers:
        own = {name: worker.env[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
        if list(own.values()) == list(place.values()):
            return worker
    raise ConfigError(
        "the tasks of this Slurm step are not the ranks of the plan",
        where="srun",
        expected=f"{plan.layout.world_size} tasks, {len(plan.workers)} a machine, in order",
        got=", ".join(f"SLURM_{name}={value}" for name, value in place.items()),
        cure="srun --ntasks-per-node=NPROC --distribution=block, or leave srun to the launcher",
    )


def execute_submission(
    submission: Submission, plan: LaunchPlan, console: TextIO | None = None
) -> int:
    """Submit, unless there is nothing left to train; the exit code.

    Raises:
        ConfigError: A path is missing or cannot be written, another job works in the run directory,
            or Slurm does not take the job; nothing was submitted.
    """
    console = console or sys.stdout
    raise_problems(verify_paths(plan))
    _refuse_second_submission(plan.run_dir)
    if take_finished(plan.run_dir, plan, console.write):
        return 0
    for path in filter(None, (plan.run_dir, plan.save_dir)):
        if (kind := local_file_system(path)) is not None:
            console.write(f"warning: {path} is on {kind}, which other machines may not see\n")
    write_run_dir(plan)  # logs/ too: without it the job would fail, and leave no word of why
    submission.path.write_text(submission.script)
    job_id, _ = submit(submission.command)
    # The job takes the lock too; whoever comes first, both write the same.
    refuse_second_job(plan.run_dir, slurm_holder(job_id))
    console.write(
        f"Submitted batch job {job_id}\n"
        f"its log: {plan.run_dir}/logs/slurm_{job_id}.log\n"
        f"where it is: python -m flagscale.launch status {shlex.quote(str(plan.run_dir))}\n"
    )
    return 0


def _refuse_second_submission(run_dir: Path) -> None:
    holder = verify_lock(run_dir)
    if holder is not None:
        raise ConfigError(
            f"{holder} works in this run directory, or may",
            where=str(run_dir),
            expected="one job in a run directory",
            got=str(holder),
            cure="wait for its end, end it (scancel), or choose another --output-dir; where nobody "
            "can be asked about it and it is gone for certain, delete lock.json there",
        )


def execute_task(worker: Worker, environ: Mapping[str, str], console: TextIO = sys.stdout) -> None:
    """Become the training process; does not return.

    Raises:
        ConfigError: The program cannot be started.
    """
    exit_signal = _exit_signal(worker.argv)
    if exit_signal is not None:
        # One that comes before the training process listens is kept for it: it lets it in then.
        signal.pthread_sigmask(signal.SIG_BLOCK, {exit_signal})
    console.write(log_header(worker, environ.get("SLURM_RESTART_COUNT", "0")))
    console.flush()
    try:
        os.execve(worker.argv[0], list(worker.argv), {**environ, **worker.env})
    except OSError as error:
        raise ConfigError(
            "the training process cannot be started", where=worker.argv[0], got=error
        ) from error


def require_address(host: str) -> None:
    """Look up the first machine.

    Raises:
        ConfigError: It has no address: the rendezvous would wait silently until the time limit.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(
            "the first machine's name has no address",
            where="MASTER_ADDR",
            got=f"{host}: {error}",
            cure="getent hosts NAME must answer on every machine: repair its name service",
        ) from error


def _exit_signal(argv: Sequence[str]) -> signal.Signals | None:
    """The signal on which Megatron saves and ends; ``None`` if it does on none."""
    if "--exit-signal-handler" not in argv:
        return None
    words = [*argv]
    name = words[words.index("--exit-signal") + 1] if "--exit-signal" in words else "SIGTERM"
    return signal.Signals[name]
