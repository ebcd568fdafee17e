"""What the command-line programs over checkpoints have in common."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from flagscale.errors import ConfigError, FlagScaleError

__all__ = [
    "add_copy_arguments",
    "add_layout_arguments",
    "exit_code",
    "nbytes",
    "progress",
    "refuse_inside",
]

_UNITS: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def exit_code(program: Callable[[], int]) -> int:
    """Run a program; its exit code, or that of the error it ends with, which is printed."""
    try:
        code = program()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except FlagScaleError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    except KeyboardInterrupt as stopped:
        sys.stderr.write(f"{stopped}\n" if str(stopped) else "interrupted\n")
        return 130


def add_copy_arguments(parser: argparse.ArgumentParser) -> None:
    """``--workers``, ``--max-memory``, ``--dry-run`` and ``--restart``."""
    add = parser.add_argument
    add("--workers", type=int, default=2, help="threads of each task (default: %(default)s)")
    add("--max-memory", type=nbytes, default=1 << 30, help="of each task, such as 1GiB (default)")
    add("--dry-run", action="store_true", help="print the whole plan and write nothing")
    add("--restart", action="store_true", help="throw away what a stopped run has left")


def add_layout_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """``--target-*-parallel-size`` and where the layers lie; by the names of a ``Request``."""
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
    return layout


def refuse_inside(source: Path, save_dir: Path, *, beside: bool = False) -> None:
    """Refuse to write into the directory that is read from.

    Args:
        source: The directory.
        save_dir: Where to write.
        beside: Whether its parent is refused as well.

    Raises:
        ConfigError: That was asked for.
    """
    source, place = source.resolve(), save_dir.resolve()
    if source in (place, *place.parents) or (beside and place == source.parent):
        raise ConfigError(
            "the target would lie in the source",
            where="--save-dir",
            expected="another directory than the source's",
            got=save_dir,
        )


def nbytes(text: str) -> int:
    """A size in bytes, such as ``512MiB``; units are powers of 1024.

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 512MiB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2]])


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
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
