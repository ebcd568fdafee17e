"""What the compiler makes of the kernels for chips that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import attention_static
import pytest
from attention_static import KERNELS, Row, problems, work, work_problems

ROW: Row = {
    "kernel": "forward", "far": True, "tiles": "128x64", "stages": 2, "shared": 1000,
    "tensor_memory": 512, "registers": 100, "spilled": 256,
    "loops": [{"matrix": 12, "local": 0}] * 5,
}  # fmt: skip
PLAIN = {**ROW, "far": False, "loops": ROW["loops"][:2]}


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_loops_are_those_of_plain_attention(arch: str, size: int) -> None:
    rows = attention_static.compiled(arch, size)
    assert [(row["kernel"], row["far"]) for row in rows] == [
        (kernel, far) for far in (True, False) for kernel in KERNELS
    ]
    for row in rows:
        assert min(loop["matrix"] for loop in row["loops"]) >= 4
    assert problems(arch, size, rows) == []


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"spilled": 257}, "257 bytes spilled"),
        ({"shared": 166_913}, "shared memory"),
        ({"tensor_memory": 513}, "513 columns of tensor memory"),
        ({"loops": [{"matrix": 12, "local": 0}] * 4 + [{"matrix": 12, "local": 1}]}, "local"),
        ({"loops": [{"matrix": 12, "local": 0}] * 4 + [{"matrix": 18, "local": 0}]}, "matrix"),
    ],
)
def test_a_missed_bar_is_named(change: dict[str, Any], what: str) -> None:
    assert problems("sm_80", 64, [ROW, PLAIN]) == []
    (found,) = problems("sm_80", 64, [{**ROW, **change}, PLAIN])
    assert what in found


def test_little_work_is_done_twice() -> None:
    assert work_problems() == []
    ratios = {(length, causal): found for length, causal, found in work()}
    assert ratios[4096, True] == pytest.approx({"forward": 1 + 1 / 33, "backward": 1 + 1 / 33})
    assert ratios[4096, False]["forward"] < 1.016


THRESHOLDS = """
import sys
sys.path[:0] = sys.argv[1:]
import json
import torch
import attention_compile as c
from dataclasses import replace
seen = set()
for w in (0, 1, 16, 17, 4096, -5):
    q = torch.empty(1, 4, 8192, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(1, 4, 8192, device="meta")
    problem = c.Problem(True, 0.125, w, 3 * w, 0, 0, None, None, 8192, 8192)
    planned = c.launch.plan_forward((q,) * 5, q, lse, problem, "sm_90")
    made = c.source(planned)
    seen.add(str((made.signature, made.constants, made.attrs)))
print(len(seen))
"""


def test_another_threshold_is_not_another_kernel() -> None:
    root = Path(attention_static.__file__).parents[1]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", THRESHOLDS, str(root), str(root / "bench")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(found.stdout) == 1
