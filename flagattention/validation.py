"""One table: every wrong shape, dtype, device and value, and the error it gives."""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from flagattention.call import Call
from flagattention.errors import (
    AttentionError,
    BackendError,
    DeviceError,
    DtypeError,
    ShapeError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["BACKENDS", "RULES", "Rule", "check", "check_cu_seqlens"]

BACKENDS = ("cpu", "triton", "reference")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LIMIT = 1 << 31


@dataclass(frozen=True)
class Rule:
    """What must hold, and the error where it does not.

    Attributes:
        error: The class of the error.
        where: The arguments concerned.
        what: What is wrong when the rule is broken.
        holds: The rule; it may rely on every rule above it.
        got: What the call has instead.
        expected: What would be right.
        cure: What the caller can do.
    """

    error: type[AttentionError]
    where: str
    what: str
    holds: Callable[[Call], bool]
    got: Callable[[Call], object]
    expected: str | Callable[[Call], object]
    cure: str | None = None


def _types(call: Call) -> str:
    return call.named(lambda x: type(x).__name__)


def _shapes(call: Call) -> str:
    return call.named(lambda x: list(x.shape))


def _dtypes(call: Call) -> str:
    return call.named(lambda x: x.dtype)


def _devices(call: Call) -> str:
    return call.named(lambda x: x.device)


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def _in_range(number: Any) -> bool:
    return bool(_whole(number) and -_LIMIT < number < _LIMIT)


def _pair_of(name: str, values: tuple[Any, Any]) -> str:
    return f"{name}_q {values[0]!r}, {name}_k {values[1]!r}"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


RULES = (
    Rule(
        DtypeError,
        "q1, k1, q2, k2, v",
        "an argument is not a tensor",
        lambda c: all(isinstance(x, torch.Tensor) for x in c.tensors),
        _types,
        "five tensors",
    ),
    Rule(
        AttentionError,
        "cu_seqlens_q, cu_seqlens_k",
        "only one of the two is given",
        lambda c: (c.cu_seqlens[0] is None) == (c.cu_seqlens[1] is None),
        lambda c: "cu_seqlens_k only" if c.cu_seqlens[0] is None else "cu_seqlens_q only",
        "both, for packed sequences, or neither",
    ),
    Rule(
        ShapeError,
        "q1, k1, q2, k2, v",
        "a tensor has the wrong number of dimensions",
        lambda c: all(x.dim() == (3 if c.packed else 4) for x in c.tensors),
        _shapes,
        lambda c: "[T, H, D], with cu_seqlens" if c.packed else "[B, H, M, D] and [B, Hk, N, D]",
        "packed sequences need cu_seqlens_q and cu_seqlens_k, dense ones take neither",
    ),
    Rule(
        ShapeError,
        "q1, q2",
        "the two queries differ in shape",
        lambda c: bool(c.q1.shape == c.tensors[2].shape),
        _shapes,
        "q1 and q2 alike",
    ),
    Rule(
        ShapeError,
        "k1, k2",
        "the two keys differ in shape",
        lambda c: bool(c.k1.shape == c.tensors[3].shape),
        _shapes,
        "k1 and k2 alike",
    ),
    Rule(
        ShapeError,
        "k1, k2",
        "the head size of the keys differs from that of the queries",
        lambda c: bool(c.k1.shape[-1] == c.q1.shape[-1]),
        _shapes,
        lambda c: f"head size {c.q1.shape[-1]}",
    ),
    Rule(
        ShapeError,
        "v",
        "the head size of the values differs from that of the queries",
        lambda c: bool(c.tensors[4].shape[-1] == c.q1.shape[-1]),
        _shapes,
        lambda c: f"head size {c.q1.shape[-1]}",
        "pad the smaller of the two with zeros, and cut the output (sm_scale then needs saying)",
    ),
    Rule(
        ShapeError,
        "v",
        "values and keys differ in batch, heads or length",
        lambda c: bool(c.tensors[4].shape[:-1] == c.k1.shape[:-1]),
        _shapes,
        "v shaped like k1",
    ),
    Rule(
        ShapeError,
        "q1, k1",
        "queries and keys differ in batch",
        lambda c: c.packed or bool(c.q1.shape[0] == c.k1.shape[0]),
        _shapes,
        "one B",
    ),
    Rule(
        ShapeError,
        "q1, k1",
        "the query heads are no multiple of the key heads",
        lambda c: c.k1.shape[1] > 0 and c.q1.shape[1] % c.k1.shape[1] == 0,
        lambda c: f"{c.q1.shape[1]} query heads, {c.k1.shape[1]} key heads",
        "H a multiple of Hk, for query head h shares key head h // (H / Hk)",
    ),
    Rule(
        DtypeError,
        "q1, k1, q2, k2, v",
        "the tensors differ in dtype",
        lambda c: all(x.dtype == c.q1.dtype for x in c.tensors),
        _dtypes,
        "one dtype",
    ),
    Rule(
        DtypeError,
        "q1, k1, q2, k2, v",
        "the dtype is not supported",
        lambda c: c.q1.dtype in _DTYPES,
        lambda c: c.q1.dtype,
        "float16, bfloat16, float32, or float64 off the GPU kernels",
    ),
    Rule(
        DeviceError,
        "q1, k1, q2, k2, v",
        "the tensors lie on different devices",
        lambda c: all(x.device == c.q1.device for x in c.tensors),
        _devices,
        "one device",
    ),
    Rule(
        BackendError,
        "backend",
        "there is no such backend",
        lambda c: c.backend in BACKENDS,
        lambda c: repr(c.backend),
        f"None or one of {', '.join(BACKENDS)}",
        "None takes triton for CUDA and ROCm tensors and cpu for CPU tensors; "
        "reference runs on any device",
    ),
    Rule(
        BackendError,
        "backend",
        "the cpu backend was asked for tensors that lie elsewhere",
        lambda c: c.backend != "cpu" or c.q1.device.type == "cpu",
        lambda c: c.q1.device,
        "CPU tensors",
        "leave backend out, or take reference",
    ),
    Rule(
        BackendError,
        "backend",
        "the triton backend was asked for tensors that lie elsewhere",
        lambda c: c.backend != "triton" or c.q1.device.type == "cuda" or _interpreted(),
        lambda c: c.q1.device,
        "CUDA or ROCm tensors",
        "leave backend out; TRITON_INTERPRET=1, set before the start, runs it on CPU tensors",
    ),
    Rule(
        DtypeError,
        "q1, k1, q2, k2, v",
        "the triton backend does not compute in float64",
        lambda c: c.backend != "triton" or c.q1.dtype != torch.float64,
        lambda c: c.q1.dtype,
        "float16, bfloat16 or float32",
        "backend='reference' computes in float64",
    ),
    Rule(
        ShapeError,
        "q1",
        "the head size is outside what the backend takes",
        lambda c: c.q1.shape[-1] >= 1 and (c.backend != "triton" or 16 <= c.q1.shape[-1] <= 256),
        lambda c: f"{c.q1.shape[-1]} ({c.backend})",
        "16 to 256 for triton, at least 1 for cpu and reference",
    ),
    Rule(
        DtypeError,
        "dist_threshold",
        "the threshold is no whole number",
        lambda c: isinstance(c.threshold, torch.Tensor) or _whole(c.threshold),
        lambda c: repr(c.threshold),
        "an int, math.inf, or an int32 tensor",
    ),
    Rule(
        AttentionError,
        "dist_threshold",
        "the threshold is out of range",
        lambda c: isinstance(c.threshold, torch.Tensor) or _in_range(c.threshold),
        lambda c: c.threshold,
        "a number that fits int32",
        "math.inf is plain attention with pair 1",
    ),
    Rule(
        DtypeError,
        "dist_threshold",
        "the threshold tensor has the wrong dtype",
        lambda c: not isinstance(c.threshold, torch.Tensor) or c.threshold.dtype == torch.int32,
        lambda c: c.threshold.dtype,
        "int32",
    ),
    Rule(
        ShapeError,
        "dist_threshold",
        "the threshold tensor has the wrong shape",
        lambda c: (
            not isinstance(c.threshold, torch.Tensor)
            or any(tuple(c.threshold.shape) == shape for shape in c.row_shapes)
        ),
        lambda c: list(c.threshold.shape),
        lambda c: " or ".join(str(list(shape)) for shape in c.row_shapes),
        "one threshold for each query row; one for all rows is an int",
    ),
    Rule(
        DeviceError,
        "dist_threshold",
        "the threshold tensor lies on another device",
        lambda c: not isinstance(c.threshold, torch.Tensor) or c.threshold.device == c.q1.device,
        lambda c: c.threshold.device,
        lambda c: c.q1.device,
    ),
    Rule(
        DtypeError,
        "causal",
        "causal is no bool",
        lambda c: isinstance(c.causal, bool),
        lambda c: repr(c.causal),
        "True or False",
    ),
    Rule(
        AttentionError,
        "sm_scale",
        "the scale is no finite number",
        lambda c: (
            c.sm_scale is None
            or (
                isinstance(c.sm_scale, (int, float))
                and not isinstance(c.sm_scale, bool)
                and abs(c.sm_scale) < float("inf")
            )
        ),
        lambda c: repr(c.sm_scale),
        "a float, or None for D ** -0.5",
    ),
    Rule(
        AttentionError,
        "q_offset, k_offset",
        "an offset is no whole number that fits int32",
        lambda c: _in_range(c.offsets[1]) and (c.offsets[0] is None or _in_range(c.offsets[0])),
        lambda c: f"q_offset {c.offsets[0]!r}, k_offset {c.offsets[1]!r}",
        "ints: the absolute positions of the first query and the first key",
    ),
    Rule(
        AttentionError,
        "n_sink",
        "the number of sinks is no whole number from 0 on",
        lambda c: _in_range(c.n_sink) and c.n_sink >= 0,
        lambda c: repr(c.n_sink),
        "0 for none, or how many of the first keys stay visible when far",
    ),
    Rule(
        AttentionError,
        "max_seqlen_q, max_seqlen_k",
        "a longest length is given for dense tensors",
        lambda c: c.packed or not c.given_max_seqlens,
        lambda c: _pair_of("max_seqlen", c.max_seqlens),
        "None: dense tensors say their lengths themselves",
    ),
    Rule(
        AttentionError,
        "max_seqlen_q, max_seqlen_k",
        "a longest length is no whole number from 0 on",
        lambda c: all(_in_range(x) and x >= 0 for x in c.given_max_seqlens),
        lambda c: _pair_of("max_seqlen", c.max_seqlens),
        "an int, or None to read it from cu_seqlens, which waits for the device",
    ),
    Rule(
        DtypeError,
        "cu_seqlens_q, cu_seqlens_k",
        "cu_seqlens are no int32 tensors",
        lambda c: all(
            isinstance(x, torch.Tensor) and x.dtype == torch.int32 for x in c.given_cu_seqlens
        ),
        lambda c: ", ".join(str(getattr(x, "dtype", type(x).__name__)) for x in c.given_cu_seqlens),
        "int32",
    ),
    Rule(
        ShapeError,
        "cu_seqlens_q, cu_seqlens_k",
        "cu_seqlens have the wrong shape",
        lambda c: (
            not c.packed
            or (
                c.cu_seqlens[0].dim() == 1
                and c.cu_seqlens[0].shape[0] >= 1
                and c.cu_seqlens[0].shape == c.cu_seqlens[1].shape
            )
        ),
        lambda c: f"{list(c.cu_seqlens[0].shape)} and {list(c.cu_seqlens[1].shape)}",
        "[S + 1] each, for S sequences",
    ),
    Rule(
        DeviceError,
        "cu_seqlens_q, cu_seqlens_k",
        "cu_seqlens lie on another device",
        lambda c: all(x.device == c.q1.device for x in c.given_cu_seqlens),
        lambda c: ", ".join(str(x.device) for x in c.given_cu_seqlens),
        lambda c: c.q1.device,
    ),
)


def check(call: Call) -> None:
    """Raises the error of the first rule a call breaks; what tensors hold is not looked at.

    Raises:
        AttentionError: One of its subclasses, by the table.
    """
    for rule in RULES:
        if not rule.holds(call):
            expected = rule.expected if isinstance(rule.expected, str) else rule.expected(call)
            raise rule.error(
                rule.what, where=rule.where, expected=expected, got=rule.got(call), cure=rule.cure
            )


def check_cu_seqlens(
    name: str, starts: list[int], n_tokens: int, longest: int | None = None
) -> None:
    """Checks what cu_seqlens hold; done where that costs nothing, on the CPU.

    Args:
        name: Of the argument.
        starts: Where each sequence begins, and where the last one ends.
        n_tokens: T.
        longest: max_seqlen, if given.

    Raises:
        AttentionError: They do not cut the T tokens into sequences, or one is too long.
    """
    shown = starts if len(starts) <= 10 else f"{starts[:5]} ... {starts[-5:]}"
    if starts != sorted(starts) or starts[0] != 0 or starts[-1] != n_tokens:
        raise AttentionError(
            "cu_seqlens do not cut the tokens into sequences",
            where=name,
            expected=f"from 0 to {n_tokens}, never falling",
            got=shown,
        )
    found = max((stop - start for start, stop in pairwise(starts)), default=0)
    if longest is not None and found > longest:
        raise AttentionError(
            "a sequence is longer than max_seqlen says",
            where=name,
            expected=f"sequences of up to {longest} tokens",
            got=f"one of {found}: {shown}",
        )
