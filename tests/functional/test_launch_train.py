"""``python -m flagscale.launch`` on a small model: what it leaves, how it resumes, how it ends."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from functional.conftest import launch_command, launch_environ

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def _iterations(output: str) -> list[int]:
    return [int(number) for number in re.findall(r"iteration +(\d+)/ ", output)]


def test_run_directory_and_restart_by_its_command(launch: Launch, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    # Two steps a start, so that each of the starts has some to do.
    words = ("--train-iters", 4, "--exit-interval", 2, "--save-interval", 2)
    first = launch(run_dir, 2, *words)
    assert first.returncode == 0, first.stdout
    assert _iterations(first.stdout) == [1, 2]
    assert "tokens/s/device: " in first.stdout
    summary = first.stdout[first.stdout.index("training summary: ") :]
    assert summary.startswith(f"training summary: {2 * 12 * 64} tokens in ")
    assert "Aquila2-7B 3014" in summary
    assert "Aquila2-34B 535" in summary

    assert (run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "2"
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        "rank_0.log",
        "rank_1.log",
    ]
    assert list((run_dir / "tensorboard").glob("events.out.tfevents.*"))
    assert "train-iters: 4" in (run_dir / "recipe.resolved.yaml").read_text()

    second = subprocess.run(
        [run_dir / "command.sh"],
        env=launch_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
    )
    assert second.returncode == 0, second.stdout
    assert _iterations(second.stdout) == [3, 4]
    assert (run_dir / "checkpoints/latest_checkpointed_iteration.txt").read_text() == "4"
    assert (run_dir / "logs/rank_1.log").read_text().count("=== ") == 2  # one header a start


def test_rank_that_raises(launch: Launch, corpus: Path, tmp_path: Path) -> None:
    shutil.copy(f"{corpus}.idx", tmp_path / "cut.idx")
    text = Path(f"{corpus}.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(text[: len(text) * 97 // 100])
    # Without the ledger, which reads the dataset, and refuses it, before upstream does.
    flags = ("--data-path", tmp_path / "cut", "--train-iters", 500, "--no-ledger")
    done = launch(tmp_path / "run", 2, *flags)
    assert done.returncode == 1
    assert _iterations(done.stdout)
    failed, reason = re.findall(
        r"\nrank (\d) ended first \(exit code 1\); .*\n(.*)\n\Z", done.stdout
    )[0]
    assert reason.startswith("ValueError: "), done.stdout
    log = (tmp_path / f"run/logs/rank_{failed}.log").read_text()
    assert "Traceback" in log


def test_rank_that_is_killed(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with subprocess.Popen(
        launch_command(recipe, run_dir, 2, "--train-iters", 100_000),
        env=launch_environ(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as launcher:
        try:
            output = ""
            while "iteration        3/" not in output:  # ends at the latest when the job does
                line = launcher.stdout.readline() if launcher.stdout else ""
                assert line, output
                output += line
            ranks = _ranks_of(launcher.pid)
            os.kill(ranks[1], signal.SIGKILL)
            killed_at = time.monotonic()
            rest, _ = launcher.communicate(timeout=60)
        finally:
            launcher.kill()
    assert time.monotonic() - killed_at < 30
    assert launcher.returncode == 128 + signal.SIGKILL
    assert "\nrank 1 ended first (SIGKILL); its log: " in rest
    last = rest.rpartition("rank 1 ended first")[2].splitlines()[1:]
    assert last
    assert all(line.startswith("[rank 1] ") for line in last)
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks.values())


def _ranks_of(launcher: int) -> dict[int, int]:
    """Process of each rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    environs = {int(pid): Path(f"/proc/{pid}/environ").read_text().split("\0") for pid in children}
    return {
        int(word.removeprefix("RANK=")): pid
        for pid, words in environs.items()
        for word in words
        if word.startswith("RANK=")
    }
