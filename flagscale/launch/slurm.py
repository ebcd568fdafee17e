"""Slurm: submit a job, start its ranks from inside it, and become one of them.

The same launcher runs three times: outside of any job it submits a script that runs it; in the
job's script it runs itself once a rank, through srun; in each of those it turns into the training
process. Which of the three it is, :mod:`flagscale.launch.start` tells.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from flagscale.errors import ConfigError
from flagscale.launch.cluster import Cluster, expand_nodelist, slurm_port
from flagscale.launch.local import FORWARDED, first_error, log_header, verify_paths, write_run_dir
from flagscale.launch.plan import LaunchPlan, Worker
from flagscale.layout.parallel import raise_problems

__all__ = [
    "Submission",
    "allocated_cluster",
    "execute_step",
    "execute_submission",
    "execute_task",
    "plan_step",
    "plan_submission",
    "worker_of_task",
]


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
        tasks = int(environ.get("SLURM_NTASKS_PER_NODE") or nproc or 1)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "Slurm's environment is incomplete",
            where=f"SLURM_JOB_ID={environ.get('SLURM_JOB_ID')}",
            expected="SLURM_JOB_ID and SLURM_JOB_NODELIST, as inside of any job",
            got=error,
        ) from error
    names = expand_nodelist(hosts)
    return Cluster(len(names), tasks, names, slurm_port(job_id))


def plan_submission(
    run_dir: Path,
    cluster: Cluster,
    *,
    name: str,
    python: str,
    work_dir: Path,
    sbatch_options: Sequence[str],
    gpus: bool,
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
    """
    launcher = [python, "-m", "flagscale.launch", str(run_dir / "recipe.resolved.yaml")]
    launcher += ["--nodes", str(cluster.nodes), "--nproc", str(cluster.nproc)]
    launcher += ["--output-dir", str(run_dir)]
    options = [
        f"--job-name={name}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.nproc}",
        *([f"--gpus-per-node={cluster.nproc}"] if gpus else []),
        "--exclusive",
        f"--output={run_dir}/logs/slurm_%j.log",
        "--open-mode=append",  # a job that is queued again goes on in its log
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
    command = ("sbatch", *sbatch_options, str(path))
    return Submission(command, tuple(launcher), path, "\n".join(lines))


def plan_step(launcher: Sequence[str], run_dir: Path, cluster: Cluster) -> tuple[str, ...]:
    """The srun command that runs the launcher once a rank."""
    return (
        "srun",
        f"--nodes={cluster.nodes}",
        f"--ntasks={cluster.world_size}",
        f"--ntasks-per-node={cluster.nproc}",
        "--distribution=block",  # ranks in order of the machines, as the layout has it
        "--cpu-bind=none",  # data loaders and libraries have threads of their own
        "--kill-on-bad-exit=1",
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


def execute_submission(submission: Submission, plan: LaunchPlan) -> int:
    """Submit; sbatch's exit code.

    Raises:
        ConfigError: A path is missing or cannot be written; nothing was submitted.
    """
    raise_problems(verify_paths(plan))
    write_run_dir(plan)  # logs/ too: without it the job would fail, and leave no word of why
    submission.path.write_text(submission.script)
    return subprocess.run(submission.command, check=False).returncode


def execute_step(
    command: Sequence[str], plan: LaunchPlan, cluster: Cluster, console: TextIO = sys.stdout
) -> int:
    """Run srun to its end, hand signals on to it, and say why a rank failed; the exit code.

    Raises:
        ConfigError: A path is missing or cannot be written, or a machine's name is unknown; nothing
            was started.
    """
    raise_problems(verify_paths(plan))
    _require_address(cluster.hosts[0])
    write_run_dir(plan)
    try:
        srun = subprocess.Popen(command)
    except OSError as error:
        raise ConfigError("srun cannot be started", where=command[0], got=error) from error

    def forward(signum: int, _frame: FrameType | None) -> None:
        srun.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in FORWARDED}
    try:
        code = srun.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if code and (record := first_error(plan.run_dir)):
        rank, message = record["rank"], record["message"]
        console.write(f"\nrank {rank} failed first; its log: {plan.log_path(rank)}\n{message}\n")
    return code if code >= 0 else 128 - code


def execute_task(worker: Worker, environ: Mapping[str, str], console: TextIO = sys.stdout) -> None:
    """Become the training process; does not return.

    Raises:
        ConfigError: The program cannot be started.
    """
    console.write(log_header(worker, environ.get("SLURM_RESTART_COUNT", "0")))
    console.flush()
    try:
        os.execve(worker.argv[0], list(worker.argv), {**environ, **worker.env})
    except OSError as error:
        raise ConfigError(
            "the training process cannot be started", where=worker.argv[0], got=error
        ) from error


def _require_address(host: str) -> None:
    """A name that does not resolve would let the rendezvous wait silently until the time limit."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(
            "the first machine's name has no address",
            where="MASTER_ADDR",
            got=f"{host}: {error}",
            cure="getent hosts NAME must answer on every machine: repair its name service",
        ) from error
