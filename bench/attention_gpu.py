"""Piecewise attention on a GPU beside its rivals: time ratios at the same shape, and memory.

Run: ``python bench/attention_gpu.py``. Each shape is causal, its threshold half its length; the
contenders take turns, and the shortest of the medians counts. Times are given over those of
``flash_attention`` by the same kernels at the same shape, never as FLOP/s. Ends with 1 where the
operator is over 1.05 forward or 1.10 backward, with 2 where there is no GPU.

Contenders: the operator; the same kernels as plain attention; torch's SDPA; FlexAttention called
for the near and for the far keys, merged by the lse; and, where it is installed, flash-attn, plain
and as a near window and a far slice merged by the lse (forward only: its lse has no gradient).

Example:
    python bench/attention_gpu.py --length 4096 32768 --size 128 --heads 48 --key-heads 8
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from flagattention import flash_attention, piecewise_attention

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
BARS = (1.05, 1.10)
"""Forward and backward, over plain attention by the same kernels."""

type Attention = Callable[[list[Tensor], int], Tensor]


@dataclass(frozen=True)
class Contender:
    """A way to attend, given q1, k1, q2, k2, v and the threshold."""

    name: str
    attend: Attention
    differentiable: bool = True


@dataclass(frozen=True)
class Measured:
    """Milliseconds, and bytes beyond the arguments and gradients; None where it does not run."""

    forward: float
    backward: float | None
    memory: int


def merge(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor]) -> Tensor:
    """Two attentions over disjoint keys as one, from outputs [.., D] and lse [..]."""
    (near_out, near_lse), (far_out, far_lse) = near, far
    share = torch.sigmoid(near_lse - far_lse).unsqueeze(-1)
    merged = near_out.float() * share + far_out.float() * (1 - share)
    return merged.to(near_out.dtype)


def _ours(tensors: list[Tensor], w: int) -> Tensor:
    out = piecewise_attention(*tensors, w, True)
    return out if isinstance(out, Tensor) else out[0]


def _plain(tensors: list[Tensor], w: int) -> Tensor:
    q, k, _, _, v = tensors
    out = flash_attention(q, k, v, True)
    return out if isinstance(out, Tensor) else out[0]


def _sdpa(tensors: list[Tensor], w: int) -> Tensor:
    q, k, _, _, v = tensors
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


@functools.cache
def _flex_parts(length: int, w: int) -> tuple[Any, Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def near(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return (m >= n) & (m - n < w)

    def far(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return m - n >= w

    masks = (create_block_mask(f, None, None, length, length, device="cuda") for f in (near, far))
    return torch.compile(flex_attention), *masks


def _flex(tensors: list[Tensor], w: int) -> Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    q1, k1, q2, k2, v = tensors
    flex, *masks = _flex_parts(q1.shape[2], w)
    parts = []
    for q, k, mask in zip((q1, q2), (k1, k2), masks, strict=True):
        out, aux = flex(q, k, v, block_mask=mask, enable_gqa=True, return_aux=AuxRequest(lse=True))
        parts.append((out, aux.lse))
    return merge(*parts)


def _flash_attn(tensors: list[Tensor], w: int) -> Tensor:
    from flash_attn import flash_attn_func

    q, k, _, _, v = (x.transpose(1, 2) for x in tensors)
    out: Tensor = flash_attn_func(q, k, v, causal=True)
    return out.transpose(1, 2)


def _flash_attn_merged(tensors: list[Tensor], w: int) -> Tensor:
    from flash_attn import flash_attn_func

    q1, k1, q2, k2, v = (x.transpose(1, 2) for x in tensors)
    near, near_lse, _ = flash_attn_func(
        q1, k1, v, causal=True, window_size=(w - 1, 0), return_attn_probs=True
    )
    far, far_lse, _ = flash_attn_func(
        q2[:, w:], k2[:, :-w], v[:, :-w], causal=True, return_attn_probs=True
    )
    head = near[:, :w].transpose(1, 2)
    tail = (near[:, w:].transpose(1, 2), near_lse[..., w:])
    return torch.cat([head, merge(tail, (far.transpose(1, 2), far_lse))], 2)


def contenders() -> list[Contender]:
    """Those that can run here; the operator and the plain kernels come first."""
    found = [
        Contender("piecewise", _ours),
        Contender("plain, same kernels", _plain),
        Contender("SDPA, plain", _sdpa),
        Contender("FlexAttention, near and far merged", _flex),
    ]
    if importlib.util.find_spec("flash_attn"):
        found += [
            Contender("flash-attn, plain", _flash_attn),
            Contender("flash-attn, near and far merged", _flash_attn_merged, differentiable=False),
        ]
    return found


def inputs(length: int, size: int, heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q1, k1, q2, k2, v."""
    counts = (heads, key_heads, heads, key_heads, key_heads)
    return [
        torch.randn(1, n, length, size, dtype=dtype, device="cuda", requires_grad=True)
        for n in counts
    ]


def measure(contender: Contender, tensors: list[Tensor], w: int) -> Measured:
    """One median of the forward and one of the backward pass."""
    from triton.testing import do_bench

    with torch.no_grad():
        forward = do_bench(lambda: contender.attend(tensors, w), return_mode="median")
    if not contender.differentiable:
        return Measured(forward, None, 0)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = contender.attend(tensors, w)
    gradient = torch.randn_like(out)
    torch.autograd.grad(out, tensors, gradient, retain_graph=True, allow_unused=True)
    memory = torch.cuda.max_memory_allocated() - before
    backward = do_bench(
        lambda: torch.autograd.grad(out, tensors, gradient, retain_graph=True, allow_unused=True),
        return_mode="median",
    )
    return Measured(forward, backward, memory)


def best(rounds: list[Measured]) -> Measured:
    """The shortest times of several rounds."""
    backward = [x.backward for x in rounds if x.backward is not None]
    return Measured(
        min(x.forward for x in rounds), min(backward) if backward else None, rounds[0].memory
    )


def compare(
    args: argparse.Namespace, size: int, length: int
) -> Iterator[tuple[str, Measured | str]]:
    """What became of each contender at one shape: numbers, or why there are none."""
    tensors = inputs(length, size, args.heads, args.key_heads, getattr(torch, args.dtype))
    rounds: dict[str, list[Measured]] = {}
    failed: dict[str, str] = {}
    for _ in range(args.rounds):
        for contender in contenders():
            if contender.name in failed:
                continue
            try:
                measured = measure(contender, tensors, length // 2)
            except (RuntimeError, ImportError, ValueError) as error:
                failed[contender.name] = (str(error).splitlines() or [type(error).__name__])[0]
            else:
                rounds.setdefault(contender.name, []).append(measured)
    for contender in contenders():
        name = contender.name
        yield name, failed[name] if name in failed else best(rounds[name])


def missed_bars(ours: Measured, plain: Measured) -> list[str]:
    """Where the operator takes longer than it may."""
    times = {"forward": (ours.forward, plain.forward), "backward": (ours.backward, plain.backward)}
    return [
        f"{name} {time / base:.3f}, over {bar}"
        for bar, (name, (time, base)) in zip(BARS, times.items(), strict=True)
        if time is not None and base is not None and time > bar * base
    ]


def _row(name: str, result: Measured | str, plain: Measured | str) -> list[str]:
    if isinstance(result, str):
        return [name, result, "", ""]
    if isinstance(plain, str):
        return [name, f"{result.forward:.3f} ms", "", ""]
    ratios = [f"{result.forward / plain.forward:.3f} ({result.forward:.3f} ms)"]
    if result.backward is None or plain.backward is None:
        return [name, *ratios, "-", "-"]
    ratios.append(f"{result.backward / plain.backward:.3f} ({result.backward:.3f} ms)")
    return [name, *ratios, f"{result.memory / 2**20:.0f}"]


def main(argv: list[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--length", nargs="+", type=int, default=LENGTHS)
    parser.add_argument("--size", nargs="+", type=int, default=(64, 128), help="head sizes")
    parser.add_argument("--heads", type=int, default=48)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    if args.key_heads < 1 or args.heads % args.key_heads:
        parser.error("--heads must be a multiple of --key-heads")
    if min(args.length) < 2 or args.rounds < 1:
        parser.error("--length must be at least 2, --rounds at least 1")
    if not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False, nothing was measured", file=sys.stderr)
        return 2
    import triton

    name = torch.cuda.get_device_name()
    print(f"{name}; torch {torch.__version__}, triton {triton.__version__}, {platform.machine()}")
    print("\n| T, D | contender | forward | backward | MiB |\n|---|---|---|---|---|")
    missed = []
    for size in args.size:
        for length in args.length:
            results = dict(compare(args, size, length))
            plain, ours = results["plain, same kernels"], results["piecewise"]
            for contender, result in results.items():
                cells = [f"{length}, {size}", *_row(contender, result, plain)]
                print("|", " | ".join(cells), "|", flush=True)
            if isinstance(ours, str) or isinstance(plain, str):
                missed.append(f"T {length}, D {size}: not measured")
            else:
                missed += [f"T {length}, D {size}: {x}" for x in missed_bars(ours, plain)]
    print(*[f"missed: {x}" for x in missed], sep="\n")
    return bool(missed)


if __name__ == "__main__":
    raise SystemExit(main())
