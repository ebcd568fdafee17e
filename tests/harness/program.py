"""Runs a program of the project in this process, which saves it the start of another."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

__all__ = ["TOOLS", "Ended", "content", "run_program"]

TOOLS = Path(__file__).parents[2] / "tools"


class Ended(NamedTuple):
    """How a program ended."""

    code: int
    out: str
    err: str


@functools.cache
def _program(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_program(name: str, *words: object) -> Ended:
    """Call a program of ``tools/`` with arguments."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = _program(name).main(list(map(str, words)))
        except SystemExit as stopped:  # argparse's own
            code = stopped.code
    return Ended(code, out.getvalue(), err.getvalue())


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of the last change of every file, by relative path."""
    return {
        str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }
