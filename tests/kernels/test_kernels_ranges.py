"""Which tiles the kernels visit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_work import PRODUCTS, Work, visits
from harness.attention_cases import Case, gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

from flagattention.kernels import launch
from flagattention.kernels.backward_kv import backward_kv_kernel
from flagattention.kernels.backward_q import backward_q_kernel
from flagattention.kernels.configs import Tiles
from flagattention.kernels.forward import forward_kernel
from flagattention.kernels.ranges import key_ranges, query_ranges, split
from flagattention.problem import NEVER

KERNELS = {
    forward_kernel: "forward", backward_kv_kernel: "backward_kv", backward_q_kernel: "backward_q"
}  # fmt: skip
NUMBERS = {
    "first": st.integers(0, 100),
    "size": st.integers(1, 40),
    "others": st.integers(0, 130),
    "offset": st.integers(-60, 150),
    "threshold": st.integers(-20, 160),
    "sink_end": st.integers(0, 60) | st.just(NEVER),
    "causal": st.booleans(),
}


def in_spans(position: int, begin: int, full_begin: int, full_end: int, end: int) -> str:
    if not begin <= position < end:
        return "out"
    return "full" if full_begin <= position < full_end else "masked"


@settings(deadline=None)
@given(**NUMBERS)
def test_rows_visit_the_keys_they_see(
    first: int, size: int, others: int, offset: int, threshold: int, sink_end: int, causal: bool
) -> None:
    rows = range(first, first + size)
    far_full, far_end, *near = key_ranges.fn(
        first, rows[-1], offset + first - threshold, offset + rows[-1] - threshold, others, offset,
        sink_end, causal,
    )  # fmt: skip
    for n in range(others):
        distances = [offset + m - n for m in rows]
        seen = [not causal or d >= 0 for d in distances]
        far = [d >= threshold for d in distances]
        far_seen = [a and b and n < sink_end for a, b in zip(far, seen, strict=True)]
        near_seen = [not a and b for a, b in zip(far, seen, strict=True)]
        for found, wanted in (
            (in_spans(n, 0, 0, far_full, far_end), far_seen),
            (in_spans(n, *near), near_seen),
        ):
            assert found != "out" or not any(wanted)
            assert found != "full" or all(wanted)


@settings(deadline=None)
@given(**NUMBERS)
def test_keys_visit_the_rows_that_see_them(
    first: int, size: int, others: int, offset: int, threshold: int, sink_end: int, causal: bool
) -> None:
    columns = range(first, first + size)
    shift = threshold - offset
    *near, far_begin, far_full = query_ranges.fn(
        first, columns[-1], first + shift, columns[-1] + shift, others, offset, sink_end, causal
    )
    for m in range(others):
        distances = [offset + m - n for n in columns]
        seen = [not causal or d >= 0 for d in distances]
        far = [d >= threshold for d in distances]
        far_seen = [a and b and n < sink_end for a, b, n in zip(far, seen, columns, strict=True)]
        near_seen = [not a and b for a, b in zip(far, seen, strict=True)]
        for found, wanted in (
            (in_spans(m, far_begin, far_full, others, others), far_seen),
            (in_spans(m, *near), near_seen),
        ):
            assert found != "out" or not any(wanted)
            assert found != "full" or all(wanted)


@settings(deadline=None)
@given(
    begin=st.integers(0, 200), length=st.integers(-50, 200), full_begin=st.integers(0, 300),
    full_end=st.integers(0, 300), step=st.sampled_from([1, 16, 64]),
)  # fmt: skip
def test_a_range_is_cut_into_tiles_once(
    begin: int, length: int, full_begin: int, full_end: int, step: int
) -> None:
    end = max(begin + length, 0)
    full_end = min(full_end, end)
    head, body = split.fn(begin, full_begin, full_end, end, step)
    tiles = [
        *((x, False) for x in range(begin, head, step)),
        *((x, True) for x in range(head, body, step)),
        *((x, False) for x in range(body, end, step)),
    ]
    assert [x for x, _ in tiles] == list(range(begin, end, step))
    for x, full in tiles:
        assert not full or full_begin <= x <= x + step <= full_end
    waste = [x for x, full in tiles if not full and full_begin <= x <= x + step <= full_end]
    assert len(waste) == 0


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("m", "n", "w"), [(320, 320, 160), (200, 330, 70), (256, 256, 256)])
@pytest.mark.parametrize("tiles", [Tiles(128, 64, 4, 1), Tiles(64, 32, 4, 1)], ids=["big", "small"])
def test_the_counted_work_is_what_the_kernels_multiply(
    tiles: Tiles, m: int, n: int, w: int, causal: bool, set_tiles: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    dots: list[int] = []
    create_dot = interpreter.InterpreterBuilder.create_dot

    def counted(*args: Any) -> Any:
        dots.append(1)
        return create_dot(*args)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", counted)
    set_tiles(tiles)
    case = Case(heads=1, groups=1, m=m, n=n, w=w, causal=causal)
    tensors, problem = case.tensors(torch.float32), case.problem()
    dout, _ = gradients(case, torch.float32, with_dlse=False)
    out, lse = (torch.zeros(1, 1, m, 16), torch.zeros(1, 1, m))
    grads = tuple(torch.empty_like(x) for x in tensors)
    arguments = (tuple(tensors), dout, None, out, lse, grads, problem, "interpreter")
    work = Work(m, n, w, causal, tiles.block_m, tiles.block_n)
    for planned in [
        launch.plan_forward(tuple(tensors), out, lse, problem, "interpreter"),
        *launch.plan_backward(*arguments),
    ]:
        dots.clear()
        planned()
        if planned.kernel not in KERNELS:  # what only prepares multiplies nothing
            assert not dots
            continue
        kernel = KERNELS[planned.kernel]
        far = launch.has_far(problem)
        assert len(dots) == visits(kernel, work, far=far) * PRODUCTS[kernel], kernel
