"""The CPU path: its pieces, its results against float64, its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.attention_cases import MATRIX, Case, check_against_float64, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flagattention import cpu, reference
from flagattention.pieces import Kind, Piece, plan
from flagattention.problem import NEVER, Problem

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def seen_by(piece: Piece) -> torch.Tensor:
    row, col = torch.arange(piece.height).unsqueeze(1), torch.arange(piece.width)
    return {
        Kind.FULL: torch.ones(piece.height, piece.width, dtype=torch.bool),
        Kind.LOWER: col <= row,
        Kind.UPPER: piece.width - col <= piece.height - row,
        Kind.BAND: (piece.lo < col - row) & (col - row <= piece.hi),
    }[piece.kind]


@settings(deadline=None)
@given(
    n_rows=st.integers(0, 150),
    n_cols=st.integers(0, 150),
    causal=st.booleans(),
    threshold=st.integers(-10, 170) | st.just(NEVER),
    offset=st.none() | st.integers(-80, 200),
    n_far_cols=st.none() | st.integers(0, 150),
)
def test_the_pieces_hold_every_seen_cell_once(
    n_rows: int, n_cols: int, causal: bool, threshold: int, offset: int | None, n_far_cols: Any
) -> None:
    offset = n_cols - n_rows if offset is None else offset
    n_far_cols = n_cols if n_far_cols is None else min(n_far_cols, n_cols)
    counts = torch.zeros(3, n_rows, n_cols, dtype=torch.int)
    for piece in plan(n_rows, n_cols, causal, threshold, offset, n_far_cols):
        for row in range(piece.count):
            top, left = piece.row + row * piece.step, piece.col + row * piece.step
            assert 0 <= top < top + piece.height <= n_rows
            assert 0 <= left < left + piece.width <= n_cols
            cells = counts[piece.pair, top : top + piece.height, left : left + piece.width]
            cells += seen_by(piece)
    row, col = torch.arange(n_rows).unsqueeze(1), torch.arange(n_cols)
    distance = offset + row - col
    far, seen = distance >= threshold, (distance >= 0) | torch.tensor(not causal)
    assert torch.equal(counts[1], (seen & ~far).int())
    assert torch.equal(counts[2], (seen & far & (col < n_far_cols)).int())


@pytest.mark.parametrize(("w", "most"), [(64, 4), (256, 3), (700, 6), (1024, 3), (1500, 6)])
def test_few_calls_do(w: int, most: int) -> None:
    assert len(plan(2048, 2048, True, w, 0, 2048)) <= most


def test_plain_attention_is_one_call() -> None:
    assert plan(64, 64, True, NEVER, 0, 64) == (Piece(1, Kind.LOWER, 0, 64, 0, 64),)
    assert plan(64, 64, True, 0, 0, 64) == (Piece(2, Kind.LOWER, 0, 64, 0, 64),)
    assert plan(3, 64, False, NEVER, 61, 64) == (Piece(1, Kind.FULL, 0, 3, 0, 64),)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("with_dlse", [False, True], ids=["out", "out_and_lse"])
@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_it_is_as_right_as_its_precision_allows(
    case: Case, with_dlse: bool, dtype: torch.dtype
) -> None:
    tensors, problem = case.tensors(dtype), case.problem()
    dout, dlse = gradients(case, dtype, with_dlse)
    out, lse = cpu.forward(*tensors, problem)
    grads = cpu.backward(dout, dlse, *tensors, out, lse, problem)
    # torch's backward kernel adds up a gradient in the tensors' dtype, by blocks of >= 32 rows.
    blocks = -(-case.m // 32)
    check_against_float64([out, lse, *grads], tensors, dout, dlse, problem, blocks)


@settings(deadline=None)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 3),
        heads=st.sampled_from([2, 4]),
        groups=st.sampled_from([1, 2]),
        m=st.integers(0, 140),
        n=st.integers(0, 140),
        size=st.sampled_from([1, 4, 7]),
        causal=st.booleans(),
        w=st.integers(-10, 160) | st.just(NEVER),
        q_offset=st.none() | st.integers(-60, 200),
        k_offset=st.sampled_from([0, 5]),
        n_sink=st.sampled_from([0, 0, 3, 40]),
        rows=st.sampled_from([0, 1, 2]),
    ).filter(lambda case: case.rows == 0 or case.w < NEVER),
    seed=st.integers(0, 1000),
)
def test_in_float64_it_is_the_reference(case: Case, seed: int) -> None:
    tensors, problem = case.tensors(torch.float64, seed), case.problem()
    dout, dlse = gradients(case, torch.float64, with_dlse=seed % 2 == 0)
    out, lse = cpu.forward(*tensors, problem)
    torch.testing.assert_close((out, lse), reference.forward(*tensors, problem))
    found = cpu.backward(dout, dlse, *tensors, out, lse, problem)
    torch.testing.assert_close(
        found, reference.backward(dout, dlse, *tensors, out, lse, problem), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e4, 1e8])
def test_the_gradient_of_the_lse_keeps_its_digits(dtype: torch.dtype, size: float) -> None:
    dlse = torch.randn(1, 2, 64) * size
    dout, out = torch.randn(1, 2, 64, 16, dtype=dtype), torch.randn(1, 2, 64, 16, dtype=dtype)
    wide_dout, wide_out = cpu._with_dlse(dout, out, dlse)
    delta = (dout.double() * out.double()).sum(-1)
    found = (wide_dout.double() * wide_out.double()).sum(-1)
    torch.testing.assert_close(delta - found, dlse.double(), rtol=2e-7, atol=1e-11)


class _Sizes(TorchDispatchMode):
    """Elements of the largest tensor that any operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.itemsize)
        return result


@pytest.mark.parametrize("w", [10, 64, 700, 1024, 1500])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("rows", [0, 1], ids=["number", "tensor"])
def test_no_tensor_is_as_large_as_the_scores(w: int, causal: bool, rows: int) -> None:
    case = Case(m=2048, n=2048, heads=2, groups=1, w=w, causal=causal, rows=rows, size=64)
    tensors, problem = case.tensors(torch.float32), case.problem()
    dout, dlse = gradients(case, torch.float32, with_dlse=True)
    with _Sizes() as sizes:
        out, lse = cpu.forward(*tensors, problem)
        cpu.backward(dout, dlse, *tensors, out, lse, problem)
    widest = case.heads * case.m * (case.size + cpu.EXTRA)
    mask = case.m * case.n // 8 if rows else 0
    assert sizes.largest <= max(widest, mask)


def test_results_repeat_to_the_bit() -> None:
    case = Case(batch=2, heads=4, m=300, n=300, w=77)
    tensors, problem = case.tensors(torch.float32), case.problem()
    dout, dlse = gradients(case, torch.float32, with_dlse=True)

    def run() -> list[torch.Tensor]:
        out, lse = cpu.forward(*tensors, problem)
        return [out, lse, *cpu.backward(dout, dlse, *tensors, out, lse, problem)]

    for once, again in zip(run(), run(), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("rows", [0, 1], ids=["number", "tensor"])
def test_nan_is_not_hidden(rows: int) -> None:
    case = Case(w=20, rows=rows)
    tensors, problem = case.tensors(torch.float32), case.problem()
    tensors[4][0, 0, 5] = torch.nan  # of v, seen by the rows from 5 on
    tensors[0][0, 0, 3] = torch.nan  # of q1, and so of the lse
    out, lse = cpu.forward(*tensors, problem)
    assert out[0, 0, 5:].isnan().all()
    assert out[0, 0, 3].isnan().all()
    assert lse[0, 0, 3].isnan()
    assert out[0, 1].isfinite().all()


def test_scores_far_apart_do_not_overflow() -> None:
    case = Case(m=100, n=100, w=30)
    tensors = [x * 30 for x in case.tensors(torch.float32)]
    dout, _ = gradients(case, torch.float32, with_dlse=False)
    problem = case.problem()
    out, lse = cpu.forward(*tensors, problem)
    grads = cpu.backward(dout, None, *tensors, out, lse, problem)
    check_against_float64([out, lse, *grads], tensors, dout, None, problem, 4)


def laid_out(name: str, x: torch.Tensor) -> torch.Tensor:
    """The same numbers in another order in memory."""
    match name:
        case "heads last":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        case "sequence first":
            return x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
        case "size not last":
            return x.mT.contiguous().mT
        case "every second":
            return torch.stack([x, x * 0], -1).flatten(-2)[..., ::2]
        case _:
            wide = torch.cat([x * 0, x, x * 0], -1)
            return wide[..., x.shape[-1] : 2 * x.shape[-1]]


@pytest.mark.parametrize(
    "layout", ["heads last", "sequence first", "size not last", "every second", "slice"]
)
@pytest.mark.parametrize("groups", [2, 4])
def test_any_strides_will_do(layout: str, groups: int) -> None:
    case = Case(batch=2, heads=4, groups=groups, m=70, n=90, w=33)
    tensors, problem = case.tensors(torch.float32), case.problem()
    dout, dlse = gradients(case, torch.float32, with_dlse=True)
    out, lse = cpu.forward(*tensors, problem)
    wanted = cpu.backward(dout, dlse, *tensors, out, lse, problem)
    strange = [laid_out(layout, x) for x in tensors]
    assert any(x.stride() != y.stride() for x, y in zip(tensors, strange, strict=True))
    found_out, found_lse = cpu.forward(*strange, problem)
    found = cpu.backward(
        laid_out(layout, dout), dlse, *strange, laid_out(layout, out), lse, problem
    )
    torch.testing.assert_close((found_out, found_lse, *found), (out, lse, *wanted))


def test_one_row_for_all_may_be_given_as_a_view() -> None:
    case = Case(m=70, n=70, w=33)
    tensors, problem = case.tensors(torch.float32), case.problem()
    tensors = [x[:, :, :1].expand_as(x) for x in tensors]
    found = cpu.forward(*tensors, problem)
    torch.testing.assert_close(found, cpu.forward(*(x.clone() for x in tensors), problem))


def test_arguments_are_left_alone() -> None:
    case = Case(batch=2, heads=4, m=70, n=70, w=33)
    tensors, problem = case.tensors(torch.float32), case.problem()
    dout, dlse = gradients(case, torch.float32, with_dlse=True)
    out, lse = cpu.forward(*tensors, problem)
    assert dlse is not None
    arguments = [dout, dlse, *tensors, out, lse]
    copies = [x.clone() for x in arguments]
    cpu.backward(*arguments, problem)
    for x, copy in zip(arguments, copies, strict=True):
        assert torch.equal(x, copy)


def test_a_masked_chunk_is_the_same_as_a_number() -> None:
    case = Case(m=600, n=700, w=123, n_sink=20, q_offset=60)
    tensors, problem = case.tensors(torch.float64), case.problem()
    by_row: Problem = replace(problem, threshold=torch.full((600,), 123, dtype=torch.int32))
    torch.testing.assert_close(cpu.forward(*tensors, by_row), cpu.forward(*tensors, problem))
