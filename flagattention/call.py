"""A call as the caller made it, before anything about it is known to be right."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from flagattention.problem import NEVER

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Call", "chosen_backend"]

_NAMES = ("q1", "k1", "q2", "k2", "v")


@dataclass(frozen=True)
class Call:
    """The arguments of ``piecewise_attention``, as the caller gave them, the backend chosen."""

    tensors: tuple[Any, Any, Any, Any, Any]  # q1, k1, q2, k2, v
    threshold: Any
    causal: Any
    sm_scale: Any
    cu_seqlens: tuple[Any, Any]  # of queries, of keys, and so the two below
    max_seqlens: tuple[Any, Any]
    offsets: tuple[Any, Any]
    n_sink: Any
    backend: str

    @property
    def q1(self) -> Any:
        """The queries of pair 1."""
        return self.tensors[0]

    @property
    def k1(self) -> Any:
        """The keys of pair 1."""
        return self.tensors[1]

    @property
    def packed(self) -> bool:
        """Whether the sequences lie one behind the other, [T, H, D]."""
        return self.cu_seqlens[0] is not None

    @property
    def row_shapes(self) -> list[tuple[int, ...]]:
        """Shapes a threshold tensor may have."""
        if self.packed:
            return [(self.q1.shape[0],)]
        return [(self.q1.shape[2],), (self.q1.shape[0], self.q1.shape[2])]

    @property
    def given_cu_seqlens(self) -> tuple[Any, ...]:
        """Those of a packed call, none of a dense one."""
        return self.cu_seqlens if self.packed else ()

    @property
    def given_max_seqlens(self) -> list[Any]:
        """Those that are not None."""
        return [x for x in self.max_seqlens if x is not None]

    @property
    def settings(self) -> tuple[Any, ...]:
        """The arguments of the operators behind the tensors, defaults filled in."""
        rows = isinstance(self.threshold, Tensor)
        q_offset, k_offset = self.offsets
        if q_offset is None and not self.packed:
            q_offset = k_offset + self.k1.shape[2] - self.q1.shape[2]
        return (
            NEVER if rows else self.threshold,
            self.threshold if rows else None,
            *self.cu_seqlens,
            *self.max_seqlens,
            q_offset,
            k_offset,
            self.n_sink,
            self.causal,
            self.q1.shape[-1] ** -0.5 if self.sm_scale is None else float(self.sm_scale),
            self.backend,
        )

    def named(self, fact: Callable[[Any], object]) -> str:
        """A fact about each of the five tensors."""
        return ", ".join(f"{n} {fact(x)}" for n, x in zip(_NAMES, self.tensors, strict=True))


def chosen_backend(backend: str | None, q: Tensor) -> str:
    """The backend asked for, or the one that serves the device of the queries."""
    if backend is not None or not isinstance(q, Tensor):
        return backend or "reference"
    return {"cpu": "cpu", "cuda": "triton"}.get(q.device.type, f"none for {q.device.type} tensors")
