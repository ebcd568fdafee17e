"""Outputs while they are written, and whether sources are still what was planned with.

What the operating system refuses becomes our own error, naming the file.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flagscale.errors import CheckpointError

__all__ = [
    "SourceStamp",
    "StagedFile",
    "disk_errors",
    "flush_directory",
    "replace_text",
    "require_room",
    "stamp_sources",
]

_WRITE_BYTES: Final = 256 << 10
"""Of one call. From 2 MiB on the kernel wants huge pages for its cache, and was measured to take
ten times as long to find them (Linux 6.18, ext4)."""
_WRITE_BACK: Final = 2  # SYNC_FILE_RANGE_WRITE
_LIBC: Final = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class SourceStamp:
    """What tells whether a source file is still the one that was planned with.

    Args:
        path: Relative to the checkpoint's iteration directory.
        size: Bytes.
        mtime_ns: Time of its last change, in nanoseconds.
    """

    path: str
    size: int
    mtime_ns: int


def stamp_sources(root: Path, paths: Sequence[str]) -> tuple[SourceStamp, ...]:
    """Look at source files without opening them.

    Raises:
        CheckpointError: One is missing.
    """
    stamps = []
    for path in paths:
        try:
            found = (root / path).stat()
        except OSError as error:
            raise CheckpointError(
                "a source file cannot be read",
                where=str(root / path),
                got=error.strerror,
                cure="give a complete checkpoint",
            ) from error
        stamps.append(SourceStamp(path, found.st_size, found.st_mtime_ns))
    return tuple(stamps)


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Name the output in what the operating system says of it.

    Raises:
        CheckpointError: No room, no permission, or no such place.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        raise CheckpointError(
            "the disk is full" if full else "cannot write the output",
            where=str(path),
            got=error.strerror,
            cure="make room" if full else "give a place that can be written",
        ) from error


class StagedFile:
    """An output file while it is written; several threads and tasks may write different parts.

    Args:
        path: Its directory exists.
        size: Bytes; a new file gets all of them at once, as zeros.

    Raises:
        CheckpointError: There is no room, or the place cannot be written.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        with disk_errors(path):
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                if os.fstat(self._handle).st_size != size:
                    os.ftruncate(self._handle, size)
                if size:
                    _allocate(self._handle, size)
            except BaseException:
                os.close(self._handle)
                raise

    def write(self, data: memoryview, offset: int) -> None:
        """Write all of a buffer."""
        with disk_errors(self.path):
            done = 0
            while done < len(data):
                part = data[done : done + _WRITE_BYTES]
                done += os.pwrite(self._handle, part, offset + done)

    def begin_write_back(self, offset: int, nbytes: int) -> None:
        """Ask that bytes go to the disk soon, so that less is left to wait for; a hint."""
        _LIBC.sync_file_range(
            self._handle, ctypes.c_int64(offset), ctypes.c_int64(nbytes), _WRITE_BACK
        )

    def read(self, into: memoryview, offset: int) -> None:
        """Fill a buffer with what was written.

        Raises:
            CheckpointError: The file is shorter than it was made.
        """
        with disk_errors(self.path):
            done = 0
            while done < len(into):
                more = os.preadv(self._handle, [into[done:]], offset + done)
                if not more:
                    raise CheckpointError("a staged file was cut short", where=str(self.path))
                done += more

    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        with disk_errors(self.path):
            os.fdatasync(self._handle)

    def close(self) -> None:
        """Close the file."""
        os.close(self._handle)


def _allocate(handle: int, size: int) -> None:
    """Reserve the space of a file now; where the file system cannot, go without.

    Not ``os.posix_fallocate``: where the file system cannot, that writes every block.
    """
    failed = _LIBC.fallocate(handle, 0, ctypes.c_int64(0), ctypes.c_int64(size))
    if failed and ctypes.get_errno() in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def require_room(directory: Path, nbytes: int) -> None:
    """Check that a file system has room.

    Args:
        directory: On the file system.
        nbytes: Bytes still to be written.

    Raises:
        CheckpointError: It has not.
    """
    with disk_errors(directory):
        found = os.statvfs(directory)
    free = found.f_bavail * found.f_frsize
    if free < nbytes:
        raise CheckpointError(
            "the disk is full",
            where=str(directory),
            expected=f"{nbytes:,} bytes free",
            got=f"{free:,} bytes free; nothing has been written",
            cure="make room, or give another place",
        )


def flush_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    with disk_errors(path):
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole: readers see the old content or the new, also after a power cut.

    Args:
        path: Its directory exists.
        text: All of it.

    Raises:
        CheckpointError: The disk refuses.
    """
    # Not by process: threads share a number, and so may processes of containers.
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with disk_errors(path):
        with draft.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(path)
        flush_directory(path.parent)
