"""Writes a tree as ``torch.save`` pickles it, with slots for tensors that are not there yet."""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

import torch

from flagscale.ckpt_io.values import Foreign, Global, StoredTensor, TensorSlot
from flagscale.errors import ConfigError
from flagscale.layout.pieces import DTYPE_BYTES, dense_strides

__all__ = ["Leaf", "dump_by_value", "dump_tree", "tensor_bytes"]

_PROTOCOL: Final = 2  # torch's own, and all that weights_only=True reads

_STORAGE_CLASSES: Final = {
    "float64": torch.DoubleStorage,
    "float32": torch.FloatStorage,
    "bfloat16": torch.BFloat16Storage,
    "float16": torch.HalfStorage,
    "int64": torch.LongStorage,
    "int32": torch.IntStorage,
    "int16": torch.ShortStorage,
    "int8": torch.CharStorage,
    "uint8": torch.ByteStorage,
    "bool": torch.BoolStorage,
}
"""The other types came later and are written as bytes, with their type in the tensor."""


@dataclass(frozen=True, slots=True)
class Leaf:
    """A tensor of a pickled tree: the storage ``data/<key>`` of its archive.

    Args:
        key: Number of the storage.
        content: The slot it is, or the tensor itself.
    """

    key: str
    content: TensorSlot | torch.Tensor

    @property
    def dtype(self) -> str:
        """Torch's name of the element type, without ``torch.``."""
        return str(self.content.dtype).removeprefix("torch.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements in each dimension."""
        return tuple(self.content.shape)

    @property
    def numel(self) -> int:
        """Elements in all."""
        numel = 1
        for size in self.shape:
            numel *= size
        return numel


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The elements of a tensor, dense and row-major."""
    if not tensor.numel():
        return b""
    flat = tensor.detach().cpu().contiguous().flatten()
    return bytes(flat.view(torch.uint8).numpy().tobytes())


def dump_tree(tree: Any) -> tuple[bytes, tuple[Leaf, ...]]:
    """Pickle a tree.

    Args:
        tree: Of plain values, :class:`Foreign`, tensors and :class:`TensorSlot`.

    Returns:
        The pickle, and its tensors in the order in which their storages are written.

    Raises:
        ConfigError: The tree cannot be written.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    try:
        pickler.dump(tree)
    except (AttributeError, RecursionError, TypeError, pickle.PicklingError) as error:
        raise ConfigError(
            "a tree cannot be written into a checkpoint",
            expected="plain values, tensors and what was read from a checkpoint",
            got=str(error),
        ) from error
    return stream.getvalue(), tuple(pickler.leaves)


@dataclass(frozen=True, slots=True)
class _Storage:
    leaf: Leaf


# Python's own pickler and not the faster one in C: only here can a class be named unimported.
_PythonPickler: Any = pickle._Pickler


# typeshed leaves out most of its methods
class _ByValue(_PythonPickler):  # type: ignore[misc]
    """Writes equal trees as equal bytes.

    A pickle refers back to a text that it has written, if it is the same object. Whether two equal
    ones are depends on what else the process has interned, and a plan has to be the same in all.
    """

    dispatch = dict(_PythonPickler.dispatch)  # noqa: RUF012  (as its base has it)

    def __init__(self, stream: io.BytesIO, protocol: int) -> None:
        super().__init__(stream, protocol=protocol)
        self._texts: dict[str, str] = {}

    def save_text(self, obj: str) -> None:
        text = self._texts.setdefault(obj, obj)
        if known := self.memo.get(id(text)):
            self.write(self.get(known[0]))
        else:
            _PythonPickler.save_str(self, text)

    dispatch[str] = save_text


def dump_by_value(tree: Any, protocol: int) -> bytes:
    """Pickle what holds no tensors, such as the metadata of a checkpoint."""
    stream = io.BytesIO()
    _ByValue(stream, protocol).dump(tree)
    return stream.getvalue()


class _Pickler(_ByValue):
    dispatch = dict(_ByValue.dispatch)  # noqa: RUF012  (as its base has it)

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream, _PROTOCOL)
        self.leaves: list[Leaf] = []

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, _Storage):
            return None
        leaf = obj.leaf
        kind = _STORAGE_CLASSES.get(leaf.dtype)
        if kind is None:
            nbytes = leaf.numel * DTYPE_BYTES[leaf.dtype]
            return ("storage", torch.UntypedStorage, leaf.key, "cpu", nbytes)
        return ("storage", kind, leaf.key, "cpu", leaf.numel)

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, StoredTensor):
            raise ConfigError(
                "a tree still holds a tensor of the checkpoint it was read from",
                got=str(obj),
                cure="put a TensorSlot in its place",
            )
        if not isinstance(obj, (TensorSlot, torch.Tensor)):
            return NotImplemented
        leaf = Leaf(str(len(self.leaves)), obj)
        if leaf.dtype not in DTYPE_BYTES:
            raise ConfigError("a tensor of an unknown element type", got=leaf.dtype)
        self.leaves.append(leaf)
        strides = dense_strides(leaf.shape)
        args: tuple[Any, ...] = (_Storage(leaf), 0, leaf.shape, strides, False, OrderedDict())
        if leaf.dtype in _STORAGE_CLASSES:
            return torch._utils._rebuild_tensor_v2, args
        return torch._utils._rebuild_tensor_v3, (*args, getattr(torch, leaf.dtype))

    def save_foreign(self, obj: Foreign) -> None:
        self.save(Global(obj.module, obj.qualname))
        self.save(obj.args)
        self.write(pickle.NEWOBJ if obj.new else pickle.REDUCE)
        self.memoize(obj)
        if obj.state is not None:
            self.save(obj.state)
            self.write(pickle.BUILD)

    dispatch[Foreign] = save_foreign

    def save_named(self, obj: Global) -> None:
        self.write(pickle.GLOBAL + f"{obj.module}\n{obj.qualname}\n".encode("ascii"))

    dispatch[Global] = save_named
