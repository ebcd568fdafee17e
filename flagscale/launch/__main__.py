"""``python -m flagscale.launch RECIPE [options] [Megatron arguments]``: run a recipe.

On this machine, on hosts given by name, or through Slurm: see :mod:`flagscale.launch.start`.
``python -m flagscale.launch status RUN_DIR`` says where a run is.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from flagscale.errors import ConfigError, FlagScaleError
from flagscale.launch.local import verify_paths
from flagscale.launch.options import known_options
from flagscale.launch.recipe import read_recipe
from flagscale.launch.settings import HEALTH_CHECKS
from flagscale.launch.start import Machine, Request, describe_start, execute_start, plan_start
from flagscale.launch.status import main as report_status


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as the project's own errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="command line", cure=self.format_usage().strip())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m flagscale.launch",
        usage="%(prog)s RECIPE [options] [Megatron arguments]",
        description="Train by a recipe, one process a device: on this machine, on hosts given by "
        "name, or through Slurm, which a recipe for several nodes looks for.",
        epilog="All other arguments are Megatron's (or --platform cuda|cpu) and override the "
        "recipe; --flag=false and --option=null remove one of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "--nodes", type=int, help="machines to ask Slurm for (default: the recipe's)"
    )
    parser.add_argument(
        "--nproc", type=int, help="processes a machine (default: NPROC, the recipe's, or 1)"
    )
    parser.add_argument(
        "--output-dir", type=Path, help="run directory (default: OUTPUT_DIR, or outputs/RECIPE)"
    )
    parser.add_argument(
        "--data-dir", type=Path, help="what {data_dir} in the recipe means (default: DATA_DIR)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be started, and start nothing"
    )
    parser.add_argument(
        "--hosts",
        type=lambda text: tuple(filter(None, text.split(","))),
        default=(),
        metavar="NAME,NAME,...",
        help="these machines, without Slurm: start the launcher on each of them",
    )
    parser.add_argument(
        "--node-rank", type=int, help="this machine's place in --hosts (default: by its name)"
    )
    parser.add_argument(
        "--port", type=int, default=29500, help="for the rendezvous on the first of --hosts"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option for sbatch, as in --sbatch=--partition=NAME; may be repeated",
    )
    parser.add_argument(
        "--srun",
        action="append",
        default=[],
        metavar="OPTION",
        help="an option for srun, as in --srun=--container-image=NAME; may be repeated",
    )
    parser.add_argument(
        "--max-restarts", type=int, help="how often a Slurm job may be queued again (default: 10)"
    )
    parser.add_argument(
        "--spares", type=int, help="machines to ask Slurm for beyond those needed (default: 0)"
    )
    parser.add_argument(
        "--health-check",
        choices=HEALTH_CHECKS,
        help="what is looked at in a Slurm job before ranks start (default: full)",
    )
    parser.add_argument(
        "--no-health-check", dest="health_check", action="store_const", const="none"
    )
    return parser


def _path(given: Path | None, environ: Mapping[str, str], variable: str) -> Path | None:
    if given is None and environ.get(variable):
        given = Path(environ[variable])
    return None if given is None else given.absolute()


def _nproc(given: int | None, environ: Mapping[str, str]) -> int | None:
    text = environ.get("NPROC")
    if given is not None or not text:
        return given
    if not text.isdecimal():
        raise ConfigError("not a number of processes", where="NPROC", expected=1, got=text)
    return int(text)


def _request(args: argparse.Namespace, overrides: list[str], environ: Mapping[str, str]) -> Request:
    return Request(
        recipe=args.recipe.absolute(),
        overrides=tuple(overrides),
        nodes=args.nodes,
        nproc=_nproc(args.nproc, environ),
        output_dir=_path(args.output_dir, environ, "OUTPUT_DIR"),
        data_dir=_path(args.data_dir, environ, "DATA_DIR"),
        hosts=args.hosts,
        node_rank=args.node_rank,
        port=args.port,
        sbatch=tuple(args.sbatch),
        srun=tuple(args.srun),
        max_restarts=args.max_restarts,
        spares=args.spares,
        health_check=args.health_check,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _machine(environ: Mapping[str, str]) -> Machine:
    return Machine(
        environ=environ,
        hostname=socket.gethostname(),
        work_dir=Path.cwd(),
        python=sys.executable,
        cpu_count=len(os.sched_getaffinity(0)),
        free_port=_free_port(),
        has_slurm=shutil.which("sbatch") is not None,
    )


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Plan, and run unless it is a dry run; the exit code."""
    try:
        if argv[:1] == ["status"]:
            return report_status(argv[1:])
        args, overrides = _parser().parse_known_args(argv)
        request = _request(args, overrides, environ)
        options = known_options()
        recipe = read_recipe(request.recipe, options)
        start = plan_start(request, recipe, options, _machine(environ))
        if not args.dry_run:
            return execute_start(start, environ)
        missing = [f"before a real start: {problem}" for problem in verify_paths(start.plan)]
        print("\n\n".join([describe_start(start), *missing]), flush=True)
    except BrokenPipeError:  # --dry-run | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FlagScaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
