"""From a resolved recipe and a number of processes to exact commands: pure, nothing is started."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

from flagscale.errors import ConfigError
from flagscale.launch.options import OptionTable
from flagscale.launch.recipe import Recipe, argument_values, dump_recipe
from flagscale.layout.parallel import (
    BatchSizes,
    ModelDims,
    ParallelLayout,
    Problem,
    raise_problems,
    verify_evaluation,
    verify_layout,
)

__all__ = ["InputPath", "LaunchPlan", "Worker", "describe", "plan_local"]

_REQUIRED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "seq_length",
    "micro_batch_size",
)
_UNEVEN_PIPELINE = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "hybrid_layer_pattern",
)


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
class InputPath:
    """A path that must exist before the job starts, and the argument that names it."""

    path: Path
    where: str


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
    """

    run_dir: Path
    command: tuple[str, ...]
    resolved_recipe: str
    workers: tuple[Worker, ...]
    inputs: tuple[InputPath, ...]
    layout: ParallelLayout
    batch: BatchSizes | None
    seq_length: int

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
    missing = [dest for dest in _REQUIRED if values[dest] is None]
    if missing:
        raise ConfigError(
            "the recipe does not say how large the model or its batches are",
            where=recipe.name,
            expected=", ".join(f"--{dest.replace('_', '-')}" for dest in missing),
        )
    layout, dims = _layout(values, nproc), _model_dims(values)
    batch = _batch(values, layout)
    problems = [*_verify_virtual_stages(values, layout), *verify_layout(layout, dims, batch)]
    if values["data_path"] and values["split"] is not None and not values["full_validation"]:
        problems += verify_evaluation(values["split"], values["eval_iters"])
    raise_problems(problems)
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
        inputs=tuple(_inputs(values)),
        layout=layout,
        batch=None if values["step_batch_size_schedule"] else batch,
        seq_length=dims.seq_length,
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


def _layout(values: Mapping[str, Any], world_size: int) -> ParallelLayout:
    tp_size = values["tensor_model_parallel_size"]
    pp_size = values["pipeline_model_parallel_size"]
    vpp_size = values["num_virtual_stages_per_pipeline_rank"]
    chunk = values["num_layers_per_virtual_pipeline_stage"]
    if vpp_size is None and chunk and pp_size:
        vpp_size = max(1, values["num_layers"] // (pp_size * chunk))
    return ParallelLayout(
        world_size=world_size,
        tp_size=tp_size,
        pp_size=pp_size,
        cp_size=values["context_parallel_size"],
        ep_size=values["expert_model_parallel_size"],
        etp_size=values["expert_tensor_parallel_size"],
        vpp_size=None if vpp_size == 1 else vpp_size,
        sequence_parallel=values["sequence_parallel"],
        uneven_pipeline=any(values[dest] for dest in _UNEVEN_PIPELINE),
        order="tp-cp-ep-pp-dp" if values["use_tp_pp_dp_mapping"] else "tp-cp-ep-dp-pp",
    )


def _verify_virtual_stages(values: Mapping[str, Any], layout: ParallelLayout) -> Iterator[Problem]:
    chunk = values["num_layers_per_virtual_pipeline_stage"]
    if chunk and layout.pp_size and values["num_layers"] % (layout.pp_size * chunk):
        yield Problem(
            "the layers do not divide into virtual pipeline stages",
            "--num-layers-per-virtual-pipeline-stage",
            f"{values['num_layers']} layers = a multiple of PP {layout.pp_size} x {chunk}",
            str(chunk),
            "another number, or --num-virtual-stages-per-pipeline-rank",
        )


def _model_dims(values: Mapping[str, Any]) -> ModelDims:
    hidden_size, heads = values["hidden_size"], values["num_attention_heads"]
    ffn_hidden_size = values["ffn_hidden_size"]
    if ffn_hidden_size is None:  # upstream's own rule
        gated = int(4 * hidden_size * 2 / 3 / 64) * 64
        ffn_hidden_size = gated if values["swiglu"] else 4 * hidden_size
    padded = values["padded_vocab_size"]
    if padded is None and values["vocab_size"] and values["pad_vocab_size"]:
        multiple = values["make_vocab_size_divisible_by"] * values["tensor_model_parallel_size"]
        padded = ceil(values["vocab_size"] / multiple) * multiple
    return ModelDims(
        num_layers=values["num_layers"],
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads,
        num_query_groups=values["num_query_groups"] if values["group_query_attention"] else heads,
        seq_length=values["seq_length"],
        kv_channels=values["kv_channels"],
        padded_vocab_size=padded,
        num_experts=values["num_experts"] or None,
        moe_ffn_hidden_size=values["moe_ffn_hidden_size"],
    )


def _batch(values: Mapping[str, Any], layout: ParallelLayout) -> BatchSizes:
    micro_batch_size = values["micro_batch_size"]
    model_size = layout.tp_size * layout.cp_size * layout.pp_size
    dp_size = layout.world_size // model_size if model_size else 1
    return BatchSizes(
        micro_batch_size=micro_batch_size,
        # Without it upstream takes one micro-batch a replica.
        global_batch_size=values["global_batch_size"] or micro_batch_size * max(1, dp_size),
        microbatch_group_size=values["microbatch_group_size_per_vp_stage"],
    )


def _inputs(values: Mapping[str, Any]) -> Iterator[InputPath]:
    for dest in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        where = f"--{dest.replace('_', '-')}"
        for word in values[dest] or ():
            if not _is_number(word):  # the weight of the corpus after it
                yield InputPath(Path(f"{word}.bin"), where)
                yield InputPath(Path(f"{word}.idx"), where)
    for dest in ("data_args_path", "per_split_data_args_path", "vocab_file", "merge_file"):
        if values[dest]:
            yield InputPath(Path(values[dest]), f"--{dest.replace('_', '-')}")
    tokenizer = values["tokenizer_model"]
    # 'name' and 'owner/name' may be names in a hub's cache, which only the tokenizer library knows.
    if tokenizer and (tokenizer.startswith((".", "/")) or tokenizer.count("/") > 1):
        yield InputPath(Path(tokenizer), "--tokenizer-model")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
