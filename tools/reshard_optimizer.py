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
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from flagscale.errors import CheckpointError, ConfigError, FlagScaleError

if TYPE_CHECKING:
    from flagscale.optim.reshard import Outcome, Reshard

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


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
    layout = parser.add_argument_group("target layout")
    for flag, name in (
        ("tensor", "tp_size"),
        ("pipeline", "pp_size"),
        ("data", "dp_size"),
        ("expert", "ep_size"),
        ("expert-tensor", "etp_size"),
        ("virtual-pipeline", "vpp_size"),
    ):
        chunks = " (model chunks a rank)" if name == "vpp_size" else ""
        layout.add_argument(
            f"--target-{flag}-parallel-size",
            dest=name,
            type=int,
            metavar="N",
            help=f"{flag} parallel size{chunks}",
        )
    layout.add_argument("--pipeline-layout", help="as --pipeline-model-parallel-layout takes it")
    layout.add_argument("--target-first-pipeline-num-layers", dest="first_layers", type=int)
    layout.add_argument("--target-last-pipeline-num-layers", dest="last_layers", type=int)
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
    add("--workers", type=int, default=2, help="threads of each task (default: %(default)s)")
    add("--max-memory", type=_nbytes, default=1 << 30, help="of each task, such as 1GiB (default)")
    add("--verify", choices=("sample", "full"), default="sample", help="what is read back")
    add("--dry-run", action="store_true", help="print the whole plan and write nothing")
    add("--restart", action="store_true", help="throw away what a stopped run has left")
    arguments = parser.parse_args(argv)
    if arguments.check is None and arguments.save_dir is None:
        parser.error("--save-dir is needed")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = parse_arguments(argv)
    try:
        if arguments.check:
            return _check(arguments)
        return _repair(arguments) if arguments.repair else _reshard(arguments)
    except FlagScaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        print(str(stopped) or "interrupted", file=sys.stderr)
        return 130


def _reshard(arguments: argparse.Namespace) -> int:
    from flagscale.optim import reshard
    from flagscale.optim.carry import Request
    from flagscale.optim.opening import open_source

    source = open_source(arguments.load_dir, arguments.iteration)
    request = Request(**{name: getattr(arguments, name) for name in Request.__annotations__})
    planned = reshard.plan(
        source, request, arguments.target_ckpt_format, arguments.target_optim_format
    )
    return _run(planned, arguments)


def _check(arguments: argparse.Namespace) -> int:
    from flagscale.optim.doctor import diagnose

    with _progress("checking") as on_progress:
        diagnosis = diagnose(arguments.check, arguments.iteration, on_progress=on_progress)
    print("\n".join(diagnosis.report()))
    return 0 if diagnosis.sound else CheckpointError.exit_code


def _repair(arguments: argparse.Namespace) -> int:
    from flagscale.optim.carry import Request
    from flagscale.optim.opening import open_source
    from flagscale.optim.repair import plan_repair

    if any(getattr(arguments, name) for name in Request.__annotations__):
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
    from flagscale.optim import reshard

    source = planned.source
    _verify_places(planned, arguments.save_dir)
    speed = reshard.measure_speed(source, arguments.save_dir) if arguments.dry_run else None
    print("\n".join(_described(planned, arguments, speed)))
    if arguments.dry_run:
        return 0
    with _progress("writing", planned.plan.total_bytes) as on_progress:
        outcome = reshard.run(
            planned,
            arguments.save_dir,
            workers=arguments.workers,
            max_memory=arguments.max_memory,
            verify=arguments.verify,
            restart=arguments.restart,
            on_progress=on_progress,
        )
    print(_told(outcome, arguments.verify))
    return 0


def _verify_places(planned: Reshard, save_dir: Path) -> None:
    source = planned.source.directory.resolve()
    if save_dir.resolve() in (source, source.parent):
        raise ConfigError(
            "the target would lie in the source",
            where="--save-dir",
            expected="another directory than the source's",
            got=save_dir,
        )


def _described(
    planned: Reshard, arguments: argparse.Namespace, speed: float | None
) -> Iterator[str]:
    source, target = planned.source, planned.target
    old = source.optim_format if source.ckpt_format == "torch_dist" else "distrib_optim.pt"
    new = target.optim_format if target.ckpt_format == "torch_dist" else "distrib_optim.pt"
    total = planned.plan.total_bytes
    yield f"source            {source.directory}, iteration {source.iteration}"
    yield f"                  {source.ckpt_format}, {old}; {_sizes(source.job)}"
    yield f"order             {source.order}"
    yield f"target            {arguments.save_dir}"
    yield f"                  {target.ckpt_format}, {new}; {_sizes(target.job)}"
    yield f"read, write       {planned.bytes_read:,} and {total:,} bytes, {len(target.files)} files"
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


def _told(outcome: Outcome, verify: str) -> str:
    speed = outcome.bytes_written / max(outcome.seconds, 1e-9) / 1e9
    who = "" if outcome.published else " (published by another task)"
    proof = f"{outcome.proved} parameters proved ({verify}): main copy, rounded, is the weight"
    return (
        f"done              {outcome.directory}{who}\n"
        f"                  {outcome.bytes_written:,} bytes in {outcome.seconds:.1f} s, "
        f"{speed:.2f} GB/s\n" + (f"                  {proof}" if outcome.published else "")
    ).rstrip()


@contextmanager
def _progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar; what it yields takes the bytes done and, if it is known only then, of all."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (
        TextColumn(what),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, of=total: bar.update(task, completed=done, total=of)


def _nbytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512MiB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


if __name__ == "__main__":
    raise SystemExit(main())
