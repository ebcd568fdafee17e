"""The public calls as torch sees them: operators with gradients, on every path the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from harness.attention_cases import MATRIX, Case, gradients
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from flagattention import BackendError, cpu, flash_attention, operators, piecewise_attention
from flagattention.operators import backward_op, piecewise_op, total_op
from flagattention.problem import NEVER

SMALL = Case(batch=2, heads=4, groups=2, m=40, n=50, w=11)
LENGTHS = ((5, 7), (0, 3), (40, 40), (33, 70), (4, 0), (1, 9))


def call(case: Case, tensors: list[Tensor], **changes: Any) -> tuple[Tensor, Tensor]:
    problem = case.problem()
    found = piecewise_attention(
        *tensors, problem.threshold, case.causal, return_lse=True, q_offset=problem.q_offset,
        k_offset=case.k_offset, n_sink=case.n_sink, **changes,
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found


def differentiated(
    found: tuple[Tensor, Tensor], tensors: list[Tensor], dout: Tensor, dlse: Tensor
) -> list[Tensor]:
    return list(torch.autograd.grad(found, tensors, (dout, dlse), materialize_grads=True))


def settings(case: Case, tensors: list[Tensor], backend: str = "cpu", **changes: Any) -> list[Any]:
    problem = replace(case.problem(), **changes)
    rows = isinstance(problem.threshold, Tensor)
    return [
        NEVER if rows else problem.threshold, problem.threshold if rows else None,
        problem.cu_seqlens_q, problem.cu_seqlens_k, None, None, problem.q_offset, problem.k_offset,
        problem.n_sink, problem.causal, problem.sm_scale, backend,
    ]  # fmt: skip


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_the_paths_agree(case: Case) -> None:
    tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]
    dout, dlse = gradients(case, torch.float64, with_dlse=True)
    assert dlse is not None
    torch.manual_seed(2)
    found = call(case, tensors)
    torch.manual_seed(2)
    wanted = call(case, tensors, backend="reference")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        differentiated(found, tensors, dout, dlse), differentiated(wanted, tensors, dout, dlse)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_gradcheck(backend: str, causal: bool, rows: int) -> None:
    case = Case(heads=2, groups=1, m=6, n=7, size=3, w=2, causal=causal, rows=rows)
    threshold = case.threshold()
    assert torch.autograd.gradcheck(
        lambda *tensors: piecewise_attention(
            *tensors, threshold, causal, return_lse=True, backend=backend
        ),
        [x.requires_grad_() for x in case.tensors(torch.float64)],
    )


def packed_tensors(dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    starts = [[0], [0]]
    for lengths in LENGTHS:
        for start, length in zip(starts, lengths, strict=True):
            start.append(start[-1] + length)
    cu_seqlens = [torch.tensor(start, dtype=torch.int32) for start in starts]
    torch.manual_seed(0)
    shapes = [(starts[0][-1], 4, 16), (starts[1][-1], 2, 16)]
    tensors = [torch.randn(shapes[i], dtype=dtype, requires_grad=True) for i in (0, 1, 0, 1, 1)]
    return tensors, cu_seqlens[0], cu_seqlens[1]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("rows", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("offsets", [(None, 0), (None, 5), (3, 2)], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["read", "given"])
def test_packed_is_a_loop_over_the_sequences(
    backend: str, causal: bool, rows: bool, offsets: tuple[int | None, int], given: bool
) -> None:
    tensors, cu_q, cu_k = packed_tensors(torch.float64)
    threshold: Any = torch.randint(-3, 30, (len(tensors[0]),)).int() if rows else 7
    options: dict[str, Any] = {
        "causal": causal, "q_offset": offsets[0], "k_offset": offsets[1], "n_sink": 2,
        "return_lse": True, "backend": backend,
    }  # fmt: skip
    longest = {"max_seqlen_q": 40, "max_seqlen_k": 70} if given else {}
    found = piecewise_attention(
        *tensors, threshold, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **longest, **options
    )
    outs, lses = [], []
    for i in range(len(LENGTHS)):
        q, k = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        pieces = [x[s].transpose(0, 1)[None] for x, s in zip(tensors, (q, k, q, k, k), strict=True)]
        out, lse = piecewise_attention(*pieces, threshold[q] if rows else threshold, **options)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    wanted = (torch.cat(outs), torch.cat(lses, 1))
    torch.testing.assert_close(found, wanted)
    dout, dlse = torch.randn_like(found[0]), torch.randn_like(found[1])
    torch.testing.assert_close(
        differentiated(found, tensors, dout, dlse), differentiated(wanted, tensors, dout, dlse)
    )


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("alias", ["q", "k", "k_and_v", "all"])
def test_one_tensor_in_two_places_gets_both_gradients(backend: str, alias: str) -> None:
    case = Case(m=50, n=50, w=13)
    q1, k1, q2, k2, v = case.tensors(torch.float64)
    if alias == "q":
        q2 = q1
    elif alias == "k":
        k2 = k1
    elif alias == "k_and_v":
        v = k2
    else:
        q1 = q2 = k1 = k2 = v
    shared = [q1, k1, q2, k2, v]
    apart = [x.clone().requires_grad_() for x in shared]
    for x in shared:
        x.requires_grad_()
    dout, dlse = gradients(case, torch.float64, with_dlse=True)
    assert dlse is not None
    one_by_one = differentiated(call(case, apart, backend=backend), apart, dout, dlse)
    sums: dict[int, Tensor] = {}
    for x, grad in zip(shared, one_by_one, strict=True):
        sums[id(x)] = sums.get(id(x), torch.zeros_like(x)) + grad
    found = call(case, shared, backend=backend)
    for x, grad in zip(shared, differentiated(found, shared, dout, dlse), strict=True):
        torch.testing.assert_close(grad, sums[id(x)])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("w", [0, 1, 50, 51])
def test_the_threshold_at_its_ends(backend: str, w: int) -> None:
    case = Case(m=50, n=50, w=w)
    q1, k1, q2, k2, v = case.tensors(torch.float64)
    out, _ = call(case, [q1, k1, q2, k2, v], backend=backend)
    plain = torch.nn.functional.scaled_dot_product_attention
    if w == 1:  # each query's own key is near, every other is far
        row, col = torch.arange(50).unsqueeze(1), torch.arange(50)
        scores = torch.where(row == col, q1 @ k1.mT, q2 @ k2.mT) / 4
        wanted = scores.masked_fill(col > row, -torch.inf).softmax(-1) @ v
    else:
        q, k = (q2, k2) if w == 0 else (q1, k1)
        wanted = plain(q, k, v, is_causal=True)
    torch.testing.assert_close(out, wanted)


@pytest.mark.parametrize("w", [49, 50])
def test_the_last_far_key_is_the_first_of_the_last_row(w: int) -> None:
    q1, k1, q2, k2, v = Case(m=50, n=50).tensors(torch.float64)
    out = piecewise_attention(q1, k1, q2, k2, v, w, causal=True)
    plain = torch.nn.functional.scaled_dot_product_attention(q1, k1, v, is_causal=True)
    same = torch.isclose(out, plain).all(-1).all(1)[0]
    assert same[:49].all()
    assert bool(same[49]) is (w == 50)


def test_either_result_may_go_unused() -> None:
    tensors = [x.requires_grad_() for x in SMALL.tensors(torch.float64)]
    dout, dlse = gradients(SMALL, torch.float64, with_dlse=True)
    assert dlse is not None
    out, lse = call(SMALL, tensors)
    both = torch.autograd.grad((out, lse), tensors, (dout, dlse), retain_graph=True)
    apart = [
        torch.autograd.grad(x, tensors, grad, retain_graph=True)
        for x, grad in ((out, dout), (lse, dlse))
    ]
    torch.testing.assert_close(tuple(a + b for a, b in zip(*apart, strict=True)), both)


def test_without_a_gradient_of_the_lse_the_shorter_way_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []

    def backward(dout: Tensor, dlse: Tensor | None, *rest: Any) -> Any:
        seen.append(dlse)
        return original(dout, dlse, *rest)

    original = cpu.backward
    monkeypatch.setattr(cpu, "backward", backward)
    out, lse = call(SMALL, [x.requires_grad_() for x in SMALL.tensors(torch.float32)])
    out.sum().backward(retain_graph=True)
    lse.sum().backward()
    assert [dlse is None for dlse in seen] == [True, False]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_thresholds_of_each_entry_of_the_batch_are_its_own(backend: str) -> None:
    tensors = SMALL.tensors(torch.float64)
    threshold = replace(SMALL, rows=2).threshold()
    assert isinstance(threshold, Tensor)
    found = piecewise_attention(*tensors, threshold, True, backend=backend)
    for b in range(2):
        entry = [x[b : b + 1] for x in tensors]
        alone = piecewise_attention(*entry, threshold[b], True, backend=backend)
        torch.testing.assert_close(found[b : b + 1], alone)


def test_a_tensor_without_a_gradient_gets_none() -> None:
    tensors = SMALL.tensors(torch.float32)
    tensors[4].requires_grad_()
    out, _ = call(SMALL, tensors)
    out.sum().backward()
    assert tensors[4].grad is not None
    assert all(x.grad is None for x in tensors[:4])
    with torch.no_grad():
        assert not call(SMALL, tensors)[0].requires_grad


def test_a_second_derivative_is_refused() -> None:
    tensors = [x.requires_grad_() for x in SMALL.tensors(torch.float64)]
    (grad,) = torch.autograd.grad(call(SMALL, tensors)[0].sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_results_have_the_layout_of_the_arguments(dtype: torch.dtype, backend: str) -> None:
    tensors = [
        x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for x in SMALL.tensors(dtype)
    ]
    out, lse = call(SMALL, tensors, backend=backend)
    assert (out.dtype, out.stride()) == (dtype, tensors[0].stride())
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for grad, x in zip(torch.autograd.grad(out.sum(), tensors), tensors, strict=True):
        assert (grad.dtype, grad.stride()) == (dtype, x.stride())


OPCHECKED = {
    "number": SMALL,
    "rows": replace(SMALL, rows=1),
    "batch_rows": replace(SMALL, rows=2),
    "full": replace(SMALL, causal=False),
    "sinks": replace(SMALL, n_sink=3),
    "empty_rows": replace(SMALL, q_offset=-5),
    "no_rows": replace(SMALL, m=0),
    "no_keys": replace(SMALL, n=0),
}


# It looks at its own copies of the arguments.
OPCHECK_WARNS = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


@OPCHECK_WARNS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", OPCHECKED.values(), ids=OPCHECKED.keys())
def test_opcheck(case: Case, backend: str) -> None:
    tensors = [x.requires_grad_() for x in case.tensors(torch.float32)]
    rest = settings(case, tensors, backend)
    torch.library.opcheck(piecewise_op, (*tensors, *rest))
    dout, dlse = gradients(case, torch.float32, with_dlse=True)
    with torch.no_grad():
        out, lse = piecewise_op(*tensors, *rest)
    plain = [x.detach() for x in tensors]
    torch.library.opcheck(backward_op, (dout, dlse, *plain, out, lse, *rest))
    torch.library.opcheck(backward_op, (dout, None, *plain, out, lse, *rest))
    torch.library.opcheck(total_op, (*plain[:4], lse, *rest))


@OPCHECK_WARNS
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck_of_packed_and_shared_and_strange_tensors(backend: str) -> None:
    tensors, cu_q, cu_k = packed_tensors(torch.float32)
    rest = settings(SMALL, tensors, backend, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, q_offset=None)
    torch.library.opcheck(piecewise_op, (*tensors, *rest))
    q, k = (x.requires_grad_() for x in replace(SMALL, m=50).tensors(torch.float32)[:2])
    torch.library.opcheck(piecewise_op, (q, k, q, k, k, *settings(SMALL, tensors, backend)))
    strange = [x.detach().mT.contiguous().mT.requires_grad_() for x in (q, k)]
    strange = [strange[i] for i in (0, 1, 0, 1, 1)]
    torch.library.opcheck(piecewise_op, (*strange, *settings(SMALL, tensors, backend)))


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("rows", [0, 2], ids=["number", "tensor"])
def test_compiled_it_is_the_same_and_the_threshold_does_not_compile_again(rows: int) -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def run(tensors: list[Tensor], threshold: Any) -> Any:
        return piecewise_attention(*tensors, threshold, True, return_lse=True)

    tensors = [x.requires_grad_() for x in SMALL.tensors(torch.float64)]
    dout, dlse = gradients(SMALL, torch.float64, with_dlse=True)
    assert dlse is not None
    for w in (7, 12, 2, 45, 30, 1000):
        threshold = replace(SMALL, w=w, rows=rows).threshold()
        found = run(tensors, threshold)
        wanted = piecewise_attention(*tensors, threshold, True, return_lse=True)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(
            differentiated(found, tensors, dout, dlse), differentiated(wanted, tensors, dout, dlse)
        )
    # A number is a constant at first, and a variable from its second value on.
    assert counter.frame_count == (1 if rows else 2)


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_for_any_shape() -> None:
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def run(tensors: list[Tensor]) -> Any:
        return piecewise_attention(*tensors, 11, True, return_lse=True)

    for m, n in ((40, 50), (33, 70), (20, 65), (90, 91)):
        case = replace(SMALL, m=m, n=n)
        tensors = [x.requires_grad_() for x in case.tensors(torch.float64)]
        found, wanted = run(tensors), call(case, tensors)
        torch.testing.assert_close(found, wanted)
        dout, dlse = gradients(case, torch.float64, with_dlse=True)
        assert dlse is not None
        torch.testing.assert_close(
            differentiated(found, tensors, dout, dlse), differentiated(wanted, tensors, dout, dlse)
        )
    assert counter.frame_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_packed_and_flash() -> None:
    tensors, cu_q, cu_k = packed_tensors(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return flash_attention(
            q, k, v, True, return_lse=True, return_total_attention=True, cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k,
        )  # fmt: skip

    arguments = tensors[0], tensors[1], tensors[4]
    wanted = flash_attention(
        *arguments, True, return_lse=True, return_total_attention=True, cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
    )  # fmt: skip
    torch.testing.assert_close(run(*arguments), wanted)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_flash_is_torchs_own_attention(backend: str, causal: bool) -> None:
    q, k, _, _, v = (x.requires_grad_() for x in replace(SMALL, m=50).tensors(torch.float64))
    out, lse, total = flash_attention(
        q, k, v, causal, return_lse=True, return_total_attention=True, backend=backend
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=causal, enable_gqa=True
    )
    torch.testing.assert_close(out, plain)
    dout = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (q, k, v), dout), torch.autograd.grad(plain, (q, k, v), dout)
    )
    scores = q @ k.repeat_interleave(2, 1).mT / 4
    if causal:
        scores = scores.masked_fill(torch.ones(50, 50, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert total.shape == (2, 4, 50)
    torch.testing.assert_close(total, scores.softmax(-1).sum(-2))
    assert not total.requires_grad


def test_flash_returns_what_is_asked_for() -> None:
    q, k, _, _, v = SMALL.tensors(torch.bfloat16)
    out = flash_attention(q, k, v)
    assert isinstance(out, Tensor)
    _, lse = flash_attention(q, k, v, return_lse=True)
    _, total = flash_attention(q, k, v, return_total_attention=True)
    assert (lse.shape, lse.dtype) == ((2, 4, 40), torch.float32)
    assert (total.shape, total.dtype) == ((2, 4, 50), torch.float32)


@pytest.mark.parametrize("case", MATRIX, ids=str)
def test_the_total_is_the_sum_of_the_weights(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flagattention.total._SCORES", 500)  # several chunks
    q1, k1, q2, k2, _ = case.tensors(torch.float64)
    one = torch.eye(case.n, dtype=torch.float64).expand(case.batch, case.groups, case.n, case.n)
    rest = settings(case, [q1])
    _, lse = piecewise_op(q1, k1, q2, k2, k1, *rest)
    total = total_op(q1, k1, q2, k2, lse, *rest)
    if case.size > case.n:
        weights = piecewise_op(
            q1, k1, q2, k2, torch.nn.functional.pad(one, (0, case.size - case.n)), *rest
        )[0][..., : case.n]
    else:
        padded = [torch.nn.functional.pad(x, (0, case.n - case.size)) for x in (q1, k1, q2, k2)]
        weights, _ = piecewise_op(*padded, one, *rest)
    torch.testing.assert_close(total, weights.sum(-2))


def test_the_total_of_packed_sequences() -> None:
    (q, k, *_), cu_q, cu_k = packed_tensors(torch.float64)
    options: dict[str, Any] = {"causal": True, "return_total_attention": True}
    _, total = flash_attention(q, k, k, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    for i in range(len(LENGTHS)):
        qs, ks = slice(*cu_q[i : i + 2].tolist()), slice(*cu_k[i : i + 2].tolist())
        dense = [x[s].transpose(0, 1)[None] for x, s in ((q, qs), (k, ks), (k, ks))]
        torch.testing.assert_close(total[:, ks], flash_attention(*dense, **options)[1][0])


def test_a_backend_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(operators._MODULES, "cpu", "flagattention.not_there")
    with pytest.raises(BackendError, match="the cpu backend cannot be imported"):
        call(SMALL, SMALL.tensors(torch.float32))


def test_triton_is_not_imported_for_cpu_tensors() -> None:
    program = """
import sys
class Guard:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "triton" or name.startswith("flagattention.kernels"):
            raise ImportError(f"{name} is not wanted")
import torch
sys.meta_path.insert(0, Guard())
from flagattention import flash_attention, piecewise_attention
x = torch.randn(1, 2, 8, 16, requires_grad=True)
for backend in (None, "cpu", "reference"):
    piecewise_attention(x, x, x, x, x, 3, causal=True, backend=backend).sum().backward()
    flash_attention(x, x, x, return_total_attention=True, backend=backend)[0].sum().backward()
assert "triton" not in sys.modules
assert not any(name.startswith(("flagscale", "flagattention.kernels")) for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
