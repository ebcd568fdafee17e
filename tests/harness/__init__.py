"""Runs the real training entry in real process groups, cheaply enough to do it in every test.

The ranks are forked from a server that has torch and megatron imported and the CPU platform in
place, so a group of four costs a second instead of half a minute.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from harness import worker

__all__ = ["Rank", "RunResult", "Step", "free_port", "train"]

_SERVER = multiprocessing.get_context("forkserver")
_TESTS = Path(__file__).parents[1]

_GRACE_SECONDS = 5.0
"""How long the other ranks may live on after one has ended in failure."""


@dataclass(frozen=True)
class Step:
    """What a rank saw of one step; ``losses`` is empty before the last pipeline stage."""

    iteration: int
    losses: Mapping[str, float]
    grad_norm: float
    skipped: bool


@dataclass(frozen=True)
class Rank:
    """How one rank ended."""

    exit_code: int
    log: str
    steps: tuple[Step, ...]
    error: Mapping[str, object] | None


@dataclass(frozen=True)
class RunResult:
    """How a job ended."""

    ranks: tuple[Rank, ...]

    @property
    def exit_codes(self) -> list[int]:
        """Exit code of each rank; minus the signal for one that was killed."""
        return [rank.exit_code for rank in self.ranks]

    @property
    def losses(self) -> dict[int, float]:
        """Loss of each iteration, in full precision, from a rank of the last stage."""
        steps = [rank.steps for rank in self.ranks if any(step.losses for step in rank.steps)]
        return {step.iteration: step.losses["lm loss"] for step in (steps[-1] if steps else ())}

    def require_success(self) -> RunResult:
        """Return self; fail with the end of the logs if any rank did not end with 0."""
        if any(self.exit_codes):
            tails = "\n".join(
                f"--- rank {i} (exit code {r.exit_code})\n{r.log[-3000:]}"
                for i, r in enumerate(self.ranks)
            )
            raise AssertionError(f"exit codes {self.exit_codes}\n{tails}")
        return self


def _start_server() -> None:
    """Start the fork server, once a test run.

    It finds its preloads by PYTHONPATH alone: Python 3.12 does not hand it ``sys.path``.
    """
    _SERVER.set_forkserver_preload(["harness.preload"])
    before = os.environ.get("PYTHONPATH")
    paths = [str(_TESTS), str(_TESTS.parent), *filter(None, [before])]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1")
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before


def free_port() -> int:
    """A TCP port on the loopback interface that was free a moment ago.

    Below those that the kernel gives away, and of a range that other workers of a test run leave
    alone: a port is asked for seconds before it is used.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20000 + 3000 * (worker % 4)
    for port in random.sample(range(first, first + 3000), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise RuntimeError(f"no port is free from {first} on")


def train(
    argv: Sequence[object],
    work_dir: Path,
    nproc: int = 1,
    *,
    environ: Mapping[str, str] | None = None,
    kill: tuple[int, int, signal.Signals] | None = None,
    timeout_s: float = 120.0,
) -> RunResult:
    """Run ``python -m flagscale.train argv`` on ``nproc`` ranks of this machine.

    Args:
        argv: Megatron's arguments.
        work_dir: Where logs go; made if missing. Give each run one of its own.
        nproc: World size.
        environ: Set in every rank, after the harness's own.
        kill: ``(rank, iteration, signal)``: send that rank a signal when it ends that iteration.
        timeout_s: Everything is ended and the test fails after this.
    """
    _start_server()
    work_dir.mkdir(parents=True, exist_ok=True)
    shared = {
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "FLAGSCALE_PLATFORM": "cpu",
        **(environ or {}),
    }
    processes = [
        _SERVER.Process(
            target=worker.run_rank,
            args=(
                [str(word) for word in argv],
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                str(work_dir),
                kill[1:] if kill and kill[0] == rank else None,
            ),
        )
        for rank in range(nproc)
    ]
    for process in processes:
        process.start()
    _wait(processes, timeout_s)
    return RunResult(tuple(_read_rank(p.exitcode, work_dir, i) for i, p in enumerate(processes)))


def _wait(processes: Sequence[multiprocessing.process.BaseProcess], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        if any(process.exitcode for process in processes):  # as any launcher does
            deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
        if time.monotonic() > deadline:
            _kill_groups(processes)
        time.sleep(0.02)
    _kill_groups(processes)  # whatever a rank has started


def _kill_groups(processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
    for process in processes:
        if process.pid:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_rank(exit_code: int | None, work_dir: Path, rank: int) -> Rank:
    steps = work_dir / f"rank_{rank}.steps.jsonl"
    error = work_dir / f"rank_{rank}.error"
    lines = steps.read_text().splitlines() if steps.exists() else []
    return Rank(
        exit_code=-1 if exit_code is None else exit_code,
        log=(work_dir / f"rank_{rank}.log").read_text(),
        steps=tuple(Step(**json.loads(line)) for line in lines),
        error=json.loads(error.read_text()) if error.exists() else None,
    )
