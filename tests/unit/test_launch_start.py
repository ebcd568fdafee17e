"""By what way a job starts: planned for all surroundings, run against stand-in programs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.errors import ConfigError
from flagscale.launch import slurm
from flagscale.launch.cluster import Cluster, expand_nodelist, node_rank_of, slurm_port
from flagscale.launch.options import OptionTable, known_options
from flagscale.launch.ownership import cluster_name
from flagscale.launch.recipe import read_recipe
from flagscale.launch.start import (
    Machine,
    Request,
    Start,
    Way,
    describe_start,
    execute_start,
    plan_start,
)
from flagscale.runs.finished import write_finished
from flagscale.runs.lock import read_holder

AQUILA = Path(__file__).parents[2] / "examples" / "aquila"
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "gpu[001-064]", "SLURM_JOB_NUM_NODES": "64"}
STEP = JOB | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[001-064]",
    "SLURM_NTASKS_PER_NODE": "8",
    "SLURM_NTASKS": "512",
    "SLURM_NODEID": "2",
    "SLURM_PROCID": "19",
    "SLURM_LOCALID": "3",
}


@pytest.fixture(scope="module")
def options() -> OptionTable:
    return known_options()


def start(
    options: OptionTable,
    name: str = "34b",
    environ: Mapping[str, str] | None = None,
    *,
    has_slurm: bool = False,
    hostname: str = "laptop.example.org",
    **request: Any,
) -> Start:
    """A start as ``train_NAME.sh`` would plan it."""
    asked = {"output_dir": Path("/run"), "data_dir": Path("/data")} | request
    path = AQUILA / f"{name}.yaml"
    machine = Machine(
        environ=environ or {},
        hostname=hostname,
        work_dir=Path("/work dir"),
        python="/bin/python",
        cpu_count=32,
        free_port=4321,
        has_slurm=has_slurm,
    )
    return plan_start(Request(path, **asked), read_recipe(path, options), options, machine)


# --- the way --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "environ", "has_slurm", "hosts", "way"),
    [
        ("34b", {}, False, (), Way.NONE),
        ("34b", {}, True, (), Way.SUBMIT),
        ("34b", JOB | {"SLURM_PROCID": "0"}, True, (), Way.STEP),
        ("34b", STEP, True, (), Way.TASK),
        ("7b", {}, True, tuple("abcdefghijkl"), Way.HERE),
        ("tiny", {}, True, (), Way.HERE),
        ("tiny", STEP, True, (), Way.HERE),
    ],
)
def test_the_way_follows_from_the_surroundings(
    options: OptionTable,
    name: str,
    environ: dict[str, str],
    has_slurm: bool,
    hosts: tuple[str, ...],
    way: Way,
) -> None:
    node_rank = 0 if hosts else None
    planned = start(options, name, environ, has_slurm=has_slurm, hosts=hosts, node_rank=node_rank)
    assert planned.way is way


def test_nodes_on_the_command_line_ask_slurm_for_them(options: OptionTable) -> None:
    planned = start(options, "tiny", has_slurm=True, nodes=2, nproc=2, sbatch=("--partition=p",))
    assert planned.way is Way.SUBMIT
    assert planned.submission is not None
    assert planned.submission.command == ("sbatch", "--parsable", "--partition=p", "/run/job.sh")
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=2\n" in planned.submission.script
    assert "--sbatch=--partition=p" in planned.plan.command


# --- Slurm: the job -------------------------------------------------------------------------------


def test_the_job_runs_the_resolved_recipe(options: OptionTable) -> None:
    planned = start(options, has_slurm=True, overrides=("--lr", "1e-5"))
    assert planned.submission is not None
    assert planned.submission.script == (
        "#!/usr/bin/env bash\n"
        "#SBATCH --job-name=34b\n"
        "#SBATCH --nodes=16-65\n"
        "#SBATCH --gpus-per-node=8\n"
        "#SBATCH --exclusive\n"
        "#SBATCH --output=/run/logs/slurm_%j.log\n"
        "#SBATCH --open-mode=append\n"
        "#SBATCH --requeue\n"
        "#SBATCH --signal=USR1@120\n"
        "set -euo pipefail\n"
        "cd '/work dir'\n"
        "exec /bin/python -m flagscale.launch /run/recipe.resolved.yaml --nodes 64 --nproc 8 "
        "--output-dir /run\n"
    )
    assert "lr: 1e-5" in planned.plan.resolved_recipe
    assert planned.step[:4] == ("srun", "--nodes=64", "--ntasks=512", "--ntasks-per-node=8")
    assert planned.step[-10:-7] == ("/bin/python", "-m", "flagscale.launch")
    assert planned.step[-7] == "/run/attempts/NUMBER/recipe.yaml"


@pytest.mark.parametrize("words", [(), ("--platform", "cpu")])
def test_on_cpus_no_gpus_are_asked_for(options: OptionTable, words: tuple[str, ...]) -> None:
    environ = {} if words else {"FLAGSCALE_PLATFORM": "cpu"}
    planned = start(options, environ=environ, has_slurm=True, overrides=words)
    assert planned.submission is not None
    assert "gpus" not in planned.submission.script


def test_inside_an_allocation_srun_starts_the_launcher_again(options: OptionTable) -> None:
    planned = start(options, environ=JOB)
    assert planned.cluster == Cluster(64, 8, planned.cluster.hosts, slurm_port(77))
    assert planned.cluster.hosts[0] == "gpu001"
    assert planned.step[-6:] == planned.plan.command[-6:]
    assert planned.job is not None
    assert planned.job.hosts == planned.cluster.hosts
    assert {"--kill-on-bad-exit=1", "--distribution=block"} < set(planned.step)
    assert "--output=/run/logs/rank_%t.log" in planned.step


def test_the_allocation_has_the_last_word_on_its_size(options: OptionTable) -> None:
    half = JOB | {"SLURM_JOB_NODELIST": "gpu[01-32]"}
    assert start(options, environ=half).plan.layout.dp_size == 16
    four = JOB | {"SLURM_NTASKS_PER_NODE": "4"}
    assert start(options, environ=four).plan.layout.dp_size == 16


def test_a_task_is_one_rank(options: OptionTable) -> None:
    planned = start(options, environ=STEP)
    worker = slurm.worker_of_task(planned.plan, STEP)
    assert worker.rank == 19
    expected = {
        "RANK": "19",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "512",
        "MASTER_ADDR": "gpu001",
        "MASTER_PORT": str(slurm_port(77)),
        "OMP_NUM_THREADS": "4",
    }
    assert expected.items() <= worker.env.items()


@pytest.mark.parametrize(
    "change", [{"SLURM_NTASKS": "256"}, {"SLURM_PROCID": "3"}, {"SLURM_LOCALID": "0"}]
)
def test_tasks_in_another_order_are_refused(options: OptionTable, change: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="are not the ranks"):
        slurm.worker_of_task(start(options, environ=STEP).plan, STEP | change)


@pytest.mark.parametrize(
    "environ",
    [{"SLURM_JOB_ID": "77"}, JOB | {"SLURM_JOB_ID": "x"}, JOB | {"SLURM_NTASKS_PER_NODE": "8(x2)"}],
)
def test_an_incomplete_environment_of_slurm_is_told(
    options: OptionTable, environ: dict[str, str]
) -> None:
    with pytest.raises(ConfigError, match="Slurm's environment is incomplete"):
        start(options, environ=environ)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b-1", ["a", "b-1"]),
        ("gpu[08-10,3],login", ["gpu08", "gpu09", "gpu10", "gpu3", "login"]),
        ("r[1-2]n[1,3].x", ["r1n1.x", "r1n3.x", "r2n1.x", "r2n3.x"]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
    ],
)
def test_node_lists_are_expanded(text: str, hosts: list[str]) -> None:
    assert list(expand_nodelist(text)) == hosts


@pytest.mark.parametrize("text", ["", "a[1-2", "a[x]", "a[1-]b]", ","])
def test_broken_node_lists_are_told(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        expand_nodelist(text)


@given(job_id=st.integers(1, 10**9))
def test_a_jobs_port_is_not_one_of_the_kernels(job_id: int) -> None:
    assert 1024 < slurm_port(job_id) < 32768  # net.ipv4.ip_local_port_range begins there


def test_this_machine_finds_itself_among_the_hosts(options: OptionTable) -> None:
    hosts = tuple(f"node{i}" for i in range(12))
    planned = start(options, "7b", hosts=hosts, hostname="node3.example.org", port=5555)
    assert [worker.rank for worker in planned.plan.workers] == list(range(24, 32))
    assert planned.plan.workers[0].env["MASTER_ADDR"] == "node0"
    assert planned.plan.workers[0].env["MASTER_PORT"] == "5555"
    assert planned.plan.command == planned.launchers[3]
    assert f"node11: {' '.join(planned.launchers[11])}" in describe_start(planned)
    assert planned.launchers[11][-2:] == ("--node-rank", "11")


def test_one_host_is_this_machine(options: OptionTable) -> None:
    planned = start(options, "7b", hosts=("localhost",), nproc=4)
    assert planned.plan.layout.world_size == 4
    assert planned.plan.workers[0].env["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("given_rank", "message"), [(None, "not in the list"), (2, "no such host"), (-1, "no such")]
)
def test_a_machine_that_is_not_among_the_hosts(given_rank: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        node_rank_of(("a", "b"), given_rank, "c")


# --- doing it -------------------------------------------------------------------------------------


def with_paths(planned: Start) -> Start:
    """The start with nothing missing on the disk."""
    return replace(planned, plan=replace(planned.plan, inputs=(), outputs=()))


def program(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_without_slurm_and_hosts_the_error_says_what_is_missing(options: OptionTable) -> None:
    with pytest.raises(ConfigError, match=r"(?s)64 machines of 8 .*sbatch on PATH.*--dry-run"):
        execute_start(start(options), {})


def test_a_missing_path_is_told_before_the_queue_is_paid_for(
    options: OptionTable, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    for environ in ({}, JOB):
        planned = start(options, environ=environ, has_slurm=True, output_dir=run_dir)
        with pytest.raises(ConfigError, match=r"/data/text_document\.bin"):
            execute_start(planned, environ)
    assert not run_dir.exists()


@pytest.fixture
def bin_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins for Slurm's programs: they are first on the path, and know of no job."""
    directory = tmp_path / "bin"
    directory.mkdir()
    program(
        directory / "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    )
    program(directory / "scontrol", "echo 'ClusterName = test'")
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
    cluster_name.cache_clear()
    yield directory
    cluster_name.cache_clear()


def submission(options: OptionTable, tmp_path: Path) -> Start:
    return with_paths(start(options, has_slurm=True, output_dir=tmp_path / "run"))


def test_submitting(
    options: OptionTable, tmp_path: Path, bin_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(bin_dir / "sbatch", f'printf "%s\\n" "$@" > {tmp_path}/submitted; echo 12')
    planned = submission(options, tmp_path)
    assert planned.submission is not None
    assert execute_start(planned, {}) == 0
    assert "Submitted batch job 12\n" in capsys.readouterr().out
    *_, script = (tmp_path / "submitted").read_text().splitlines()
    assert script == str(tmp_path / "run" / "job.sh")
    assert Path(script).read_text() == planned.submission.script
    subprocess.run(["bash", "-n", script], check=True)
    assert (tmp_path / "run" / "logs").is_dir()
    assert read_recipe(tmp_path / "run" / "recipe.resolved.yaml", options).nodes == 64
    assert str(read_holder(tmp_path / "run")) == "Slurm job 12 of cluster test"


def test_what_slurm_refuses_is_told_in_its_words(
    options: OptionTable, tmp_path: Path, bin_dir: Path
) -> None:
    program(bin_dir / "sbatch", "echo 'sbatch: error: invalid partition specified: x' >&2; exit 1")
    with pytest.raises(ConfigError, match=r"(?s)does not take .*got: +invalid partition specified"):
        execute_start(submission(options, tmp_path), {})
    assert read_holder(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("answer", "refused"), [("echo RUNNING", True), ("echo CANCELLED", False), ("exit 1", True)]
)
def test_a_second_job_is_refused_on_evidence(
    options: OptionTable, tmp_path: Path, bin_dir: Path, answer: str, refused: bool
) -> None:
    program(bin_dir / "sbatch", "echo 12")
    assert execute_start(submission(options, tmp_path), {}) == 0
    program(bin_dir / "squeue", answer)
    program(bin_dir / "sbatch", "echo 13")
    if refused:
        with pytest.raises(ConfigError, match="Slurm job 12"):
            execute_start(submission(options, tmp_path), {})
    else:
        assert execute_start(submission(options, tmp_path), {}) == 0
    assert str(read_holder(tmp_path / "run")).startswith(f"Slurm job {12 if refused else 13} ")


def test_a_finished_run_is_not_submitted(
    options: OptionTable, tmp_path: Path, bin_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program(bin_dir / "sbatch", "echo 12")
    planned = submission(options, tmp_path)
    planned = replace(planned, plan=replace(planned.plan, train_samples=None, train_iters=9))
    run_dir, save_dir = tmp_path / "run", planned.plan.save_dir
    assert save_dir is not None
    (save_dir / "iter_0000009").mkdir(parents=True)
    (save_dir / "latest_checkpointed_iteration.txt").write_text("9")
    write_finished(run_dir, iteration=9, train_iters=9, consumed_samples=9)
    assert execute_start(planned, {}) == 0
    assert "training is over, at iteration 9 of 9" in capsys.readouterr().out
    assert read_holder(run_dir) is None
    longer = replace(planned, plan=replace(planned.plan, train_iters=10))
    assert execute_start(longer, {}) == 0
    assert not (run_dir / "finished.json").exists()
    assert "finished.json says iteration 9, and --train-iters is now 10" in capsys.readouterr().out


def test_a_task_becomes_the_training_process(options: OptionTable) -> None:
    script = (
        "import os, sys; from flagscale.launch.plan import Worker\n"
        "from flagscale.launch.slurm import execute_task\n"
        'code = \'import os; print(os.environ["RANK"], os.environ["KEPT"], os.getpid())\'\n'
        "worker = Worker(3, (sys.executable, '-c', code), {'RANK': '3'})\n"
        "print(os.getpid(), flush=True)\n"
        "execute_task(worker, {**os.environ, 'KEPT': 'yes', 'SLURM_RESTART_COUNT': '2'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(AQUILA.parents[1])},
    )  # fmt: skip
    pid, header, line = done.stdout.splitlines()
    assert line == f"3 yes {pid}"
    assert " rank 3 restart 2: " in header


def test_the_description_has_all_of_it(options: OptionTable) -> None:
    text = describe_start(start(options, has_slurm=True))
    for piece in (
        "ranks             512 = TP 4 x CP 1 x DP 32 x PP 4",
        "tokens a step     4,194,304",
        "from 32 samples (131,072 tokens) a step, in 31 rises over the first 8,192,000,000",
        "parameters        33,694,636,032",
        "flash attention",
        "504-511        0-3        0    30-31        3",
        "MASTER_ADDR=FIRST-NODE-OF-THE-JOB",
        "way: a job is submitted to Slurm",
        "to submit the job: sbatch --parsable /run/job.sh",
        "  #SBATCH --nodes=16-65",
        "in the job, once a rank\n  srun ",
        "first the health check",
    ):
        assert piece in text
