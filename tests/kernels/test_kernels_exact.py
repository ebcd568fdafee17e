"""The kernels in the interpreter against float64, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from harness.attention_cases import MATRIX, Case, by_autograd, check_against_float64, gradients
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flagattention.kernels import launch
from flagattention.kernels.configs import Tiles
from flagattention.problem import NEVER

# Tiles cost time here, not elements: few large ones, of every shape.
TILES = (
    Tiles(128, 64, 4, 1),
    Tiles(64, 128, 4, 1, tma=True),
    Tiles(128, 128, 4, 1, tma=True),
)
SHORT = [case for case in MATRIX if max(case.m, case.n) <= 200]
SHAPES = list(enumerate(dict.fromkeys(SHORT[::3] + [case for case in SHORT if case.size > 16])))
FEW = list(enumerate(SHORT[::25]))

SetTiles = Callable[[Tiles], None]


def check(case: Case, dtype: torch.dtype, seed: int = 0, *, with_dlse: bool) -> None:
    tensors, problem = case.tensors(dtype, seed), case.problem()
    dout, dlse = gradients(case, dtype, with_dlse)
    out, lse = launch.forward(*tensors, problem)
    grads = launch.backward(dout, dlse, *tensors, out, lse, problem)
    check_against_float64([out, lse, *grads], tensors, dout, dlse, problem, 0)


def test_there_are_enough_shapes() -> None:
    assert len(SHAPES) >= 60
    cases = [case for _, case in SHAPES]
    for name in ("causal", "rows", "n_sink", "groups", "size", "q_offset"):
        assert len({getattr(case, name) for case in cases}) > 1, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(("number", "case"), SHAPES, ids=str)
def test_they_are_as_right_as_their_precision_allows(
    number: int, case: Case, dtype: torch.dtype, set_tiles: SetTiles
) -> None:
    set_tiles(TILES[number % len(TILES)])
    check(case, dtype, with_dlse=number % 3 > 0)


@pytest.mark.parametrize(("number", "case"), FEW, ids=str)
def test_bfloat16(number: int, case: Case, set_tiles: SetTiles) -> None:
    set_tiles(TILES[number % len(TILES)])
    check(case, torch.bfloat16, with_dlse=True)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("w", [0, 1, 150, 151])
def test_a_key_at_the_threshold_is_far(w: int, causal: bool, set_tiles: SetTiles) -> None:
    set_tiles(Tiles(64, 64, 4, 1))
    check(Case(heads=1, groups=1, m=150, n=150, w=w, causal=causal), torch.float32, with_dlse=True)


@settings(
    deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=st.builds(
        Case,
        batch=st.integers(1, 2),
        heads=st.sampled_from([2, 4]),
        groups=st.sampled_from([1, 2]),
        m=st.integers(0, 140),
        n=st.integers(0, 140),
        size=st.sampled_from([16, 24]),
        causal=st.booleans(),
        w=st.integers(-10, 160) | st.just(NEVER),
        q_offset=st.none() | st.integers(-60, 200),
        k_offset=st.sampled_from([0, 5]),
        n_sink=st.sampled_from([0, 0, 3, 40]),
        rows=st.sampled_from([0, 1, 2]),
    ).filter(lambda case: case.rows == 0 or case.w < NEVER),
    tiles=st.builds(
        Tiles,
        st.sampled_from([32, 64, 128]),
        st.sampled_from([32, 64, 128]),
        st.just(4),
        st.just(1),
        st.booleans(),
    ).filter(lambda tiles: tiles.block_m + tiles.block_n > 64),
    seed=st.integers(0, 1000),
)
def test_any_problem_with_any_tiles(
    case: Case, tiles: Tiles, seed: int, set_tiles: SetTiles
) -> None:
    set_tiles(tiles)
    check(case, torch.float32, seed, with_dlse=seed % 2 == 0)


@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_any_finite_scale(scale: float, set_tiles: SetTiles) -> None:
    set_tiles(TILES[0])
    case = Case(heads=2, groups=1, m=90, n=110, w=33)
    tensors, problem = case.tensors(torch.float32), replace(case.problem(), sm_scale=scale)
    dout, dlse = gradients(case, torch.float32, with_dlse=True)
    out, lse = launch.forward(*tensors, problem)
    grads = launch.backward(dout, dlse, *tensors, out, lse, problem)
    wanted = by_autograd(tensors, dout, dlse, problem, torch.float64)
    torch.testing.assert_close(
        [out, lse, *grads], [x.float() for x in wanted], rtol=1e-4, atol=1e-4
    )
