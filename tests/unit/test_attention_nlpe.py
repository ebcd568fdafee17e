"""Pairs for long texts, against scores written down from the distances of queries and keys."""

from __future__ import annotations

import math
import re
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness.nlpe_scores import by_distances
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from flagattention import (
    AttentionError,
    DeviceError,
    DtypeError,
    ShapeError,
    nlpe,
    piecewise_attention,
)
from flagattention import fused as fused_module
from flagattention.fused import nlpe_backward_op, nlpe_op
from flagattention.nlpe import Method, Rotary, nlpe_attention, pairs, rotate
from flagattention.positions import consecutive
from flagattention.rotary import angles, turn

METHODS = {
    "rerope": Method("rerope", 7),
    "leaky-rerope": Method("leaky-rerope", 7, leak=2.5),
    "self-extend": Method("self-extend", 6, group=3),
    "self-extend-uneven": Method("self-extend", 7, group=2),
    "streaming": Method("streaming", 7, n_sink=2),
    "logarithm": Method("rerope", 7, log_length=12),
    "streaming-logarithm": Method("streaming", 5, n_sink=3, log_length=9),
}
ROTARIES = {
    "whole": Rotary(1.0 / 100.0 ** (torch.arange(4) / 4)),
    "partial": Rotary(1.0 / 100.0 ** (torch.arange(3) / 3)),
    "interleaved": Rotary(1.0 / 100.0 ** (torch.arange(3) / 3), interleaved=True),
    "scaled": Rotary(1.0 / 100.0 ** (torch.arange(3) / 3), attention_scaling=1.3),
}


def tensors(m: int, n: int, dtype: torch.dtype = torch.float64, batch: int = 2) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((batch, 4, m, 8), (batch, 2, n, 8), (batch, 2, n, 8))
    return [torch.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def gradients(found: tuple[Tensor, Tensor], leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    start = [torch.randn_like(x) for x in found]
    return list(torch.autograd.grad(found, leaves, start))


def attention(
    q: Tensor, k: Tensor, v: Tensor, method: Method, rotary: Rotary, rotated: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    if rotated:
        cu_seqlens = (options.get("cu_seqlens_q"), options.get("cu_seqlens_k"))
        offsets = (options.get("q_positions"), options.get("k_positions", 0))
        rows, cols = consecutive((q, k), cu_seqlens, *offsets)
        q, k = rotate(q, rows, rotary), rotate(k, cols, rotary)
    found = nlpe_attention(q, k, v, method, rotary, rotated=rotated, return_lse=True, **options)
    assert isinstance(found, tuple)
    return found


@pytest.mark.parametrize("rotary", ROTARIES.values(), ids=ROTARIES)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("rotated", [False, True], ids=["unrotated", "rotated"])
def test_scores_are_those_of_the_distances(method: Method, rotary: Rotary, rotated: bool) -> None:
    for (m, n), causal in product(((30, 30), (4, 33)), (True, False)):
        leaves = tensors(m, n)
        found = attention(*leaves, method, rotary, rotated, causal=causal)
        wanted = by_distances(*leaves, method, rotary, n - m, causal)
        torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)
        torch.testing.assert_close(
            gradients(found, leaves), gradients(wanted, leaves), atol=1e-10, rtol=0
        )


@pytest.mark.parametrize("rotated", [False, True], ids=["unrotated", "rotated"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_sequences_may_begin_anywhere(method: Method, rotated: bool) -> None:
    leaves = tensors(12, 20)
    rotary = ROTARIES["partial"]
    found = attention(*leaves, method, rotary, rotated, q_positions=17, k_positions=4)
    wanted = by_distances(*leaves, method, rotary, 17, k_offset=4)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    "method",
    [
        Method("rerope", 40),
        Method("leaky-rerope", 5, leak=1),
        Method("self-extend", 5, group=1),
        Method("streaming", 40, n_sink=1),
    ],
    ids=str,
)
def test_a_method_that_changes_nothing_is_plain_attention(method: Method) -> None:
    q, k, v = tensors(30, 30)
    rotary, positions = ROTARIES["whole"], torch.arange(30)
    q1, k1 = rotate(q, positions, rotary), rotate(k, positions, rotary)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        q1, k1, v, is_causal=True, enable_gqa=True
    )
    for rotated in (False, True):
        out, _ = attention(q, k, v, method, rotary, rotated)
        torch.testing.assert_close(out, wanted)


def test_a_window_tells_methods_apart() -> None:
    leaves = tensors(30, 30)
    outs = [
        attention(*leaves, method, ROTARIES["whole"], False)[0][:, :, 29]
        for method in METHODS.values()
    ]
    for i, a in enumerate(outs):
        assert all((a - b).abs().max() > 1e-4 for b in outs[:i])


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("rotated", [False, True], ids=["unrotated", "rotated"])
@pytest.mark.parametrize("q_offset", [None, 3])
def test_packed_is_a_loop_over_the_sequences(
    method: Method, rotated: bool, q_offset: int | None
) -> None:
    lengths = ((5, 20), (0, 3), (25, 25), (1, 9))
    starts = [[0], [0]]
    for pair in lengths:
        for start, length in zip(starts, pair, strict=True):
            start.append(start[-1] + length)
    cu_q, cu_k = (torch.tensor(start, dtype=torch.int32) for start in starts)
    torch.manual_seed(0)
    shapes = ((starts[0][-1], 4, 8), (starts[1][-1], 2, 8), (starts[1][-1], 2, 8))
    leaves = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in shapes]
    rotary = ROTARIES["partial"]
    found = attention(
        *leaves, method, rotary, rotated, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k,
        q_positions=q_offset,
    )  # fmt: skip
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(pairwise(starts[0]), pairwise(starts[1]), strict=True):
        pieces = [
            x[where].transpose(0, 1)[None]
            for x, where in zip(leaves, (slice(q0, q1), slice(k0, k1), slice(k0, k1)), strict=True)
        ]
        first = (k1 - k0) - (q1 - q0) if q_offset is None else q_offset
        out, lse = by_distances(*pieces, method, rotary, first)
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    wanted = (torch.cat(outs), torch.cat(lses, 1))
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)
    torch.testing.assert_close(
        gradients(found, leaves), gradients(wanted, leaves), atol=1e-10, rtol=0
    )


GRADCHECKED = {
    "rerope": Method("rerope", 3, log_length=4),
    "leaky-rerope": Method("leaky-rerope", 2, leak=2.5),
    "streaming": Method("streaming", 3, n_sink=2),
}


@pytest.mark.parametrize(
    ("name", "rotated", "backend"),
    [
        *product(GRADCHECKED, (False, True), ("cpu",)),
        ("rerope", False, "reference"),
    ],
)
def test_gradcheck(name: str, rotated: bool, backend: str) -> None:
    heads, rotary = (2, 1, 1), Rotary(torch.tensor([1.0]), attention_scaling=1.3)
    leaves = [
        x.detach()[:1, :h, :, :3].requires_grad_()
        for x, h in zip(tensors(5, 6), heads, strict=True)
    ]
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, GRADCHECKED[name], rotary, rotated, backend=backend),
        leaves,
    )


# Precision.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_pairs_are_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 2, 64, 8).to(dtype) for _ in range(2))
    rotary, positions = ROTARIES["partial"], torch.arange(64)
    method = Method("leaky-rerope", 7, leak=2.5, log_length=12)
    for rotated in (False, True):
        found = pairs(q, k, positions, positions, method, rotary, rotated=rotated)
        exact = pairs(q.double(), k.double(), positions, positions, method, rotary, rotated=rotated)
        for name in ("q1", "k1", "q2", "k2"):
            got, want = getattr(found, name), getattr(exact, name)
            assert got.dtype == dtype
            # Half a unit in the last place, and what float32 is off by before the rounding.
            bound = want.abs() * torch.finfo(dtype).eps / 2 * (1 + 1e-3) + 1e-5
            assert ((got.double() - want).abs() <= bound).all(), (name, rotated)


def test_rotating_back_undoes_what_the_model_rounded() -> None:
    torch.manual_seed(0)
    inv_freq = 1.0 / 10000.0 ** (torch.arange(32) / 32)
    positions = torch.arange(100_000, 100_064)
    q = torch.randn(1, 1, 64, 64)
    freqs = positions.float().unsqueeze(-1) * inv_freq
    cos, sin = freqs.cos(), freqs.sin()
    a, b = q[..., :32], q[..., 32:]
    model_q = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    made = pairs(
        model_q, model_q, positions, positions, Method("rerope", 50), Rotary(inv_freq),
        rotated=True,
    )  # fmt: skip
    assert made.k1 is model_q
    assert (made.k2 - q).abs().max() < 2e-6
    exact = turn(q.double(), (50.0 * inv_freq.double()).unsqueeze(0), Rotary(inv_freq))
    assert (made.q2 - exact).abs().max() < 2e-5


def test_angles_are_the_models() -> None:
    rotary, positions = ROTARIES["whole"], torch.arange(1000)
    found = angles(positions, rotary, torch.bfloat16)
    assert found.dtype == torch.float64
    assert torch.equal(found.float(), torch.outer(positions.float(), rotary.inv_freq))


def test_what_does_not_change_is_not_copied() -> None:
    q, k, _ = tensors(10, 10)
    positions, method = torch.arange(10), METHODS["rerope"]
    made = pairs(q, k, positions, positions, method, ROTARIES["whole"], rotated=True)
    assert made.q1 is q
    assert made.k1 is k
    assert (made.threshold, made.n_sink) == (7, 0)


# The fused operator.


def unfused(q: Tensor, k: Tensor, v: Tensor, method: Method, rotary: Rotary) -> Any:
    positions = torch.arange(q.shape[2])
    made = pairs(q, k, positions, positions, method, rotary, rotated=False)
    return piecewise_attention(
        made.q1, made.k1, made.q2, made.k2, v, made.threshold, True, return_lse=True,
        n_sink=made.n_sink,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary", ROTARIES.values(), ids=ROTARIES)
def test_fused_is_what_the_pairs_give(rotary: Rotary, dtype: torch.dtype) -> None:
    for name in ("rerope", "streaming-logarithm"):
        leaves = tensors(40, 40, dtype)
        method = METHODS[name]
        found = attention(*leaves, method, rotary, False)
        wanted = unfused(*leaves, method, rotary)
        torch.testing.assert_close(found, wanted, atol=0, rtol=0)
        exact = [x.detach().double().requires_grad_() for x in leaves]
        torch.manual_seed(1)
        start = [torch.randn_like(x) for x in wanted]
        fused_grads = torch.autograd.grad(found, leaves, start)
        plain_grads = torch.autograd.grad(wanted, leaves, start)
        exact_grads = torch.autograd.grad(
            by_distances(*exact, method, rotary, 0), exact, [x.double() for x in start]
        )
        for got, plain, want in zip(fused_grads, plain_grads, exact_grads, strict=True):
            assert got.dtype == dtype
            inherited = (plain.double() - want).norm()
            assert (got.double() - want).norm() <= inherited * 1.05 + 1e-6


def saved_bytes(run: Any) -> int:
    """What autograd keeps, each storage counted once."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = run()
    assert found[0].grad_fn is not None
    return sum(kept.values())


@pytest.mark.parametrize("name", ["rerope", "streaming-logarithm"])
def test_fused_keeps_one_rotated_tensor(name: str) -> None:
    torch.manual_seed(0)
    batch, heads, groups, length, size = 1, 8, 2, 512, 64
    q, k, v = (
        torch.randn(batch, h, length, size, dtype=torch.bfloat16, requires_grad=True)
        for h in (heads, groups, groups)
    )
    rotary = Rotary(1.0 / 10000.0 ** (torch.arange(32) / 32))
    method = METHODS[name]
    query, key = q.nbytes, k.nbytes
    lse = batch * heads * length * 4
    fused = saved_bytes(lambda: attention(q, k, v, method, rotary, False))
    # q, k, k1, v, out, lse, and the inverse frequencies.
    assert fused == 2 * query + 3 * key + lse + 32 * 4
    generic = saved_bytes(lambda: unfused(q, k, v, method, rotary))
    # q1, q2, k1, k2, v, out, lse, and tables.
    assert generic >= 3 * query + 3 * key + lse
    assert fused < 0.8 * generic


# It looks at its own copies of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", ["rerope", "streaming-logarithm"])
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_opcheck(name: str, packed: bool) -> None:
    method, rotary = METHODS[name], ROTARIES["scaled"]
    q, k, v = tensors(10, 10, torch.float32)
    cu: list[Tensor | None] = [None, None]
    if packed:
        # With strides that are not those of a contiguous tensor.
        q, k, v = (x.detach()[0].transpose(0, 1).requires_grad_() for x in (q, k, v))
        cu = [torch.tensor([0, 4, 10], dtype=torch.int32)] * 2
    rest = (
        rotary.inv_freq, rotary.interleaved, rotary.attention_scaling, method.log_length,
        method.window, *cu, None, None, None if packed else 0, 0, method.n_sink, True, 0.3, "cpu",
    )  # fmt: skip
    torch.library.opcheck(nlpe_op, (q, k, v, *rest))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, k1 = nlpe_op(q, k, v, *rest)
    torch.library.opcheck(
        nlpe_backward_op,
        (torch.randn_like(out), torch.randn_like(lse), q, k, k1, v, out, lse, *rest),
    )


@pytest.mark.parametrize(("name", "rotated"), [("rerope", False), ("self-extend", True)])
def test_compiles_without_a_break(name: str, rotated: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(nlpe_attention, backend=counter, fullgraph=True)
    leaves = tensors(12, 12)
    call = (*leaves, METHODS[name], ROTARIES["partial"])
    found = compiled(*call, rotated=rotated, return_lse=True)
    wanted: Any = nlpe_attention(*call, rotated=rotated, return_lse=True)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gradients(found, leaves), gradients(wanted, leaves))
    assert counter.frame_count == 1


def test_a_backend_may_fuse_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = tensors(12, 12)
    method, rotary = METHODS["logarithm"], ROTARIES["scaled"]
    seen: list[Any] = []

    def nlpe_forward(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        seen.append(rest)
        return torch.ones_like(q), q.new_zeros(q.shape[:3]), torch.full_like(k, 2)

    def nlpe_backward(
        dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, k1: Tensor, v: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        seen.append(rest[2:])
        return torch.full_like(q, 3), k1.clone(), torch.full_like(v, 5)

    own = SimpleNamespace(nlpe_forward=nlpe_forward, nlpe_backward=nlpe_backward)
    monkeypatch.setattr(fused_module, "backend_module", lambda name: own)
    found = attention(*leaves, method, rotary, False)
    assert (found[0] == 1).all()
    for grad, value in zip(gradients(found, leaves), (3, 2, 5), strict=True):
        assert (grad == value).all()
    for rotation, log_length, problem in seen:
        assert (rotation.attention_scaling, log_length, problem.threshold) == (1.3, 12, 7)


# What is refused.


@pytest.mark.parametrize(
    ("settings", "where", "what"),
    [
        ({"name": "nlpe"}, "name", "no such method"),
        ({"window": 0}, "window", "out of range"),
        ({"window": 2.0}, "window", "out of range"),
        ({"window": True}, "window", "out of range"),
        ({"log_length": 1}, "log_length", "out of range"),
        ({"leak": 2.0}, "leak", "does not use leak"),
        ({"group": 2}, "group", "does not use group"),
        ({"n_sink": 4}, "n_sink", "does not use n_sink"),
        ({"name": "leaky-rerope"}, "leak", "missing"),
        ({"name": "leaky-rerope", "leak": 0.5}, "leak", "out of range"),
        ({"name": "leaky-rerope", "leak": math.inf}, "leak", "out of range"),
        ({"name": "self-extend"}, "group", "missing"),
        ({"name": "self-extend", "group": 0}, "group", "out of range"),
        ({"name": "self-extend", "group": 1.5}, "group", "out of range"),
        ({"name": "streaming"}, "n_sink", "out of range"),
    ],
    ids=str,
)
def test_settings_refused(settings: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(AttentionError, match=what) as caught:
        Method(**{"name": "rerope", "window": 4, **settings})
    assert caught.value.where == where


@pytest.mark.parametrize(
    ("rotary", "error"),
    [
        (Rotary(torch.ones(5)), ShapeError),
        (Rotary(torch.ones(2, 2)), ShapeError),
        (Rotary(torch.ones(2, dtype=torch.int64)), DtypeError),
        (Rotary([1.0, 0.5]), DtypeError),  # type: ignore[arg-type]
        (Rotary(torch.ones(4, device="meta")), DeviceError),
        (Rotary(torch.ones(4), attention_scaling=0.0), AttentionError),
    ],
)
def test_rotations_refused(rotary: Rotary, error: type[AttentionError]) -> None:
    q, k, v = tensors(6, 6)
    with pytest.raises(error):
        nlpe_attention(q, k, v, METHODS["rerope"], rotary, rotated=False)
    with pytest.raises(error):
        pairs(q, k, torch.arange(6), torch.arange(6), METHODS["rerope"], rotary, rotated=True)


def positions_of(what: str) -> dict[str, Any]:
    rows, cols = torch.arange(4, 10), torch.arange(10)
    return {
        "vectors": {"q_positions": rows, "k_positions": cols},
        "a row each": {"q_positions": rows.expand(2, -1), "k_positions": cols.expand(2, -1)},
        "floats": {"q_positions": rows.double()},
        "elsewhere": {"q_positions": rows + 3, "k_positions": cols + 3},
        "apart": {"q_positions": rows + 2},
        "a gap": {"q_positions": torch.tensor([4, 5, 6, 8, 9, 10])},
        "a restart": {"k_positions": cols % 5},
        "backwards": {"k_positions": cols.flip(0)},
        "rows that differ": {"q_positions": torch.stack((rows, rows + 1))},
        "too many": {"q_positions": torch.arange(7)},
        "three rows": {"k_positions": cols.expand(3, -1)},
        "booleans": {"k_positions": cols > 3},
        "half": {"q_positions": rows + 0.5},
        "an offset that is none": {"q_positions": 0.5},
    }[what]


@pytest.mark.parametrize(
    ("what", "q_offset", "k_offset"),
    [
        ("vectors", 4, 0),
        ("a row each", 4, 0),
        ("floats", 4, 0),
        ("elsewhere", 7, 3),
        ("apart", 6, 0),
    ],
)
def test_positions_taken(what: str, q_offset: int, k_offset: int) -> None:
    leaves = tensors(6, 10)
    method, rotary = METHODS["self-extend"], ROTARIES["partial"]
    found = nlpe_attention(
        *leaves, method, rotary, rotated=False, return_lse=True, **positions_of(what)
    )
    wanted = by_distances(*leaves, method, rotary, q_offset, k_offset=k_offset)
    torch.testing.assert_close(found, wanted, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    ("what", "error", "where"),
    [
        ("a gap", AttentionError, "q_positions"),
        ("a restart", AttentionError, "k_positions"),
        ("backwards", AttentionError, "k_positions"),
        ("rows that differ", AttentionError, "q_positions"),
        ("half", AttentionError, "q_positions"),
        ("too many", ShapeError, "q_positions"),
        ("three rows", ShapeError, "k_positions"),
        ("booleans", DtypeError, "k_positions"),
        ("an offset that is none", AttentionError, "q_offset, k_offset"),
    ],
)
def test_positions_refused(what: str, error: type[AttentionError], where: str) -> None:
    with pytest.raises(error) as caught:
        nlpe_attention(
            *tensors(6, 10), METHODS["rerope"], ROTARIES["whole"], rotated=False,
            **positions_of(what),
        )  # fmt: skip
    assert caught.value.where == where


def test_positions_of_packed_sequences() -> None:
    q, k, v = (x.detach()[0].transpose(0, 1).contiguous() for x in tensors(10, 10))
    cu = torch.tensor([0, 4, 10], dtype=torch.int32)
    positions = torch.cat((torch.arange(4), torch.arange(6)))

    def run(**options: Any) -> Any:
        return nlpe_attention(
            q, k, v, METHODS["rerope"], ROTARIES["whole"], rotated=False, cu_seqlens_q=cu,
            cu_seqlens_k=cu, **options,
        )  # fmt: skip

    assert torch.equal(run(q_positions=positions, k_positions=positions), run())
    for wrong in (torch.arange(10), positions.flip(0)):
        with pytest.raises(AttentionError, match="not consecutive"):
            run(q_positions=wrong)


def test_tensors_are_checked_before_anything_is_rotated() -> None:
    q, k, v = tensors(6, 6)
    run = {"method": METHODS["rerope"], "rotary": ROTARIES["whole"], "rotated": False}
    with pytest.raises(ShapeError, match="number of dimensions"):
        nlpe_attention(q[0], k, v, **run)
    with pytest.raises(DtypeError, match="not a tensor"):
        nlpe_attention(None, k, v, **run)  # type: ignore[arg-type]
    with pytest.raises(DtypeError, match="differ in dtype"):
        nlpe_attention(q.float(), k, v, **run)


def test_a_method_of_ones_own_as_the_docs_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is Leaky ReRoPE with a leak of 2."""
    page = Path(__file__).parents[2] / "docs" / "attention.md"
    (example,) = re.findall(r"```python\n([^`]*halved[^`]*)```", page.read_text())
    monkeypatch.setattr(nlpe, "METHODS", dict(nlpe.METHODS))
    q, k, v = (torch.randn(1, 2, 1500, 16, dtype=torch.float64) for _ in range(3))
    rotary = Rotary(1 / 100 ** (torch.arange(0, 16, 2) / 16))
    names = {"q": q, "k": k, "v": v, "rotary": rotary, "nlpe_attention": nlpe_attention}
    exec(example, names)  # noqa: S102
    leaky = Method("leaky-rerope", window=1024, leak=2.0)
    wanted = nlpe_attention(q, k, v, leaky, rotary, rotated=False)
    assert isinstance(wanted, Tensor)
    torch.testing.assert_close(names["out"], wanted, rtol=0, atol=1e-12)
    plain = nlpe_attention(q, k, v, Method("rerope", window=1500), rotary, rotated=False)
    assert isinstance(plain, Tensor)
    assert (plain - wanted).abs().max() > 1e-3
