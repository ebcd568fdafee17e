"""Training on a real Slurm: to its end, and through whatever can end it before.

A start costs each rank ten seconds of a core, so the attempts of one job serve several tests' worth
of questions each.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import train
from harness.corpus import model_argv
from harness.slurm_job import SlurmRun, losses_of
from harness.slurm_rank import Fault

NewRun = Callable[..., SlurmRun]


@pytest.fixture(scope="module")
def uninterrupted(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of twelve steps at DP 2 that nothing disturbs."""
    argv = model_argv(corpus, train_iters=12)
    return train(argv, tmp_path_factory.mktemp("uninterrupted"), 2).require_success().losses


def test_an_error_of_one_rank_ends_the_job_and_the_next_one_finishes(
    new_run: NewRun, uninterrupted: dict[int, float]
) -> None:
    run = new_run({"health_check": "full"}, train_iters=12, save_interval=4)
    run.submit(faults=[Fault("raise", rank=1, iteration=6)])
    # While it works, nobody else may.
    second = run.launch()
    assert second.returncode == 2, second.stdout
    assert f"Slurm job {run.job_id}" in second.stdout

    job = run.wait_end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "1:0", "0"), run.tell()
    assert "rank 1 failed: RuntimeError: told to fail at iteration 6" in run.log()
    assert "RuntimeError: told to fail at iteration 6" in run.rank_log(1)
    assert "health check: 2 of 2 machines are fit" in run.log()

    run.submit()
    job = run.wait_end()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.tell()
    assert losses_of(run.steps()) == uninterrupted
    assert "iteration        5/      12" in run.rank_log(1)  # of the last rank; from the save at 4
    finished = json.loads((run.run_dir / "finished.json").read_text())
    assert (finished["iteration"], finished["consumed_samples"]) == (12, 144)
    status = _status(run)
    assert "finished" in status
    assert "told to fail at iteration 6" in status

    again = run.launch()
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True), again.stdout


def test_preempted_hung_and_killed_until_the_cap_and_then_to_the_end(
    new_run: NewRun, uninterrupted: dict[int, float], tmp_path: Path
) -> None:
    run = new_run({"max_restarts": 2, "hang_minutes": 0.25}, train_iters=12, save_interval=2)
    hold = tmp_path / "hold"
    faults = [
        Fault("hold", rank=1, iteration=3, file=str(hold)),
        Fault("hang", rank=1, iteration=5, restart=1),
        Fault("kill-in-save", rank=0, iteration=8, restart=2),
    ]
    job_id = run.submit(faults=faults)

    run.wait(hold.exists, "hold at step 3")
    run.cluster.ask("scancel", "--signal=USR1", job_id)
    hold.unlink()
    run.wait(lambda: run.cluster.job(job_id)["Restarts"] == "1", "requeue after the signal")
    assert (run.run_dir / "checkpoints/iter_0000003/COMPLETE.json").exists()

    run.wait(lambda: run.cluster.job(job_id)["Restarts"] == "2", "requeue after the hang")
    assert "rank 1 hung at" in run.log(), run.tell()
    assert "slurm_rank.py" in run.log()

    job = run.wait_end()
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "2"), run.tell()
    assert "max-restarts is 2" in run.log()
    # What the cap has ended can be started again, by hand; half a save is set aside and named.
    run.submit()
    job = run.wait_end()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.tell()
    assert losses_of(run.steps()) == uninterrupted
    assert "iteration 8 is not whole" in run.log()
    assert (run.run_dir / "checkpoints/iter_0000008.incomplete-1").is_dir()
    assert " restart 1: " in run.rank_log(0)
    assert " restart 2: " in run.rank_log(1)
    status = _status(run)
    for reason in ("saved and ended early", "hung", "SIGKILL", "is done and saved"):
        assert reason in status, status


def _status(run: SlurmRun) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "flagscale.launch", "status", str(run.run_dir)],
        env=run.cluster.environ,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout
