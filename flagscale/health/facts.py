"""What is looked at on a machine. Only the standard library is needed, and no device is touched."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

__all__ = ["Device", "Facts", "TimeServer", "clock_skew", "collect", "write_speed"]

_WRITTEN: Final = 16 << 20
"""Bytes that are written to measure a speed."""
_QUERY: Final = ("index", "name", "memory.total", "memory.used", "utilization.gpu")


@dataclass(frozen=True)
class Device:
    """A device as its driver describes it.

    Args:
        index: Its number on the machine.
        name: Its model.
        memory: Bytes.
        memory_used: Bytes.
        busy: How much of the time it works, 0 to 1.
    """

    index: int
    name: str
    memory: int
    memory_used: int
    busy: float


@dataclass(frozen=True)
class Facts:
    """What was found on a machine.

    Args:
        host: Its name in the job.
        devices: ``None`` where the platform has none, or they cannot be asked about.
        device_error: Why they cannot.
        cores: That this process may use.
        load: Processes that run or wait to, over the last minute.
        memory: Bytes.
        memory_free: Bytes that can be had.
        clock_skew: Seconds by which the clock is ahead of the first machine's; ``None``: unknown.
        disk_free: Bytes on the checkpoints' file system; ``None`` if it cannot be asked.
        write_speed: Bytes a second, flushed to the disk; ``None`` if it cannot be written.
        write_error: Why it cannot.
        sees_probe: Whether the file that the first machine wrote beside the checkpoints is there.
        unresolved: Machines of the job whose names have no address here.
    """

    host: str
    devices: tuple[Device, ...] | None
    device_error: str
    cores: int
    load: float
    memory: int
    memory_free: int
    clock_skew: float | None
    disk_free: int | None
    write_speed: float | None
    write_error: str
    sees_probe: bool
    unresolved: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The facts as JSON can hold them."""
        return asdict(self)

    @classmethod
    def read(cls, record: dict[str, Any]) -> Self:
        """The facts from what :meth:`record` made.

        Raises:
            KeyError, TypeError: It is something else.
        """
        devices = record["devices"]
        if devices is not None:
            devices = tuple(Device(**device) for device in devices)
        return cls(**record | {"devices": devices, "unresolved": tuple(record["unresolved"])})


def collect(
    host: str,
    *,
    platform: str,
    directory: Path,
    probe: Path,
    token: str,
    hosts: Sequence[str],
    clock: tuple[str, int] | None,
) -> Facts:
    """Look at this machine.

    Args:
        host: Its name in the job.
        platform: ``cuda`` has devices to ask about.
        directory: Where checkpoints go; it exists.
        probe: A file that the first machine wrote there.
        token: Its content.
        hosts: All machines of the job.
        clock: Address and port of the first machine's :class:`TimeServer`.
    """
    memory = _memory()
    devices, device_error = _devices() if platform == "cuda" else (None, "")
    speed, write_error = write_speed(directory)
    return Facts(
        host=host,
        devices=devices,
        device_error=device_error,
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        memory=memory.get("MemTotal", 0),
        memory_free=memory.get("MemAvailable", 0),
        clock_skew=None if clock is None else clock_skew(*clock),
        disk_free=_disk_free(directory),
        write_speed=speed,
        write_error=write_error,
        sees_probe=_content(probe) == token,
        unresolved=tuple(name for name in hosts if not _resolves(name)),
    )


def write_speed(directory: Path, size: int = _WRITTEN) -> tuple[float | None, str]:
    """Bytes a second at which a new file reaches the disk, or why none can be written."""
    path = directory / f".health-{secrets.token_hex(8)}"
    block = os.urandom(1 << 20)  # file systems may compress
    started = time.monotonic()
    try:
        with path.open("wb") as stream:
            for _ in range(size // len(block)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        return None, str(error)
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
    return size / max(time.monotonic() - started, 1e-9), ""


class TimeServer:
    """Answers each connection with this machine's time, while it is open."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("", 0), backlog=512)
        self.port: int = self._socket.getsockname()[1]

    def serve(self) -> None:
        """Answer until :meth:`close`; for a thread of its own."""
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(2)
                    while connection.recv(1):
                        connection.sendall(f"{time.time():.6f}\n".encode())

    def close(self) -> None:
        """End."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


def clock_skew(address: str, port: int, rounds: int = 5) -> float | None:
    """Seconds by which this clock is ahead of a :class:`TimeServer`'s; ``None`` if none answers.

    Half of a round trip is the error, whatever it took to start this process.
    """
    skews = []
    try:
        with socket.create_connection((address, port), timeout=5) as connection:
            stream = connection.makefile("rb")
            for _ in range(rounds):
                sent = time.time()
                connection.sendall(b"?")
                theirs = float(stream.readline())
                skews.append((sent + time.time()) / 2 - theirs)
    except (OSError, ValueError):
        return None
    return statistics.median(skews)


def _memory() -> dict[str, int]:
    """Bytes by the names of ``/proc/meminfo``."""
    sizes = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, rest = line.partition(":")
            sizes[name] = int(rest.split()[0]) * 1024
    return sizes


def _devices() -> tuple[tuple[Device, ...] | None, str]:
    command = ("nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits")
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return tuple(_device(line) for line in done.stdout.splitlines() if line.strip()), ""
    except subprocess.CalledProcessError as error:
        lines = (error.stdout + error.stderr).strip().splitlines()
        return None, lines[-1] if lines else str(error)
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        return None, str(error)


def _device(line: str) -> Device:
    index, name, memory, used, busy = (word.strip() for word in line.split(","))
    # Some drivers do not tell how busy a device is: "[N/A]".
    share = float(busy) / 100 if busy.replace(".", "").isdecimal() else 0.0
    return Device(int(index), name, int(memory) << 20, int(used) << 20, share)


def _disk_free(directory: Path) -> int | None:
    try:
        return shutil.disk_usage(directory).free
    except OSError:
        return None


def _content(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, ValueError):
        return None


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True
