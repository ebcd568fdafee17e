"""Signals, fences and watches of a rank, without a job."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, FunctionType

import pytest

from flagscale.ckpt_io.location import TRACKER
from flagscale.errors import SupersededError
from flagscale.patches.tracker import publish_checkpoint
from flagscale.runs.attempt import ATTEMPT_VARIABLE, RUN_DIR_VARIABLE, begin_attempt
from flagscale.runs.fence import Fence
from flagscale.train import failure, preemption
from flagscale.train.fencing import Lookout
from flagscale.train.watchdog import Watch, is_waiting, where_is


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def fresh() -> Iterator[None]:
    """A process that has heard nothing yet, with its handlers put back afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    importlib.reload(preemption)
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--exit-signal", "SIGUSR1"], None),
        (["--exit-signal-handler"], signal.SIGTERM),
        (["--exit-signal", "SIGUSR1", "--exit-signal-handler"], signal.SIGUSR1),
        (["--exit-signal-handler", "--exit-signal=SIGUSR1"], signal.SIGUSR1),
        (["--exit-signal-handler", "--exit-signal", "NOTHING"], None),
        (["--exit-signal-handler", "--exit-signal"], None),
    ],
)
def test_which_signal_is_listened_for(argv: list[str], expected: signal.Signals | None) -> None:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1)}
    preemption.remember(argv)
    changed = [signum for signum in before if signal.getsignal(signum) is not before[signum]]
    assert changed == ([] if expected is None else [expected])


def test_the_entry_listens_before_it_imports(tmp_path: Path) -> None:
    # The first slow module is replaced by one that sends the signal.
    (tmp_path / "difflib.py").write_text(
        "import os, signal, time\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
        "time.sleep(0.5)\n"
        "raise SystemExit(42)\n"
    )
    command = [sys.executable, "-m", "flagscale.train", "--exit-signal-handler"]
    for name, code in (("SIGUSR1", 42), ("SIGTERM", -signal.SIGUSR1)):
        ended = subprocess.run(
            [*command, "--exit-signal", name],
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert ended.returncode == code, ended.stderr.decode()


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2"])
def test_the_signal_is_kept_from_processes_that_help(name: str) -> None:
    # Slurm sends it to all processes of a step.
    script = (
        "import os, signal, subprocess, sys, time\n"
        "from flagscale.train import preemption\n"
        f"preemption.remember(['--exit-signal-handler', '--exit-signal', '{name}'])\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        f"os.killpg(0, signal.{name})\n"
        "time.sleep(0.5)\n"
        "code = child.poll()\n"
        "child.terminate()\n"
        "print(code, child.wait(), preemption._HEARD.received)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        start_new_session=True,
    )
    assert ended.stdout == "None -15 True\n"


def test_a_lookout_looks_now_and_then(tmp_path: Path) -> None:
    clock = Clock()
    attempt = begin_attempt(tmp_path, hosts=[], layout={}, world_size=1)
    lookout = Lookout(Fence(tmp_path, attempt.token), interval=5.0, clock=clock)
    lookout.look_now_and_then()
    begin_attempt(tmp_path, hosts=[], layout={}, world_size=1)
    clock.now = 4.9
    lookout.look_now_and_then()
    with pytest.raises(SupersededError):
        lookout.look()
    clock.now = 10.0
    with pytest.raises(SupersededError):
        lookout.look_now_and_then()


def test_a_superseded_rank_leaves_no_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "rank_0.error"
    attempt = begin_attempt(tmp_path, hosts=[], layout={}, world_size=1)
    monkeypatch.setenv(failure.ERROR_FILE, str(record))
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv(ATTEMPT_VARIABLE, attempt.token)
    failure.record_failure("why", 1, waiting=True)
    assert '"waiting": true' in record.read_text()
    record.unlink()
    begin_attempt(tmp_path, hosts=[], layout={}, world_size=1)
    failure.record_failure("why", 1)
    assert not record.exists()


def test_a_superseded_rank_marks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = begin_attempt(tmp_path, hosts=[], layout={}, world_size=1)
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    monkeypatch.setenv(ATTEMPT_VARIABLE, attempt.token)
    (tmp_path / "iter_0000004").mkdir()
    begin_attempt(tmp_path, hosts=[], layout={}, world_size=1)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SupersededError):
        publish_checkpoint(tmp_path / TRACKER, "4")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_watch_begins_with_the_first_step() -> None:
    clock = Clock()
    watch = Watch(60.0, clock)
    clock.now = 1000.0  # of loading
    watch.note_progress()
    clock.now = 2000.0
    assert not watch.stalled()
    watch.arm()
    clock.now += 60.0
    assert not watch.stalled()
    clock.now += 0.1
    assert watch.stalled()
    watch.note_progress()
    assert not watch.stalled()
    clock.now += 1000.0
    watch.disarm()
    assert not watch.stalled()


def frame_of(action: Callable[[], object]) -> FrameType:
    """The innermost frame of a thread that does something for ever."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    time.sleep(0.1)
    return sys._current_frames()[thread.ident or 0]


class _Work:
    """Stands for a work handle, whose wait() is in C: it has no frame."""

    wait = staticmethod(time.sleep)
    sleep = staticmethod(time.sleep)


def test_waiting_for_others_and_not() -> None:
    def collective() -> None:
        _Work.wait(2)

    def alone() -> None:
        _Work.sleep(2)

    def loader() -> None:
        threading.Event().wait(2)

    assert is_waiting(frame_of(collective))
    assert not is_waiting(frame_of(alone))
    assert not is_waiting(frame_of(loader))  # a Python thread
    assert "alone: _Work.sleep(2)" in where_is(frame_of(alone))
    assert "loader: threading.Event().wait(2)" in where_is(frame_of(loader))


@pytest.mark.parametrize(
    ("path", "others_wait", "waiting"),
    [
        ("/x/torch/distributed/distributed_c10d.py", False, True),
        ("/x/torch/distributed/checkpoint/filesystem.py", False, False),
        ("/x/torch/autograd/graph.py", False, False),
        ("/x/torch/autograd/graph.py", True, True),
    ],
)
def test_waiting_inside_torch(path: str, others_wait: bool, waiting: bool) -> None:
    def in_file(name: str) -> FrameType:
        def sleep() -> None:
            time.sleep(2)

        code = sleep.__code__.replace(co_filename=name)
        return frame_of(FunctionType(code, globals()))

    others = [in_file("/x/torch/distributed/distributed_c10d.py")] if others_wait else []
    assert is_waiting(in_file(path), others) == waiting
