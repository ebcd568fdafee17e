"""What the attention kernels come to on chips that are not there: machine code, and counted work.

Compiles every kernel for every target and head size, each target in a process of its own, and
prints what must hold on a chip before a clock is asked: registers, spilled bytes, shared memory,
matrix instructions in each loop beside those of plain attention. Then the matrix products counted
from the kernels' own ranges. Ends with 1 where a bar is missed.

Example:
    python bench/attention_static.py
    python bench/attention_static.py --arch sm_90 --size 128
    python bench/attention_static.py --work
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
SIZES = (64, 128, 256)
KERNELS = ("forward", "backward_kv", "backward_q")
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes of shared memory a program may take."""
TENSOR_MEMORY_LIMIT = 512
"""Columns of a multiprocessor's tensor memory. What needs more compiles, to a program that stops at
once; the driver never gets to see it, for Triton refuses the launch."""
SPILL_LIMIT = 256
"""Bytes, stored and loaded in all."""
WORK_BARS = {4096: 1.03, 8192: 1.015, 32768: 1.005}
"""Matrix work over plain attention, by length, to the digits given."""

type Row = dict[str, Any]


def compiled(
    arch: str, size: int, dtype: str = "bfloat16", kernels: Sequence[str] = KERNELS
) -> list[Row]:
    """What became of the kernels on one target, compiled in a process of its own."""
    program = [sys.executable, str(ROOT / "bench" / "attention_compile.py"), arch, str(size)]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [*program, "--dtype", dtype, "--kernels", *kernels],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if found.returncode:
        raise RuntimeError(f"{arch}, head size {size}, did not compile:\n{found.stderr}")
    return [json.loads(line) for line in found.stdout.splitlines()]


def is_barred(arch: str, size: int, kernel: str) -> bool:
    """Whether the loops and spills of a kernel are held to the bars, or only shown."""
    return arch in ("sm_80", "sm_90") and (size <= 128 or (arch, kernel) in _AT_256)


_AT_256 = {("sm_90", "forward"), ("sm_90", "backward_q"),
           ("sm_80", "forward"), ("sm_80", "backward_q")}  # fmt: skip


def problems(arch: str, size: int, rows: list[Row]) -> list[str]:
    """The bars that the kernels of one target miss."""
    plain = {row["kernel"]: row for row in rows if not row["far"]}
    found = []
    for row in rows:
        name = f"{arch}, {size}, {row['kernel']}{'' if row['far'] else ' (plain)'}"
        if row["shared"] > SHARED_LIMIT[arch]:
            found.append(f"{name}: {row['shared']} bytes of shared memory")
        if row["tensor_memory"] > TENSOR_MEMORY_LIMIT:
            found.append(f"{name}: {row['tensor_memory']} columns of tensor memory")
        if not row["far"] or not is_barred(arch, size, row["kernel"]):
            continue
        if row["spilled"] > SPILL_LIMIT:
            found.append(f"{name}: {row['spilled']} bytes spilled")
        if any(loop["local"] for loop in row["loops"]):
            found.append(f"{name}: local memory in a loop: {_each(row, 'local')}")
        if set(_each(row, "matrix")) != set(_each(plain[row["kernel"]], "matrix")):
            found.append(f"{name}: matrix instructions {_each(row, 'matrix')}, "
                         f"plain {_each(plain[row['kernel']], 'matrix')}")  # fmt: skip
    return found


def work() -> list[tuple[int, bool, dict[str, float]]]:
    """Length, causal or not, and the ratio of matrix work at 128x64 tiles, w half the length."""
    from attention_work import Work, ratio

    parts = {"forward": ("forward",), "backward": ("backward_kv", "backward_q")}
    return [
        (length, causal, {
            name: ratio(kernels, Work(length, length, length // 2, causal, 128, 64))
            for name, kernels in parts.items()
        })
        for length in WORK_BARS for causal in (True, False)
    ]  # fmt: skip


def work_problems() -> list[str]:
    """The bars that the counted work misses, to as many digits as a bar has."""
    return [
        f"{length} {'causal' if causal else 'full'} {name}: {value:.4f}"
        for length, causal, ratios in work()
        for name, value in ratios.items()
        if round(value, len(str(WORK_BARS[length])) - 2) > WORK_BARS[length]
    ]


def _each(row: Row, count: str) -> list[int]:
    return [loop[count] for loop in row["loops"]]


def _show(arch: str, size: int, rows: list[Row]) -> None:
    plain = {row["kernel"]: row for row in rows if not row["far"]}
    for row in rows:
        if row["far"]:
            stages = f"{row['stages']}{' (not pipelined)' if row['stages'] == 1 else ''}"
            beside = _each(plain[row["kernel"]], "matrix")
            cells = (
                arch, size, row["kernel"], row["tiles"], stages, row["registers"],
                row["spilled"], row["shared"], _each(row, "local"), _each(row, "matrix"), beside,
            )  # fmt: skip
            print("|", " | ".join("-" if x in (-1, []) else str(x) for x in cells), "|", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Prints the tables; ends with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=ARCHS)
    parser.add_argument("--size", nargs="+", type=int, default=SIZES, help="head sizes")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--work", action="store_true", help="only count the work")
    args = parser.parse_args(argv)
    missed = []
    if not args.work:
        head = ("arch", "D", "kernel", "tile", "stages", "registers", "spilled B", "shared B",
                "local in each loop", "matrix in each loop", "plain")  # fmt: skip
        print("|", " | ".join(head), "|")
        print("|---" * len(head) + "|")
        for arch in args.arch:
            for size in args.size:
                rows = compiled(arch, size, args.dtype)
                _show(arch, size, rows)
                missed += problems(arch, size, rows)
        print()
    print("| T, w = T/2 | mask | forward | backward | bar |\n|---|---|---|---|---|")
    for length, causal, ratios in work():
        cells = " | ".join(f"{x:.4f}" for x in ratios.values())
        print(f"| {length} | {'causal' if causal else 'none'} | {cells} | {WORK_BARS[length]} |")
    missed += work_problems()
    print(*[f"missed: {x}" for x in missed], sep="\n")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
