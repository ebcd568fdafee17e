"""``spikes``: steps whose loss rose as it should not have."""

from __future__ import annotations

import argparse
from dataclasses import asdict, fields, replace
from pathlib import Path

from flagscale.data_inspect.commands import Output, add_run_arguments, format_table
from flagscale.data_inspect.curve import Curve
from flagscale.data_inspect.run import open_run
from flagscale.data_inspect.spikes import Spike, SpikeSettings, find_spikes

__all__ = ["add_arguments", "add_detector_arguments", "detector_settings", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, where to read the losses, and the detector's settings."""
    add_run_arguments(parser)
    parser.add_argument(
        "--log",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="read these logs, or folders of logs, and neither ledger nor event files",
    )
    parser.add_argument(
        "--events", type=Path, metavar="DIR", help="read TensorBoard's event files there"
    )
    parser.add_argument(
        "--wandb", type=Path, metavar="DIR", help="read Weights & Biases' offline files below it"
    )
    add_detector_arguments(parser)


def add_detector_arguments(parser: argparse.ArgumentParser) -> None:
    """An option for each setting of the detector."""
    group = parser.add_argument_group("detector", "see docs/inspect.md")
    for one in fields(SpikeSettings):
        group.add_argument(
            f"--{one.name.replace('_', '-')}",
            type=type(one.default),
            default=one.default,
            metavar="N",
            help="default: %(default)s",
        )


def detector_settings(args: argparse.Namespace) -> SpikeSettings:
    """The settings of a command line.

    Raises:
        ConfigError: One is out of its range.
    """
    return SpikeSettings(**{one.name: getattr(args, one.name) for one in fields(SpikeSettings)})


def read_curve(args: argparse.Namespace) -> tuple[Curve, str]:
    """The curve that is asked for, and what it was read from.

    Raises:
        DataError: There is none, or it is damaged.
    """
    if args.log:
        from flagscale.data_inspect.logs import read_log

        return read_log(*args.log), f"the logs {', '.join(map(str, args.log))}"
    if args.wandb:
        from flagscale.data_inspect.wandb_files import read_wandb

        return read_wandb(args.wandb), f"the Weights & Biases files in {args.wandb}"
    run_files = open_run(args.run_dir, args.arguments)
    if args.events:
        run_files = replace(run_files, ledger_directory=None, events=args.events)
    return run_files.curve()


def run(args: argparse.Namespace) -> Output:
    """Find them.

    Raises:
        ConfigError: A setting is out of its range.
        DataError: There is no curve, or it is damaged.
    """
    curve, source = read_curve(args)
    spikes = find_spikes(curve, detector_settings(args))
    last = max((point.iteration for point in curve.points), default=0)
    attempts = len(curve.attempts)
    head = f"{len(spikes)} in {last} iterations, {attempts} start(s); read from {source}"
    damaged = [f"could not be read: {place}" for place in curve.damaged]
    json = {
        "source": source,
        "last_iteration": last,
        "attempts": [asdict(attempt) for attempt in curve.attempts],
        "damaged": [str(place) for place in curve.damaged],
        "spikes": [asdict(spike) for spike in spikes],
    }
    return Output("\n".join([head, *damaged, *([_table(spikes)] if spikes else [])]), json)


def _table(spikes: tuple[Spike, ...]) -> str:
    rows: list[tuple[object, ...]] = []
    for spike in spikes:
        first, last = spike.suspects
        rows.append(
            (
                spike.kind.value,
                f"{spike.first_iteration}-{spike.last_iteration}",
                str(last) if first == last else f"{first}-{last}",
                *(f"{x:.4f}" if x is not None else "-" for x in (spike.baseline, spike.peak)),
                f"{spike.score:.1f}",
                "; ".join(spike.evidence),
            )
        )
    header = ("kind", "iterations", "began at", "expected", "peak", "score", "evidence")
    return format_table(header, rows)
