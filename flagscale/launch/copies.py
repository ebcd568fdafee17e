"""What an attempt was run with, kept in the run directory: recipe, environment, versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import flagscale
from flagscale.errors import ConfigError

__all__ = ["attempt_directory", "public_environment", "write_copies"]

_SECRET: Final = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL|COOKIE|AUTH|PRIVATE", re.IGNORECASE)


def attempt_directory(run_dir: Path, number: int) -> Path:
    """Where what belongs to one attempt lies."""
    return run_dir / "attempts" / f"{number:04d}"


def public_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what may be a secret, by the names of the variables."""
    return {
        name: value
        for name, value in sorted(environ.items())
        if not _SECRET.search(name) and "://" not in value.partition("@")[0]
    }


def write_copies(
    directory: Path, *, recipe: str, command: Sequence[str], environ: Mapping[str, str]
) -> None:
    """Write what an attempt runs with; the directory is made.

    Raises:
        ConfigError: It cannot be written.
    """
    files = {
        "recipe.yaml": recipe,
        "command.txt": shlex.join(command) + "\n",
        "environment.json": json.dumps(public_environment(environ), indent=1) + "\n",
        "versions.json": json.dumps(_versions(), indent=1) + "\n",
    }
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (directory / name).write_text(text)
    except OSError as error:
        raise ConfigError(
            "the run directory cannot be written", where=str(directory), got=error
        ) from error


def _versions() -> dict[str, str]:
    versions = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
        if distribution.metadata["Name"]
    }
    known = dict(sorted(versions.items(), key=lambda item: item[0].lower()))
    return {
        "python": sys.version.split("\n")[0],
        "machine": platform.platform(),
        "revision": _revision(),
        **known,
    }


def _revision() -> str:
    """The commit of the source tree, and whether it was changed since."""
    root = Path(flagscale.__file__).parents[1]
    if not (root / ".git").exists():
        return "not from a git repository"
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"
    return done.stdout.strip()
