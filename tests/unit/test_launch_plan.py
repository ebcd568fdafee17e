from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import ConfigError
from flagscale.launch import local
from flagscale.launch.__main__ import main
from flagscale.launch.cluster import Cluster
from flagscale.launch.options import OptionTable, known_options
from flagscale.launch.plan import LaunchPlan, ModelSize, describe, plan_node
from flagscale.launch.recipe import read_recipe, resolve_recipe

ROOT = Path(__file__).parents[2]
TINY = ROOT / "examples" / "aquila" / "tiny.yaml"


@pytest.fixture(scope="module")
def options() -> OptionTable:
    return known_options()


def plan(options: OptionTable, *overrides: str, **changes: Any) -> LaunchPlan:
    cluster_changes = {
        key: changes.pop(key) for key in ("nodes", "nproc", "hosts") if key in changes
    }
    recipe = resolve_recipe(
        read_recipe(TINY, options), options, overrides, Path("/run"), Path("/data")
    )
    cluster = Cluster(**{"nodes": 1, "nproc": 4, "port": 12345} | cluster_changes)
    settings: dict[str, Any] = {
        "node_rank": 0,
        "run_dir": Path("/run"),
        "command": ["flagscale", "tiny.yaml"],
        "python": "/bin/python",
        "environ": {},
        "cpu_count": 10,
    }
    return plan_node(recipe, options, cluster, **settings | changes)


def test_each_worker_has_its_command_and_environment(options: OptionTable) -> None:
    planned = plan(options, "--tensor-model-parallel-size", "2")
    assert [worker.rank for worker in planned.workers] == [0, 1, 2, 3]
    third = planned.workers[3]
    assert third.argv[:5] == ("/bin/python", "-m", "flagscale.train", "--num-layers", "4")
    assert third.env == {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "12345",
        "OMP_NUM_THREADS": "2",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "PYTHONUNBUFFERED": "1",
        "FLAGSCALE_RUN_DIR": "/run",
        "FLAGSCALE_ERROR_FILE": str(planned.error_path(3)),
    }
    assert planned.layout.dp_size == 2
    assert "tokens a step     2,048 (128 a sample)" in describe(planned)


def test_the_second_of_three_machines(options: OptionTable) -> None:
    hosts = ("a", "b", "c")
    words = ("--global-batch-size", "24", "--micro-batch-size", "2")
    planned = plan(options, *words, nodes=3, hosts=hosts, node_rank=1)
    assert [worker.rank for worker in planned.workers] == [4, 5, 6, 7]
    last = planned.workers[3].env
    assert (last["RANK"], last["LOCAL_RANK"]) == ("7", "3")
    assert (last["WORLD_SIZE"], last["LOCAL_WORLD_SIZE"]) == ("12", "4")
    assert last["MASTER_ADDR"] == "a"
    assert planned.layout.world_size == 12


def test_a_large_job_is_told_machine_by_machine(options: OptionTable) -> None:
    words = ("--tensor-model-parallel-size", "2", "--global-batch-size", "128")
    lines = describe(plan(options, *words, nodes=8)).splitlines()
    start = lines.index("ranks           tp       cp       dp       pp")
    assert lines[start + 1].split() == ["0-3", "0-1", "0", "0-1", "0"]
    assert lines[start + 8].split() == ["28-31", "0-1", "0", "14-15", "0"]


def test_the_size_is_told_when_it_is_known(options: OptionTable) -> None:
    unknown = describe(plan(options, "--padded-vocab-size=null"))
    assert "only the tokenizer knows the vocabulary" in unknown
    planned = plan(options, "--pipeline-model-parallel-size", "2")
    assert isinstance(planned.size, ModelSize)
    assert len(planned.size.memory) == 2
    text = describe(planned)
    assert "parameters        2,274,432" in text
    assert "stage      weights    gradients    optimizer  activations      working" in text
    for words in (
        ("--decoder-first-pipeline-num-layers", "3"),
        ("--multi-latent-attention",),
        ("--num-experts", "2", "--moe-layer-freq", "[0]*3+[1]"),
    ):
        text = describe(plan(options, *words))
        assert f"not counted: {words[-2] if len(words) > 1 else words[0]}" in text


def test_the_environment_of_the_user_stands(options: OptionTable) -> None:
    environ = {"OMP_NUM_THREADS": "7", "CUDA_DEVICE_MAX_CONNECTIONS": "8"}
    assert environ.items() <= plan(options, environ=environ).workers[0].env.items()
    assert plan(options, cpu_count=2).workers[0].env["OMP_NUM_THREADS"] == "1"


def test_the_files_it_needs(options: OptionTable) -> None:
    needed = {str(needed.path) for needed in plan(options).inputs}
    assert needed == {
        "/data/tiny_text_document.bin",
        "/data/tiny_text_document.idx",
        "/data/tokenizer",
    }
    blend = plan(options, "--data-path", "30", "a", "70", "b", "--tokenizer-model", "org/name")
    assert {str(needed.path) for needed in blend.inputs} == {"a.bin", "a.idx", "b.bin", "b.idx"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("--tensor-model-parallel-size 3", "(?s)ranks do not divide.*heads do not divide"),
        ("--pipeline-model-parallel-size 4 --num-layers 6", "layers do not divide"),
        ("--num-layers-per-virtual-pipeline-stage 3", "virtual pipeline stages"),
        ("--expert-model-parallel-size 2", "without experts"),
        ("--sequence-parallel", "needs tensor parallelism"),
        ("--global-batch-size 17", "16 or 32"),
        ("--eval-iters 2", "keeps no data"),
        (
            "--step-batch-size-schedule 0:16,4096:32",
            "(?s)exclude each other.*learning rate would end",
        ),
        (
            "--global-batch-size=null --train-iters=null --train-samples 99 "
            "--step-batch-size-schedule 0:16,4096:24",
            "(?s)entry 2 of 2.*DP 1 or 2, or",
        ),
        ("--num-layers=null", "(?s)how large.*--num-layers"),
        ("--tensor-model-parallel-size 2 --vocab-size 6001 --no-pad-vocab-size", ""),
        ("--padded-vocab-size 6001 --tensor-model-parallel-size 2", "padded vocabulary"),
    ],
)
def test_what_does_not_fit_is_refused(options: OptionTable, overrides: str, message: str) -> None:
    if not message:
        plan(options, *overrides.split())
        return
    with pytest.raises(ConfigError, match=message):
        plan(options, *overrides.split())


def test_a_job_without_processes(options: OptionTable) -> None:
    with pytest.raises(ConfigError, match="nothing to start"):
        plan(options, nproc=0)
    with pytest.raises(ConfigError, match="nothing to start"):
        plan(options, nodes=0)


@pytest.mark.parametrize(
    "words",
    [
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1",
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2",
        "--pipeline-model-parallel-size 2 --num-layers 5 --decoder-first-pipeline-num-layers 3",
        "--num-experts 4 --expert-model-parallel-size 2 --moe-ffn-hidden-size 64",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--tensor-model-parallel-size 4",
        "--global-batch-size=null --train-iters=null --train-samples 99 "
        "--step-batch-size-schedule 0:16,4096:32",
        "--use-tp-pp-dp-mapping --pipeline-model-parallel-size 2",
    ],
)
def test_what_fits_is_planned_and_described(options: OptionTable, words: str) -> None:
    text = describe(plan(options, *words.split()))
    assert "RANK=3" in text
    assert "flagscale.train" in text


def test_the_tiny_recipes_vocabulary_is_not_padded_at_any_tp(options: OptionTable) -> None:
    # The size of the tokenizer that data/tiny trains: padding would change the softmax.
    entry = read_recipe(TINY, options).find("padded_vocab_size")
    assert entry is not None
    assert entry.values == ("6000",)
    assert [6000 % tp for tp in (1, 2, 4)] == [0, 0, 0]


def test_a_dry_run_starts_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_Job", None)
    environ = {"OUTPUT_DIR": str(tmp_path / "run"), "DATA_DIR": str(tmp_path), "NPROC": "2"}
    assert main([str(TINY), "--dry-run", "--lr", "5"], environ) == 0
    out = capsys.readouterr().out
    assert "--lr 5" in out
    assert "RANK=1" in out
    assert "before a real start: a path does not exist" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "environ"),
    [
        ([str(TINY)], {}),
        ([str(TINY), "--nproc", "x"], {}),
        ([str(TINY)], {"NPROC": "two"}),
        ([str(TINY), "--nproc", "0"], {}),
        ([str(TINY), "--no-such-thing"], {}),
        (["missing.yaml"], {}),
        ([], {}),
    ],
)
def test_bad_input_is_one_error_and_code_2(
    tmp_path: Path,
    words: list[str],
    environ: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = {"OUTPUT_DIR": str(tmp_path / "run"), "DATA_DIR": str(tmp_path)}
    assert main(words, base | environ) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    assert "where:" in err
    assert not (tmp_path / "run").exists()


def test_help_imports_neither_torch_nor_megatron() -> None:
    script = (
        "import sys; from flagscale.launch.__main__ import main\n"
        "try: main(['--help'])\n"
        "finally: print({m.partition('.')[0] for m in sys.modules} & {'torch', 'megatron'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "RECIPE" in done.stdout
    assert done.stdout.endswith("set()\n")
