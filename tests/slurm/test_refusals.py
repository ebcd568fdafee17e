"""What is refused before the queue is paid for, by a real sbatch: in one line each, exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from harness.slurm_cluster import SlurmCluster
from harness.slurm_job import SlurmRun

NewRun = Callable[..., SlurmRun]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sbatch=--partition=nope"], "partition"),
        (["--nodes", 9], "9"),
        (["--tensor-model-parallel-size", 3], "3"),
        (["--data-path", "/nowhere/text_document"], "/nowhere/text_document.bin"),
    ],
)
def test_what_slurm_or_the_layout_cannot_do_is_said_before(
    new_run: NewRun, cluster: SlurmCluster, words: list[object], said: str
) -> None:
    run = new_run()
    done = run.launch(*words)
    assert done.returncode == 2, done.stdout
    assert said in done.stdout.lower()
    assert "Traceback" not in done.stdout
    assert cluster.ask("squeue", "-h") == ""


def test_checkpoints_that_cannot_be_written_are_said_before(
    new_run: NewRun, cluster: SlurmCluster, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    checkpoints = tmp_path / "file/checkpoints"
    done = new_run(save=checkpoints, load=checkpoints).launch()
    assert done.returncode == 2, done.stdout
    assert f"{checkpoints} can be made and written" in done.stdout
    assert cluster.ask("squeue", "-h") == ""
