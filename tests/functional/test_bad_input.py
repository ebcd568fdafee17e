"""Mistakes end before any process group exists: with our own error and exit code 2."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import megatron.training
import pytest
from harness import free_port, train
from harness.corpus import model_argv

Launch = Callable[..., "subprocess.CompletedProcess[str]"]

_HALF_A_WORLD = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
"""One rank of two: whoever makes a process group waits for the other until the test ends it."""

_TP, _PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"

# What to add to a sound command line for two ranks, where the error is, and what it says. {tmp}
# is a directory with an empty "file" in it.
_SHARED = [
    pytest.param("--data-path {tmp}/no", "--data-path", "/no.idx", id="data"),
    pytest.param("--data-path 3 {tmp}/no 1 {tmp}/no", "--data-path", "/no.bin", id="blend"),
    pytest.param("--tokenizer-model {tmp}/no", "--tokenizer-model", "not exist", id="tokenizer"),
    pytest.param("--load {tmp}/no", "--load", "a path does not exist", id="load"),
    pytest.param("--save {tmp} --save-interval 0", "--save-interval", "no interval", id="interval"),
    pytest.param("--save {tmp}/file", "--save", "not a writable directory", id="save-file"),
    pytest.param("--save {tmp}/file/a", "--save", "not a writable directory", id="save-below-file"),
    pytest.param("--tensorboard-dir {tmp}/file", "--tensorboard-dir", "writable", id="tensorboard"),
    pytest.param(f"{_TP} 2 {_PP} 2", "world size, TP x CP x PP", "multiple of 4", id="world"),
    pytest.param(f"{_TP} 0", _TP, "at least 1", id="zero"),
    pytest.param("--num-attention-heads 6", "--hidden-size, --num-", "multiple of 6", id="hidden"),
    pytest.param(f"{_TP} 2 --num-attention-heads 5", _TP, "heads do not divide", id="heads"),
    pytest.param(f"{_PP} 2 --num-layers 3", "--num-layers", "a multiple of 2", id="layers"),
    pytest.param("--global-batch-size 11", "--global-batch-size", "10 or 12", id="batch"),
    pytest.param("--sequence-parallel", "--sequence-parallel", _TP, id="sequence-parallel"),
    pytest.param("--eval-iters 2", "--split, --eval-iters", "keeps no data", id="evaluation"),
    pytest.param("--eval-interval 0", "--eval-interval", "upstream divides", id="eval-interval"),
    pytest.param("--num-layerz 3", "command line", "num-layers", id="unknown-option"),
    pytest.param("--num-layers two", "command line", "two", id="not-a-number"),
    pytest.param("--lr", "command line", "--lr", id="no-value"),
]


def _words(text: str, tmp_path: Path) -> list[str]:
    (tmp_path / "file").touch()
    return text.format(tmp=tmp_path).split()


def _check(output: str, where: str, said: str) -> None:
    assert re.search(rf"^ *where: +{re.escape(where)}", output, re.MULTILINE), output
    assert said in output
    assert "Traceback" not in output


@pytest.mark.parametrize(("added", "where", "said"), _SHARED)
def test_process(corpus: Path, tmp_path: Path, added: str, where: str, said: str) -> None:
    argv = [*model_argv(corpus), *_words(added, tmp_path)]
    result = train(argv, tmp_path / "logs", environ=_HALF_A_WORLD, timeout_s=20)
    assert result.exit_codes == [2]
    _check(result.ranks[0].log, where, said)
    assert result.ranks[0].error is not None
    assert result.ranks[0].error["exit_code"] == 2


@pytest.mark.parametrize(("added", "where", "said"), _SHARED)
def test_launcher(launch: Launch, tmp_path: Path, added: str, where: str, said: str) -> None:
    done = launch(tmp_path / "run", 2, *_words(added, tmp_path))
    assert done.returncode == 2
    _check(done.stdout, where, said)
    assert not (tmp_path / "run").exists()


def test_launcher_without_its_recipe(launch: Launch, tmp_path: Path) -> None:
    done = launch(tmp_path / "run", 2, recipe=tmp_path / "no.yaml")
    assert done.returncode == 2
    _check(done.stdout, f"{tmp_path}/no.yaml", "the recipe cannot be read")


def test_launcher_below_a_file(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = launch(tmp_path / "file" / "run", 2)
    assert done.returncode == 2
    _check(done.stdout, "--output-dir", "not a writable directory")


@pytest.mark.parametrize(
    ("added", "said"),
    [
        pytest.param("--fp16", "megatron-core refuses these arguments", id="upstream-assertion"),
        pytest.param("--recompute-granularity full", "recompute_method must", id="upstream-config"),
        pytest.param("--tokenizer-type NoSuchTokenizer", "NoSuchTokenizer", id="tokenizer-type"),
        pytest.param(
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp}",
            "Unable to instantiate HuggingFace AutoTokenizer",
            id="not-a-tokenizer",
        ),
        pytest.param(
            "--tokenizer-type SentencePieceTokenizer --tokenizer-model {tmp}/file",
            "megatron-core refuses these arguments",
            id="not-a-sentencepiece-model",
        ),
        pytest.param("--allow-changed-patches adm", "did you mean 'adam'?", id="patch-group"),
    ],
)
def test_what_only_the_process_knows(corpus: Path, tmp_path: Path, added: str, said: str) -> None:
    argv = [*model_argv(corpus), *_words(added, tmp_path)]
    result = train(argv, tmp_path / "logs", environ=_HALF_A_WORLD, timeout_s=20)
    assert result.exit_codes == [2]
    assert result.ranks[0].error is not None
    message = str(result.ranks[0].error["message"])
    assert said in message
    assert "cure:" in message


def _run(code: str, argv: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, for what the harness has decided already: platform and patches."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *code.split(maxsplit=1), *argv],
        env={**os.environ, **place, **_HALF_A_WORLD, **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


_ENTRY = "-m flagscale.train"
_MEGATRON_FIRST = (
    "-c import sys, megatron.core; from flagscale.train.__main__ import guarded_main;"
    "raise SystemExit(guarded_main(sys.argv[1:]))"
)


@pytest.mark.parametrize(
    ("code", "environ", "where", "said"),
    [
        pytest.param(
            _ENTRY, {"FLAGSCALE_PLATFORM": "cpuu"}, "FLAGSCALE_PLATFORM", "did you mean 'cpu'?",
            id="unknown",
        ),
        pytest.param(
            _ENTRY, {"FLAGSCALE_PLATFORM": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "--platform",
            "torch.cuda.is_available() is false", id="no-gpu",
        ),
        pytest.param(
            _MEGATRON_FIRST, {"FLAGSCALE_PLATFORM": "cpu"}, "megatron.core",
            "imported before the device platform was chosen", id="megatron-first",
        ),
        pytest.param(
            _ENTRY, {"FLAGSCALE_PLATFORM": "cpu", "FLAGSCALE_DISABLE_PATCHES": "adam,rampp"},
            "FLAGSCALE_DISABLE_PATCHES", "there is no patch group 'rampp'", id="patch-group",
        ),
    ],
)  # fmt: skip
def test_platform_and_patches(
    corpus: Path, code: str, environ: dict[str, str], where: str, said: str
) -> None:
    done = _run(code, model_argv(corpus), **environ)
    assert done.returncode == 2, done.stderr
    _check(done.stderr, where, said)


def test_changed_upstream(corpus: Path, tmp_path: Path) -> None:
    # megatron is a namespace package: a training package of our own goes before the installed one.
    installed = Path(megatron.training.__file__).parent
    overlay = tmp_path / "megatron" / "training"
    overlay.mkdir(parents=True)
    for path in installed.iterdir():
        (overlay / path.name).symlink_to(path)
    source = (installed / "training.py").read_text()
    changed = source.replace("def training_log(", "def training_log(\n    extra,", 1)
    assert changed != source
    (overlay / "training.py").unlink()
    (overlay / "training.py").write_text(changed)

    done = _run(_ENTRY, model_argv(corpus), FLAGSCALE_PLATFORM="cpu", PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stderr
    assert "group log-interval: megatron.training.training:training_log" in done.stderr
    assert "FLAGSCALE_DISABLE_PATCHES" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "environ", "said"),
    [
        pytest.param(["--platform", "cpuu"], {}, "there is no device platform", id="platform"),
        pytest.param(
            [], {"FLAGSCALE_DISABLE_PATCHES": "rampp"}, "there is no patch group", id="patch-group"
        ),
    ],
)
def test_launcher_tells_what_a_process_found(
    launch: Launch, tmp_path: Path, words: list[str], environ: dict[str, str], said: str
) -> None:
    done = launch(tmp_path / "run", 2, *words, **environ)
    assert done.returncode == 2
    last = done.stdout.rpartition("ended first (exit code 2)")[2]
    assert said in last
    assert "cure:" in last
