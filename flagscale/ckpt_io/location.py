"""Which checkpoint of a directory is meant, and of which format it is.

Source: megatron-core 0.19.2, ``training/checkpointing.py`` 195-241, 353-395, 1612-1630.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final, Literal

from flagscale.ckpt_io.sources import Sources
from flagscale.errors import CheckpointError

__all__ = ["TRACKER", "Format", "detect_format", "find_iteration"]

TRACKER: Final = "latest_checkpointed_iteration.txt"
"""The file that names the last complete checkpoint of a directory."""

Format = Literal["torch", "torch_dist", "fsdp_dtensor"]
"""Upstream's name of a format. On the disk ``torch_dcp`` looks like ``fsdp_dtensor``."""


def find_iteration(load_dir: Path, iteration: int | None = None) -> tuple[int, Path]:
    """The iteration of a checkpoint, and its directory.

    Args:
        load_dir: As ``--load`` takes it; the directory of one iteration will do as well.
        iteration: The one wanted, counted from 1; by default, the last complete one.

    Returns:
        The iteration and its directory; 0 for a release, as upstream has it, and where neither
        the name of the directory nor a file beside it tells.

    Raises:
        CheckpointError: There is no such checkpoint.
    """
    if iteration is None and (found := _iteration_of(load_dir)) is not None:
        return found, load_dir
    if iteration is None:
        iteration, directory = _tracked(load_dir)
    else:
        directory = load_dir / f"iter_{iteration:07d}"
    if not directory.is_dir():
        raise CheckpointError(
            "there is no checkpoint of this iteration",
            where=str(directory),
            got=f"in {load_dir}: {_content(load_dir)}",
            cure="give an iteration that is there",
        )
    return iteration, directory


def _iteration_of(directory: Path) -> int | None:
    if (directory / TRACKER).exists() or not directory.is_dir():
        return None
    if match := re.fullmatch(r"iter_(\d{7,18})", directory.name):
        return int(match[1])
    is_checkpoint = (directory / "metadata.json").exists() or any(directory.glob("mp_rank_*"))
    return 0 if directory.name == "release" or is_checkpoint else None


def _tracked(load_dir: Path) -> tuple[int, Path]:
    if not (load_dir / TRACKER).exists():
        raise CheckpointError(
            "this directory does not say which checkpoint is complete",
            where=str(load_dir),
            expected=f"the file {TRACKER}",
            got=_content(load_dir),
            cure="give the directory that was saved into, or name the iteration",
        )
    with Sources(load_dir) as sources:
        text = sources.read(TRACKER, 0, min(sources.size(TRACKER), 100)).strip()
    if text == b"release":
        return 0, load_dir / "release"
    if not re.fullmatch(rb"\d{1,18}", text):
        raise CheckpointError(
            "the number of the last iteration cannot be read",
            where=str(load_dir / TRACKER),
            expected="a number, or release",
            got=ascii(text.decode("latin1")),
        )
    return int(text), load_dir / f"iter_{int(text):07d}"


def detect_format(directory: Path) -> Format:
    """The format of the checkpoint of one iteration.

    Raises:
        CheckpointError: It is of none that is known.
    """
    if (directory / "metadata.json").exists():
        _verify_backend(directory)
        return "torch_dist"
    if directory.is_dir() and any(directory.glob("mp_rank_*")):
        return "torch"
    if (directory / ".metadata").exists():
        return "fsdp_dtensor"
    raise CheckpointError(
        "this is not a checkpoint of a known format",
        where=str(directory),
        expected="metadata.json (torch_dist), mp_rank_* (torch) or .metadata (fsdp_dtensor)",
        got=_content(directory),
        cure="give the directory of one iteration, such as iter_0001000",
    )


def _verify_backend(directory: Path) -> None:
    with Sources(directory) as sources:
        raw = sources.read("metadata.json", 0, min(sources.size("metadata.json"), 1 << 20))
    try:
        backend = json.loads(raw)["sharded_backend"]
    except (KeyError, RecursionError, TypeError, ValueError):
        backend = "nothing that can be read"
    if backend != "torch_dist":
        raise CheckpointError(
            "this checkpoint is of another format",
            where=str(directory / "metadata.json"),
            expected="sharded_backend torch_dist",
            got=f"{backend!a}"[:200],
            cure="load it with the release of Megatron that wrote it, and save it again",
        )


def _content(directory: Path) -> str:
    try:
        names = sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        return error.strerror or "it cannot be read"
    shown = ", ".join(name.encode("ascii", "backslashreplace").decode() for name in names[:8])
    return f"{shown}{', ...' if len(names) > 8 else ''}" or "an empty directory"
