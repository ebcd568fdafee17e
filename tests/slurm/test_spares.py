"""A machine that is not fit, and a spare one in its place."""

from __future__ import annotations

from slurm.conftest import NewRun


def test_a_bad_machine_is_named_and_a_spare_takes_its_place(new_run: NewRun) -> None:
    run = new_run({"health_check": "full", "spares": 1}, train_iters=2)
    run.cluster.spoil(2)
    run.submit()
    job = run.wait_end()
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), run.tell()
    assert "health check: 127.0.0.2: " in run.log()
    assert "health check: 2 of 3 machines are fit" in run.log()
    assert "machines not used: 127.0.0.2" in run.log()
    assert "begun again without 127.0.0.2" in (run.run_dir / "attempts.jsonl").read_text()
