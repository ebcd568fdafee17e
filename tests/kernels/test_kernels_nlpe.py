"""NLPE with the rotation inside the kernels, in the interpreter."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import attention_static
import pytest
import torch
from harness.nlpe_scores import by_distances
from torch import Tensor

from flagattention.fused import nlpe_op
from flagattention.kernels import launch
from flagattention.kernels.configs import Tiles
from flagattention.nlpe import Method, Rotary, nlpe_attention
from flagattention.turns import Turns

SetTiles = Callable[[Tiles], None]
Shapes = tuple[tuple[int, int, int, int], tuple[int, int]]


def rotation(pairs: int, **settings: Any) -> Rotary:
    return Rotary(1.0 / 100.0 ** (torch.arange(pairs) / max(pairs, 1)), **settings)


RULES = {
    "rerope": Method("rerope", 33),
    "logarithm": Method("rerope", 20, log_length=25),
    "streaming": Method("streaming", 33, n_sink=5, log_length=40),
    "all near": Method("rerope", 200, log_length=25),
}
ROTATIONS = {
    "whole": rotation(8),
    "partial": rotation(3),
    "interleaved": rotation(8, interleaved=True),
    "partial interleaved": rotation(5, interleaved=True, attention_scaling=1.3),
    "scaled": rotation(8, attention_scaling=1.3),
    "none": rotation(0),
    "padded": rotation(10),
}
# Batch, heads, length and size of q; heads and length of k.
SMALL, GROUPS, PADDED = (
    ((1, 1, 70, 16), (1, 90)),
    ((2, 2, 40, 16), (1, 50)),
    ((1, 2, 70, 24), (1, 75)),
)


def leaves(shapes: Shapes, dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    (batch, heads, m, size), (groups, n) = shapes
    made = (torch.randn(batch, h, t, size) for h, t in ((heads, m), (groups, n), (groups, n)))
    return [x.to(dtype).requires_grad_() for x in made]


def starts(out: Tensor, lse: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(out.shape).to(out.dtype), torch.randn(lse.shape).to(lse.dtype)]


def run(tensors: list[Tensor], method: Method, rotary: Rotary, **options: Any) -> list[Tensor]:
    """Out, lse and the gradients of q, k and v."""
    found = nlpe_attention(
        *tensors, method, rotary, rotated=False, return_lse=True, backend="triton", **options
    )
    assert isinstance(found, tuple)
    return [*(x.detach() for x in found), *torch.autograd.grad(found, tensors, starts(*found))]


def exact(tensors: list[Tensor], method: Method, rotary: Rotary) -> list[Tensor]:
    """The same from float64 scores."""
    doubles = [x.detach().double().requires_grad_() for x in tensors]
    q, k, _ = tensors
    found = by_distances(*doubles, method, rotary, k.shape[2] - q.shape[2])
    begin = starts(q, found[1].float())
    grads = torch.autograd.grad(found, doubles, [x.double() for x in begin])
    return [x.detach() for x in (*found, *grads)]


@pytest.fixture
def unfuse(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes the operator rotate, and hand the kernels both pairs."""

    def do() -> None:
        monkeypatch.delattr(launch, "nlpe_forward")
        monkeypatch.delattr(launch, "nlpe_backward")

    return do


@pytest.mark.parametrize(
    ("name", "turning", "shapes", "dtype"),
    [
        ("rerope", "whole", SMALL, torch.float32),
        ("logarithm", "partial", GROUPS, torch.float32),
        ("streaming", "interleaved", SMALL, torch.float16),
        ("streaming", "partial interleaved", GROUPS, torch.float32),
        ("streaming", "padded", PADDED, torch.float32),
        ("all near", "scaled", SMALL, torch.float32),
        ("logarithm", "none", SMALL, torch.float16),
    ],
)
def test_it_is_what_rotated_queries_give(
    name: str, turning: str, shapes: Shapes, dtype: torch.dtype, unfuse: Callable[[], None]
) -> None:
    method, rotary = RULES[name], ROTATIONS[turning]
    tensors = leaves(shapes, dtype)
    found = run(tensors, method, rotary)
    unfuse()
    for got, want in zip(found, run(tensors, method, rotary), strict=True):
        assert torch.equal(got, want)
    tolerance = 2e-5 if dtype == torch.float32 else 8e-3
    for got, want in zip(found, exact(tensors, method, rotary), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_only_keys_are_rotated_before_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    rotated: list[str] = []
    queries, keys = Turns.queries, Turns.keys
    monkeypatch.setattr(Turns, "queries", lambda *args: rotated.append("q") or queries(*args))
    monkeypatch.setattr(Turns, "keys", lambda *args: rotated.append("k") or keys(*args))
    tensors = leaves(SMALL, torch.float32)
    found = nlpe_attention(
        *tensors, RULES["rerope"], ROTATIONS["whole"], rotated=False, backend="triton"
    )
    assert isinstance(found, Tensor)
    assert rotated == ["k"]
    # For dk/dv there are rotated queries, as long as it runs.
    found.sum().backward()
    assert sorted(rotated) == ["k", "k", "q"]


@pytest.mark.parametrize("name", ["rerope", "logarithm"])
def test_packed_is_a_loop_over_the_sequences(name: str) -> None:
    lengths = ((5, 7), (0, 3), (70, 70), (1, 30))
    method, rotary = RULES[name], ROTATIONS["partial interleaved"]
    where = [[0, *torch.tensor(x).cumsum(0).tolist()] for x in zip(*lengths, strict=True)]
    cu_q, cu_k = (torch.tensor(x, dtype=torch.int32) for x in where)
    (q, k, v) = (
        x.detach()[0].transpose(0, 1) for x in leaves(((1, 2, 76, 16), (1, 110)), torch.float32)
    )
    tensors = [x.requires_grad_() for x in (q, k, v)]
    found = run(tensors, method, rotary, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k)
    begin = starts(found[0], found[1])
    for (q0, q1), (k0, k1) in zip(pairwise(where[0]), pairwise(where[1]), strict=True):
        rows, columns = slice(q0, q1), slice(k0, k1)
        slices = (rows, columns, columns)
        parts = [
            x[at].transpose(0, 1)[None].detach() for x, at in zip(tensors, slices, strict=True)
        ]
        parts = [x.double().requires_grad_() for x in parts]
        out, lse = by_distances(*parts, method, rotary, (k1 - k0) - (q1 - q0))
        start = (begin[0][rows].transpose(0, 1)[None].double(), begin[1][None, :, rows].double())
        grads = torch.autograd.grad((out, lse), parts, start)
        for x, at, want in zip((found[0], *found[2:]), (rows, *slices), (out, *grads), strict=True):
            got = x[at].transpose(0, 1)[None].double()
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(found[1][None, :, rows].double(), lse, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_any_strides_and_any_scale(scale: float, unfuse: Callable[[], None]) -> None:
    tensors = leaves(((1, 2, 40, 16), (1, 50)), torch.float32)
    method, rotary = RULES["streaming"], ROTATIONS["scaled"]
    strange = [x.detach().mT.contiguous().mT.requires_grad_() for x in tensors]
    found = run(strange, method, rotary, sm_scale=scale)
    unfuse()
    torch.testing.assert_close(found, run(tensors, method, rotary, sm_scale=scale))


def test_offsets_and_no_mask(unfuse: Callable[[], None]) -> None:
    options: dict[str, Any] = {"q_positions": 130, "k_positions": 90, "causal": False}
    tensors = leaves(SMALL, torch.float32)
    found = run(tensors, RULES["logarithm"], ROTATIONS["whole"], **options)
    unfuse()
    for got, want in zip(
        found, run(tensors, RULES["logarithm"], ROTATIONS["whole"], **options), strict=True
    ):
        assert torch.equal(got, want)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    m, n = shape
    tensors = leaves(((1, 2, m, 16), (1, n)), torch.float32)
    found = run(tensors, RULES["rerope"], ROTATIONS["whole"], q_positions=0)
    assert all(not x.any() for i, x in enumerate(found) if i != 1)
    assert (found[1] == -torch.inf).all()


def test_what_is_kept() -> None:
    tensors = leaves(GROUPS, torch.float16)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    rotary = ROTATIONS["whole"]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = nlpe_attention(*tensors, RULES["rerope"], rotary, rotated=False, backend="triton")
    assert isinstance(out, Tensor)
    q, k, _ = tensors
    lse = q.numel() // q.shape[3] * 4
    # q, k, k1, v, out, lse, and the inverse frequencies.
    assert sum(kept.values()) == 2 * q.nbytes + 3 * k.nbytes + lse + rotary.inv_freq.nbytes


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # it looks at its copies
def test_it_is_an_operator_as_torch_wants_them() -> None:
    tensors = leaves(((1, 1, 10, 16), (1, 12)), torch.float32)
    rotary = ROTATIONS["partial interleaved"]
    rest = (
        rotary.inv_freq, rotary.interleaved, rotary.attention_scaling, 9, 5, None, None, None, None,
        2, 0, 0, True, 0.25, "triton",
    )  # fmt: skip
    torch.library.opcheck(nlpe_op, (*tensors, *rest))


def test_the_loops_are_those_of_plain_attention() -> None:
    rows = attention_static.compiled("sm_90", 128, kernels=["nlpe_forward"])
    assert [row["far"] for row in rows] == [True, False]
    assert attention_static.problems("sm_90", 128, rows) == []
