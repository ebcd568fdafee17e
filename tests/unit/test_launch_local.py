from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from flagscale.errors import ConfigError
from flagscale.launch.local import execute_local
from flagscale.launch.paths import ArgumentPath
from flagscale.launch.plan import LaunchPlan, Worker
from flagscale.layout.parallel import BatchSizes, ParallelLayout

PREAMBLE = """
import json, os, pathlib, signal, subprocess, sys, time
rank, run_dir = int(os.environ["RANK"]), pathlib.Path(os.environ["FLAGSCALE_RUN_DIR"])
def record(message, exit_code, at=None):
    text = json.dumps(dict(rank=rank, time=at or time.time(), message=message, exit_code=exit_code))
    pathlib.Path(os.environ["FLAGSCALE_ERROR_FILE"]).write_text(text)
def wait_for(name):
    while not (run_dir / name).exists():
        time.sleep(0.01)
def touch(name):
    (run_dir / name).write_text(str(os.getpid()))
"""
DRIVER = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("driven", sys.argv[1])
driven = importlib.util.module_from_spec(spec)
spec.loader.exec_module(driven)
plan = driven.make_plan(driven.Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
raise SystemExit(driven.execute_local(plan))
"""


def make_plan(run_dir: Path, nproc: int, script: str) -> LaunchPlan:
    def env(rank: int) -> dict[str, str]:
        error_file = run_dir / "logs" / f"rank_{rank}.error"
        return {
            "RANK": str(rank),
            "FLAGSCALE_RUN_DIR": str(run_dir),
            "FLAGSCALE_ERROR_FILE": str(error_file),
            "PYTHONUNBUFFERED": "1",
        }

    argv = (sys.executable, "-c", PREAMBLE + script)
    return LaunchPlan(
        run_dir=run_dir,
        command=("train", "a b"),
        resolved_recipe="model: {}\n",
        workers=tuple(Worker(rank, argv, env(rank)) for rank in range(nproc)),
        inputs=(),
        layout=ParallelLayout(nproc, 1, 1),
        batch=BatchSizes(1, nproc),
        seq_length=1,
    )


def run(plan: LaunchPlan, grace_s: float = 10.0) -> tuple[int, str]:
    console = io.StringIO()
    return execute_local(plan, console, grace_s), console.getvalue()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Callable[[int, str], subprocess.Popen[str]]]:
    """Starts a launcher in a process of its own, whose run directory is ``tmp_path / "run"``."""
    started = []

    def start(nproc: int, script: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-c", DRIVER, __file__, str(tmp_path / "run"), str(nproc), script]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_run_that_succeeds(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "run", 3, "print('from', rank); print('no newline', end='')")
    code, console = run(plan)
    assert code == 0
    assert sorted(console.splitlines()) == ["from 0", "from 2", "no newline", "no newline"]
    assert "from 1" in plan.log_path(1).read_text()
    assert (tmp_path / "run/recipe.resolved.yaml").read_text() == "model: {}\n"
    script = tmp_path / "run/command.sh"
    assert os.access(script, os.X_OK)
    assert script.read_text().endswith("exec train 'a b'\n")


def test_logs_are_appended_to_with_a_header_for_each_start(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, 1, "print('hello')")
    assert run(plan) == run(plan) == (0, "hello\n")
    lines = plan.log_path(0).read_text().splitlines()
    assert lines.count("hello") == 2
    assert sum(line.startswith("===") for line in lines) == 2


def test_the_first_failure_ends_the_others_and_is_told_last(tmp_path: Path) -> None:
    script = """
if rank == 1:
    wait_for("up"); record("no such file\\n  cure: make it", 5); sys.exit(5)
signal.signal(signal.SIGTERM, lambda *_: (record("connection reset", 1), sys.exit(1)))
touch("up"); time.sleep(60)
"""
    started = time.monotonic()
    code, console = run(make_plan(tmp_path, 3, script))
    assert code == 5
    assert console.endswith("rank_1.log\nno such file\n  cure: make it\n")
    assert time.monotonic() - started < 10


def test_a_stale_error_file_is_not_the_reason(tmp_path: Path) -> None:
    run(make_plan(tmp_path, 1, "record('of yesterday', 5, at=1.0); sys.exit(5)"))
    code, console = run(make_plan(tmp_path, 1, "print('of today'); sys.exit(6)"))
    assert code == 6
    assert "of yesterday" not in console


def test_without_an_error_file_the_end_of_the_log_is_the_reason(tmp_path: Path) -> None:
    script = "[print('line', i) for i in range(40)]; sys.exit(3) if rank == 1 else time.sleep(60)"
    code, console = run(make_plan(tmp_path, 3, script))
    assert code == 3
    assert console.splitlines()[-15:] == [f"[rank 1] line {i}" for i in range(25, 40)]


def test_a_killed_rank_is_the_cause_of_its_peers_errors(tmp_path: Path) -> None:
    # The peer's clock is behind: by time alone its error would be the first.
    script = """
if rank == 1:
    wait_for("deaf"); print("about to be killed"); touch("up"); os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN); touch("deaf")
wait_for("up"); record("connection closed by peer", 1, at=1.0); sys.exit(1)
"""
    code, console = run(make_plan(tmp_path, 2, script))
    assert code == 128 + signal.SIGKILL
    assert "rank 1 ended first (SIGKILL)" in console
    assert console.endswith("[rank 1] about to be killed\n")


def test_an_abort_is_no_cause(tmp_path: Path) -> None:
    script = """
if rank == 1:
    wait_for("deaf"); record("out of memory", 4); touch("up"); sys.exit(4)
signal.signal(signal.SIGTERM, signal.SIG_IGN); touch("deaf")
wait_for("up"); os.abort()
"""
    code, console = run(make_plan(tmp_path, 2, script))
    assert code == 4
    assert console.endswith("out of memory\n")


def test_a_rank_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    script = """
if rank == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN); touch("deaf"); time.sleep(60)
wait_for("deaf"); sys.exit(9)
"""
    started = time.monotonic()
    code, _ = run(make_plan(tmp_path, 2, script), grace_s=0.5)
    assert code == 9
    assert time.monotonic() - started < 10


def test_a_rank_that_fails_but_does_not_end_is_ended(tmp_path: Path) -> None:
    script = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
record("stuck in cleaning up", 3)
time.sleep(60)
"""
    code, console = run(make_plan(tmp_path, 1, script), grace_s=0.5)
    assert code == 3
    assert console.endswith("stuck in cleaning up\n")


def test_what_a_rank_started_ends_with_it(tmp_path: Path) -> None:
    script = """
child = subprocess.Popen(["sleep", "60"])
(run_dir / "child").write_text(str(child.pid))
os._exit(0)
"""
    assert run(make_plan(tmp_path, 1, script))[0] == 0
    pid = int((tmp_path / "child").read_text())
    assert eventually(lambda: not alive(pid))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"])
def test_signals_reach_every_rank(
    launcher: Callable[[int, str], subprocess.Popen[str]], tmp_path: Path, name: str
) -> None:
    script = f"""
signal.signal(signal.{name}, lambda *_: (print("saved"), touch(f"saved{{rank}}"), sys.exit(0)))
touch(f"up{{rank}}")
time.sleep(60)
"""
    process = launcher(2, script)
    assert eventually(lambda: all((tmp_path / f"run/up{rank}").exists() for rank in range(2)))
    process.send_signal(signal.Signals[name])
    console, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert console == "saved\nsaved\n"


def test_a_signal_nobody_handles_ends_the_job_with_its_code(
    launcher: Callable[[int, str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = launcher(2, "touch(f'up{rank}'); time.sleep(60)")
    assert eventually(lambda: all((tmp_path / f"run/up{rank}").exists() for rank in range(2)))
    process.terminate()
    console, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert console.endswith("It was stopped by a signal to the launcher.\n")


def test_a_second_interrupt_kills(
    launcher: Callable[[int, str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    script = """
signal.signal(signal.SIGINT, lambda *_: touch("interrupted"))
touch("up")
while True: time.sleep(1)
"""
    process = launcher(1, script)
    assert eventually((tmp_path / "run/up").exists)
    process.send_signal(signal.SIGINT)
    assert eventually((tmp_path / "run/interrupted").exists)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGKILL


def test_a_killed_launcher_leaves_no_process(
    launcher: Callable[[int, str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = launcher(2, "touch(f'up{rank}'); time.sleep(60)")
    up = [tmp_path / f"run/up{rank}" for rank in range(2)]
    assert eventually(lambda: all(path.exists() and path.read_text() for path in up))
    pids = [int(path.read_text()) for path in up]
    assert all(map(alive, pids))
    process.kill()
    assert eventually(lambda: not any(map(alive, pids)))


def test_nothing_is_made_when_a_path_is_missing(tmp_path: Path) -> None:
    missing = ArgumentPath(tmp_path / "corpus.bin", "--data-path")
    plan = replace(make_plan(tmp_path / "run", 1, ""), inputs=(missing,))
    with pytest.raises(ConfigError, match=r"corpus\.bin"):
        run(plan)
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="not a writable directory"):
        run(make_plan(tmp_path / "file" / "run", 1, ""))


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    plan = make_plan(tmp_path, 2, "time.sleep(60)")
    lost = replace(plan.workers[1], argv=("/no/such/python",))
    with pytest.raises(ConfigError, match="cannot be started"):
        run(replace(plan, workers=(plan.workers[0], lost)))
