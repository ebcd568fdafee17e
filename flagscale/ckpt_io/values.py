"""What the trees read from a checkpoint hold, besides plain Python values.

Nothing here belongs to megatron: a class that only megatron has is a :class:`Foreign`, which is
written again as a reference to the same class.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from flagscale.layout.pieces import DTYPE_BYTES, dense_strides

__all__ = ["Foreign", "Global", "StoredTensor", "TensorSlot"]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor that is still in its file.

    Args:
        file: Path relative to the checkpoint's iteration directory, with forward slashes.
        offset: Bytes from the start of the file to the first element.
        dtype: Torch's name of the element type, without ``torch.``.
        shape: Elements in each dimension.
        strides: Bytes from one index to the next, for each dimension.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Elements in all."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the elements themselves, wherever they lie."""
        return self.numel * DTYPE_BYTES[self.dtype]

    @property
    def dense(self) -> bool:
        """Whether the elements lie one after another, in row-major order."""
        dense = dense_strides(self.shape, DTYPE_BYTES[self.dtype])
        return self.numel == 0 or all(
            size == 1 or have == want
            for size, have, want in zip(self.shape, self.strides, dense, strict=True)
        )


@dataclass(frozen=True, slots=True)
class TensorSlot:
    """A tensor to be written later: a leaf of a tree from which an archive is planned.

    Args:
        dtype: Torch's name of the element type, without ``torch.``.
        shape: Elements in each dimension.
        key: Names the hole it becomes; one name, one tensor.
    """

    dtype: str
    shape: tuple[int, ...]
    key: str


@dataclass(frozen=True, slots=True)
class Global:
    """A class that is only named, not imported."""

    module: str
    qualname: str


@dataclass(eq=False, slots=True)
class Foreign:
    """An object of a class that is not imported: what its pickle said of it, and no more.

    Args:
        module: Of its class.
        qualname: Name of its class.
        args: What the class is called with; of an enum, its value.
        state: What is set on it afterwards, mostly a dict of its attributes.
        new: Whether its pickle calls ``__new__`` and not the class.
    """

    module: str
    qualname: str
    args: tuple[Any, ...] = ()
    state: Any = None
    new: bool = False

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Foreign):
            return NotImplemented
        return (self.module, self.qualname, self.args, self.state, self.new) == (
            (other.module, other.qualname, other.args, other.state, other.new)
        )

    def __hash__(self) -> int:
        return hash((self.module, self.qualname))
