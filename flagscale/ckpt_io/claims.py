"""Who does what, agreed on through the file system alone.

A claim is a file made with ``O_EXCL``; its owner shows that it lives by touching it. The claim of a
dead owner is taken over by making the file of the next generation, which again only one can. Should
an owner thought dead wake up, both do the same work, and what is claimed here may be done twice: it
puts the same bytes in the same places.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from flagscale.ckpt_io.raw import disk_errors

__all__ = ["Claims", "Task"]


@dataclass(frozen=True, slots=True)
class Task:
    """One of several processes that share a job without talking to each other.

    Args:
        rank: 0-based.
        count: How many there are.
    """

    rank: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> Task:
        """As Slurm's ``srun`` or ``torchrun`` says; alone where neither has started us."""
        for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
            with contextlib.suppress(KeyError, ValueError):
                return cls(int(os.environ[rank]), int(os.environ[count]))
        return cls()


class Claims:
    """The claims of one process in a directory.

    Args:
        directory: Holds the claims of all; exists.
        stale_after: Seconds without a sign of life after which an owner on another machine, or one
            that cannot be told, counts as dead.
    """

    def __init__(self, directory: Path, stale_after: float) -> None:
        self._directory = directory
        self._stale_after = stale_after
        self._held: dict[str, Path] = {}
        self._seen: dict[Path, tuple[int, float]] = {}  # mtime in ns, when first seen
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="claims", daemon=True)
        self._heart.start()

    def acquire(self, what: str) -> bool:
        """Try to get something for this process alone."""
        with self._lock:
            if what in self._held:
                return False
            generation = 0
            while (path := self._path(what, generation)).exists():
                generation += 1
            if generation and not self._is_dead(self._path(what, generation - 1)):
                return False
            with disk_errors(path):
                try:
                    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
                except FileExistsError:
                    return False
                with open(handle, "w", encoding="utf-8") as stream:
                    json.dump({"owner": _myself()}, stream)
            self._held[what] = path
            return True

    def release(self, what: str) -> None:
        """Let others have it."""
        with self._lock:
            path = self._held.pop(what, None)
        if path is not None:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others have everything."""
        self._ended.set()
        self._heart.join()
        for what in list(self._held):
            self.release(what)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _path(self, what: str, generation: int) -> Path:
        return self._directory / f"{what}.{generation}.claim"

    def _beat(self) -> None:
        while not self._ended.wait(self._stale_after / 5):
            with self._lock:
                for path in self._held.values():
                    with contextlib.suppress(OSError):  # taken over, or all is finished
                        os.utime(path)

    def _is_dead(self, path: Path) -> bool:
        """Whether an owner is gone; by the clock of this process alone, for clocks differ."""
        try:
            changed = path.stat().st_mtime_ns
            owner = json.loads(path.read_text(encoding="utf-8"))["owner"]
        except FileNotFoundError:
            return True
        except (OSError, ValueError, KeyError, TypeError):
            owner = None  # not written out yet, or never
        machine = _myself()[0]
        if machine and isinstance(owner, list) and len(owner) == 3 and owner[0] == machine:
            return owner != _identity(owner[1])
        now = time.monotonic()
        seen, since = self._seen.get(path, (changed, now))
        if seen != changed:
            since = now
        self._seen[path] = (changed, since)
        return now - since > self._stale_after


def _myself() -> list[object]:
    return _identity(os.getpid())


def _identity(pid: object) -> list[object]:
    """Names a process: the machine since it started, the process, when that started."""
    machine = ""
    with contextlib.suppress(OSError):
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        machine += os.readlink("/proc/self/ns/pid")
    started = None
    with contextlib.suppress(OSError, IndexError):
        # The name of the program is in parentheses and may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] not in "ZX":  # dead, but not yet buried
            started = fields[19]
    return [machine, pid, started]
