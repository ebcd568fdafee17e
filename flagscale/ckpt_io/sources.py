"""Files of a checkpoint, opened for reading only, and read at given places."""

from __future__ import annotations

import os
import stat
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Final, Self

from flagscale.errors import CheckpointError

__all__ = ["MAX_READ", "Sources"]

MAX_READ: Final = 1 << 30
"""Bytes read at once, at most. Only pickles and tables are, which are far smaller."""

_MAX_OPEN: Final = 64


class Sources:
    """The files of one directory, for one thread; a context manager, which closes what it opened.

    Args:
        directory: The iteration's directory; every file is named relative to it.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._open: OrderedDict[str, int] = OrderedDict()
        self._sizes: dict[str, int] = {}
        self.bytes_read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def size(self, file: str) -> int:
        """Bytes of a file.

        Raises:
            CheckpointError: There is no such file, or it cannot be read.
        """
        if file not in self._sizes:
            self._descriptor(file)
        return self._sizes[file]

    def read(self, file: str, offset: int, nbytes: int) -> bytes:
        """The bytes at a place of a file, all of them.

        Raises:
            CheckpointError: The file is missing, unreadable, or ends before.
        """
        size = self.size(file)
        if offset < 0 or nbytes < 0 or offset + nbytes > size:
            raise CheckpointError(
                "a file of the checkpoint is too short",
                where=str(self.directory / file),
                expected=f"bytes {offset} to {offset + nbytes}",
                got=f"{size} bytes",
                cure="it was truncated: take another copy",
            )
        if nbytes > MAX_READ:
            raise CheckpointError(
                "a table or pickle is too large to be one",
                where=str(self.directory / file),
                expected=f"at most {MAX_READ} bytes",
                got=f"{nbytes} bytes at {offset}",
            )
        content = bytearray(nbytes)
        self.read_into(file, offset, memoryview(content))
        return bytes(content)

    def read_into(self, file: str, offset: int, into: memoryview) -> None:
        """Fill a buffer from a place in a file.

        Raises:
            CheckpointError: The file is missing, unreadable, or ends before.
        """
        descriptor = self._descriptor(file)
        done = 0
        while done < len(into):
            try:
                more = os.preadv(descriptor, [into[done:]], offset + done)
            except OSError as error:
                raise _unreadable(self.directory / file, error) from error
            if not more:
                raise CheckpointError(
                    "a file of the checkpoint is too short",
                    where=str(self.directory / file),
                    expected=f"bytes {offset} to {offset + len(into)}",
                    got=f"{offset + done} bytes",
                    cure="it was truncated, or changed while it was read: take another copy",
                )
            done += more
        self.bytes_read += done

    def _descriptor(self, file: str) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        if len(self._open) >= _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        path = self.directory / _inside(file, self.directory)
        try:
            # Non-blocking: a pipe put in a file's place must not hold us up.
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise _unreadable(path, error) from error
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise CheckpointError("this is not a file", where=str(path))
        self._open[file] = descriptor
        self._sizes[file] = status.st_size
        return descriptor


def _inside(file: str, directory: Path) -> PurePosixPath:
    """The relative path, if it stays in the directory."""
    path = PurePosixPath(file)
    if not file or "\0" in file or path.is_absolute() or ".." in path.parts or len(file) > 1024:
        raise CheckpointError(
            "a checkpoint names a file outside itself",
            where=str(directory),
            expected="the name of a file in this directory",
            got=ascii(file[:200]),
        )
    return path


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return CheckpointError(
            "a file of the checkpoint is missing",
            where=str(path),
            cure="take another copy of the checkpoint",
        )
    return CheckpointError(
        "a file of the checkpoint cannot be read", where=str(path), got=error.strerror
    )
