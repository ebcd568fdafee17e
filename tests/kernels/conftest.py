"""These tests run the kernels in Triton's interpreter, in a process of their own.

Triton decides between compiler and interpreter when a kernel is defined, for the whole process.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if "flagattention.kernels.launch" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("run tests/kernels in a process of its own")
os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from harness.triton_interpreter import install

from flagattention.kernels import frame
from flagattention.kernels.configs import Tiles

install()


@pytest.fixture
def set_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[Tiles], None]:
    """Makes every kernel take these tiles."""
    return lambda tiles: monkeypatch.setattr(frame, "choose", lambda *_: tiles)
