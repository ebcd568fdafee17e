"""``python -m flagscale.launch RECIPE [options] [Megatron arguments]``: run a recipe here."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from flagscale.errors import ConfigError, FlagScaleError
from flagscale.launch.local import execute_local, verify_paths
from flagscale.launch.options import known_options
from flagscale.launch.plan import LaunchPlan, describe, plan_local
from flagscale.launch.recipe import read_recipe, resolve_recipe


class _Parser(argparse.ArgumentParser):
    """Reports mistakes as the project's own errors."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where="command line", cure=self.format_usage().strip())


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m flagscale.launch",
        usage="%(prog)s RECIPE [options] [Megatron arguments]",
        description="Train by a recipe on this machine, one process a device.",
        epilog="All other arguments are Megatron's (or --platform cuda|cpu) and override the "
        "recipe; --flag=false and --option=null remove one of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument("--nproc", type=int, help="processes (default: NPROC, or 1)")
    parser.add_argument(
        "--output-dir", type=Path, help="run directory (default: OUTPUT_DIR, or outputs/RECIPE)"
    )
    parser.add_argument(
        "--data-dir", type=Path, help="what {data_dir} in the recipe means (default: DATA_DIR)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be started, and start nothing"
    )
    return parser


def _path(given: Path | None, environ: Mapping[str, str], variable: str) -> Path | None:
    if given is None and environ.get(variable):
        given = Path(environ[variable])
    return None if given is None else given.absolute()


def _nproc(given: int | None, environ: Mapping[str, str]) -> int:
    if given is not None:
        return given
    text = environ.get("NPROC") or "1"
    if not text.isdecimal():
        raise ConfigError("not a number of processes", where="NPROC", expected=1, got=text)
    return int(text)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _plan(args: argparse.Namespace, overrides: list[str], environ: Mapping[str, str]) -> LaunchPlan:
    options = known_options()
    recipe = read_recipe(args.recipe, options)
    nproc = _nproc(args.nproc, environ)
    run_dir = _path(args.output_dir, environ, "OUTPUT_DIR") or Path("outputs", recipe.name)
    run_dir = run_dir.absolute()
    data_dir = _path(args.data_dir, environ, "DATA_DIR")
    command = [sys.executable, "-m", "flagscale.launch", str(args.recipe.absolute())]
    command += ["--nproc", str(nproc), "--output-dir", str(run_dir)]
    command += [] if data_dir is None else ["--data-dir", str(data_dir)]
    return plan_local(
        resolve_recipe(recipe, options, overrides, run_dir, data_dir),
        options,
        nproc=nproc,
        run_dir=run_dir,
        command=[*command, *overrides],
        python=sys.executable,
        environ=environ,
        cpu_count=len(os.sched_getaffinity(0)),
        port=_free_port(),
    )


def main(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> int:
    """Plan, and run unless it is a dry run; the exit code."""
    try:
        args, overrides = _parser().parse_known_args(argv)
        plan = _plan(args, overrides, environ)
        if not args.dry_run:
            return execute_local(plan)
        print(describe(plan))
        for problem in verify_paths(plan):
            print(f"\nbefore a real start: {problem}")
    except FlagScaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
