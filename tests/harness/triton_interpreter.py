"""Makes Triton's interpreter right in bfloat16, and quicker.

The interpreter keeps bfloat16 as bit patterns: it rounds down where hardware rounds to nearest, and
multiplies matrices of patterns as if they were integers. And it replaces the functions of
``triton.language`` anew at every call of one kernel function by another.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

__all__ = ["install"]


def _widened(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (data.astype(np.uint32) << 16).view(np.float32)


def _rounded(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16)
    return rounded.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def _is_bf16(handle: Any) -> bool:
    return bool(handle.dtype.scalar == tl.bfloat16)


class _Scope:
    """Stands for replacements that are there already."""

    def restore(self) -> None:
        """Nothing: who made them does."""


def install() -> None:
    """Changes the interpreter of this process, once."""
    builder, cast, dot = _originals()

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if _is_bf16(src) and dst_type.scalar == tl.float32:
            return interpreter.TensorHandle(_widened(src.data), tl.float32)
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return interpreter.TensorHandle(_rounded(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(_widened(x.data), tl.float32) if _is_bf16(x) else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    builder.cast_impl, builder.create_dot = cast_impl, create_dot
    _patch_once()


def _originals() -> tuple[Any, Any, Any]:
    builder = interpreter.InterpreterBuilder
    return builder, builder.cast_impl, builder.create_dot


def _patch_once() -> None:
    patch = interpreter._patch_lang
    active: set[tuple[bool, bool]] = set()

    def patch_lang(fn: Any) -> Any:
        modules = [x for x in fn.__globals__.values() if inspect.ismodule(x)]
        key = (tl in modules, tl.core in modules)
        if key in active:
            return _Scope()
        outermost = not active
        scope = patch(fn)
        active.add(key)
        if outermost:
            scope.restore = partial(_leave, active, scope.restore)
        return scope

    interpreter._patch_lang = patch_lang


def _leave(active: set[tuple[bool, bool]], restore: Callable[[], None]) -> None:
    active.clear()
    restore()
