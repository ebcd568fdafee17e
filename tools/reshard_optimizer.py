r"""Bring a checkpoint, distributed optimizer included, to another parallel layout: files to files.

Examples:
    python tools/reshard_optimizer.py --load-dir ckpt --save-dir ckpt-tp8 \
        --target-tensor-parallel-size 8 --target-pipeline-parallel-size 2 --dry-run
    srun --ntasks=16 python tools/reshard_optimizer.py --load-dir ckpt --save-dir ckpt-tp8 \
        --target-tensor-parallel-size 8 --target-pipeline-parallel-size 2
    python tools/reshard_optimizer.py --check ckpt
    python tools/reshard_optimizer.py --repair ckpt --save-dir ckpt-repaired

No GPU, no process group and no model are needed. The source is only read. A run that was stopped
goes on where it was when it is started again. By default the result is torch_dist with
fully_reshardable states, which megatron-core loads at any layout.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.console import (
    add_copy_arguments,
    add_layout_arguments,
    exit_code,
    progress,
    refuse_inside,
)
from flagscale.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from flagscale.ckpt_copy.run import Outcome
    from flagscale.optim.reshard import Reshard


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description="Bring a checkpoint, distributed optimizer included, to another layout.",
        epilog="Sizes that are left out stay what they were in the source.",
    )
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--load-dir", type=Path, help="the checkpoint, as for --load")
    what.add_argument("--check", type=Path, metavar="DIR", help="look for damage and name it")
    what.add_argument("--repair", type=Path, metavar="DIR", help="mend what upstream #5077 broke")
    add("--save-dir", type=Path, help="where to write, as for --save; another than the source")
    add("--iteration", type=int, help="of the source (default: the last complete one)")
    layout = add_layout_arguments(parser)
    layout.add_argument(
        "--allow-vocab-growth",
        action="store_true",
        help="let the padded vocabulary grow where the tensor parallel size does not divide it",
    )
    add("--target-ckpt-format", choices=("torch_dist", "torch"), default="torch_dist")
    add(
        "--target-optim-format",
        choices=("fully_reshardable", "dp_reshardable"),
        default="fully_reshardable",
        help="of torch_dist: loads at any layout, or at the target's tensor and pipeline size only",
    )
    add("--verify", choices=("sample", "full"), default="sample", help="what is read back")
    add_copy_arguments(parser)
    arguments = parser.parse_args(argv)
    if arguments.check is None and arguments.save_dir is None:
        parser.error("--save-dir is needed")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = parse_arguments(argv)
    program = _check if arguments.check else _repair if arguments.repair else _reshard
    return exit_code(lambda: program(arguments))


def _reshard(arguments: argparse.Namespace) -> int:
    from flagscale.optim import reshard
    from flagscale.optim.carry import Request
    from flagscale.optim.opening import open_source

    source = open_source(arguments.load_dir, arguments.iteration)
    told = vars(arguments)
    request = Request(**{name: told[name] for name in Request.__annotations__ if name in told})
    planned = reshard.plan(
        source, request, arguments.target_ckpt_format, arguments.target_optim_format
    )
    return _run(planned, arguments)


def _check(arguments: argparse.Namespace) -> int:
    from flagscale.optim.doctor import diagnose

    with progress("checking") as on_progress:
        diagnosis = diagnose(arguments.check, arguments.iteration, on_progress=on_progress)
    print("\n".join(diagnosis.report()))
    return 0 if diagnosis.sound else CheckpointError.exit_code


def _repair(arguments: argparse.Namespace) -> int:
    from flagscale.optim.carry import Request
    from flagscale.optim.opening import open_source
    from flagscale.optim.repair import plan_repair

    if any(vars(arguments).get(name) for name in Request.__annotations__):
        raise ConfigError(
            "a repair keeps the layout",
            where="--target-*, --pipeline-layout, --allow-vocab-growth",
            expected="none of them",
            cure="reshard what --repair has written",
        )
    repair = plan_repair(open_source(arguments.repair, arguments.iteration))
    print("\n".join(f"repair            {line}" for line in repair.report()))
    return _run(repair.reshard, arguments)


def _run(planned: Reshard, arguments: argparse.Namespace) -> int:
    from flagscale.ckpt_copy.run import measure_speed
    from flagscale.optim import reshard

    source = planned.source
    refuse_inside(source.directory, arguments.save_dir, beside=True)
    speed = measure_speed(source.directory, arguments.save_dir) if arguments.dry_run else None
    print("\n".join(_described(planned, arguments, speed)))
    if arguments.dry_run:
        return 0
    with progress("writing", planned.copy.plan.total_bytes) as on_progress:
        outcome, proved = reshard.run(
            planned,
            arguments.save_dir,
            workers=arguments.workers,
            max_memory=arguments.max_memory,
            verify=arguments.verify,
            restart=arguments.restart,
            on_progress=on_progress,
        )
    print(_told(outcome, proved, arguments.verify))
    return 0


def _described(
    planned: Reshard, arguments: argparse.Namespace, speed: float | None
) -> Iterator[str]:
    source, target = planned.source, planned.target
    old = source.optim_format if source.ckpt_format == "torch_dist" else "distrib_optim.pt"
    new = target.optim_format if target.ckpt_format == "torch_dist" else "distrib_optim.pt"
    read, total = planned.copy.bytes_read, planned.copy.plan.total_bytes
    yield f"source            {source.directory}, iteration {source.iteration}"
    yield f"                  {source.ckpt_format}, {old}; {_sizes(source.job)}"
    yield f"order             {source.order}"
    yield f"target            {arguments.save_dir}"
    yield f"                  {target.ckpt_format}, {new}; {_sizes(target.job)}"
    yield f"read, write       {read:,} and {total:,} bytes, {len(target.files)} files"
    yield f"memory            at most {arguments.max_memory / 2**20:,.0f} MiB of buffers a task"
    if speed:
        yield f"time              about {total / speed:,.0f} s at {speed / 1e9:.2f} GB/s, measured"
    yield f"random generators {target.rng}"
    for note in target.notes:
        yield f"note              {note}"


def _sizes(job: object) -> str:
    at, pipeline = job.layout, job.pipeline  # type: ignore[attr-defined]
    sizes = f"TP {at.tp_size} x CP {at.cp_size} x DP {at.dp_size} x PP {at.pp_size}"
    if pipeline.num_chunks > 1:
        sizes += f", {pipeline.num_chunks} chunks a rank"
    if at.ep_size > 1:
        sizes += f", EP {at.ep_size}, ETP {at.expert_tp_size}"
    layers = "+".join(str(sum(len(stage.layers) for stage in chunks)) for chunks in pipeline.stages)
    return f"{sizes}; layers {layers}; {at.world_size} ranks"


def _told(outcome: Outcome, proved: int, verify: str) -> str:
    lines = [*outcome.report()]
    if outcome.published:
        proof = f"{proved} parameters proved ({verify}): main copy, rounded, is the weight"
        lines.append(f"                  {proof}")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
