"""The launcher as people use it: a recipe file, and a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from harness.corpus import model_argv

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def recipe(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests' small model as a recipe named ``small``."""
    arguments: dict[str, object] = {}
    for word in model_argv(corpus, save_interval=1000):  # the launcher asks for checkpoints
        if word.startswith("--"):
            arguments[word.removeprefix("--")] = True
        else:
            arguments[list(arguments)[-1]] = word
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(yaml.safe_dump({"model": arguments}))
    return path


def launch_command(recipe: Path, run_dir: Path, nproc: int, *words: object) -> list[str]:
    command = [sys.executable, "-m", "flagscale.launch", str(recipe)]
    command += ["--nproc", str(nproc), "--output-dir", str(run_dir)]
    return [*command, *map(str, words)]


def launch_environ(**environ: str) -> dict[str, str]:
    return {**os.environ, "FLAGSCALE_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", **environ}


@pytest.fixture(scope="session")
def launch(recipe: Path) -> Launch:
    """Run ``python -m flagscale.launch RECIPE`` to its end: ``(run_dir, nproc, *words, **env)``."""

    def launch(
        run_dir: Path, nproc: int, *words: object, recipe: Path = recipe, **environ: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            launch_command(recipe, run_dir, nproc, *words),
            env=launch_environ(**environ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=150,
        )

    return launch
