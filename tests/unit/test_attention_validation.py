"""Every rule of the table is broken once, and gives its own error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from flagattention import (
    AttentionError,
    BackendError,
    DeviceError,
    DtypeError,
    ShapeError,
    flash_attention,
    piecewise_attention,
)
from flagattention.validation import RULES


def dense(**changes: Any) -> dict[str, Any]:
    """Arguments of a call that is right, but for the changes."""
    q, k = torch.zeros(2, 4, 5, 16), torch.zeros(2, 2, 7, 16)
    return {"q1": q, "k1": k, "q2": q, "k2": k, "v": k, "dist_threshold": 3} | changes


def packed(**changes: Any) -> dict[str, Any]:
    q, k = torch.zeros(5, 4, 16), torch.zeros(7, 2, 16)
    right = {
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 2, 7], dtype=torch.int32),
    }
    return {"q1": q, "k1": k, "q2": q, "k2": k, "v": k, "dist_threshold": 3} | right | changes


def every(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, Any]:
    """The change made to all five tensors."""
    return dense(**{name: change(dense()[name]) for name in ("q1", "k1", "q2", "k2", "v")})


@dataclass(frozen=True)
class Wrong:
    """A call that breaks one rule, and what its error says."""

    arguments: dict[str, Any]
    error: type[AttentionError]
    where: str
    what: str
    got: str
    interpreted: bool = False  # TRITON_INTERPRET=1


def int32(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.int32, device=device)


WRONG = [
    Wrong(dense(q1=[1.0]), DtypeError, "q1, k1", "not a tensor", "q1 list"),
    Wrong(dense(cu_seqlens_q=int32(2)), AttentionError, "cu_seqlens", "only one", "cu_seqlens_q"),
    Wrong(packed(cu_seqlens_q=None), AttentionError, "cu_seqlens", "only one", "cu_seqlens_k"),
    Wrong(
        dense(v=torch.zeros(2, 7, 16)),
        ShapeError,
        "v",
        "wrong number of dimensions",
        "v [2, 7, 16]",
    ),
    Wrong(
        packed(q1=torch.zeros(1, 5, 4, 16)),
        ShapeError,
        "q1",
        "wrong number of dimensions",
        "q1 [1, 5",
    ),
    Wrong(dense(q2=torch.zeros(2, 4, 6, 16)), ShapeError, "q1, q2", "the two queries", "[2, 4, 6"),
    Wrong(dense(k2=torch.zeros(2, 2, 8, 16)), ShapeError, "k1, k2", "the two keys", "[2, 2, 8"),
    Wrong(
        dense(k1=torch.zeros(2, 2, 7, 8), k2=torch.zeros(2, 2, 7, 8)),
        ShapeError,
        "k1, k2",
        "head size of the keys",
        "k1 [2, 2, 7, 8]",
    ),
    Wrong(dense(v=torch.zeros(2, 2, 7, 8)), ShapeError, "v", "head size of the values", "7, 8]"),
    Wrong(dense(v=torch.zeros(2, 2, 6, 16)), ShapeError, "v", "values and keys", "v [2, 2, 6, 16]"),
    Wrong(dense(v=torch.zeros(2, 4, 7, 16)), ShapeError, "v", "values and keys", "v [2, 4, 7, 16]"),
    Wrong(
        dense(**{name: torch.zeros(3, 2, 7, 16) for name in ("k1", "k2", "v")}),
        ShapeError,
        "q1, k1",
        "queries and keys differ",
        "k1 [3",
    ),
    Wrong(
        dense(**{name: torch.zeros(2, 3, 7, 16) for name in ("k1", "k2", "v")}),
        ShapeError,
        "q1, k1",
        "no multiple",
        "4 query heads, 3 key heads",
    ),
    Wrong(
        dense(**{name: torch.zeros(2, 0, 7, 16) for name in ("k1", "k2", "v")}),
        ShapeError,
        "q1, k1",
        "no multiple",
        "4 query heads, 0 key heads",
    ),
    Wrong(
        dense(v=torch.zeros(2, 2, 7, 16).half()), DtypeError, "v", "differ in dtype", "v torch.fl"
    ),
    Wrong(every(lambda x: x.int()), DtypeError, "q1", "not supported", "torch.int32"),
    Wrong(
        dense(v=torch.zeros(2, 2, 7, 16, device="meta")),
        DeviceError,
        "v",
        "different devices",
        "v meta",
    ),
    Wrong(dense(backend="cuda"), BackendError, "backend", "no such backend", "'cuda'"),
    Wrong(every(lambda x: x.to("meta")), BackendError, "backend", "no such backend", "meta"),
    Wrong(
        every(lambda x: x.to("meta")) | {"backend": "cpu"},
        BackendError,
        "backend",
        "the cpu backend was",
        "meta",
    ),
    Wrong(dense(backend="triton"), BackendError, "backend", "the triton backend was", "cpu"),
    Wrong(
        every(lambda x: x.double()) | {"backend": "triton"},
        DtypeError,
        "q1",
        "does not compute in float64",
        "torch.float64",
        interpreted=True,
    ),
    Wrong(
        every(lambda x: x[..., :8]) | {"backend": "triton"},
        ShapeError,
        "q1",
        "head size is outside",
        "8 (triton)",
        interpreted=True,
    ),
    Wrong(every(lambda x: x[..., :0]), ShapeError, "q1", "head size is outside", "0 (cpu)"),
    Wrong(
        dense(dist_threshold=3.0), DtypeError, "dist_threshold", "the threshold is no whole", "3.0"
    ),
    Wrong(
        dense(dist_threshold=-math.inf),
        DtypeError,
        "dist_threshold",
        "the threshold is no whole",
        "-inf",
    ),
    Wrong(
        dense(dist_threshold=math.nan),
        DtypeError,
        "dist_threshold",
        "the threshold is no whole",
        "nan",
    ),
    Wrong(
        dense(dist_threshold=True),
        DtypeError,
        "dist_threshold",
        "the threshold is no whole",
        "True",
    ),
    Wrong(
        dense(dist_threshold=None),
        DtypeError,
        "dist_threshold",
        "the threshold is no whole",
        "None",
    ),
    Wrong(dense(dist_threshold=1 << 31), AttentionError, "dist_threshold", "out of range", "2147"),
    Wrong(
        dense(dist_threshold=torch.zeros(5)),
        DtypeError,
        "dist_threshold",
        "tensor has the wrong dtype",
        "fl",
    ),
    Wrong(
        dense(dist_threshold=torch.zeros(5).long()),
        DtypeError,
        "dist_threshold",
        "tensor has the wrong dtype",
        "torch.int64",
    ),
    Wrong(
        dense(dist_threshold=int32(7)),
        ShapeError,
        "dist_threshold",
        "tensor has the wrong shape",
        "[7]",
    ),
    Wrong(
        dense(dist_threshold=int32(1, 5)),
        ShapeError,
        "dist_threshold",
        "tensor has the wrong shape",
        "[1, 5]",
    ),
    Wrong(
        dense(dist_threshold=torch.tensor(3).int()),
        ShapeError,
        "dist_",
        "tensor has the wrong shape",
        "[]",
    ),
    Wrong(
        packed(dist_threshold=int32(7)),
        ShapeError,
        "dist_threshold",
        "tensor has the wrong shape",
        "[7]",
    ),
    Wrong(
        dense(dist_threshold=int32(5, device="meta")),
        DeviceError,
        "dist_threshold",
        "tensor lies on another",
        "meta",
    ),
    Wrong(dense(causal=1), DtypeError, "causal", "no bool", "1"),
    Wrong(dense(sm_scale=math.nan), AttentionError, "sm_scale", "the scale is no finite", "nan"),
    Wrong(dense(sm_scale=math.inf), AttentionError, "sm_scale", "the scale is no finite", "inf"),
    Wrong(
        dense(sm_scale=torch.tensor(1.0)),
        AttentionError,
        "sm_scale",
        "the scale is no finite",
        "tensor",
    ),
    Wrong(dense(sm_scale=True), AttentionError, "sm_scale", "the scale is no finite", "True"),
    Wrong(dense(q_offset=1.5), AttentionError, "q_offset", "an offset", "q_offset 1.5"),
    Wrong(dense(k_offset=None), AttentionError, "k_offset", "an offset", "k_offset None"),
    Wrong(dense(q_offset=1 << 40), AttentionError, "q_offset", "an offset", "1099511627776"),
    Wrong(dense(n_sink=-1), AttentionError, "n_sink", "number of sinks", "-1"),
    Wrong(dense(n_sink=1.0), AttentionError, "n_sink", "number of sinks", "1.0"),
    Wrong(dense(max_seqlen_q=5), AttentionError, "max_seqlen", "for dense", "max_seqlen_q 5"),
    Wrong(packed(max_seqlen_k=-1), AttentionError, "max_seqlen", "longest length is no", "k -1"),
    Wrong(packed(cu_seqlens_q=[0, 2, 5]), DtypeError, "cu_seqlens", "no int32", "list"),
    Wrong(
        packed(cu_seqlens_k=torch.tensor([0, 2, 7])),
        DtypeError,
        "cu_seqlens",
        "no int32",
        "torch.int64",
    ),
    Wrong(
        packed(cu_seqlens_q=int32(2)),
        ShapeError,
        "cu_seqlens",
        "have the wrong shape",
        "[2] and [3]",
    ),
    Wrong(
        packed(cu_seqlens_q=int32(0), cu_seqlens_k=int32(0)),
        ShapeError,
        "cu_",
        "cu_seqlens have the wrong shape",
        "[0]",
    ),
    Wrong(
        packed(cu_seqlens_k=int32(3, device="meta")),
        DeviceError,
        "cu_seqlens",
        "cu_seqlens lie on another",
        "cpu, meta",
    ),
]

VALUES = [
    Wrong(
        packed(cu_seqlens_q=torch.tensor([1, 2, 5]).int()),
        AttentionError,
        "cu_seqlens_q",
        "do not cut",
        "[1, 2, 5]",
    ),
    Wrong(
        packed(cu_seqlens_k=torch.tensor([0, 8, 7]).int()),
        AttentionError,
        "cu_seqlens_k",
        "do not cut",
        "[0, 8, 7]",
    ),
    Wrong(
        packed(cu_seqlens_k=torch.tensor([0, 2, 6]).int()),
        AttentionError,
        "cu_seqlens_k",
        "do not cut",
        "[0, 2, 6]",
    ),
    Wrong(packed(max_seqlen_q=2), AttentionError, "cu_seqlens_q", "longer than", "one of 3"),
]


@pytest.mark.parametrize(
    "wrong", [*WRONG, *VALUES], ids=lambda w: f"{w.what}: {w.got}".replace("torch.", "")
)
def test_a_wrong_argument_is_named(wrong: Wrong, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", str(int(wrong.interpreted)))
    with pytest.raises(AttentionError) as caught:
        piecewise_attention(**wrong.arguments)
    error = caught.value
    assert type(error) is wrong.error
    assert error.where is not None
    assert wrong.where in error.where or error.where.startswith("q1, k1, q2, k2, v")
    assert wrong.what in error.what
    assert wrong.got in str(error.got)
    assert error.expected
    assert "got:" in str(error)


def test_every_rule_is_broken_by_some_call() -> None:
    unbroken = [rule.what for rule in RULES if not any(w.what in rule.what for w in WRONG)]
    assert unbroken == []


def test_the_rules_are_told_apart() -> None:
    assert len({rule.what for rule in RULES}) == len(RULES)
    for wrong in WRONG:
        assert sum(wrong.what in rule.what for rule in RULES) == 1, wrong.what


@pytest.mark.parametrize("arguments", [dense(), packed()], ids=["dense", "packed"])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"causal": True},
        {"sm_scale": 1},
        {"dist_threshold": math.inf},
        {"dist_threshold": -(2**31) + 1},
        {"dist_threshold": int32(5)},
        {"q_offset": -3, "k_offset": 9},
        {"n_sink": 4},
        {"backend": "cpu"},
        {"backend": "reference"},
    ],
    ids=str,
)
def test_what_is_right_passes(arguments: dict[str, Any], change: dict[str, Any]) -> None:
    out = piecewise_attention(**arguments | change)
    assert isinstance(out, torch.Tensor)
    assert out.shape == arguments["q1"].shape


def test_no_sequences_at_all_pass() -> None:
    none = {name: torch.zeros(0, 2, 16) for name in ("q1", "k1", "q2", "k2", "v")}
    out = piecewise_attention(**packed(**none, cu_seqlens_q=int32(1), cu_seqlens_k=int32(1)))
    assert isinstance(out, torch.Tensor)
    assert out.shape == (0, 2, 16)


def test_flash_attention_has_the_same_rules() -> None:
    q, k = torch.zeros(2, 4, 5, 16), torch.zeros(2, 3, 7, 16)
    with pytest.raises(ShapeError, match="no multiple"):
        flash_attention(q, k, k)
