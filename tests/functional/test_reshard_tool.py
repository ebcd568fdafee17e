"""tools/reshard_optimizer.py as a person meets it: what it prints, refuses, and leaves alone."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness.program import TOOLS, Ended, content, run_program
from harness.saved_job import job_args
from harness.synthetic import Synthetic

TOOL = TOOLS / "reshard_optimizer.py"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dp_reshardable checkpoint of TP2 x PP2."""
    save_dir = tmp_path_factory.mktemp("source") / "ck"
    Synthetic(job_args(tp=2, pp=2), "dp_reshardable", "local").write(save_dir)
    return save_dir


def run(*words: object) -> Ended:
    return run_program("reshard_optimizer", *words)


def only_iteration(save_dir: Path) -> Path:
    (directory,) = save_dir.glob("iter_*")
    return directory


def test_a_dry_run_prints_the_plan_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    sizes = ("--target-tensor-parallel-size", 1, "--target-pipeline-parallel-size", 1)
    code, out, err = run("--load-dir", source, "--save-dir", tmp_path / "x", *sizes, "--dry-run")
    assert (code, err) == (0, "")
    for line in (
        "torch_dist, dp_reshardable; TP 2 x CP 1 x DP 1 x PP 2; layers",
        "torch_dist, fully_reshardable; TP 1 x CP 1 x DP 4 x PP 1; layers",
        "proved on a sample of every parameter",
        "random generators left out: the tensor or pipeline size is another one",
        "give --padded-vocab-size",
        "GB/s, measured",
    ):
        assert line in out, out
    assert list(tmp_path.iterdir()) == []


def test_the_source_is_only_read(source: Path, tmp_path: Path) -> None:
    before = content(source)
    sizes = ("--target-tensor-parallel-size", 1, "--target-ckpt-format", "torch")
    code, out, _ = run("--load-dir", source, "--save-dir", tmp_path / "x", *sizes)
    assert code == 0
    assert "parameters proved (sample)" in out
    assert "resume with --no-load-rng" in out
    assert content(source) == before
    assert (tmp_path / "x" / "latest_checkpointed_iteration.txt").read_text().strip().isdigit()
    assert [path.name for path in (tmp_path / "x").iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--target-tensor-parallel-size", 3), 2, "a divisor of"),
        (("--target-tensor-parallel-size", 0), 2, "a parallel size is none"),
        (("--target-pipeline-parallel-size", 3), 2, "pipeline"),
        (("--target-expert-parallel-size", 2), 2, "expert parallelism in a model without experts"),
        (("--iteration", 77), 3, "there is no checkpoint of this iteration"),
        (("--max-memory", "1KiB"), 2, "too little memory"),
        (("--max-memory", "much"), 2, "is no size such as"),
    ],
)
def test_what_cannot_be_is_refused(
    source: Path, tmp_path: Path, words: tuple[object, ...], code: int, message: str
) -> None:
    got, _, err = run("--load-dir", source, "--save-dir", tmp_path / "x", *words)
    assert got == code, err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "x").exists() or not list((tmp_path / "x").glob("iter_*"))


def test_the_target_may_not_lie_in_the_source(source: Path) -> None:
    for place in (source, only_iteration(source)):
        code, _, err = run("--load-dir", source, "--save-dir", place)
        assert code == 2
        assert "the target would lie in the source" in err


def test_a_place_that_is_taken_is_refused(source: Path, tmp_path: Path) -> None:
    taken = tmp_path / "x" / only_iteration(source).name
    taken.mkdir(parents=True)
    code, _, err = run("--load-dir", source, "--save-dir", tmp_path / "x")
    assert code == 3
    assert "the destination exists already" in err
    assert list(taken.iterdir()) == []


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    code, _, err = run("--load-dir", tmp_path, "--save-dir", tmp_path / "x")
    assert code == 3
    assert str(tmp_path) in err
    assert "Traceback" not in err


class _Hostile:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pwned",)


def test_a_hostile_pickle_is_refused(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / only_iteration(source).name
    subprocess.run(["cp", "-r", only_iteration(source), copy], check=True)
    (copy / ".metadata").write_bytes(pickle.dumps(_Hostile()))
    code, _, err = run("--load-dir", copy, "--save-dir", tmp_path / "x")
    assert code == 3
    assert "system" in err
    assert not Path("pwned").exists()


def test_several_tasks_share_one_reshard(source: Path, tmp_path: Path) -> None:
    tasks = [
        subprocess.Popen(
            [sys.executable, str(TOOL), "--load-dir", source, "--save-dir", tmp_path / "x",
             "--target-tensor-parallel-size", "1"],
            env={**os.environ, "SLURM_PROCID": str(rank), "SLURM_NTASKS": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [task.communicate(timeout=120)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], outputs
    alone = tmp_path / "alone"
    assert (
        run("--load-dir", source, "--save-dir", alone, "--target-tensor-parallel-size", 1)[0] == 0
    )
    shared, single = (
        {name: data for name, (data, _) in content(only_iteration(place)).items()}
        for place in (tmp_path / "x", alone)
    )
    assert shared == single


def test_an_interrupted_run_says_how_to_go_on(source: Path, tmp_path: Path) -> None:
    words = ["--load-dir", source, "--save-dir", tmp_path / "x", "--target-tensor-parallel-size", 1]
    child = subprocess.Popen(
        [sys.executable, str(TOOL), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    staging = tmp_path / "x" / f".{only_iteration(source).name}.partial"
    while child.poll() is None and not staging.exists():
        time.sleep(0.001)
    child.send_signal(signal.SIGINT)
    child.communicate(timeout=120)
    assert child.returncode in (0, 130)  # it may have been faster than the signal
    if child.returncode == 130:
        assert not list((tmp_path / "x").glob("iter_*"))
        assert run(*words)[0] == 0
    assert only_iteration(tmp_path / "x").is_dir()


def test_help_is_quick() -> None:
    code = (
        "import runpy, sys; sys.argv = ['reshard_optimizer.py', '--help']\n"
        f"try: runpy.run_path(r'{TOOL}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules or 'megatron' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stderr.strip() == "False"
