"""Processes that are timed, with the most memory they held; for the benchmarks."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Measured", "copy", "run"]


@dataclass(frozen=True)
class Measured:
    """How long a variant took, and the most memory it held."""

    seconds: float
    peak_bytes: int
    read_bytes: int | None = None
    own_seconds: float | None = None
    """Without the start of the process, by its own clock, where it tells."""


def run(argv: Sequence[str | Path]) -> tuple[Measured, str]:
    """Run a process to its end."""
    begun = time.perf_counter()
    child = subprocess.Popen(
        [str(word) for word in argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    peak_bytes = 0
    while child.poll() is None:  # not getrusage: that counts what a child has of its parent
        with contextlib.suppress(OSError, TypeError, ValueError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{child.pid}/status").read_text())
            peak_bytes = max(peak_bytes, int(found[1]) * 1024 if found else 0)
        time.sleep(0.01)
    seconds = time.perf_counter() - begun
    text = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"{argv}\nended with {child.returncode}\n{text[-3000:]}")
    return Measured(seconds, peak_bytes), text


def copy(source: Path, destination: Path) -> Measured:
    """``cp`` and a flush of every file."""
    script = 'cp -r "$0" "$1" && find "$1" -type f -exec sync {} +'
    return run(["bash", "-c", script, source, destination])[0]
