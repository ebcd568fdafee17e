"""Writing files: what the disk refuses is our own error, and what is published is on the disk."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from flagscale.errors import DataError

__all__ = ["flush_to_disk", "writing_to"]


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Name the output in what the operating system says of it.

    Raises:
        DataError: No room, no permission, or no such place.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            "cannot write the output",
            where=str(path),
            got=f"{error.strerror}: {error.filename or path}",
            cure="make room, or give another place",
        ) from error


def flush_to_disk(path: Path) -> None:
    """Wait until a file has left the caches, so that a rename after it cannot get ahead of it."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
