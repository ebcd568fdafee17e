"""The staging directory of an output and the record of what in it is finished.

Beside the destination ``iter_0000010`` lies ``.iter_0000010.partial`` with

    plan.json        the fingerprint of the plan, and the source files as they were
    data/            what becomes the destination, by one rename
    journal/         one append-only file of records for each process; the claims

The record of a file is written when the file has reached the disk, and is believed. That of a unit
is written when the kernel has the unit: a killed process loses nothing of it, a power cut may. So
it is not believed, but carries checksums: whoever goes on reads the unit anyway, for the digest of
the file, and makes it again when they differ. A line torn by a crash fails its own checksum and is
passed over.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from flagscale.ckpt_io.claims import Task
from flagscale.ckpt_io.raw import SourceStamp, disk_errors, flush_directory
from flagscale.errors import CheckpointError, ConfigError

__all__ = ["RECEIPT", "FileRecord", "HolePart", "Journal", "Staging", "UnitRecord"]

RECEIPT: Final = "flagscale.json"
"""In a published directory: the fingerprint of the plan it was made by."""


@dataclass(frozen=True, slots=True)
class HolePart:
    """The CRC-32 of a part of a hole.

    Args:
        hole: Index in the file.
        start: Bytes from the start of the hole.
        nbytes: Of the part.
        crc: Its CRC-32.
    """

    hole: int
    start: int
    nbytes: int
    crc: int


@dataclass(frozen=True, slots=True)
class UnitRecord:
    """A unit has been written.

    Args:
        file: Index of the output file.
        unit: Index of the unit in it.
        parts: The parts of holes in it, by offset.
    """

    file: int
    unit: int
    parts: tuple[HolePart, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file is on the disk, checksums and all.

    Args:
        file: Index of the output file.
        sha256: Of the file, in hexadecimal.
        hole_crcs: CRC-32 of each hole.
    """

    file: int
    sha256: str
    hole_crcs: tuple[int, ...]


class Journal:
    """The records of all processes; appends to a file of its own.

    Args:
        directory: Holds the records of all; exists.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._own: int | None = None
        self._own_path = directory
        self._read: dict[Path, int] = {}
        self._lock = threading.Lock()
        self.units: dict[int, dict[int, UnitRecord]] = {}
        self.files: dict[int, FileRecord] = {}
        self.refresh()

    def refresh(self) -> None:
        """Read what the other processes have appended."""
        with self._lock, disk_errors(self._directory):
            for path in sorted(self._directory.glob("*.records")):
                if path == self._own_path:
                    continue
                with path.open("rb") as stream:
                    stream.seek(self._read.get(path, 0))
                    text = stream.read()
                whole = text[: text.rfind(b"\n") + 1]
                self._read[path] = self._read.get(path, 0) + len(whole)
                for record in _parsed(whole.splitlines()):
                    self._keep(record)

    def append(self, record: UnitRecord | FileRecord) -> None:
        """Record a unit that was written, or a file that has reached the disk.

        The record of a file has reached the disk, too, when this returns.
        """
        with self._lock, disk_errors(self._directory):
            if self._own is None:
                self._own, self._own_path = self._create()
            os.write(self._own, _line(record))
            if isinstance(record, FileRecord):
                os.fdatasync(self._own)
            self._keep(record)

    def forget(self, file: int) -> None:
        """Distrust what is recorded of a file, which is not there as recorded."""
        with self._lock:
            self.files.pop(file, None)
            self.units.pop(file, None)

    def close(self) -> None:
        """Close the file."""
        if self._own is not None:
            os.close(self._own)
            self._own = None

    def _create(self) -> tuple[int, Path]:
        number = 0
        while True:
            path = self._directory / f"{number}.records"
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
                handle = os.open(path, flags, 0o666)
            except FileExistsError:
                number += 1
                continue
            flush_directory(self._directory)
            return handle, path

    def _keep(self, record: UnitRecord | FileRecord) -> None:
        if isinstance(record, FileRecord):
            self.files[record.file] = record
        else:
            self.units.setdefault(record.file, {})[record.unit] = record


def _line(record: UnitRecord | FileRecord) -> bytes:
    fields: list[Any]
    if isinstance(record, FileRecord):
        fields = ["file", record.file, record.sha256, list(record.hole_crcs)]
    else:
        parts = [[part.hole, part.start, part.nbytes, part.crc] for part in record.parts]
        fields = ["unit", record.file, record.unit, parts]
    text = json.dumps(fields, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _parsed(lines: Iterable[bytes]) -> Iterator[UnitRecord | FileRecord]:
    for line in lines:
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            continue
        kind, file, detail, rest = json.loads(text)
        if kind == "file":
            yield FileRecord(file, detail, tuple(rest))
        else:
            yield UnitRecord(file, detail, tuple(HolePart(*part) for part in rest))


@dataclass(frozen=True)
class Staging:
    """Where an output is made before it is published.

    Args:
        destination: The directory to be.
        fingerprint: Of the plan.
    """

    destination: Path
    fingerprint: str
    root: Path = field(init=False)

    def __post_init__(self) -> None:
        name = f".{self.destination.name}.partial"
        object.__setattr__(self, "root", self.destination.parent / name)

    @property
    def data(self) -> Path:
        """What becomes the destination."""
        return self.root / "data"

    @property
    def journal(self) -> Path:
        """Records and claims."""
        return self.root / "journal"

    def is_published(self) -> bool:
        """Whether the destination is there, and made by this plan."""
        try:
            receipt = json.loads((self.destination / RECEIPT).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(receipt, dict) and receipt.get("plan") == self.fingerprint

    def require_free(self, task: Task) -> None:
        """Check, before any work, that the destination is not there yet.

        What this very plan has made may be there when a run stopped between the rename and its last
        steps, or when another task of the same job was faster.

        Raises:
            CheckpointError: It is there.
        """
        if not os.path.lexists(self.destination):
            return
        if self.is_published() and (task.count > 1 or self.root.exists()):
            return
        raise CheckpointError(
            "the destination exists already",
            where=str(self.destination),
            cure="give another place, or remove it",
        )

    def open(
        self, sources: Iterable[SourceStamp], *, task: Task | None = None, restart: bool = False
    ) -> None:
        """Make the staging directory, or go on with the one that is there.

        Args:
            sources: The source files as they are now.
            task: Which of several processes this is; default: the only one.
            restart: Throw away what an earlier run has left.

        Raises:
            CheckpointError: The destination exists, or what is staged is of another plan or of
                sources that have changed since.
            ConfigError: ``restart`` with several tasks.
        """
        task = task or Task()
        self.require_free(task)
        if restart and task.count > 1:
            raise ConfigError(
                "several tasks cannot agree on when to start afresh",
                where=str(self.root),
                cure="remove the staging directory first",
            )
        with disk_errors(self.root):
            if restart and self.root.exists():
                shutil.rmtree(self.root)
            if self.is_published():
                return
            self.destination.parent.mkdir(parents=True, exist_ok=True)
            for directory in (self.root, self.data, self.journal):
                directory.mkdir(exist_ok=True)
            self._agree({stamp.path: [stamp.size, stamp.mtime_ns] for stamp in sources})
        if self.is_published():  # by another task, between our first look and now
            self.remove()

    def _agree(self, sources: dict[str, list[int]]) -> None:
        ours = {"plan": self.fingerprint, "sources": sources}
        path = self.root / "plan.json"
        if not path.exists():
            draft = self.root / f"plan.{os.uname().nodename}.{os.getpid()}"
            with draft.open("w", encoding="utf-8") as stream:
                json.dump(ours, stream)
                stream.flush()
                os.fsync(stream.fileno())
            try:
                os.link(draft, path)  # unlike a rename, only one task can
            except FileExistsError:
                pass
            finally:
                draft.unlink()
            flush_directory(self.root)
        try:
            theirs = json.loads(path.read_text(encoding="utf-8"))
            found, staged = theirs["sources"], theirs["plan"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._unfit("cannot be read", str(path)) from error
        changed = sorted(name for name in sources if found.get(name) != sources[name])
        if changed:
            raise self._unfit("was made from other source files", f"{changed[0]} has changed")
        if staged != self.fingerprint:
            raise self._unfit("belongs to another plan", staged)

    def _unfit(self, what: str, got: str) -> CheckpointError:
        return CheckpointError(
            f"the staging directory {what}",
            where=str(self.root),
            expected=f"plan {self.fingerprint}",
            got=got,
            cure="start afresh with --restart, or remove the staging directory",
        )

    def make_parent(self, path: str) -> Path:
        """Make the directories of an output file below ``data``; ``data`` itself is there."""
        with disk_errors(self.data):
            place = self.data
            for name in Path(path).parent.parts:
                place = place / name
                place.mkdir(exist_ok=True)
        return self.data / path

    def remove(self) -> None:
        """Remove the staging directory."""
        shutil.rmtree(self.root, ignore_errors=True)
