"""The Triton backend through the public calls, packed or not, in any layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness.attention_cases import MATRIX, Case, gradients
from torch import Tensor

from flagattention import BackendError, flash_attention, piecewise_attention, reference
from flagattention.kernels import launch
from flagattention.kernels.configs import KERNELS, TABLE, Tiles, choose
from flagattention.operators import piecewise_op
from flagattention.problem import NEVER

LENGTHS = ((5, 7), (0, 3), (40, 40), (33, 70), (4, 0), (1, 9))
CASES = [case for case in MATRIX if max(case.m, case.n) <= 130][::9]


def call(case: Case, tensors: list[Tensor], backend: str, threshold: Any) -> Any:
    problem = case.problem()
    return piecewise_attention(
        *tensors, threshold, case.causal, return_lse=True, q_offset=problem.q_offset,
        k_offset=case.k_offset, n_sink=case.n_sink, backend=backend,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_paths_agree(case: Case) -> None:
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)]
    threshold = case.threshold()
    gradient = gradients(case, torch.float32, with_dlse=True)
    found = {}
    for backend in ("triton", "cpu", "reference"):
        results = call(case, tensors, backend, threshold)
        grads = torch.autograd.grad(results, tensors, gradient, materialize_grads=True)
        found[backend] = [*(x.detach() for x in results), *grads]
    for other in ("cpu", "reference"):
        torch.testing.assert_close(found["triton"], found[other], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("w", [0, 200])
def test_either_end_is_plain_attention(w: int) -> None:
    case = Case(heads=4, groups=2, m=70, n=110, w=w)
    q1, k1, q2, k2, v = tensors = case.tensors(torch.float32)
    out, lse = call(case, tensors, "triton", w)
    q, k = (q1, k1) if w else (q2, k2)
    plain = flash_attention(q, k, v, causal=True, return_lse=True, backend="triton")
    torch.testing.assert_close((out, lse), plain)


def test_infinity_is_the_plain_kernel() -> None:
    case = Case(m=70, n=110, w=NEVER)
    problem = case.problem()
    assert not launch.has_far(problem)
    for w, far in ((109, True), (110, False), (1 << 31, False)):
        assert launch.has_far(Case(m=70, n=110, w=w).problem()) == far


@pytest.mark.parametrize("q_offset", [None, 30])
@pytest.mark.parametrize("rows", [False, True], ids=["number", "rows"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_packed_sequences_are_those_of_a_loop(
    causal: bool, rows: bool, q_offset: int | None
) -> None:
    starts = [
        torch.tensor(x).cumsum(0, dtype=torch.int32) for x in zip((0, 0), *LENGTHS, strict=True)
    ]
    torch.manual_seed(0)
    shapes = [(int(s[-1]), heads, 16) for s, heads in zip(starts, (4, 2), strict=True)]
    tensors = [torch.randn(shapes[i], requires_grad=True) for i in (0, 1, 0, 1, 1)]
    threshold = torch.randint(-5, 50, shapes[0][:1], dtype=torch.int32) if rows else 13
    dout, dlse = torch.randn(shapes[0]), torch.randn(4, shapes[0][0])
    options: dict[str, Any] = {"n_sink": 4, "k_offset": 2, "q_offset": q_offset}
    packed = piecewise_attention(
        *tensors, threshold, causal, return_lse=True, cu_seqlens_q=starts[0],
        cu_seqlens_k=starts[1], backend="triton", **options,
    )  # fmt: skip
    found = torch.autograd.grad(packed, tensors, (dout, dlse))
    outs, lses = [], []
    for i, (m, n) in enumerate(LENGTHS):
        q, k = (slice(s[i], s[i + 1]) for s in starts)
        parts = [x[k if j in (1, 3, 4) else q].transpose(0, 1)[None] for j, x in enumerate(tensors)]
        out, lse = piecewise_attention(
            *parts, threshold[q] if isinstance(threshold, Tensor) else threshold, causal,
            return_lse=True, backend="reference", **options,
        )  # fmt: skip
        assert out.shape[2] == m
        assert parts[1].shape[2] == n
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    loop = torch.cat(outs), torch.cat(lses, -1)
    torch.testing.assert_close(packed, loop, rtol=2e-5, atol=2e-5)
    wanted = torch.autograd.grad(loop, tensors, (dout, dlse))
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_a_sequence_does_not_see_the_next_ones_nan() -> None:
    starts = torch.tensor([0, 20, 40], dtype=torch.int32)
    tensors = [torch.randn(40, 2, 16) for _ in range(5)]
    for x in tensors:
        x[20:] = torch.nan
    tensors = [x.requires_grad_() for x in tensors]
    out = piecewise_attention(
        *tensors, 7, True, cu_seqlens_q=starts, cu_seqlens_k=starts, backend="triton"
    )
    assert isinstance(out, Tensor)
    grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
    for x in (out, *grads):
        assert x[:20].isfinite().all()
        assert not x[20:].isfinite().all()


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "sequence first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "size not last": lambda x: x.mT.contiguous().mT,
    "every second": lambda x: torch.stack([x, x * 0], -1).flatten(-2)[..., ::2],
    "slice": lambda x: torch.cat([x * 0, x, x * 0], -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "odd slice": lambda x: torch.cat([x[..., :1], x], -1)[..., 1:],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides_will_do(layout: str, set_tiles: Callable[[Tiles], None]) -> None:
    set_tiles(Tiles(64, 64, 4, 1, tma=True))
    case = Case(batch=2, heads=2, groups=1, m=40, n=70, w=33)
    tensors, problem = case.tensors(torch.float32), case.problem()
    dout, dlse = gradients(case, torch.float32, with_dlse=True)
    out, lse = launch.forward(*tensors, problem)
    wanted = launch.backward(dout, dlse, *tensors, out, lse, problem)
    move = LAYOUTS[layout]
    strange = [move(x) for x in tensors]
    assert any(x.stride() != y.stride() for x, y in zip(tensors, strange, strict=True))
    found_out, found_lse = launch.forward(*strange, problem)
    found = launch.backward(move(dout), dlse, *strange, move(out), lse, problem)
    torch.testing.assert_close((found_out, found_lse, *found), (out, lse, *wanted))


def test_one_row_for_all_may_be_given_as_a_view() -> None:
    case = Case(m=40, n=40, w=13)
    tensors, problem = case.tensors(torch.float32), case.problem()
    tensors = [x[:, :, :1].expand_as(x) for x in tensors]
    found = launch.forward(*tensors, problem)
    torch.testing.assert_close(found, launch.forward(*(x.clone() for x in tensors), problem))


def test_addresses_do_not_wrap() -> None:
    far_apart = (1 << 31) + 64  # elements; only the pages that are written to exist
    case = Case(batch=2, m=20, n=20, w=9)
    tensors, problem = case.tensors(torch.float16), case.problem()
    wanted = launch.forward(*tensors, problem)
    memory = torch.empty(far_apart + tensors[1].numel(), dtype=torch.float16)
    k1 = memory.as_strided(tensors[1].shape, (far_apart, *tensors[1].stride()[1:]))
    tensors[1] = k1.copy_(tensors[1])
    torch.testing.assert_close(launch.forward(*tensors, problem), wanted, rtol=0, atol=0)


def test_results_repeat_to_the_bit_and_leave_the_arguments_alone() -> None:
    case = Case(heads=4, groups=2, m=90, n=90, w=37)
    tensors, problem = case.tensors(torch.float32), case.problem()
    dout, dlse = gradients(case, torch.float32, with_dlse=True)
    assert dlse is not None
    copies = [x.clone() for x in (*tensors, dout, dlse)]

    def run() -> list[Tensor]:
        out, lse = launch.forward(*tensors, problem)
        return [out, lse, *launch.backward(dout, dlse, *tensors, out, lse, problem)]

    for once, again in zip(run(), run(), strict=True):
        assert torch.equal(once, again)
    for x, copy in zip((*tensors, dout, dlse), copies, strict=True):
        assert torch.equal(x, copy)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=2, heads=4, groups=2, m=70, n=90, w=33),
        Case(m=70, n=90, w=33, causal=False, n_sink=9),
        Case(batch=2, m=90, n=70, w=20, rows=2),
        Case(m=70, n=70, w=NEVER, size=24),
        Case(m=0, n=5),
    ],
    ids=str,
)
def test_total_attention(case: Case) -> None:
    q1, k1, q2, k2, v = case.tensors(torch.float32)
    problem = case.problem()
    _, lse = reference.forward(q1, k1, q2, k2, v, problem)
    found = launch.total_attention(q1, k1, q2, k2, lse, problem)
    wanted = reference.total_attention(q1, k1, q2, k2, lse, problem)
    torch.testing.assert_close(found, wanted, rtol=2e-5, atol=2e-5)


def test_total_attention_of_packed_sequences() -> None:
    starts = [
        torch.tensor(x).cumsum(0, dtype=torch.int32) for x in zip((0, 0), *LENGTHS, strict=True)
    ]
    q = torch.randn(int(starts[0][-1]), 4, 16)
    k, v = (torch.randn(int(starts[1][-1]), 2, 16) for _ in "kv")
    results = [
        flash_attention(
            q, k, v, True, return_lse=True, return_total_attention=True, cu_seqlens_q=starts[0],
            cu_seqlens_k=starts[1], backend=backend,
        )
        for backend in ("triton", "reference")
    ]  # fmt: skip
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # it looks at its copies
@pytest.mark.parametrize("rows", [False, True], ids=["number", "rows"])
def test_it_is_an_operator_as_torch_wants_them(rows: bool) -> None:
    case = Case(heads=2, groups=1, m=10, n=12, w=4, rows=int(rows))
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)]
    threshold = case.threshold()
    number, row = (NEVER, threshold) if rows else (threshold, None)
    settings = (number, row, None, None, None, None, 2, 0, 0, True, 0.25, "triton")
    torch.library.opcheck(piecewise_op, (*tensors, *settings))


def test_every_chip_has_its_tiles_or_is_named() -> None:
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert set(TABLE[arch]) == {64, 128, 256}
        for size in (16, 64, 80, 128, 192, 256):
            for kernel in KERNELS:
                choose(arch, size, kernel)
    for other, known in (("sm_86", "sm_80"), ("sm_103", "sm_100"), ("sm_120", "sm_80")):
        assert choose(other, 128, "forward") == choose(known, 128, "forward")
    assert choose("sm_90", 64, "forward", 4).block_m < choose("sm_90", 64, "forward").block_m
    for unknown in ("sm_70", "gfx90a", "xpu"):
        with pytest.raises(BackendError, match=unknown):
            choose(unknown, 64, "forward")
