"""From a resolved recipe and a number of processes to exact commands: pure, nothing is started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import ConfigError
from flagscale.launch.options import OptionTable
from flagscale.launch.paths import ArgumentPath, input_paths, output_paths
from flagscale.launch.recipe import Recipe, argument_values, dump_recipe
from flagscale.layout.arguments import batch_sizes, parallel_layout, verify_arguments
from flagscale.layout.parallel import BatchSizes, ParallelLayout, raise_problems

__all__ = ["LaunchPlan", "Worker", "describe", "plan_local"]


@dataclass(frozen=True)
class Worker:
    """One process of the job.

    Args:
        rank: Its global rank.
        argv: The program and its arguments.
        env: What is set in its environment, over that of the launcher.
    """

    rank: int
    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class LaunchPlan:
    """Everything about a start, decided.

    Args:
        run_dir: The run directory, absolute.
        command: The launcher's own command line, made explicit.
        resolved_recipe: The recipe as it runs, as YAML.
        workers: The processes, in order of their ranks.
        inputs: What must exist.
        layout: How the ranks are divided.
        batch: Samples a step; ``None`` when a schedule changes the batch size.
        seq_length: Tokens a sample.
        outputs: Directories that are written to, besides the run directory.
    """

    run_dir: Path
    command: tuple[str, ...]
    resolved_recipe: str
    workers: tuple[Worker, ...]
    inputs: tuple[ArgumentPath, ...]
    layout: ParallelLayout
    batch: BatchSizes | None
    seq_length: int
    outputs: tuple[ArgumentPath, ...] = ()

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens in one optimizer step; ``None`` when a schedule changes it."""
        return None if self.batch is None else self.batch.global_batch_size * self.seq_length

    def log_path(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.run_dir / "logs" / f"rank_{rank}.log"

    def error_path(self, rank: int) -> Path:
        """Where a rank that fails says why."""
        return self.run_dir / "logs" / f"rank_{rank}.error"


def plan_local(
    recipe: Recipe,
    options: OptionTable,
    *,
    nproc: int,
    run_dir: Path,
    command: Sequence[str],
    python: str,
    environ: Mapping[str, str],
    cpu_count: int,
    port: int,
) -> LaunchPlan:
    """Plan a job whose processes all run on this machine.

    Args:
        recipe: The resolved recipe.
        options: The known options.
        nproc: Processes, one a device.
        run_dir: The run directory, absolute.
        command: The launcher's own command line, for the record.
        python: The interpreter of the processes.
        environ: The environment they inherit.
        cpu_count: Cores they share.
        port: A free TCP port for their rendezvous.

    Raises:
        ConfigError: Model, batch and processes do not fit together.
    """
    if nproc < 1:
        raise ConfigError(
            "there is nothing to start", where="--nproc", expected="at least 1", got=nproc
        )
    values = argument_values(recipe, options)
    raise_problems(verify_arguments(values, nproc))
    layout = parallel_layout(values, nproc)
    env = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        # Every process would take all cores otherwise.
        "OMP_NUM_THREADS": environ.get("OMP_NUM_THREADS") or str(max(1, cpu_count // nproc)),
        # Upstream relies on the order in which kernels were queued; FSDP needs another value.
        "CUDA_DEVICE_MAX_CONNECTIONS": environ.get("CUDA_DEVICE_MAX_CONNECTIONS") or "1",
        "PYTHONUNBUFFERED": "1",
        "FLAGSCALE_RUN_DIR": str(run_dir),
    }
    argv = (python, "-m", "flagscale.train", *recipe.argv)
    workers = [
        Worker(
            rank,
            argv,
            env
            | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "FLAGSCALE_ERROR_FILE": str(run_dir / "logs" / f"rank_{rank}.error"),
            },
        )
        for rank in range(nproc)
    ]
    return LaunchPlan(
        run_dir=run_dir,
        command=tuple(command),
        resolved_recipe=dump_recipe(recipe),
        workers=tuple(workers),
        inputs=tuple(input_paths(values)),
        layout=layout,
        batch=None if values["step_batch_size_schedule"] else batch_sizes(values, layout),
        seq_length=values["seq_length"],
        outputs=tuple(output_paths(values)),
    )


def describe(plan: LaunchPlan) -> str:
    """The plan for people: layout, batch, environment and commands."""
    at, batch = plan.layout, plan.batch
    lines = [
        f"run directory     {plan.run_dir}",
        f"ranks             {at.world_size} = TP {at.tp_size} x CP {at.cp_size} x DP {at.dp_size} "
        f"x PP {at.pp_size}"
        + (f", {at.vpp_size} virtual stages a rank" if at.vpp_size else "")
        + (f"; experts: EP {at.ep_size}, ETP {at.expert_tp_size}" if at.ep_size > 1 else ""),
    ]
    if batch is None:
        lines += ["batch             by --step-batch-size-schedule"]
    else:
        micro = batch.global_batch_size // (batch.micro_batch_size * at.dp_size)
        lines += [
            f"batch             {batch.global_batch_size} samples a step = {micro} micro-batches "
            f"x {batch.micro_batch_size} x DP {at.dp_size}",
            f"tokens a step     {plan.tokens_per_step:,} ({plan.seq_length} a sample)",
        ]
    lines += ["", "rank    tp   cp   dp   pp"]
    for worker in plan.workers:
        place = "".join(f"{i:5}" for i in at.coordinates(worker.rank))
        lines.append(f"{worker.rank:4} {place}")
    shared = dict(set.intersection(*(set(worker.env.items()) for worker in plan.workers)))
    lines += ["", "environment of every rank"]
    lines += [f"  {name}={shlex.quote(value)}" for name, value in sorted(shared.items())]
    lines += ["", "environment of each rank"]
    for worker in plan.workers:
        own = sorted(worker.env.items() - shared.items())
        lines.append("  " + " ".join(f"{name}={shlex.quote(value)}" for name, value in own))
    lines += ["", "command of every rank", f"  {_wrapped(plan.workers[0].argv)}"]
    return "\n".join(lines)


def _wrapped(argv: Sequence[str]) -> str:
    """A command for a shell, one option a line."""
    words = (f"\\\n    {w}" if w.startswith("--") else w for w in map(shlex.quote, argv))
    return " ".join(words)
