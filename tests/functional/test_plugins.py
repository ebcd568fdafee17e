"""Plugins of other distributions, really installed and really trained with; and broken ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from harness import free_port
from harness.corpus import model_argv

_TESTS = Path(__file__).parents[1]
_EXAMPLE = {
    name: (_TESTS / "third_party" / name).read_text()
    for name in ("pyproject.toml", "flagscale_example_plugin.py")
}
_MODULE = "flagscale_example_plugin.py"


def _install(files: Mapping[str, str], work_dir: Path) -> Path:
    """Build and install a distribution into a directory of its own; return that directory."""
    source, target = work_dir / "source", work_dir / "site"
    source.mkdir()
    for name, text in files.items():
        (source / name).write_text(text)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--target", str(target), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def _train(site: Path, argv: list[str], **environ: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "FLAGSCALE_PLUGINS"}
    return subprocess.run(
        [sys.executable, "-m", "flagscale.train", *argv],
        env={
            **inherited,
            "PYTHONPATH": str(site),
            "FLAGSCALE_PLATFORM": "cpu",
            "OMP_NUM_THREADS": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            **environ,
        },
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the unbroken plugin is installed."""
    return _install(_EXAMPLE, tmp_path_factory.mktemp("example"))


def test_argument_listeners_model_hook_and_patch(
    example: Path, corpus: Path, tmp_path: Path
) -> None:
    argv = model_argv(corpus, train_iters=2, micro_batch_size=3, lr_decay_style="constant")
    journal = tmp_path / "journal.jsonl"
    argv += ["--example-journal", str(journal), "--example-lr-factor", "0.5"]
    done = _train(example, argv)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"plugins: .*\bexample\b", done.stdout)
    assert "on   example-lr" in done.stdout

    rows = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [row["event"] for row in rows] == ["start", *(["loss"] * 4 + ["step"]) * 2, "exit"]
    assert rows[-1]["exit_code"] == 0
    assert {row["learning_rate"] for row in rows if row["event"] == "step"} == {5e-4}  # of 1e-3
    first_step = [row["per_sample"] for row in rows if row["event"] == "loss"][:4]
    assert [len(samples) for samples in first_step] == [3, 3, 3, 3]
    mean = sum(sum(samples) for samples in first_step) / 12
    printed = re.search(r"iteration +1/.*lm loss: (\S+)", done.stdout)
    assert printed
    assert float(printed[1]) == pytest.approx(mean, abs=1e-5)


def test_its_own_refusal_is_a_configuration_error(example: Path, corpus: Path) -> None:
    done = _train(example, [*model_argv(corpus), "--example-lr-factor", "-1"])
    assert done.returncode == 2
    assert "the factor must be positive" in done.stderr


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        pytest.param(
            "import functools", "import no_such_module", "plugin 'example' cannot be imported",
            id="import",
        ),
        pytest.param(
            "PLUGIN = Plugin(", "PLUGIN = dict(", "plugin 'example' is not a plugin", id="type"
        ),
        pytest.param(
            '"--example-journal"', '"--num-layers"',
            "plugin 'example' failed to add its arguments", id="option",
        ),
        pytest.param(
            "def write(event", "raise OSError('the disk is full')\n\n    def write(event",
            "plugin 'example' failed to connect its hooks", id="connect",
        ),
        pytest.param(
            '"megatron.core.optimizer_param_scheduler:OptimizerParamScheduler.get_lr"',
            '"megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__"',
            "two patches claim the same target", id="patch",
        ),
    ],
)  # fmt: skip
def test_broken_plugins_stop_the_job(
    corpus: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    broken = _EXAMPLE[_MODULE].replace(old, new)
    assert broken != _EXAMPLE[_MODULE]
    site = _install({**_EXAMPLE, _MODULE: broken}, tmp_path)
    # A world of two with one rank: a process group would wait for the other.
    done = _train(site, model_argv(corpus), WORLD_SIZE="2", RANK="0")
    assert done.returncode == 2
    assert said in done.stderr
    assert "example" in done.stderr


@pytest.mark.parametrize(("allowed", "returncode"), [("", 2), ("examples", 2), ("example", 0)])
def test_allow_list(example: Path, allowed: str, returncode: int, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from flagscale.errors import FlagScaleError\n"
        "from flagscale.plugins import load_plugins\n"
        "try:\n"
        "    names = [p.name for p in load_plugins()]\n"
        "    assert load_plugins() == load_plugins()\n"
        "except FlagScaleError as error:\n"
        "    print(error); raise SystemExit(error.exit_code)\n"
        "assert not {'torch', 'megatron'} & set(sys.modules)\n"
        "raise SystemExit(0 if 'example' in names else 2)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(example), "FLAGSCALE_PLUGINS": allowed},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == returncode, done.stdout + done.stderr
    assert ("did you mean 'example'" in done.stdout) == (allowed == "examples")


def test_the_device_plugin_of_the_documentation(corpus: Path, tmp_path: Path) -> None:
    page = (_TESTS.parent / "docs" / "plugins.md").read_text()
    (toml,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    (module,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    site = _install({"pyproject.toml": toml, "flagscale_acme.py": module}, tmp_path)
    done = _train(site, [*model_argv(corpus, train_iters=1), "--platform", "acme"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "platform: acme (--platform): ACME devices" in done.stdout
    assert "on   acme-device: the platform is acme" in done.stdout
    assert "off  cpu-device: the platform is not cpu" in done.stdout
    assert "device: ACME One, peak 0.5 TFLOP/s" in done.stdout
