"""Upstream's integrity manifest: the SHA-256 of every file of a checkpoint, in ``integrity.json``.

Upstream lists the files of the directory itself; we list those of its directories too (a checkpoint
of format ``torch`` has nothing else), by relative path, and upstream verifies them as well.

Source: megatron-core 0.19.2, ``core/dist_checkpointing/validation.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from flagscale.ckpt_io.sources import Sources
from flagscale.errors import CheckpointError

__all__ = ["MANIFEST", "digest_file", "read_manifest", "verify_manifest", "write_manifest"]

MANIFEST: Final = "integrity.json"
_ALGORITHM: Final = "sha256"
_BLOCK: Final = 4 << 20  # bytes in memory at once


def digest_file(sources: Sources, file: str) -> str:
    """SHA-256 of a file in hexadecimal digits, in bounded memory.

    Raises:
        CheckpointError: It cannot be read.
    """
    digest = hashlib.sha256()
    size = sources.size(file)
    for offset in range(0, size, _BLOCK):
        digest.update(sources.read(file, offset, min(_BLOCK, size - offset)))
    return digest.hexdigest()


def write_manifest(directory: Path, digests: Mapping[str, str] | None = None) -> Path:
    """Write the manifest of all files that are in the directory of an iteration.

    Args:
        directory: Of the iteration.
        digests: By relative path, of files hashed already; the others are read.

    Returns:
        The path of the manifest.

    Raises:
        CheckpointError: A file cannot be read, a digest is of a file that is not there, or the
            manifest cannot be written.
    """
    known = dict(digests or {})
    with Sources(directory) as sources:
        files = {
            file: known.pop(file, "") or digest_file(sources, file)
            for file in _files(directory)
            if file != MANIFEST
        }
    if known:
        raise CheckpointError("a file that was written is gone", where=str(directory / min(known)))
    path = directory / MANIFEST
    partial = path.with_name(f".{MANIFEST}.partial-{os.getpid()}")
    try:
        with partial.open("w") as stream:
            json.dump({"algorithm": _ALGORITHM, "files": files}, stream, indent=2)
            stream.flush()
            os.fsync(stream.fileno())
        partial.rename(path)
    except OSError as error:
        raise CheckpointError(
            "the manifest cannot be written", where=str(path), got=error.strerror
        ) from error
    return path


def read_manifest(directory: Path) -> dict[str, str]:
    """The digests that a manifest gives, by relative path.

    Raises:
        CheckpointError: There is no manifest, or it is damaged.
    """
    with Sources(directory) as sources:
        raw = sources.read(MANIFEST, 0, sources.size(MANIFEST))
    try:
        content = json.loads(raw)
        algorithm, files = content.get("algorithm", _ALGORITHM), content["files"]
        if not all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in files.values()):
            raise ValueError("a digest that is none")
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the manifest of a checkpoint is damaged",
            where=str(directory / MANIFEST),
            got=f"{type(error).__name__}: {error}"[:300],
        ) from None
    if algorithm != _ALGORITHM:
        raise CheckpointError(
            "the manifest of a checkpoint uses another algorithm",
            where=str(directory / MANIFEST),
            expected=_ALGORITHM,
            got=f"{algorithm!a}"[:200],
        )
    return dict(files)


def verify_manifest(directory: Path) -> tuple[str, ...]:
    """Compare every file with the manifest, in bounded memory.

    Returns:
        What is wrong, a sentence for each file; empty if nothing is. Files that the manifest does
        not list are not looked at.

    Raises:
        CheckpointError: There is no manifest, or it is damaged.
    """
    problems: list[str] = []
    with Sources(directory) as sources:
        for file, expected in read_manifest(directory).items():
            try:
                got = digest_file(sources, file)
            except CheckpointError as error:
                problems.append(f"{file}: {error.what}")
                continue
            if got != expected:
                problems.append(f"{file}: its SHA-256 is {got[:16]}..., not {expected[:16]}...")
    return tuple(problems)


def _files(directory: Path) -> Iterator[str]:
    """Relative paths of all regular files, in the order of their names."""
    try:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                yield path.relative_to(directory).as_posix()
    except OSError as error:
        raise CheckpointError(
            "the directory of a checkpoint cannot be read",
            where=str(directory),
            got=error.strerror,
        ) from error
