"""How tensors are handed to the kernels, and results laid out so that they can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from flagattention.kernels.tiles import Rows, Turned

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.turns import Tables

__all__ = ["as_rows", "dense", "result_like", "turned_rows", "walkable", "walked"]

# A tile's rows are addressed in 32 bits; no tile has more rows than this.
_TILE_ROWS = 512


def walked(tensors: tuple[Tensor, ...], block: int, wanted: bool) -> tuple[list[Any], bool]:
    """The tensors a loop walks, as its kernel takes them.

    Args:
        tensors: [B, H, M, D], ``walkable``.
        block: Rows of a tile.
        wanted: Read them through descriptors, if all can be. Not those of packed sequences: a
            descriptor does not end with a sequence, and what lies behind would be read.

    Returns:
        ``Rows`` or tensor descriptors, and whether they are the latter.
    """
    if not wanted or not all(map(_describable, tensors)):
        return [as_rows(x) for x in tensors], False
    shape = [1, 1, block, triton.next_power_of_2(tensors[0].shape[3])]
    return [TensorDescriptor(x, list(x.shape), list(x.stride()), shape) for x in tensors], True


def _describable(x: Tensor) -> bool:
    steps = [step * x.element_size() for step in x.stride()[:3]]
    aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 16 == 0 for step in steps)
    return aligned and x.numel() > 0


def dense(x: Tensor, packed: bool) -> Tensor:
    """A view [B, H, T, D], of a packed tensor [1, H, T, D]."""
    return x.transpose(0, 1).unsqueeze(0) if packed else x


def walkable(x: Tensor) -> Tensor:
    """The tensor, or a copy where the kernels cannot address it: the last dimension is not dense.

    Args:
        x: [B, H, T, D].
    """
    return x if _addressable(x) else x.contiguous()


def _addressable(x: Tensor) -> bool:
    return x.stride(3) == 1 and x.stride(2) * _TILE_ROWS < 1 << 31


def as_rows(x: Tensor) -> Rows:
    """A tensor [B, H, T, D] and its strides."""
    return Rows(x, *x.stride()[:3])


def turned_rows(near: Tensor, far: Tensor, tables: Tables) -> tuple[Turned, Turned]:
    """Tensors [B, H, T, D] that a kernel rotates: with the tables of pair 1 and of pair 2."""
    return (
        Turned(*as_rows(near), *tables.near, tables.scales),
        Turned(*as_rows(far), *tables.far, tables.scales),
    )


def result_like(x: Tensor, filled: bool = False) -> Tensor:
    """A result laid out like an argument, as far as the kernels can write that."""
    make = torch.zeros_like if filled else torch.empty_like
    made = make(x)
    usable = _addressable(dense(made, x.dim() == 3))
    return made if usable else make(x, memory_format=torch.contiguous_format)
