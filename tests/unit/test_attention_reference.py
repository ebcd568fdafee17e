"""The plain reference, held to the definition written out as loops, and to autograd."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from harness.attention_cases import MATRIX, Case, by_autograd, gradients
from hypothesis import given, settings
from hypothesis import strategies as st

from flagattention import piecewise_attention, reference
from flagattention.problem import NEVER, Problem

SMALL = Case(batch=2, heads=4, groups=2, m=5, n=7, size=3, w=2)


def by_loops(
    tensors: list[torch.Tensor], problem: Problem
) -> tuple[list[list[float]], list[float]]:
    """Out and lse of every row of every head, one number at a time."""
    q1, k1, q2, k2, v = (x.tolist() for x in tensors)
    group = len(q1[0]) // len(k1[0])
    outs, lses = [], []
    for b in range(len(q1)):
        for h in range(len(q1[0])):
            g = h // group
            for m in range(len(q1[0][0])):
                exps, total, out = [], 0.0, [0.0] * len(v[0][0][0])
                for n in range(len(k1[0][0])):
                    position = problem.k_offset + n
                    distance = (problem.q_offset or 0) + m - position
                    far = distance >= threshold_of(problem, b, m)
                    if problem.causal and distance < 0:
                        continue
                    if far and 0 < problem.n_sink <= position:
                        continue
                    q, k = (q2, k2) if far else (q1, k1)
                    dot = sum(x * y for x, y in zip(q[b][h][m], k[b][g][n], strict=True))
                    exps.append((math.exp(dot * problem.sm_scale), v[b][g][n]))
                total = sum(e for e, _ in exps)
                for e, value in exps:
                    out = [o + e / total * x for o, x in zip(out, value, strict=True)]
                outs.append(out)
                lses.append(math.log(total) if exps else -math.inf)
    return outs, lses


def threshold_of(problem: Problem, b: int, m: int) -> int:
    if isinstance(problem.threshold, int):
        return problem.threshold
    rows = problem.threshold if problem.threshold.dim() == 1 else problem.threshold[b]
    return int(rows[m])


CASES = st.builds(
    Case,
    batch=st.integers(1, 2),
    groups=st.just(1),
    heads=st.sampled_from([1, 2]),
    m=st.integers(1, 6),
    n=st.integers(1, 7),
    size=st.just(2),
    causal=st.booleans(),
    w=st.integers(-3, 9),
    q_offset=st.none() | st.integers(-5, 12),
    k_offset=st.sampled_from([0, 4]),
    n_sink=st.sampled_from([0, 0, 1, 3, 6]),
    rows=st.sampled_from([0, 1, 2]),
)


@settings(deadline=None)
@given(CASES)
def test_it_is_the_definition(case: Case) -> None:
    tensors, problem = case.tensors(torch.float64), case.problem()
    out, lse = reference.forward(*tensors, problem)
    outs, lses = by_loops(tensors, problem)
    torch.testing.assert_close(out.flatten(0, 2), torch.tensor(outs, dtype=torch.float64))
    torch.testing.assert_close(lse.flatten(), torch.tensor(lses, dtype=torch.float64))


@pytest.mark.parametrize("w", [0, 1, 6, 7])
def test_a_key_at_the_threshold_is_far(w: int) -> None:
    n = 6
    q1, k1, q2, k2, v = replace(SMALL, m=n, n=n).tensors(torch.float64)
    out = piecewise_attention(q1, k1, q2, k2, v, w, causal=True, backend="reference")
    k1, k2, v = (x.repeat_interleave(2, 1) for x in (k1, k2, v))
    near, far = q1 @ k1.mT, q2 @ k2.mT
    row, col = torch.arange(n).unsqueeze(1), torch.arange(n)
    scores = far if w == 0 else near if w >= n else torch.where(col <= row - w, far, near)
    scores = (scores * 3**-0.5).masked_fill(col > row, -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


@pytest.mark.parametrize("case", [c for c in MATRIX if c.m * c.n < 10_000], ids=str)
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out_and_lse"])
def test_the_gradients_are_those_of_autograd(case: Case, with_dlse: bool) -> None:
    tensors, problem = case.tensors(torch.float64), case.problem()
    dout, dlse = gradients(case, torch.float64, with_dlse)
    out, lse, *wanted = by_autograd(tensors, dout, dlse, problem, torch.float64)
    found = reference.backward(dout, dlse, *tensors, out, lse, problem)
    torch.testing.assert_close(list(found), wanted)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("n_sink", [0, 2], ids=["all", "sinks"])
@pytest.mark.parametrize("rows", [0, 2], ids=["number", "tensor"])
@pytest.mark.parametrize("q_offset", [None, -2], ids=["aligned", "empty_rows"])
@pytest.mark.parametrize("public", [True, False], ids=["operator", "attend"])
def test_gradcheck(
    causal: bool, n_sink: int, rows: int, q_offset: int | None, public: bool
) -> None:
    # Each element costs two passes: two heads of one group are enough.
    few = replace(SMALL, heads=2, groups=1)
    case = replace(few, causal=causal, n_sink=n_sink, rows=rows, q_offset=q_offset)
    problem = case.problem()

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not public:
            out, lse = reference.attend(*tensors, problem)
        else:
            out, lse = piecewise_attention(
                *tensors, problem.threshold, causal, return_lse=True, q_offset=problem.q_offset,
                n_sink=n_sink, backend="reference",
            )  # fmt: skip
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in case.tensors(torch.float64)])


def test_a_row_that_sees_no_key_is_empty() -> None:
    case = replace(SMALL, q_offset=-2)
    tensors, problem = case.tensors(torch.float64), case.problem()
    out, lse = reference.forward(*tensors, problem)
    assert not out[:, :, :2].any()
    assert (lse[:, :, :2] == -torch.inf).all()
    assert lse[:, :, 2:].isfinite().all()
    dout, dlse = gradients(case, torch.float64, with_dlse=True)
    dq1, _, dq2, _, _ = reference.backward(dout, dlse, *tensors, out, lse, problem)
    assert not dq1[:, :, :2].any()
    assert not dq2[:, :, :2].any()


def test_sinks_are_the_far_keys_that_stay() -> None:
    case = replace(SMALL, m=8, n=8, n_sink=2)
    *pairs, v = case.tensors(torch.float64)
    v = torch.eye(8, dtype=torch.float64).expand(2, 2, 8, 8)
    pairs = [torch.nn.functional.pad(x, (0, 5)) for x in pairs]
    weights, _ = reference.forward(*pairs, v, case.problem())
    row, col = torch.arange(8).unsqueeze(1), torch.arange(8)
    seen = (col <= row) & ((row - col < 2) | (col < 2))
    assert torch.equal(weights != 0, seen.expand_as(weights))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_tensors_are_computed_in_float32(dtype: torch.dtype) -> None:
    tensors, problem = SMALL.tensors(dtype), SMALL.problem()
    out, lse = reference.forward(*tensors, problem)
    exact_out, exact_lse = reference.forward(*(x.float() for x in tensors), problem)
    assert torch.equal(out, exact_out.to(dtype))
    assert torch.equal(lse, exact_lse)


def test_a_threshold_beyond_the_length_is_plain_attention() -> None:
    case = replace(SMALL, w=NEVER, m=7)
    q1, k1, q2, k2, v = case.tensors(torch.float64)
    out, _ = reference.forward(q1, k1, q2, k2, v, case.problem())
    plain = torch.nn.functional.scaled_dot_product_attention(
        q1, k1, v, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, plain)
