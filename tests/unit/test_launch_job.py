"""A job inside of an allocation, run against stand-ins for Slurm's programs."""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import ConfigError
from flagscale.launch import job as job_module
from flagscale.launch import slurm as slurm_module
from flagscale.launch.copies import public_environment
from flagscale.launch.job import execute_job, fruitless_attempts
from flagscale.launch.options import OptionTable, known_options
from flagscale.launch.ownership import cluster_name
from flagscale.launch.recipe import read_recipe
from flagscale.launch.start import Machine, Request, Start, plan_start
from flagscale.launch.status import main as status
from flagscale.launch.status import state_of
from flagscale.runs.attempt import begin_attempt, current, end_attempt, history
from flagscale.runs.finished import write_finished
from flagscale.runs.status import Status, write_status

TINY = Path(__file__).parents[2] / "examples" / "aquila" / "tiny.yaml"
TRAINS = "*flagscale.launch*"


@pytest.fixture(scope="module")
def options() -> OptionTable:
    return known_options()


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Programs that are first on the path; ``calls`` is what was asked of them."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program(directory, "squeue", "echo 'slurm: Invalid job id specified' >&2; exit 1")
    program(directory, "scontrol", 'echo "ClusterName = test"; echo "scontrol $*" >> $CALLS')
    program(directory, "srun", "exit 0")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(job_module, "_AFTER_REQUEUE", 0.0)
    cluster_name.cache_clear()
    yield directory
    cluster_name.cache_clear()


def program(directory: Path, name: str, text: str) -> None:
    path = directory / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


def start(options: OptionTable, tmp_path: Path, hosts: str = "n1", **request: Any) -> Start:
    environ = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": hosts,
        "SLURM_RESTART_COUNT": str(request.pop("restarts", 0)),
    }
    machine = Machine(environ, "n1", tmp_path, "/bin/python", 4, 1, has_slurm=True)
    asked: dict[str, Any] = {"nodes": 1, "nproc": 1, "health_check": "none"} | request
    words = ("--platform", "cpu", *asked.pop("words", ()))
    recipe = Request(TINY, words, output_dir=tmp_path / "run", data_dir=tmp_path / "data", **asked)
    return plan_start(recipe, read_recipe(TINY, options), options, machine)


def run(planned: Start) -> tuple[int, str]:
    """The exit code and the words of a job that lacks nothing on the disk."""
    assert planned.job is not None
    plan_for = planned.job.plan_for
    job = replace(
        planned.job, plan_for=lambda *args: replace(plan_for(*args), inputs=(), outputs=())
    )
    console = io.StringIO()
    code = execute_job(job, replace(planned.plan, inputs=(), outputs=()), dict(os.environ), console)
    return code, console.getvalue()


@pytest.fixture(autouse=True)
def known_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_module, "require_address", lambda host: None)


def calls(tmp_path: Path) -> list[str]:
    path = tmp_path / "calls"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if "show config" not in line]


def test_an_attempt_is_recorded_from_its_beginning_to_its_end(
    options: OptionTable, tmp_path: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_SECRET_WORD", "x")
    program(slurm, "srun", f'env > {tmp_path}/env; printf "%s\\n" "$@" > {tmp_path}/words')
    code, said = run(start(options, tmp_path))
    run_dir = tmp_path / "run"
    assert code == 0
    assert "health check: skipped" in said
    (past,) = history(run_dir)
    assert past.attempt.layout["format"] == "torch_dist/dp_reshardable"
    assert past.end is not None
    assert (past.end.exit_code, past.end.iteration) == (0, None)
    directory = run_dir / "attempts" / "0001"
    lines = (tmp_path / "env").read_text().splitlines()
    assert f"FLAGSCALE_ATTEMPT={past.attempt.token}" in lines
    assert f"FLAGSCALE_ATTEMPT_DIR={directory}" in lines
    assert str(directory / "recipe.yaml") in (tmp_path / "words").read_text().splitlines()
    assert "exit-signal: SIGUSR1" in (directory / "recipe.yaml").read_text()
    assert "MY_SECRET_WORD" not in json.loads((directory / "environment.json").read_text())
    assert "numpy" in json.loads((directory / "versions.json").read_text())
    assert calls(tmp_path) == []


@pytest.mark.parametrize(
    ("srun", "code", "requeued", "words"),
    [
        ("exit 75", 75, True, "saved and ended early, with more to do; restart 1 of 10"),
        ("echo 'srun: error: n1: task 0: Killed' >&2; exit 137", 137, True, "rank 0 on n1"),
        ("exit 76", 76, False, "another attempt"),
        (
            'echo \'{"rank": 0, "time": 1, "message": "ValueError: no", "exit_code": 1}\''
            " > $FLAGSCALE_ATTEMPT_DIR/rank_0.error; exit 143",
            1,
            False,
            "rank 0 failed: ValueError: no",
        ),
        ("exit 1", 1, False, "exit code 1, and no rank said why"),
    ],
)
def test_what_follows_an_end(
    options: OptionTable,
    tmp_path: Path,
    slurm: Path,
    srun: str,
    code: int,
    requeued: bool,
    words: str,
) -> None:
    program(slurm, "srun", srun)
    found, said = run(start(options, tmp_path))
    assert found == code
    assert words in said
    assert calls(tmp_path) == (["scontrol requeue 7"] if requeued else [])


def test_the_cap_holds(options: OptionTable, tmp_path: Path, slurm: Path) -> None:
    program(slurm, "srun", "exit 75")
    code, said = run(start(options, tmp_path, restarts=2, max_restarts=2))
    assert code == 75
    assert "not queued again after restart 2: max-restarts is 2" in said
    # Slurm itself may have queued it again.
    with pytest.raises(ConfigError, match="queued again 3 times"):
        run(start(options, tmp_path, restarts=3, max_restarts=2))
    assert calls(tmp_path) == []
    *_, last = history(tmp_path / "run")
    assert last.end is not None
    assert last.end.reason == "the job has been queued again 3 times"


def test_attempts_without_fruit_end_a_job(
    options: OptionTable, tmp_path: Path, slurm: Path
) -> None:
    program(slurm, "srun", "echo 'srun: error: n1: task 0: Killed' >&2; exit 137")
    texts = [run(start(options, tmp_path, restarts=i))[1] for i in range(3)]
    assert [("restart" in text.splitlines()[-1]) for text in texts] == [True, True, False]
    assert "3 attempts in a row" in texts[-1]
    assert fruitless_attempts(history(tmp_path / "run"), "7") == 3
    assert fruitless_attempts(history(tmp_path / "run"), "8") == 0


def test_a_script_whose_attempt_is_over_touches_nothing(
    options: OptionTable, tmp_path: Path, slurm: Path
) -> None:
    record = {"number": 9, "token": "other", "job_id": "7", "restart": 1, "hosts": ["n2"]}
    record |= {"started": 1, "layout": {}, "world_size": 1}
    text = json.dumps(record)
    program(slurm, "srun", f"echo '{text}' > {tmp_path}/run/attempt.json; exit 137")
    code, said = run(start(options, tmp_path))
    assert code == 76
    assert "another attempt has taken this run over" in said
    assert calls(tmp_path) == []
    assert history(tmp_path / "run")[0].end is None


def test_another_job_is_refused(options: OptionTable, tmp_path: Path, slurm: Path) -> None:
    run(start(options, tmp_path))
    lock = tmp_path / "run" / "lock.json"
    lock.write_text(lock.read_text().replace('"7"', '"6"'))
    program(slurm, "squeue", "echo RUNNING")
    with pytest.raises(ConfigError, match=r"(?s)another job works here.*Slurm job 6"):
        run(start(options, tmp_path))


NODES = r"""
dir=${@: -1}; dir=${dir%/*}
for word in "$@"; do case $word in --nodelist=*) host=${word#*=};; esac; done
if [[ " $* " == *" node "* ]]; then
  [[ $host == 127.0.0.2 ]] && exit 1
  SLURMD_NODENAME=$host python -m flagscale.health node "${@: -1}"
fi
exit 0
"""


def test_a_bad_machine_is_left_out_when_there_is_a_spare(
    options: OptionTable, tmp_path: Path, slurm: Path
) -> None:
    program(slurm, "srun", NODES)
    words = ("--save", str(tmp_path / "run" / "checkpoints"))
    planned = start(
        options, tmp_path, "127.0.0.[1-3]", nodes=2, spares=1, health_check="nodes", words=words
    )
    code, said = run(planned)
    assert code == 0
    assert "health check: 127.0.0.2: it did not answer in time" in said
    assert "machines not used: 127.0.0.2" in said
    assert "--nodes=2 --nodelist=127.0.0.1,127.0.0.3 " in said
    first, second = history(tmp_path / "run")
    assert first.end is not None
    assert first.end.reason == "begun again without 127.0.0.2"
    assert second.attempt.hosts == ("127.0.0.1", "127.0.0.3")


def test_too_few_machines_are_an_error_that_names_them(
    options: OptionTable, tmp_path: Path, slurm: Path
) -> None:
    program(slurm, "srun", "exit 1")
    with pytest.raises(ConfigError, match=r"(?s)too few machines.*n1: it did not answer"):
        run(start(options, tmp_path, health_check="nodes"))
    (past,) = history(tmp_path / "run")
    assert past.end is not None
    assert past.end.reason == "too few machines are fit for this job"


def test_secrets_are_not_copied() -> None:
    environ = {"HF_TOKEN": "x", "AWS_SECRET_ACCESS_KEY": "x", "DB_PASSWORD": "x", "PATH": "/bin"}
    assert public_environment(environ) == {"PATH": "/bin"}


# --- status ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("works", "queue_state", "finished", "held", "expected"),
    [
        (True, "RUNNING", True, True, "finished"),
        (True, "RUNNING", False, True, "running"),
        (True, "PENDING", False, True, "queued"),
        (True, None, False, True, "running"),
        (False, "", False, True, "ended"),
        (None, None, False, True, "unknown"),
        (None, None, False, False, "ended"),
    ],
)
def test_the_state_in_a_word(
    works: bool | None, queue_state: str | None, finished: bool, held: bool, expected: str
) -> None:
    assert state_of(works, queue_state, finished, held) == expected


def test_where_a_run_is(tmp_path: Path) -> None:
    attempt = begin_attempt(tmp_path, hosts=["a", "b"], layout={}, world_size=2, now=0)
    end_attempt(tmp_path, attempt.number, exit_code=137, reason="killed", iteration=4, now=9)
    begin_attempt(tmp_path, hosts=["a"], layout={}, world_size=2, restart=1, now=10)
    write_status(tmp_path, Status(2, 5, 10, 50, 500, 1000, 10.0, 2.5, 4, 9.0, time.time()))
    console = io.StringIO()
    assert status([str(tmp_path)], console) == 0
    for words in (
        "state            ended",
        "iteration        5 of 10 (50.0 %)",
        "last checkpoint  iteration 4",
        "1970-01-01 00:00:00Z         2        0  killed (exit code 137, at iteration 4)",
        "1970-01-01 00:00:10Z         1        1  nobody wrote it down",
    ):
        assert words in console.getvalue()
    write_finished(tmp_path, iteration=10, train_iters=10, consumed_samples=100)
    console = io.StringIO()
    assert status([str(tmp_path), "--json"], console) == 0
    record = json.loads(console.getvalue())
    assert (record["state"], record["restarts"]) == ("finished", 1)
    assert record["status"]["seconds_left"] == 50.0
    assert current(tmp_path) is not None


def test_what_is_no_run_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        status([str(tmp_path)])
    with pytest.raises(ConfigError, match="required: RUN_DIR"):
        status([])
