"""Piecewise attention on a CPU against plain causal attention: time ratios at one shape.

Run: ``python bench/attention_cpu.py``, on a quiet machine or not: within one run the contenders
take turns, and the shortest of the repetitions counts, so that the ratios hold where the times do
not. Prints a markdown table; ends with 1 where a ratio is over its bar.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterable

# Threads that spin while they wait lose a whole time slice, in every operator, to whatever else
# runs on the machine; it must be said before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F  # noqa: N812

from flagattention import piecewise_attention
from flagattention.problem import Problem
from flagattention.reference import attend

BARS = {  # dtype, (forward, forward and backward) at w = T / 2, the same for the worst w
    torch.float32: ((1.4, 1.4), (1.6, 1.6)),
    torch.bfloat16: ((1.4, 1.5), (1.6, 1.8)),
}
THRESHOLDS = (64, 256, 512, 700, 1024, 1500)

type Tensors = list[torch.Tensor]
type Contender = Callable[[Tensors], torch.Tensor]


def plain(tensors: Tensors) -> torch.Tensor:
    """What everything is measured against: torch's own causal attention, pair 1 alone."""
    q1, k1, _, _, v = tensors
    return F.scaled_dot_product_attention(q1, k1, v, is_causal=True)


def ours(w: int) -> Contender:
    """The operator at one threshold."""
    return lambda tensors: piecewise_attention(*tensors, w, causal=True)


def naive(w: int) -> Contender:
    """Both scores of every key materialised."""

    def run(tensors: Tensors) -> torch.Tensor:
        n, size = tensors[0].shape[2:]
        return attend(*tensors, Problem(True, size**-0.5, w, 0, 0, 0, None, None, n, n))[0]

    return run


def seconds(contender: Contender, tensors: Tensors, grad: torch.Tensor | None) -> float:
    """One forward pass, and with ``grad`` one backward pass behind it."""
    begin = time.perf_counter()
    out = contender(tensors)
    if grad is not None:
        torch.autograd.grad(out, [x for x in tensors if x.requires_grad], grad, allow_unused=True)
    return time.perf_counter() - begin


def shortest(
    contenders: dict[str, Contender], tensors: Tensors, grad: torch.Tensor | None, repeats: int
) -> dict[str, float]:
    """The least time of each, the contenders taking turns."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats + 1):  # the first turn warms up, and is never the shortest
        for name, contender in contenders.items():
            best[name] = min(best[name], seconds(contender, tensors, grad))
    return best


def measure(
    dtype: torch.dtype, shape: tuple[int, int, int, int], repeats: int
) -> dict[str, tuple[float, float]]:
    """Seconds forward, and forward and backward, of each contender."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=dtype) for _ in range(5)]
    contenders: dict[str, Contender] = {"plain causal": plain}
    contenders |= {f"ours, w = {w}": ours(w) for w in THRESHOLDS}
    contenders[f"naive, w = {shape[2] // 2}"] = naive(shape[2] // 2)
    with torch.no_grad():
        forward = shortest(contenders, tensors, None, repeats)
    for x in tensors:
        x.requires_grad_()
    both = shortest(contenders, tensors, torch.randn_like(tensors[0]), repeats)
    return {name: (forward[name], both[name]) for name in contenders}


def table(dtype: torch.dtype, times: dict[str, tuple[float, float]]) -> Iterable[str]:
    """Rows of markdown."""
    base = times["plain causal"]
    for name, found in times.items():
        cells = [f"{t * 1e3:.1f} ms ({t / b:.2f}x)" for t, b in zip(found, base, strict=True)]
        yield f"| {str(dtype).removeprefix('torch.')} | {name} | {cells[0]} | {cells[1]} |"


def over(dtype: torch.dtype, times: dict[str, tuple[float, float]], half: int) -> list[str]:
    """The bars that are missed."""
    base, (at_half, worst) = times["plain causal"], BARS[dtype]
    missed = []
    for name, found in times.items():
        if not name.startswith("ours"):
            continue
        bars = at_half if name == f"ours, w = {half}" else worst
        for part, t, b, bar in zip(("forward", "both"), found, base, bars, strict=True):
            if t / b > bar:
                missed.append(f"{dtype}, {name}, {part}: {t / b:.2f}x, over {bar}x")
    return missed


def main() -> int:
    """Measures, prints, and says whether every bar holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shape = (1, arguments.heads, arguments.length, arguments.head_size)
    print(f"[B, H, T, D] = {list(shape)}, causal, {arguments.threads} threads of", end=" ")
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__};", end=" ")
    print(f"the shortest of {arguments.repeats} turns.\n")
    print("| dtype | | forward | forward and backward |\n| --- | --- | --- | --- |")
    missed = []
    for dtype in BARS:
        times = measure(dtype, shape, arguments.repeats)
        print("\n".join(table(dtype, times)), flush=True)
        missed += over(dtype, times, arguments.length // 2)
    for line in missed:
        print(f"\nover its bar: {line}")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
