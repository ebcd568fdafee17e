"""Run a planned job on this machine: start, watch, show, forward signals, end, and say why.

Every process leads a session of its own, so that whatever it starts can be ended with it, and is
killed by the kernel when the launcher itself is (Linux's parent-death signal).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from flagscale.errors import ConfigError
from flagscale.launch.paths import ArgumentPath, verify_inputs, verify_outputs
from flagscale.launch.plan import LaunchPlan, Worker
from flagscale.layout.parallel import Problem, raise_problems
from flagscale.runs.exit_codes import SAVED

__all__ = [
    "FORWARDED",
    "execute_local",
    "log_header",
    "signals_told",
    "verify_paths",
    "write_run_dir",
]

TERMINATION_GRACE_S = 10.0
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals to the launcher that are meant for the training processes."""
_TAIL_LINES = 15
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


def verify_paths(plan: LaunchPlan) -> list[Problem]:
    """What the file system lacks for this plan: inputs, or directories that can be written."""
    run_dir = ArgumentPath(plan.run_dir, "--output-dir")
    # Most others are below the run directory: one complaint is enough.
    return verify_inputs(plan.inputs) + (verify_outputs([run_dir]) or verify_outputs(plan.outputs))


def execute_local(
    plan: LaunchPlan, console: TextIO | None = None, grace_s: float = TERMINATION_GRACE_S
) -> int:
    """Run the job to its end.

    The output of the first and the last rank appears on the console; every rank's is appended to
    its log. When a rank fails, the others get SIGTERM, and SIGKILL after ``grace_s`` seconds.

    Args:
        plan: What to run.
        console: Where output is shown; standard output by default.
        grace_s: Seconds.

    Returns:
        0, the code of a run that saved and ended early, or the exit code of the rank that failed
        first (128 + N for signal N).

    Raises:
        ConfigError: A path is missing or cannot be written; nothing was started.
    """
    raise_problems(verify_paths(plan))
    write_run_dir(plan)
    return _Job(plan, console or sys.stdout, grace_s).run()


def write_run_dir(plan: LaunchPlan) -> None:
    """Make the run directory, with the resolved recipe and the command in it.

    Raises:
        ConfigError: It cannot be written.
    """
    script = plan.run_dir / "command.sh"
    here = shlex.quote(os.getcwd())
    try:
        (plan.run_dir / "logs").mkdir(parents=True, exist_ok=True)
        for error_file in (plan.run_dir / "logs").glob("rank_*.error"):
            error_file.unlink()  # of an earlier start
        (plan.run_dir / "recipe.resolved.yaml").write_text(plan.resolved_recipe)
        script.write_text(f"#!/usr/bin/env bash\ncd {here} &&\nexec {shlex.join(plan.command)}\n")
        script.chmod(0o755)
    except OSError as error:
        raise ConfigError(
            "the run directory cannot be written",
            where=str(plan.run_dir),
            got=error,
            cure="choose another with --output-dir",
        ) from error


@dataclass
class _Rank:
    """A started process."""

    worker: Worker
    process: subprocess.Popen[bytes]
    pidfd: int
    log_start: int  # bytes; before it lie earlier starts
    exit_code: int | None = None  # as in subprocess: -N for signal N
    ended_at: float = 0.0  # seconds since the epoch

    @property
    def has_failed(self) -> bool:
        """Whether it has ended otherwise than all ranks do."""
        return self.exit_code not in (None, 0, SAVED)

    def send(self, signum: int) -> None:
        """Send a signal to the process and all it started; it must not have been reaped."""
        os.killpg(self.process.pid, signum)

    def reap(self) -> None:
        """Note the end of the process, and end what it has started; if it still runs, kill it."""
        self.ended_at = time.time()
        # Before the process is reaped: until then its group's number cannot be anyone else's.
        self.send(signal.SIGKILL)
        self.exit_code = self.process.wait()
        os.close(self.pidfd)


class _Follower:
    """Shows a growing file, whole lines at a time."""

    def __init__(self, path: Path, console: TextIO) -> None:
        self._file = path.open("rb")
        self._file.seek(0, os.SEEK_END)
        self._console = console
        self._rest = b""

    def show(self) -> None:
        """Show what came since."""
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        self._console.writelines(line.decode(errors="replace") + "\n" for line in lines)
        self._console.flush()

    def show_rest(self) -> None:
        """Show what came since, an unfinished line too."""
        self.show()
        if self._rest:
            self._console.write(self._rest.decode(errors="replace") + "\n")

    def close(self) -> None:
        """Stop following."""
        self._file.close()


class _Job:
    """One run of a plan."""

    def __init__(self, plan: LaunchPlan, console: TextIO, grace_s: float) -> None:
        self._plan = plan
        self._console = console
        self._grace_s = grace_s
        self._ranks: list[_Rank] = []
        self._followers: list[_Follower] = []
        self._received: list[int] = []  # signals not yet forwarded
        self._sent: set[int] = set()
        self._abrupt: set[int] = set()  # ranks ended by a signal that is not ours
        self._kill_at: float | None = None  # on time.monotonic()'s clock

    def run(self) -> int:
        """Start, watch, end; the job's exit code."""
        with signals_told(self._received.append):
            try:
                self._start()
                while self._running():
                    self._wait()
                    self._forward_signals()
                    self._end_after_failure()
                    for follower in self._followers:
                        follower.show()
                for follower in self._followers:
                    follower.show_rest()
            finally:
                self._kill()
                for follower in self._followers:
                    follower.close()
        return self._report()

    def _start(self) -> None:
        for worker in self._plan.workers:
            path = self._plan.log_path(worker.rank)
            with path.open("ab") as log:
                log.write(log_header(worker).encode())
                log.flush()
                log_start = log.tell()
                if worker in (self._plan.workers[0], self._plan.workers[-1]):
                    self._followers.append(_Follower(path, self._console))
                try:
                    process = subprocess.Popen(
                        worker.argv,
                        env={**os.environ, **worker.env},
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                        preexec_fn=_die_with(os.getpid()),
                    )
                except OSError as error:
                    raise ConfigError(
                        "a process cannot be started", where=worker.argv[0], got=error
                    ) from error
            self._ranks.append(_Rank(worker, process, os.pidfd_open(process.pid), log_start))

    def _running(self) -> list[_Rank]:
        return [rank for rank in self._ranks if rank.exit_code is None]

    def _wait(self) -> None:
        """Wait until a process ends, at most a tenth of a second; note which have ended."""
        running = {rank.pidfd: rank for rank in self._running()}
        poll = select.poll()
        for pidfd in running:
            poll.register(pidfd, select.POLLIN)
        for pidfd, _ in poll.poll(100):
            rank = running[pidfd]
            rank.reap()
            if rank.process.returncode < 0 and -rank.process.returncode not in self._sent:
                self._abrupt.add(rank.worker.rank)

    def _forward_signals(self) -> None:
        while self._received:
            signum = self._received.pop(0)
            if signum == signal.SIGINT and signum in self._sent:
                signum = signal.SIGKILL
            self._send(signum)

    def _send(self, signum: int) -> None:
        self._sent.add(signum)
        for rank in self._running():
            rank.send(signum)

    def _end_after_failure(self) -> None:
        """Once a rank has failed, or says that it is about to, the others cannot go on."""
        if self._kill_at is None:
            if any(rank.has_failed or self._error_record(rank) for rank in self._ranks):
                self._kill_at = time.monotonic() + self._grace_s
                self._send(signal.SIGTERM)
        elif time.monotonic() > self._kill_at:
            self._send(signal.SIGKILL)

    def _kill(self) -> None:
        """End whatever still runs; nothing does, unless the launcher itself has failed."""
        for rank in self._running():
            rank.reap()

    def _error_record(self, rank: _Rank) -> dict[str, Any] | None:
        return _read_record(self._plan.error_path(rank.worker.rank))

    def _report(self) -> int:
        """Say why the job failed, if it did; its exit code."""
        failed = [rank for rank in self._ranks if rank.has_failed]
        if not failed:
            return max((rank.exit_code or 0 for rank in self._ranks), default=0)
        first = min(failed, key=self._order_of_failure)
        number, record = first.worker.rank, self._error_record(first)
        exit_code = first.exit_code or 0
        how = f"exit code {exit_code}"
        if exit_code < 0:
            how, exit_code = signal.Signals(-exit_code).name, 128 - exit_code
        log = self._plan.log_path(number)
        if record is not None:
            exit_code = int(record.get("exit_code", exit_code))
            how, reason = f"exit code {exit_code}", str(record.get("message"))
        elif number not in self._abrupt and first.exit_code in {-s for s in self._sent}:
            reason = "It was stopped by a signal to the launcher."
        else:
            lines = _last_lines(log, first.log_start)
            reason = "\n".join(f"[rank {number}] {line}" for line in lines) or "It printed nothing."
        self._console.write(f"\nrank {number} ended first ({how}); its log: {log}\n{reason}\n")
        self._console.flush()
        return exit_code

    def _order_of_failure(self, rank: _Rank) -> tuple[bool, float]:
        """The least is the cause; the others failed because it was gone.

        A process killed from outside (out of memory, a crash in native code) leaves no record,
        while its peers soon record a broken connection: so it comes first whatever their clocks
        say. An abort is no such case, for communication libraries abort when a peer is gone.
        """
        killed = rank.worker.rank in self._abrupt and rank.exit_code != -signal.SIGABRT
        record = self._error_record(rank) or {}
        return not killed, float(record.get("time", rank.ended_at))


@contextlib.contextmanager
def signals_told(hear: Callable[[int], None]) -> Iterator[None]:
    """Tell of the signals to forward instead of dying of them."""

    def receive(signum: int, _frame: FrameType | None) -> None:
        hear(signum)

    previous = {signum: signal.signal(signum, receive) for signum in FORWARDED}
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _die_with(launcher: int) -> Callable[[], None]:
    """Have the kernel kill the new process when the launcher is gone, even if it is already."""

    def prepare() -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)

    return prepare


def _last_lines(path: Path, start: int) -> list[str]:
    """The end of a log that may be large, without what comes before the byte ``start``."""
    with path.open("rb") as log:
        log.seek(max(start, log.seek(0, os.SEEK_END) - (1 << 16)))
        return log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]


def log_header(worker: Worker, restart: str = "") -> str:
    """The line that begins a start in a rank's log."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    again = f" restart {restart}" if restart not in ("", "0") else ""
    return f"=== {now} rank {worker.rank}{again}: {shlex.join(worker.argv)}\n"


def _read_record(path: Path) -> dict[str, Any] | None:
    """What a rank left about its failure in the file ``FLAGSCALE_ERROR_FILE`` names."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):  # none, or not yet whole
        return None
    return record if isinstance(record, dict) else None
