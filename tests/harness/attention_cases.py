"""Attention problems to try, what they come to in float64, and how far off a result may be.

The bound is derived, not tuned. A result may miss float64 by twice what plain torch of the same
precision misses it by, and by a band of roundings: a number of units of roundoff, counted from what
a kernel must round, times the sum of the magnitudes that were added up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import torch
from torch import Tensor

from flagattention.masks import masks
from flagattention.problem import NEVER, Problem
from flagattention.reference import attend

NAMES = ("out", "lse", "dq1", "dk1", "dq2", "dk2", "dv")

# Vectorised exponentials of torch's CPU kernels are right to 20 units in the last place ...
_EXP_ROUNDINGS = 20 * 2.0**-23


@dataclass(frozen=True)
class Case:
    """One dense problem; ``rows`` makes the threshold a tensor of that many dimensions."""

    batch: int = 1
    heads: int = 2
    groups: int = 2
    m: int = 64
    n: int = 64
    size: int = 16
    causal: bool = True
    w: int = 20
    q_offset: int | None = None
    k_offset: int = 0
    n_sink: int = 0
    rows: int = 0

    def tensors(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """q1, k1, q2, k2, v."""
        torch.manual_seed(seed)
        q, k = (self.batch, self.heads, self.m), (self.batch, self.groups, self.n)
        return [torch.randn(*shape, self.size, dtype=dtype) for shape in (q, k, q, k, k)]

    def threshold(self) -> int | Tensor:
        """w, or random numbers on either side of it that rise and fall."""
        if not self.rows:
            return self.w
        shape = (self.batch, self.m)[2 - self.rows :]
        return torch.randint(-5, max(2 * self.w, 10), shape, dtype=torch.int32)

    def problem(self) -> Problem:
        """As the backends take it."""
        return Problem(
            causal=self.causal,
            sm_scale=self.size**-0.5,
            threshold=self.threshold(),
            q_offset=self.k_offset + self.n - self.m if self.q_offset is None else self.q_offset,
            k_offset=self.k_offset,
            n_sink=self.n_sink,
            cu_seqlens_q=None,
            cu_seqlens_k=None,
            max_seqlen_q=self.m,
            max_seqlen_k=self.n,
        )

    def __str__(self) -> str:
        changed = [
            f"{name}={value}"
            for name, value in vars(self).items()
            if value != getattr(Case, name) or name == "w"
        ]
        return ",".join(changed)


def _matrix() -> list[Case]:
    base = Case()
    lengths = ((1, 1), (1, 70), (33, 33), (64, 64), (65, 130), (130, 65), (200, 200))
    found = [
        replace(base, m=m, n=n, w=w, causal=causal)
        for (m, n), w, causal in product(lengths, (0, 1, 30, 37, 64), (True, False))
    ]
    found += [replace(base, m=m, n=n, w=w) for m, n in lengths for w in (-3, m, m + 1, n, n + 1)]
    found += [
        replace(base, m=96, n=96, w=33, size=size) for size in (17, 32, 64, 80, 128, 200, 256)
    ]
    found += [
        replace(base, batch=batch, heads=heads, groups=groups, m=90, n=110, causal=causal)
        for (batch, heads, groups), causal in product(
            ((3, 4, 4), (2, 6, 2), (1, 5, 1), (3, 6, 3)), (True, False)
        )
    ]
    found += [
        replace(base, batch=2, m=100, n=120, n_sink=sinks, causal=causal, rows=rows)
        for sinks, causal, rows in product((0, 1, 4, 50, 500), (True, False), (0, 1, 2))
    ]
    found += [
        replace(base, m=80, n=100, q_offset=q_offset, k_offset=k_offset, n_sink=sinks, rows=rows)
        for q_offset, k_offset, sinks, rows in product(
            (-40, 0, 50, 300), (0, 7, 30), (0, 9), (0, 1)
        )
    ]
    found += [replace(base, m=m, n=n, rows=rows) for m, n in ((0, 5), (5, 0)) for rows in (0, 1)]
    found += [replace(base, batch=2, m=300, n=300, w=w, rows=2) for w in (5, 100, 400)]
    found += [replace(base, w=NEVER, causal=causal) for causal in (True, False)]
    return list(dict.fromkeys(found))


MATRIX = _matrix()


def gradients(case: Case, dtype: torch.dtype, with_dlse: bool) -> tuple[Tensor, Tensor | None]:
    """Gradients of out and of the lse to begin a backward pass with."""
    torch.manual_seed(1)
    dout = torch.randn(case.batch, case.heads, case.m, case.size, dtype=dtype)
    exact = torch.promote_types(dtype, torch.float32)
    dlse = torch.randn(case.batch, case.heads, case.m, dtype=exact) * 3 if with_dlse else None
    return dout, dlse


def by_autograd(
    tensors: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    problem: Problem,
    dtype: torch.dtype,
    rounded: torch.dtype | None = None,
) -> list[Tensor]:
    """Plain torch: out, lse and the five gradients, computed in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in tensors]
    out, lse = attend(*leaves, problem, rounded)
    alive = lse > -torch.inf
    total = (out * dout.to(dtype)).sum()
    if dlse is not None:
        total = total + (lse.masked_fill(~alive, 0) * dlse.to(dtype)).sum()
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in (out, lse, *grads)]


def same_precision(
    tensors: list[Tensor], dout: Tensor, dlse: Tensor | None, problem: Problem
) -> list[Tensor]:
    """Plain torch of the tensors' precision: 16-bit matrices, sums in float32."""
    dtype = tensors[0].dtype
    found = by_autograd(tensors, dout, dlse, problem, torch.float32, dtype)
    return [x if i == 1 else x.to(dtype) for i, x in enumerate(found)]


def magnitudes(
    tensors: list[Tensor], dout: Tensor, dlse: Tensor | None, problem: Problem
) -> list[Tensor]:
    """What is added up to out, lse and each gradient, without the signs, in float64."""
    q1, k1, q2, k2, v = (x.double() for x in tensors)
    group = q1.shape[1] // k1.shape[1]
    k1, k2, v = (x.repeat_interleave(group, 1) for x in (k1, k2, v))
    far, seen = masks(problem, q1.shape[2], k1.shape[2], q1.device)
    scores = torch.where(far, q2 @ k2.mT, q1 @ k1.mT) * problem.sm_scale
    sizes = torch.where(far, q2.abs() @ k2.abs().mT, q1.abs() @ k1.abs().mT) * problem.sm_scale
    scores = scores.masked_fill(~seen, -torch.inf)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    dout = dout.double()
    out = p @ v.abs()
    dp = dout.abs() @ v.abs().mT + (dout.abs() * out).sum(-1, keepdim=True)
    if dlse is not None:
        dp = dp + dlse.double().abs().unsqueeze(-1)
    # A score that is off by so much makes its probability off by as much, relatively.
    off = 1 + sizes
    ds = p * dp * off * problem.sm_scale
    near, dfar = ds.masked_fill(far, 0), ds.masked_fill(~far, 0)

    def summed(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    return [
        (p * off) @ v.abs(),
        (p * off).sum(-1) + scores.abs().masked_fill(~seen, 0).amax(-1)
        if scores.shape[-1]
        else p.sum(-1),
        near @ k1.abs(),
        summed(near.mT @ q1.abs()),
        dfar @ k2.abs(),
        summed(dfar.mT @ q2.abs()),
        summed((p * off).mT @ dout.abs()),
    ]


def roundoff(dtype: torch.dtype) -> float:
    """The most by which rounding to a dtype changes a number, relatively."""
    return torch.finfo(dtype).eps / 2


@cache
def exp_error(dtype: torch.dtype) -> float:
    """How far off a kernel's exponentials may be, relatively.

    In bfloat16 torch takes a coarser one than it says; the lse of its own plain attention shows
    how coarse.
    """
    case = Case(m=256, n=256, w=NEVER)
    tensors = case.tensors(dtype)
    q, k, _, _, v = tensors
    scale = case.problem().sm_scale
    _, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, is_causal=True, scale=scale
    )
    _, exact = attend(*(x.double() for x in tensors), case.problem())
    return max(_EXP_ROUNDINGS, 2 * float((lse - exact).abs().max()))


def check_against_float64(
    found: list[Tensor],
    tensors: list[Tensor],
    dout: Tensor,
    dlse: Tensor | None,
    problem: Problem,
    extra_roundings: int,
) -> None:
    """Holds out, lse and gradients to the bound.

    Args:
        found: out, lse, dq1, dk1, dq2, dk2, dv.
        tensors: q1, k1, q2, k2, v.
        dout: Gradient of out.
        dlse: Gradient of the lse, or None.
        problem: Dense.
        extra_roundings: How often the kernel rounds a running sum to the tensors' dtype.
    """
    dtype = tensors[0].dtype
    wanted = by_autograd(tensors, dout, dlse, problem, torch.float64)
    plain = same_precision(tensors, dout, dlse, problem)
    sizes = magnitudes(tensors, dout, dlse, problem)
    for i, name in enumerate(NAMES):
        got, want, size = found[i].double(), wanted[i], sizes[i]
        assert got.shape == want.shape, name
        if want.numel() == 0:
            continue
        dead = want == -torch.inf
        assert torch.equal(got == -torch.inf, dead), f"{name}: other rows are empty"
        got, want = got.masked_fill(dead, 0), want.masked_fill(dead, 0)
        inherited = 2 * (plain[i].double().masked_fill(dead, 0) - want).abs().max()
        # Matrices rounded before a product (probabilities, gradients of scores, out), the result
        # itself; sums in float32 of as many numbers as there are.
        roundings = 1 if name == "lse" else 3 + extra_roundings
        unit = torch.float32 if name == "lse" else dtype
        depth = math.sqrt(max(*tensors[0].shape[2:], *tensors[1].shape[2:]))
        band = roundings * roundoff(unit) + exp_error(dtype) + depth * roundoff(torch.float32)
        excess = (got - want).abs() - inherited - band * size
        worst = excess.argmax()
        assert excess.max() <= 0, (
            f"{name}: {got.flatten()[worst]} for {want.flatten()[worst]}, "
            f"over the bound by {excess.max():.3g}"
        )
