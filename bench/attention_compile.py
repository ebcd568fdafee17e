"""Compiles the attention kernels for a chip that is not there, and looks at the machine code.

Run as a program, it compiles for one target, for that is what a process can do, and prints one JSON
object a line:

    python bench/attention_compile.py sm_90 128 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]

import torch  # noqa: E402
import triton  # noqa: E402
from attention_sass import Loop, matrix_loops, read_usage  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from flagattention.kernels import launch  # noqa: E402
from flagattention.kernels.frame import Frame  # noqa: E402
from flagattention.problem import NEVER, Problem  # noqa: E402
from flagattention.turns import Tables  # noqa: E402

LOOPS = {
    "forward": (5, 2),
    "backward_kv": (6, 3),
    "backward_q": (5, 2),
    "total": (6, 3),
    "nlpe_forward": (5, 2),
    "nlpe_backward_q": (5, 2),
}
"""Loops that multiply matrices, with far keys and as plain attention."""

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32"}
_LENGTH, _HEADS = 4096, 8


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel.

    Attributes:
        kernel: Its name.
        far: Whether it was compiled with far keys, or as plain attention.
        tiles: Its configuration, as "128x64", with warps and stages.
        stages: Tiles in flight.
        shared: Bytes of shared memory.
        tensor_memory: Columns of tensor memory; 0 on a chip without.
        registers: Of a thread; -1 where the assembler does not say.
        spilled: Bytes stored to and loaded from local memory; -1 as above.
        loops: Innermost loops with matrix instructions.
    """

    kernel: str
    far: bool
    tiles: str
    stages: int
    shared: int
    tensor_memory: int
    registers: int
    spilled: int
    loops: list[Loop]


def launches(
    arch: str, size: int, dtype: torch.dtype, far: bool, *, causal: bool = True, group: int = 6
) -> dict[str, launch.Launch]:
    """What would be launched on a chip, with tensors that have no storage."""
    q = torch.empty(1, _HEADS * group, _LENGTH, size, dtype=dtype, device="meta")
    k = torch.empty(1, _HEADS, _LENGTH, size, dtype=dtype, device="meta")
    lse = torch.empty(1, _HEADS * group, _LENGTH, device="meta")
    problem = Problem(
        causal=causal,
        sm_scale=size**-0.5,
        threshold=_LENGTH // 2 if far else NEVER,
        q_offset=0,
        k_offset=0,
        n_sink=0,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=_LENGTH,
        max_seqlen_k=_LENGTH,
    )
    tensors, totals = (q, k, q, k, k), lse
    _, keys, queries = launch.plan_backward(tensors, q, None, q, lse, tensors, problem, arch)
    tables = _tables(size)
    turning = Frame(q, k, problem, arch, tables)
    return {
        "forward": launch.plan_forward(tensors, q, lse, problem, arch),
        "backward_kv": keys,
        "backward_q": queries,
        "total": launch.plan_total(tensors[:4], lse, totals, problem, arch),
        "nlpe_forward": launch.plan_forward(tensors, q, lse, problem, arch, tables),
        "nlpe_backward_q": launch.plan_queries(turning, tensors, (q, lse, lse), (q, q)),
    }


def _tables(size: int) -> Tables:
    near, far = (torch.empty(rows, size // 2, device="meta") for rows in (_LENGTH, 1))
    return Tables((near, near), (far, far), torch.empty(_LENGTH, device="meta"), interleaved=False)


def source(planned: launch.Launch) -> ASTSource:
    """The kernel as Triton would specialise it for these arguments."""
    kernel, constants, attributes, signature = planned.kernel, {}, {}, {}
    for index, (param, value) in enumerate(zip(kernel.params, planned.arguments, strict=True)):
        signature[param.name] = _describe(
            value, (index,), not param.do_not_specialize, constants, attributes
        )
    return ASTSource(kernel, signature, constants, attributes)


def _describe(
    value: Any, path: tuple[int, ...], specialize: bool, constants: dict, attributes: dict
) -> Any:
    if isinstance(value, tuple):
        fields = (_describe(x, (*path, i), specialize, constants, attributes)
                  for i, x in enumerate(value))  # fmt: skip
        return type(value)(*fields)
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{value.block_shape}>"
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int) and not (specialize and value == 1):
        if specialize and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    constants[path] = getattr(value, "value", value)
    return "constexpr"


def target(arch: str) -> GPUTarget:
    """The target of an architecture."""
    if arch.startswith("sm_"):
        return GPUTarget("cuda", int(arch[3:]), 32)
    return GPUTarget("hip", arch, 64)


def examine(arch: str, name: str, planned: launch.Launch, far: bool) -> Compiled:
    """Compiles one kernel and reads its machine code, where it is NVIDIA's."""
    tiles = planned.tiles
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    made = triton.compile(source(planned), target=target(arch), options=options)
    registers, spilled, loops = -1, -1, []
    if arch.startswith("sm_"):
        usage = read_usage(_ptxas(arch, made.asm["ptx"]))
        registers, spilled = usage.registers, usage.spilled
    if arch in ("sm_80", "sm_90"):
        loops = matrix_loops(_nvdisasm(made.asm["cubin"]), LOOPS[name][not far])
    return Compiled(
        name,
        far,
        f"{tiles.block_m}x{tiles.block_n}, {tiles.warps} warps{', tma' if tiles.tma else ''}",
        tiles.stages,
        made.metadata.shared,
        getattr(made.metadata, "tmem_size", 0) or 0,
        registers,
        spilled,
        loops,
    )


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _ptxas(arch: str, ptx: str) -> str:
    number = int(arch[3:])
    tool = _tool("ptxas-blackwell" if number >= 100 else "ptxas")
    suffix = "a" if number >= 90 else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={arch}{suffix}", str(file), "-o", f"{folder}/kernel"]
        found = subprocess.run(command, check=True, text=True, capture_output=True)
    return found.stdout + found.stderr


def _nvdisasm(cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [_tool("nvdisasm"), "-c", str(file)]
        return subprocess.run(command, check=True, text=True, capture_output=True).stdout


def examine_all(
    arch: str, size: int, dtype: torch.dtype, kernels: list[str], variants: list[bool]
) -> Iterator[Compiled]:
    """Every kernel asked for, with far keys and without."""
    for far in variants:
        planned = launches(arch, size, dtype, far)
        for name in kernels:
            yield examine(arch, name, planned[name], far)


def main(argv: list[str] | None = None) -> int:
    """Prints what became of the kernels on one target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arch", help="sm_80, sm_90, sm_100 or gfx942")
    parser.add_argument("size", type=int, help="head size")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kernels", nargs="+", default=list(LOOPS), choices=list(LOOPS))
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype)
    for compiled in examine_all(args.arch, args.size, dtype, args.kernels, [True, False]):
        print(json.dumps(asdict(compiled)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
