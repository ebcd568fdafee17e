"""What is refused before the queue is paid for, by a real sbatch: in one line each, exit code 2."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from harness.slurm_cluster import SlurmCluster
from harness.slurm_job import SlurmRun

NewRun = Callable[..., SlurmRun]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--sbatch=--partition=nope"], "partition"),
        (["--sbatch=--account=nope", "--sbatch=--qos=nope"], "qos"),
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


def test_a_node_that_is_no_node_ends_the_job_by_its_name(
    new_run: NewRun, cluster: SlurmCluster
) -> None:
    """The health check finds what is wrong with a machine; here, that nothing can be written."""
    run = new_run({"health_check": "nodes"}, save="/proc/nowhere/checkpoints")
    done = run.launch()
    assert done.returncode == 2, done.stdout
    assert "/proc/nowhere" in done.stdout
    assert cluster.ask("squeue", "-h") == ""
