"""``lock.json``: one job works in a run directory, and a second is refused.

The lock is never given back. It is released by evidence that its holder is gone: the queue does not
know the job any more, the process has ended. A holder that was killed can give nothing back, and
one that is cut off from the file system must not be taken for gone.
"""

from __future__ import annotations

import enum
import hashlib
import json
import os
import secrets
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

from flagscale.ckpt_io.raw import disk_errors, flush_directory
from flagscale.errors import ConfigError

__all__ = [
    "LOCK",
    "Holder",
    "LocalHolder",
    "Ruling",
    "SlurmHolder",
    "acquire",
    "decide",
    "local_alive",
    "read_holder",
    "this_process",
]

LOCK: Final = "lock.json"
_START_TIME_FIELD: Final = 18  # of /proc/PID/stat, behind name and state, from 0


@dataclass(frozen=True)
class SlurmHolder:
    """A job of the queue, over all its restarts.

    Args:
        job_id: Its number.
        cluster: The name of the cluster that gave it.
        submitted: Seconds since the epoch.
    """

    job_id: str
    cluster: str
    submitted: float
    kind: Literal["slurm"] = "slurm"

    def __str__(self) -> str:
        return f"Slurm job {self.job_id} of cluster {self.cluster}"


@dataclass(frozen=True)
class LocalHolder:
    """A process.

    Args:
        host: Its machine.
        pid: Its number.
        start_time: When it was started, in the kernel's ticks since the machine was: numbers come
            round again.
        boot_id: Of the machine's last start.
    """

    host: str
    pid: int
    start_time: int
    boot_id: str
    kind: Literal["local"] = "local"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


type Holder = SlurmHolder | LocalHolder


class Ruling(enum.Enum):
    """Whether a job may work in the run directory."""

    FREE = "nobody works here"
    OURS = "this job works here already"
    GONE = "the job that worked here is gone"
    HELD = "another job works here"
    UNKNOWN = "whether the job that worked here is gone cannot be found out"

    @property
    def allows(self) -> bool:
        """Whether it may."""
        return self in (Ruling.FREE, Ruling.OURS, Ruling.GONE)


def decide(holder: Holder | None, ours: Holder, alive: Callable[[Holder], bool | None]) -> Ruling:
    """Rule on a lock.

    Args:
        holder: Who has it; ``None`` if nobody.
        ours: Who asks.
        alive: Whether a holder still works; ``None`` if there is no telling.
    """
    if holder is None:
        return Ruling.FREE
    if _is_same(holder, ours):
        return Ruling.OURS
    answer = alive(holder)
    if answer is None:
        return Ruling.UNKNOWN
    return Ruling.HELD if answer else Ruling.GONE


def _is_same(holder: Holder, ours: Holder) -> bool:
    if isinstance(holder, SlurmHolder) and isinstance(ours, SlurmHolder):
        # Not the time: each start of the job may know another.
        return (holder.job_id, holder.cluster) == (ours.job_id, ours.cluster)
    return holder == ours


def acquire(
    run_dir: Path,
    ours: Holder,
    alive: Callable[[Holder], bool | None],
    *,
    force: bool = False,
) -> Ruling:
    """Take the lock.

    Args:
        run_dir: The run directory; exists.
        ours: Who asks.
        alive: As for :func:`decide`.
        force: Take it also where there is no telling whether its holder is gone.

    Raises:
        ConfigError: Another job has it, or may have it.
        CheckpointError: The disk refuses.
    """
    path = run_dir / LOCK
    while True:
        seen = _content(path)
        ruling = decide(_holder(seen), ours, alive)
        if seen is not None and ruling is Ruling.FREE:
            ruling = Ruling.UNKNOWN  # there is a lock, but it cannot be read
        if ruling is Ruling.OURS:
            return ruling
        if not (ruling.allows or (force and ruling is Ruling.UNKNOWN)):
            raise ConfigError(
                ruling.value,
                where=str(path),
                expected="a run directory for this job alone",
                got=str(_holder(seen) or "a lock that cannot be read"),
                cure="wait for its end, or cancel it; use another run directory"
                if ruling is Ruling.HELD
                else f"if it is certain that it is gone, delete {path}",
            )
        with disk_errors(path):
            if _create(path, ours) if seen is None else _succeed(path, seen, ours):
                return ruling
        # Somebody was quicker: look again.


def _create(path: Path, ours: Holder) -> bool:
    draft = _draft(path, ours)
    try:
        os.link(draft, path)  # unlike a rename, only one of several can
    except FileExistsError:
        return False
    finally:
        draft.unlink()
    flush_directory(path.parent)
    return True


def _succeed(path: Path, seen: bytes, ours: Holder) -> bool:
    """Take over from a holder that was ruled on.

    The lock itself is never away, not for a moment: who finds none takes it. One of several creates
    the successor's file, which counts from then on, and brings it to the lock's place.
    """
    successor = _successor(path, seen)
    if not _create(successor, ours):
        return False
    won = _content(path) == _bytes(ours)  # else another has succeeded, and tidied up, before
    if won:
        _draft(path, ours).replace(path)
        flush_directory(path.parent)
    successor.unlink()
    return won


def _successor(path: Path, content: bytes) -> Path:
    return path.with_name(f".{path.name}.after-{hashlib.sha256(content).hexdigest()[:16]}")


def _draft(path: Path, ours: Holder) -> Path:
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with draft.open("wb") as stream:
        stream.write(_bytes(ours))
        stream.flush()
        os.fsync(stream.fileno())
    return draft


def _bytes(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode() + b"\n"


def _content(path: Path) -> bytes | None:
    """Of the lock, or of the last successor that was created; ``None`` if there is no lock."""
    with disk_errors(path):
        content = None
        try:
            while True:
                content = (path if content is None else _successor(path, content)).read_bytes()
        except FileNotFoundError:
            return content


def read_holder(run_dir: Path) -> Holder | None:
    """Who has the lock of a run directory, or had it last; ``None`` if nobody ever had."""
    return _holder(_content(run_dir / LOCK))


def _holder(content: bytes | None) -> Holder | None:
    try:
        return None if content is None else _from_facts(json.loads(content))
    except (RecursionError, ValueError):
        return None


def _from_facts(facts: Any) -> Holder | None:
    try:
        if facts["kind"] == "slurm":
            return SlurmHolder(**facts)
        if facts["kind"] == "local":
            return LocalHolder(**facts)
    except (KeyError, TypeError):
        pass
    return None


def this_process() -> LocalHolder:
    """The process that asks, as a holder."""
    pid = os.getpid()
    return LocalHolder(socket.gethostname(), pid, _start_time(pid) or 0, _boot_id())


def local_alive(holder: LocalHolder) -> bool | None:
    """Whether a process still runs; ``None`` for one of another machine."""
    if holder.host != socket.gethostname():
        return None
    if holder.boot_id != _boot_id():
        return False
    return _start_time(holder.pid) == holder.start_time


def _start_time(pid: int) -> int | None:
    """When a process was started; ``None`` if there is none, or it is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()  # the name before it may hold anything
    return None if state in "ZX" else int(fields[_START_TIME_FIELD])


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
