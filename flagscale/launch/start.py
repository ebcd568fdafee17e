"""By what way a job starts, and what that means for this machine.

A recipe for one machine starts here. One for several looks for Slurm: it submits itself, starts its
ranks when it is inside an allocation, and becomes a rank when srun has started it. With a list of
hosts it starts this machine's processes, and is to be run on each of the others.
"""

from __future__ import annotations

import enum
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flagscale.errors import ConfigError
from flagscale.launch import slurm
from flagscale.launch.cluster import Cluster, node_rank_of, slurm_port
from flagscale.launch.elastic import (
    choose_layout,
    layout_choices,
    nodes_to_ask_for,
)
from flagscale.launch.here import execute_here
from flagscale.launch.job import ATTEMPT_DIRECTORY_VARIABLE, Job, execute_job
from flagscale.launch.node_check import Check, describe_check
from flagscale.launch.options import OptionTable
from flagscale.launch.plan import LaunchPlan, describe, plan_node
from flagscale.launch.recipe import Recipe, dump_recipe, resolve_recipe
from flagscale.launch.settings import LayoutChoice, Settings

_ON_SLURM: Mapping[str, str | None] = {
    "--exit-signal-handler": None,
    "--exit-signal": "SIGUSR1",
}
"""The ranks save and end on the signal that Slurm sends before the time limit."""

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
        srun: Options for srun, besides those of the recipe.
        max_restarts: How often the job may be queued again.
        spares: Machines to ask for beyond those that are needed.
        health_check: What is looked at before ranks start.
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
    srun: tuple[str, ...] = ()
    max_restarts: int | None = None
    spares: int | None = None
    health_check: str | None = None

    def settings(self, recipe: Settings) -> Settings:
        """The recipe's settings, and what the command line says over them."""
        told = {
            name: getattr(self, name)
            for name in ("max_restarts", "spares", "health_check")
            if getattr(self, name) is not None
        }
        return replace(recipe, **told, container=(*recipe.container, *self.srun))


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
        check: The health check before it; ``None`` when there is none.
        job: What runs inside of an allocation; ``None`` unless this is inside of one.
        leads: Whether this machine is the first of the job.
    """

    way: Way
    cluster: Cluster
    plan: LaunchPlan
    launchers: tuple[tuple[str, ...], ...]
    submission: slurm.Submission | None = None
    step: tuple[str, ...] = ()
    check: Check | None = None
    job: Job | None = None
    leads: bool = True


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
    recipe = replace(recipe, settings=request.settings(recipe.settings))
    way = _way(request, recipe, machine)
    cluster, node_rank = _cluster(request, recipe, way, machine)
    run_dir = request.output_dir or machine.work_dir / "outputs" / recipe.name
    planner = _Planner(request, recipe, options, machine, way, run_dir)
    if way is Way.STEP:
        return planner.plan_job(cluster)
    launchers = _launchers(request, cluster, way, run_dir, machine.python)
    launcher = launchers[node_rank if len(launchers) > 1 else 0]
    plan = planner.plan(cluster, node_rank, launcher)
    if way is Way.HERE:
        return Start(way, cluster, plan, launchers, leads=node_rank == 0)
    if way is Way.TASK:
        return Start(way, cluster, plan, launchers)
    return planner.plan_submission(cluster, plan, launchers)


@dataclass(frozen=True)
class _Planner:
    """All that plans have in common, whatever the layout and the machines.

    Args:
        request: What the command line asks for.
        recipe: The recipe, with the settings of the command line.
        options: The known options.
        machine: Where this is.
        way: How processes are started.
        run_dir: The run directory.
    """

    request: Request
    recipe: Recipe
    options: OptionTable
    machine: Machine
    way: Way
    run_dir: Path

    def resolve(self, words: Sequence[str] = ()) -> Recipe:
        """The recipe as it runs, with further words of Megatron's command line."""
        return resolve_recipe(
            self.recipe,
            self.options,
            (*self.request.overrides, *words),
            self.run_dir,
            self.request.data_dir,
            {} if self.way is Way.HERE else _ON_SLURM,
        )

    def plan(
        self, cluster: Cluster, node_rank: int, command: Sequence[str], words: Sequence[str] = ()
    ) -> LaunchPlan:
        """The processes of one machine."""
        error_dir = self.machine.environ.get(ATTEMPT_DIRECTORY_VARIABLE)
        return plan_node(
            self.resolve(words),
            self.options,
            cluster,
            node_rank=node_rank,
            run_dir=self.run_dir,
            command=command,
            python=self.machine.python,
            environ=self.machine.environ,
            cpu_count=self.machine.cpu_count,
            error_dir=Path(error_dir) if error_dir and self.way is Way.TASK else None,
        )

    def plan_submission(
        self, cluster: Cluster, plan: LaunchPlan, launchers: tuple[tuple[str, ...], ...]
    ) -> Start:
        """What is submitted, once every layout it may come to has been looked at."""
        settings = self.recipe.settings
        for choice in layout_choices(settings, cluster.nodes):
            self._verify_choice(choice, cluster)
        resolved = self.resolve()
        exit_signal = resolved.find("exit_signal")
        submission = slurm.plan_submission(
            self.run_dir,
            cluster,
            name=self.recipe.name,
            python=self.machine.python,
            work_dir=self.machine.work_dir,
            sbatch_options=self.request.sbatch,
            gpus=not _on_cpu(resolved, self.machine.environ),
            nodes=nodes_to_ask_for(settings, cluster.nodes),
            exit_signal=exit_signal.values[0] if exit_signal and exit_signal.values else "SIGTERM",
        )
        step = self._step(cluster)
        check = self._check(plan, cluster, resolved)
        return Start(self.way, cluster, plan, launchers, submission, step, check)

    def plan_job(self, allocation: Cluster) -> Start:
        """What runs on the machines of an allocation, as far as it is known before they are."""
        settings, hosts = self.recipe.settings, allocation.hosts
        asked = self.request.nodes or self.recipe.nodes or len(hosts)
        choices = layout_choices(settings, asked)
        if not settings.layouts and (settings.spares == 0 or asked > len(hosts)):
            # Nothing is said about other sizes: that of the allocation counts.
            choices = (LayoutChoice(len(hosts)),)

        def plan_for(
            choice: LayoutChoice, hosts: Sequence[str], words: Sequence[str]
        ) -> LaunchPlan:
            cluster = replace(allocation, nodes=choice.nodes, hosts=tuple(hosts))
            command = slurm.task_command(
                self.machine.python, self.request.recipe, len(hosts), cluster.nproc, self.run_dir
            )
            return self.plan(cluster, 0, command, (*choice.words, *words))

        def problem_of(choice: LayoutChoice) -> str | None:
            try:
                plan_for(choice, hosts[: choice.nodes], ())
            except ConfigError as error:
                return str(error)
            return None

        if len(choices) == 1 and choices[0].nodes <= len(hosts):
            choice = choices[0]  # what is wrong with it is told as it is
        else:
            choice = choose_layout(choices, len(hosts), problem_of)
        used = hosts[: choice.nodes]
        plan = plan_for(choice, used, ())
        resolved = self.resolve()
        cluster = replace(allocation, nodes=choice.nodes, hosts=used)
        check = self._check(plan, cluster, resolved)
        job = Job(
            run_dir=self.run_dir,
            recipe=dump_recipe(resolved),
            hosts=hosts,
            nodes=asked,
            choices=choices,
            settings=settings,
            check=check or self._node_check(plan, cluster, resolved),
            plan_for=plan_for,
            job_id=self.machine.environ["SLURM_JOB_ID"],
            restarts=int(self.machine.environ.get("SLURM_RESTART_COUNT") or 0),
        )
        step = self._step(cluster, used if len(used) < len(hosts) else ())
        launchers = _launchers(self.request, cluster, self.way, self.run_dir, self.machine.python)
        return Start(self.way, cluster, plan, launchers, step=step, check=check, job=job)

    def _verify_choice(self, choice: LayoutChoice, cluster: Cluster) -> None:
        try:
            sized = Cluster(choice.nodes, cluster.nproc, cluster.hosts, cluster.port)
            self.plan(sized, 0, (), choice.words)
        except ConfigError as error:
            if not choice.words and choice.nodes == cluster.nodes:
                raise
            raise ConfigError(
                f"a layout of the recipe does not fit: {choice}",
                where=choice.where,
                got=str(error),
                cure="correct it, or leave it out",
            ) from error

    def _step(self, cluster: Cluster, hosts: Sequence[str] = ()) -> tuple[str, ...]:
        """The ranks' srun, as far as it is known before the attempt has a number."""
        launcher = slurm.task_command(
            self.machine.python,
            self.run_dir / "attempts" / "NUMBER" / "recipe.yaml",
            cluster.nodes,
            cluster.nproc,
            self.run_dir,
        )
        return slurm.plan_step(
            launcher,
            self.run_dir,
            cluster.nodes,
            cluster.nproc,
            hosts=hosts,
            options=self.recipe.settings.container,
        )

    def _check(self, plan: LaunchPlan, cluster: Cluster, resolved: Recipe) -> Check | None:
        if self.recipe.settings.health_check == "none":
            return None
        return self._node_check(plan, cluster, resolved)

    def _node_check(self, plan: LaunchPlan, cluster: Cluster, resolved: Recipe) -> Check:
        return Check(
            kind=self.recipe.settings.health_check,
            directory=self.run_dir / "health" / "NUMBER",
            checkpoints=plan.save_dir or self.run_dir,
            python=self.machine.python,
            platform="cpu" if _on_cpu(resolved, self.machine.environ) else "cuda",
            devices=cluster.nproc,
            port=slurm_port(cluster.port, 1),  # another than the ranks'
            srun_options=self.recipe.settings.container,
        )


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
    if start.check is not None:
        lines += ["", "in the job, first the health check (--no-health-check leaves it out)"]
        lines += [f"  {line}" for line in describe_check(start.check, start.cluster.nodes)]
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
        return execute_here(plan, cluster, leads=start.leads)
    if start.job is not None:
        return execute_job(start.job, plan, environ)
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
        command += [f"--srun={option}" for option in request.srun]
        for name in ("max_restarts", "spares", "health_check"):
            if getattr(request, name) is not None:
                command += [f"--{name.replace('_', '-')}", str(getattr(request, name))]
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
