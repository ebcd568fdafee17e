"""From a resolved recipe and a cluster to exact commands: pure, nothing is started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from flagscale.launch.cluster import Cluster
from flagscale.launch.elastic import checkpoint_layout
from flagscale.launch.options import OptionTable
from flagscale.launch.paths import ArgumentPath, input_paths, output_paths
from flagscale.launch.recipe import Recipe, argument_values, dump_recipe
from flagscale.layout.arguments import (
    batch_sizes,
    model_dims,
    parallel_layout,
    training_mode,
    uncounted,
    verify_arguments,
)
from flagscale.layout.memory import MemoryTerms, predict_memory
from flagscale.layout.parallel import BatchSizes, ParallelLayout, raise_problems
from flagscale.layout.parameters import count_parameters
from flagscale.layout.ramp import ScheduleEntry, parse_schedule

__all__ = ["LaunchPlan", "ModelSize", "Worker", "describe", "plan_node"]

_ROWS_OF_RANKS = 16  # a larger job's ranks are told node by node


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
class ModelSize:
    """What a model takes.

    Args:
        parameters: Of the whole model, pad rows of the vocabulary included.
        memory: What a rank of each pipeline stage needs, in order of the stages.
        flash_attention: Whether that is without attention scores.
    """

    parameters: int
    memory: tuple[MemoryTerms, ...]
    flash_attention: bool


@dataclass(frozen=True)
class LaunchPlan:
    """Everything about the processes of one machine, decided.

    Args:
        run_dir: The run directory, absolute.
        command: The launcher's own command line, made explicit.
        resolved_recipe: The recipe as it runs, as YAML.
        workers: The processes of this machine, in order of their ranks.
        inputs: What must exist.
        layout: How the ranks of all machines are divided.
        batch: Samples a step; the largest, under a schedule.
        seq_length: Tokens a sample.
        outputs: Directories that are written to, besides the run directory.
        schedule: How the batch size rises; empty when it does not.
        size: Parameters and memory, or why they are not known.
        checkpoint_layout: Parallel sizes and storage, as an attempt is recorded with.
        save_dir: Where checkpoints go, absolute; ``None`` if nothing is saved.
        loads_own_checkpoints: Whether a start goes on from what was saved there.
        train_iters: The last iteration, where the arguments say it.
        train_samples: The last sample, where the arguments say that.
        error_dir: Where ranks that fail say why; ``None``: beside the logs.
    """

    run_dir: Path
    command: tuple[str, ...]
    resolved_recipe: str
    workers: tuple[Worker, ...]
    inputs: tuple[ArgumentPath, ...]
    layout: ParallelLayout
    batch: BatchSizes
    seq_length: int
    outputs: tuple[ArgumentPath, ...] = ()
    schedule: tuple[ScheduleEntry, ...] = ()
    size: ModelSize | str = "not counted"
    checkpoint_layout: Mapping[str, Any] = field(default_factory=dict)
    save_dir: Path | None = None
    loads_own_checkpoints: bool = False
    train_iters: int | None = None
    train_samples: int | None = None
    error_dir: Path | None = None

    def log_path(self, rank: int) -> Path:
        """Where a rank's output goes."""
        return self.run_dir / "logs" / f"rank_{rank}.log"

    def error_path(self, rank: int) -> Path:
        """Where a rank that fails says why."""
        return (self.error_dir or self.run_dir / "logs") / f"rank_{rank}.error"


def plan_node(
    recipe: Recipe,
    options: OptionTable,
    cluster: Cluster,
    *,
    node_rank: int,
    run_dir: Path,
    command: Sequence[str],
    python: str,
    environ: Mapping[str, str],
    cpu_count: int,
    error_dir: Path | None = None,
) -> LaunchPlan:
    """Plan the processes of one machine of a job.

    Args:
        recipe: The resolved recipe.
        options: The known options.
        cluster: All machines of the job.
        node_rank: The place of this one, 0-based.
        run_dir: The run directory, absolute.
        command: The launcher's own command line, for the record.
        python: The interpreter of the processes.
        environ: The environment they inherit.
        cpu_count: Cores that this machine's processes share.
        error_dir: Where ranks that fail say why; beside the logs by default.

    Raises:
        ConfigError: Model, batch and processes do not fit together.
    """
    values = argument_values(recipe, options)
    raise_problems(verify_arguments(values, cluster.world_size))
    layout = parallel_layout(values, cluster.world_size)
    batch = batch_sizes(values, layout)
    schedule = parse_schedule(values["step_batch_size_schedule"] or "")
    if schedule:
        batch = replace(batch, global_batch_size=schedule[-1].batch_size)
    # What the user has set stands over the recipe.
    given = {**recipe.settings.env, **{name: value for name, value in environ.items() if value}}
    threads = given.get("OMP_NUM_THREADS") or str(max(1, cpu_count // cluster.nproc))
    env = {name: given[name] for name in recipe.settings.env}
    env |= {
        "WORLD_SIZE": str(cluster.world_size),
        "LOCAL_WORLD_SIZE": str(cluster.nproc),
        "MASTER_ADDR": cluster.hosts[0] if cluster.hosts else "127.0.0.1",
        "MASTER_PORT": str(cluster.port),
        # Every process would take all cores otherwise.
        "OMP_NUM_THREADS": threads,
        # Upstream relies on the order in which kernels were queued; FSDP needs another value.
        "CUDA_DEVICE_MAX_CONNECTIONS": given.get("CUDA_DEVICE_MAX_CONNECTIONS") or "1",
        "PYTHONUNBUFFERED": "1",
        "FLAGSCALE_RUN_DIR": str(run_dir),
    }
    argv = (python, "-m", "flagscale.train", *recipe.argv)
    workers = []
    for local_rank in range(cluster.nproc):
        rank = node_rank * cluster.nproc + local_rank
        error_file = str((error_dir or run_dir / "logs") / f"rank_{rank}.error")
        own = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "FLAGSCALE_ERROR_FILE": error_file}
        workers.append(Worker(rank, argv, env | own))
    return LaunchPlan(
        run_dir=run_dir,
        command=tuple(command),
        resolved_recipe=dump_recipe(recipe),
        workers=tuple(workers),
        inputs=tuple(input_paths(values)),
        layout=layout,
        batch=batch,
        seq_length=values["seq_length"],
        outputs=tuple(output_paths(values)),
        schedule=schedule,
        size=_model_size(values, layout, batch),
        checkpoint_layout=checkpoint_layout(layout, values),
        save_dir=Path(values["save"]).absolute() if values["save"] else None,
        loads_own_checkpoints=bool(values["save"]) and values["load"] == values["save"],
        train_iters=values["train_iters"],
        train_samples=values["train_samples"],
        error_dir=error_dir,
    )


def _model_size(
    values: Mapping[str, Any], layout: ParallelLayout, batch: BatchSizes
) -> ModelSize | str:
    reason = uncounted(values)
    if reason is not None:
        return reason
    dims, mode = model_dims(values), training_mode(values)
    stages = range(layout.pp_size)
    return ModelSize(
        count_parameters(dims),
        tuple(predict_memory(dims, layout, batch, mode, stage) for stage in stages),
        mode.flash_attention,
    )


def describe(plan: LaunchPlan) -> str:
    """The plan for people: layout, batch, sizes, environment and command."""
    at = plan.layout
    lines = [
        f"run directory     {plan.run_dir}",
        f"ranks             {at.world_size} = TP {at.tp_size} x CP {at.cp_size} x DP {at.dp_size} "
        f"x PP {at.pp_size}"
        + (f", {at.vpp_size} virtual stages a rank" if at.vpp_size else "")
        + (f"; experts: EP {at.ep_size}, ETP {at.expert_tp_size}" if at.ep_size > 1 else ""),
        *_batch_lines(plan),
        *_size_lines(plan.size),
        "",
        *_rank_lines(plan),
    ]
    shared = dict(set.intersection(*(set(worker.env.items()) for worker in plan.workers)))
    lines += ["", "environment of every rank"]
    lines += [f"  {name}={shlex.quote(value)}" for name, value in sorted(shared.items())]
    if len(plan.workers) > 1:
        lines += ["", "environment of each rank (of the first machine)"]
    for worker in plan.workers:
        own = sorted(worker.env.items() - shared.items())
        if own:
            lines.append("  " + " ".join(f"{name}={shlex.quote(value)}" for name, value in own))
    lines += ["", "command of every rank", f"  {_wrapped(plan.workers[0].argv)}"]
    return "\n".join(lines)


def _batch_lines(plan: LaunchPlan) -> list[str]:
    batch, dp_size = plan.batch, plan.layout.dp_size
    microbatches = batch.global_batch_size // (batch.micro_batch_size * dp_size)
    tokens = batch.global_batch_size * plan.seq_length
    lines = [
        f"batch             {batch.global_batch_size} samples a step = {microbatches} "
        f"micro-batches x {batch.micro_batch_size} x DP {dp_size}",
        f"tokens a step     {tokens:,} ({plan.seq_length} a sample)",
    ]
    if plan.schedule:
        first, last = plan.schedule[0], plan.schedule[-1]
        lines.append(
            f"ramp              from {first.batch_size} samples "
            f"({first.batch_size * plan.seq_length:,} tokens) a step, in {len(plan.schedule) - 1} "
            f"rises over the first {last.first_token:,} tokens"
        )
    return lines


def _size_lines(size: ModelSize | str) -> list[str]:
    if isinstance(size, str):
        return [f"parameters        not counted: {size}"]
    terms = [term.name for term in fields(MemoryTerms)]
    attention = "flash attention" if size.flash_attention else "stored attention scores"
    large = max(memory.total for memory in size.memory) >= 2**30
    unit, unit_bytes = ("GiB", 2**30) if large else ("MiB", 2**20)
    lines = [
        f"parameters        {size.parameters:,}",
        "",
        f"memory of a rank at its peak, {unit} ({attention}; the device's own and the "
        "communication library's come on top)",
        "stage" + "".join(f"{name:>13}" for name in [*terms, "total"]),
    ]
    for stage, memory in enumerate(size.memory):
        numbers = [*(getattr(memory, name) for name in terms), memory.total]
        lines.append(f"{stage:5}" + "".join(f"{number / unit_bytes:13.2f}" for number in numbers))
    return lines


def _rank_lines(plan: LaunchPlan) -> list[str]:
    """Where each rank stands; in a large job, where those of each machine do."""
    at, nproc = plan.layout, len(plan.workers)
    size = 1 if at.world_size <= _ROWS_OF_RANKS else nproc
    lines = ["ranks           tp       cp       dp       pp"]
    for first in range(0, at.world_size, size):
        places = zip(*(at.coordinates(rank) for rank in range(first, first + size)), strict=True)
        columns = [_span(range(first, first + size)), *map(_span, places)]
        lines.append(f"{columns[0]:9}" + "".join(f"{column:>9}" for column in columns[1:]))
    return lines


def _span(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _wrapped(argv: Sequence[str]) -> str:
    """A command for a shell, one option a line."""
    words = (f"\\\n    {w}" if w.startswith("--") else w for w in map(shlex.quote, argv))
    return " ".join(words)
