"""The paths that arguments name: what must exist, what must be writable, and whether it is so."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flagscale.layout.parallel import Problem

__all__ = [
    "ArgumentPath",
    "input_paths",
    "local_file_system",
    "output_paths",
    "verify_inputs",
    "verify_outputs",
]

_OF_ONE_MACHINE: Final = frozenset({"tmpfs", "ramfs", "devtmpfs", "overlay", "squashfs"})
"""File systems that no other machine sees. A disk's may be exported by this very machine."""


@dataclass(frozen=True)
class ArgumentPath:
    """A path, and the argument that names it."""

    path: Path
    where: str


def input_paths(values: Mapping[str, Any]) -> Iterator[ArgumentPath]:
    """What must exist before a job with these values, by attribute, starts."""
    for dest in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        for word in values[dest] or ():
            if not _is_number(word):  # the weight of the corpus after it
                yield ArgumentPath(Path(f"{word}.bin"), _option(dest))
                yield ArgumentPath(Path(f"{word}.idx"), _option(dest))
    for dest in ("data_args_path", "per_split_data_args_path", "vocab_file", "merge_file"):
        if values[dest]:
            yield ArgumentPath(Path(values[dest]), _option(dest))
    tokenizer = values["tokenizer_model"]
    # 'name' and 'owner/name' may be names in a hub's cache, which only the tokenizer library knows.
    if tokenizer and (tokenizer.startswith((".", "/")) or tokenizer.count("/") > 1):
        yield ArgumentPath(Path(tokenizer), "--tokenizer-model")
    if values.get("quarantine"):
        yield ArgumentPath(Path(values["quarantine"]), "--quarantine")
    for dest in ("load", "pretrained_checkpoint"):
        # A run that loads from where it saves finds nothing the first time.
        if values[dest] and values[dest] != values["save"]:
            yield ArgumentPath(Path(values[dest]), _option(dest))


def output_paths(values: Mapping[str, Any]) -> Iterator[ArgumentPath]:
    """The directories that a job with these values writes to."""
    for dest in ("save", "tensorboard_dir", "data_cache_path", "ledger_dir"):
        if values.get(dest):
            yield ArgumentPath(Path(values[dest]), _option(dest))


def verify_inputs(paths: Iterable[ArgumentPath]) -> list[Problem]:
    """A problem for each path that does not exist."""
    return [
        Problem(
            "a path does not exist",
            needed.where,
            f"{needed.path}",
            "nothing there",
            "correct the path, or prepare the data first",
        )
        for needed in paths
        if not needed.path.exists()
    ]


def verify_outputs(paths: Iterable[ArgumentPath]) -> list[Problem]:
    """A problem for each directory that is neither there and writable, nor can be made."""
    problems = []
    for output in paths:
        existing = output.path.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            problems.append(
                Problem(
                    "a directory cannot be written",
                    output.where,
                    f"{output.path} can be made and written",
                    f"{existing} is not a writable directory",
                    "choose another directory, or change its permissions",
                )
            )
    return problems


def local_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> str | None:
    """The file system below a path if only this machine can have it; ``None`` otherwise."""
    try:
        lines = mounts.read_text().splitlines()
    except OSError:
        return None
    kind, longest = "", 0
    for line in lines:
        _, place, found, *_ = line.split(" ")
        root = Path(place.replace("\\040", " "))
        if path.absolute().is_relative_to(root) and len(place) >= longest:
            kind, longest = found, len(place)
    if kind in _OF_ONE_MACHINE:
        return kind
    first = path.absolute().parts[1:2]
    return "/tmp" if first == ("tmp",) else None


def _option(dest: str) -> str:
    return f"--{dest.replace('_', '-')}"


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
