"""Nodes that are lost while their ranks live on, and a queue that gives back fewer."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import train
from harness.corpus import model_argv
from harness.slurm_job import SlurmRun, losses_of
from harness.slurm_rank import Fault

NewRun = Callable[..., SlurmRun]

ROOT = Path(__file__).parents[2]
LAST = 12
MODEL = {"bf16": None, "train_iters": LAST}  # fp32: what differs is the order of sums alone


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses at TP 2 that nothing disturbs."""
    argv = model_argv(corpus, tensor_model_parallel_size=2, **MODEL)
    return train(argv, tmp_path_factory.mktemp("undisturbed"), 2).require_success().losses


def test_orphans_publish_nothing_and_the_job_goes_on_with_one_node_and_another_layout(
    new_run: NewRun,
    undisturbed: dict[int, float],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    smaller = {"nodes": 1, "tensor-model-parallel-size": 1}
    run = new_run({"layouts": [smaller]}, tensor_model_parallel_size=2, save_interval=4, **MODEL)
    hold = tmp_path / "hold"
    faults = [Fault("hold", rank=0, iteration=6, file=str(hold))]
    job_id = run.submit(faults=faults)
    run.wait(hold.exists, "hold at step 6")
    cluster = run.cluster
    orphans = cluster.ranks(job_id)
    lost = orphans[0].environ["SLURM_JOB_NODELIST"]
    assert (sorted(orphans), lost) == ([0, 1], "127.0.0.[1-2]")

    # Both slurmds, so that nothing can reach the ranks, and they lack nothing to go on.
    cluster.kill_node(1)
    cluster.kill_node(2)
    killed = time.time()
    run.wait(lambda: _owner(run) == 2, "second attempt")
    assert {p.pid for p in cluster.ranks(job_id).values()} >= {orphans[1].pid}
    hold.unlink()  # the orphans go on: two steps to their next save
    run.wait(
        lambda: not {p.pid for p in orphans.values()} & {p.pid for p in cluster.processes()},
        "end of the orphans",
    )

    job = run.wait_end()
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1")
    assert job["NodeList"] == "127.0.0.3"
    rows = [row for rows in run.steps().values() for row in rows]
    second = sorted((r for r in rows if r.restart), key=lambda row: row.time)
    record_property("seconds from failure to next step", second[0].time - killed)
    assert [row.iteration for row in second] == list(range(5, LAST + 1))
    assert max(row.iteration for row in rows if not row.restart) < LAST
    saves = run.run_dir / "checkpoints"
    owners = {
        path.parent.name: json.loads(path.read_text())["attempt"]
        for path in saves.glob("iter_*/COMPLETE.json")
    }
    assert owners == {"iter_0000004": 1, "iter_0000008": 2, "iter_0000012": 2}
    assert "attempt 2 owns this run now" in run.rank_log(0) + run.rank_log(1)
    assert "resharding iteration 4" in run.log(), run.tell()

    losses = losses_of(run.steps())
    assert losses.keys() == undisturbed.keys()
    assert losses == pytest.approx(undisturbed, rel=0, abs=2e-5)
    assert {i: losses[i] for i in range(1, 5)} == {i: undisturbed[i] for i in range(1, 5)}
    verified = subprocess.run(
        [sys.executable, str(ROOT / "tools/inspect_data.py"), "verify", str(run.run_dir), "--json"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert verified.returncode == 0, verified.stderr
    assert json.loads(verified.stdout)["labels"] == {"EXACT": LAST}


def _owner(run: SlurmRun) -> int:
    return int(json.loads((run.run_dir / "attempt.json").read_text())["number"])
