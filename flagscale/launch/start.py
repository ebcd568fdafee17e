"""By what way a job starts, and what that means for this machine.

A recipe for one machine starts here. One for several looks for Slurm: it submits itself, starts its
ranks when it is inside an allocation, and becomes a rank when srun has started it. With a list of
hosts it starts this machine's processes, and is to be run on each of the others.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import ConfigError
from flagscale.launch import slurm
from flagscale.launch.cluster import Cluster, node_rank_of
from flagscale.launch.local import execute_local
from flagscale.launch.options import OptionTable
from flagscale.launch.plan import LaunchPlan, describe, plan_node
from flagscale.launch.recipe import Recipe, resolve_recipe

__all__ = ["Machine", "Request", "Start", "Way", "describe_start", "execute_start", "plan_start"]


class Way(enum.Enum):
    """How the processes of a job come to be started."""

    HERE = "this machine's processes are started by this launcher"
    SUBMIT = "a job is submitted to Slurm"
    STEP = "inside a Slurm allocation, srun starts the processes"
    TASK = "srun has started this process, which becomes one rank"
    NONE = "there is neither Slurm nor a list of hosts"


@dataclass(frozen=True)
class Request:
    """What the command line asks for; ``None`` leaves it to the recipe.

    Args:
        recipe: Its file, absolute.
        overrides: Words of Megatron's command line.
        nodes: Machines.
        nproc: Processes a machine.
        output_dir: The run directory, absolute.
        data_dir: What ``{data_dir}`` means, absolute.
        hosts: Machines by name; empty without such a list.
        node_rank: This machine's place among them.
        port: For the rendezvous on the first of them.
        sbatch: Options for sbatch.
    """

    recipe: Path
    overrides: tuple[str, ...] = ()
    nodes: int | None = None
    nproc: int | None = None
    output_dir: Path | None = None
    data_dir: Path | None = None
    hosts: tuple[str, ...] = ()
    node_rank: int | None = None
    port: int = 29500
    sbatch: tuple[str, ...] = ()


@dataclass(frozen=True)
class Machine:
    """Where the launcher runs.

    Args:
        environ: Its environment.
        hostname: The machine's name.
        work_dir: Its working directory.
        python: The interpreter.
        cpu_count: Cores it may use.
        free_port: A TCP port that is free on the loopback interface.
        has_slurm: Whether sbatch is there.
    """

    environ: Mapping[str, str]
    hostname: str
    work_dir: Path
    python: str
    cpu_count: int
    free_port: int
    has_slurm: bool


@dataclass(frozen=True)
class Start:
    """A start, decided.

    Args:
        way: How.
        cluster: On what machines.
        plan: The processes of this one, or of the first.
        launchers: The launcher's command on each machine, in order; one when it is the same.
        submission: The job to submit; ``None`` unless that is, or would be, the way.
        step: The srun command; empty when there is none.
    """

    way: Way
    cluster: Cluster
    plan: LaunchPlan
    launchers: tuple[tuple[str, ...], ...]
    submission: slurm.Submission | None = None
    step: tuple[str, ...] = ()


def plan_start(request: Request, recipe: Recipe, options: OptionTable, machine: Machine) -> Start:
    """Decide everything about a start.

    Args:
        request: What the command line asks for.
        recipe: The recipe, as read from ``request.recipe``.
        options: The known options.
        machine: Where this is.

    Raises:
        ConfigError: Model, batch and machines do not fit together, or an argument is wrong.
    """
    way = _way(request, recipe, machine)
    cluster, node_rank = _cluster(request, recipe, way, machine)
    run_dir = request.output_dir or machine.work_dir / "outputs" / recipe.name
    launchers = _launchers(request, cluster, way, run_dir, machine.python)
    resolved = resolve_recipe(recipe, options, request.overrides, run_dir, request.data_dir)
    plan = plan_node(
        resolved,
        options,
        cluster,
        node_rank=node_rank,
        run_dir=run_dir,
        command=launchers[node_rank if len(launchers) > 1 else 0],
        python=machine.python,
        environ=machine.environ,
        cpu_count=machine.cpu_count,
    )
    if way is Way.HERE:
        return Start(way, cluster, plan, launchers)
    if way in (Way.STEP, Way.TASK):
        step = slurm.plan_step(plan.command, run_dir, cluster)
        return Start(way, cluster, plan, launchers, step=step)
    submission = slurm.plan_submission(
        run_dir,
        cluster,
        name=recipe.name,
        python=machine.python,
        work_dir=machine.work_dir,
        sbatch_options=request.sbatch,
        gpus=not _on_cpu(resolved, machine.environ),
    )
    step = slurm.plan_step(submission.launcher, run_dir, cluster)
    return Start(way, cluster, plan, launchers, submission, step)


def describe_start(start: Start) -> str:
    """All that would be done, for people."""
    lines = [describe(start.plan), "", f"way: {start.way.value}"]
    if len(start.launchers) > 1:
        lines += ["", "to be run on each of the machines"]
        for host, launcher in zip(start.cluster.hosts, start.launchers, strict=True):
            lines.append(f"  {host}: {shlex.join(launcher)}")
    if start.submission is not None:
        lines += ["", f"to submit the job: {shlex.join(start.submission.command)}"]
        lines += [f"  {line}" for line in start.submission.script.splitlines()]
    if start.step:
        lines += ["", "in the job, once a rank", f"  {shlex.join(start.step)}"]
    return "\n".join(lines)


def execute_start(start: Start, environ: Mapping[str, str]) -> int:
    """Do it; the exit code.

    Raises:
        ConfigError: A path is missing or cannot be written, or there is no way to the machines;
            nothing has been started.
    """
    plan, cluster = start.plan, start.cluster
    if start.way is Way.HERE:
        return execute_local(plan)
    if start.way is Way.STEP:
        return slurm.execute_step(start.step, plan, cluster)
    if start.way is Way.TASK:
        slurm.execute_task(slurm.worker_of_task(plan, environ), environ)
    if start.way is Way.SUBMIT and start.submission is not None:
        return slurm.execute_submission(start.submission, plan)
    raise ConfigError(
        f"the job is for {cluster.nodes} machines of {cluster.nproc} devices, and {Way.NONE.value}",
        where="--nodes, or the recipe's nodes",
        expected="sbatch on PATH, a Slurm allocation around it, or --hosts NAME,NAME,... on each",
        got="none of them",
        cure="--dry-run shows what would be started; --hosts localhost --nproc N, with parallel "
        "sizes that fit, uses this machine alone",
    )


def _way(request: Request, recipe: Recipe, machine: Machine) -> Way:
    if request.hosts or (request.nodes is None and recipe.nodes is None):
        return Way.HERE
    # A batch script has a SLURM_PROCID too: only a step's id tells a task from it.
    if "SLURM_JOB_ID" in machine.environ:
        return Way.TASK if "SLURM_STEP_ID" in machine.environ else Way.STEP
    return Way.SUBMIT if machine.has_slurm else Way.NONE


def _cluster(request: Request, recipe: Recipe, way: Way, machine: Machine) -> tuple[Cluster, int]:
    """The machines, and the place of this one among them."""
    nproc = recipe.nproc or 1 if request.nproc is None else request.nproc
    if way is Way.TASK or way is Way.STEP:
        cluster = slurm.allocated_cluster(machine.environ, request.nproc or recipe.nproc)
        return cluster, int(machine.environ["SLURM_NODEID"]) if way is Way.TASK else 0
    if len(request.hosts) > 1:
        node_rank = node_rank_of(request.hosts, request.node_rank, machine.hostname)
        return Cluster(len(request.hosts), nproc, request.hosts, request.port), node_rank
    if way is Way.HERE:
        return Cluster(1, nproc, port=machine.free_port), 0
    nodes = request.nodes if request.nodes is not None else recipe.nodes or 1
    # Their names, and the port, are known once the job has them.
    return Cluster(nodes, nproc, ("FIRST-NODE-OF-THE-JOB",)), 0


def _launchers(
    request: Request, cluster: Cluster, way: Way, run_dir: Path, python: str
) -> tuple[tuple[str, ...], ...]:
    command = [python, "-m", "flagscale.launch", str(request.recipe)]
    command += [] if way is Way.HERE else ["--nodes", str(cluster.nodes)]
    command += ["--nproc", str(cluster.nproc), "--output-dir", str(run_dir)]
    command += [] if request.data_dir is None else ["--data-dir", str(request.data_dir)]
    if not request.hosts:
        command += [f"--sbatch={option}" for option in request.sbatch]
        return ((*command, *request.overrides),)
    command += ["--hosts", ",".join(request.hosts), "--port", str(request.port)]
    return tuple(
        (*command, "--node-rank", str(rank), *request.overrides)
        for rank in range(len(request.hosts))
    )


def _on_cpu(recipe: Recipe, environ: Mapping[str, str]) -> bool:
    platform = recipe.find("platform")
    named = platform.values if platform else (environ.get("FLAGSCALE_PLATFORM"),)
    return named == ("cpu",)
