"""What a pickle of a checkpoint may name, and what each name builds.

Source: torch 2.11 to 2.14, ``torch/_utils.py`` and ``torch/serialization.py``; numpy's
``__reduce__``; what megatron-core 0.19.2 lists in ``core/safe_globals.py``.
"""

from __future__ import annotations

import signal
import types
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, Final

import numpy as np
import torch

from flagscale.ckpt_io.values import Foreign, Global, StoredTensor
from flagscale.layout.pieces import DTYPE_BYTES

__all__ = [
    "FOREIGN",
    "INDEX",
    "NAMES",
    "Budget",
    "Builder",
    "Index",
    "Storage",
    "StorageType",
    "TypedStorage",
    "set_state",
    "simple_key",
]

_MCORE = "megatron.core"
_DCP = "torch.distributed.checkpoint"

FOREIGN: Final = frozenset(
    Global(module, name)
    for module, names in {
        f"{_MCORE}.enums": ("ModelType",),
        f"{_MCORE}.optimizer.optimizer_config": ("OptimizerConfig",),
        f"{_MCORE}.rerun_state_machine": ("RerunDiagnostic", "RerunMode", "RerunState"),
        f"{_MCORE}.transformer.enums": (
            "AttnBackend", "AttnMaskType", "AttnType", "CudaGraphModule", "CudaGraphScope",
            "InferenceCudaGraphScope", "LayerType", "ModelType",
        ),
        f"{_MCORE}.transformer.pipeline_parallel_layer_layout": ("PipelineParallelLayerLayout",),
        f"{_MCORE}.dist_checkpointing.strategies.torch": ("MCoreMetadata", "MCoreSavePlan"),
        f"{_DCP}.filesystem": ("_StorageInfo", "_StoragePrefix"),
        f"{_DCP}.metadata": (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex",
            "StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        ),
        f"{_DCP}.planner": (
            "BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType",
        ),
        "_io": ("BytesIO",),
        "pathlib": ("PosixPath", "PurePosixPath"),
        "pathlib._local": ("PosixPath", "PurePosixPath"),
        "torch._C": ("Generator",),
    }.items()
    for name in names
)  # fmt: skip
"""Classes that stand for themselves: nothing of them is imported, called or looked at."""

INDEX: Final = Global(f"{_DCP}.metadata", "MetadataIndex")

_STORAGES: Final = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "BFloat16Storage": "bfloat16",
    "HalfStorage": "float16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes that tensors are views of.

    Args:
        file: As in :class:`StoredTensor`.
        offset: Bytes from the start of the file.
        nbytes: Its length.
    """

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TypedStorage:
    """A storage, and the type of its elements; ``None`` where each tensor says its own."""

    storage: Storage
    dtype: str | None


@dataclass(frozen=True, slots=True)
class StorageType:
    """What a pickle calls a storage's class: the type of its elements."""

    dtype: str | None


class Budget:
    """Counts what is copied; a pickle has no need to copy more than its own length."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def spend(self, amount: int) -> None:
        """Count a copy of so many bytes or items."""
        self._left -= amount
        if self._left < 0:
            raise ValueError("it copies more than it holds")


def _ints(values: object) -> tuple[int, ...]:
    """A shape, or strides."""
    if not isinstance(values, tuple) or not all(type(value) is int for value in values):
        raise TypeError("a shape that is not a tuple of integers")
    if len(values) > 64 or not all(0 <= value < 1 << 62 for value in values):
        raise ValueError("a shape or offset out of range")
    return tuple(values)


def _stored(storage: Storage, dtype: str, offset: int, size: object, steps: object) -> StoredTensor:
    shape, strides = _ints(size), _ints(steps)
    (first,) = _ints((offset,))
    itemsize = DTYPE_BYTES[dtype]
    if len(shape) != len(strides):
        raise ValueError("a tensor with more or fewer strides than dimensions")
    numel = prod(shape)
    last = first + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    held = storage.nbytes // itemsize
    if numel and (last >= held or numel > held):
        raise ValueError(f"a tensor of shape {shape} in a storage of {held} elements")
    return StoredTensor(
        storage.file,
        storage.offset + first * itemsize,
        dtype,
        shape,
        tuple(step * itemsize for step in strides),
    )


def _dtype_name(dtype: object) -> str:
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, torch.dtype) or name not in DTYPE_BYTES:
        raise ValueError("a tensor of an unknown element type")
    return name


def _rebuild_tensor(_: Budget, *args: Any) -> StoredTensor:
    typed, offset, size, stride, *rest = args
    if len(rest) > 3 or any(rest[2:]):
        raise ValueError("a tensor with metadata of its own, such as a conjugate view")
    return _stored(typed.storage, typed.dtype, offset, size, stride)


def _rebuild_new_tensor(_: Budget, *args: Any) -> StoredTensor:
    typed, offset, size, stride, _grad, _hooks, dtype, *metadata = args
    if len(metadata) > 1 or any(metadata):
        raise ValueError("a tensor with metadata of its own, such as a conjugate view")
    return _stored(typed.storage, _dtype_name(dtype), offset, size, stride)


def _rebuild_parameter(_: Budget, data: Any, _grad: Any, _hooks: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise TypeError("a parameter that is not a tensor")
    return data


def _nothing(kind: type) -> Callable[[Budget], Any]:
    return lambda _: kind()


def _encode(budget: Budget, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise TypeError("text that stands for bytes, in an unknown encoding")
    budget.spend(len(text))
    return text.encode("latin1")


def _set(kind: type) -> Callable[[Budget, Any], Any]:
    def build(budget: Budget, items: Any) -> Any:
        if type(items) is not list:
            raise TypeError("a set of what is not a list")
        budget.spend(len(items))
        return kind(simple_key(item) for item in items)

    return build


def _size(budget: Budget, dims: Any) -> torch.Size:
    values = _ints(dims)
    budget.spend(len(values))
    return torch.Size(values)


def _device(_: Budget, kind: Any, index: Any = None) -> torch.device:
    if type(kind) is not str or len(kind) > 32 or type(index) not in (int, types.NoneType):
        raise TypeError("a device of an unknown kind")
    return torch.device(kind) if index is None else torch.device(kind, index)


def _layout(_: Budget, name: Any) -> torch.layout:
    if name != "torch.strided":
        raise ValueError("a tensor that is not strided")
    return torch.strided


def _signal(_: Budget, number: Any) -> signal.Signals:
    return signal.Signals(*_ints((number,)))


_NUMPY_CODES: Final = frozenset(
    ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
)


def _numpy_dtype(_: Budget, code: Any, *_flags: Any) -> np.dtype[Any]:
    if code not in _NUMPY_CODES:
        raise ValueError("a numpy array of an unknown element type")
    dtype: np.dtype[Any] = np.dtype(code)
    return dtype


def _numpy_empty(_: Budget, kind: Any, *_args: Any) -> np.ndarray[Any, Any]:
    if kind is not _NDARRAY:
        raise TypeError("a numpy array of a subclass")
    return np.empty(0, np.uint8)


def _numpy_scalar(budget: Budget, dtype: Any, data: Any) -> Any:
    _verify_array(budget, (), dtype, data)
    return np.frombuffer(data, dtype)[0]


def _verify_array(budget: Budget, shape: object, dtype: Any, data: Any) -> None:
    dims = _ints(shape)
    if not isinstance(dtype, np.dtype) or type(data) is not bytes:
        raise TypeError("a numpy array of objects")
    if len(dims) > 32 or prod(dims) * dtype.itemsize != len(data):
        raise ValueError(f"a numpy array of shape {dims} in {len(data)} bytes")
    budget.spend(len(data))


class Index(Foreign):
    """A foreign object that is a key of a dict: it is equal to itself only."""

    __slots__ = ()
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def simple_key(value: Any, *, nested: bool = False) -> Any:
    """A key of a dict, or an element of a set: cheap to hash, whatever the pickle says.

    Raises:
        TypeError: It is not.
        ValueError: It is an integer that may have been chosen to collide with others.
    """
    kind = type(value)
    if kind is int and abs(value) >= 1 << 60:
        raise ValueError("a key out of range")
    if kind in (str, bytes, int, bool, types.NoneType, torch.dtype, Index):
        return value
    if kind is tuple and not nested and len(value) <= 32:
        for item in value:
            simple_key(item, nested=True)
        return value
    raise TypeError(f"a key that is a {kind.__name__}")


def set_state(budget: Budget, target: Any, state: Any) -> None:
    """What BUILD does: set the attributes of an object, once it is there.

    Raises:
        TypeError: The object takes no such state.
        ValueError: The state does not fit the object.
    """
    if isinstance(target, Foreign):
        if target.state is not None:
            raise ValueError("an object with two states")
        target.state = state
    elif isinstance(target, np.ndarray):
        version, shape, dtype, fortran, data = state
        array: Any = target
        if type(version) is not int or type(fortran) is not bool:
            raise TypeError("an unknown kind of numpy array")
        _verify_array(budget, shape, dtype, data)
        array.__setstate__((1, shape, dtype, fortran, data))  # in place: the memo has it already
    elif isinstance(target, np.dtype):
        version, order, *rest = state
        if order not in ("<", "|") or version not in (3, 4) or any(rest[:3]):
            raise ValueError("a numpy array of an unknown element type or byte order")
    elif isinstance(state, dict) and all(type(name) is str for name in state):
        if isinstance(target, OrderedDict) and set(state) != {"_metadata"}:
            raise ValueError("a dict with attributes")
        if not isinstance(target, (Namespace, OrderedDict, types.SimpleNamespace)):
            raise TypeError("attributes of an object that has none")
        budget.spend(len(state))
        vars(target).update(state)
    else:
        raise TypeError("attributes that are not a dict")


@dataclass(frozen=True, slots=True)
class Builder:
    """What a name does when it is called, and when it is only made anew."""

    call: Callable[..., Any] | None = None
    new: Callable[..., Any] | None = None


_NDARRAY: Final = Builder()


def _names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("torch.storage", "UntypedStorage"): StorageType(None),
        ("torch._utils", "_rebuild_tensor"): Builder(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v2"): Builder(_rebuild_tensor),
        ("torch._utils", "_rebuild_tensor_v3"): Builder(_rebuild_new_tensor),
        ("torch._utils", "_rebuild_parameter"): Builder(_rebuild_parameter),
        ("torch.serialization", "_get_layout"): Builder(_layout),
        ("torch", "Size"): Builder(_size),
        ("torch", "device"): Builder(_device),
        ("collections", "OrderedDict"): Builder(_nothing(OrderedDict)),
        ("argparse", "Namespace"): Builder(new=_nothing(Namespace)),
        ("types", "SimpleNamespace"): Builder(_nothing(types.SimpleNamespace)),
        ("_codecs", "encode"): Builder(_encode),
        ("signal", "Signals"): Builder(_signal),
        ("numpy", "ndarray"): _NDARRAY,
        ("numpy", "dtype"): Builder(_numpy_dtype),
    }
    for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
        names[module, "_reconstruct"] = Builder(_numpy_empty)
        names[module, "scalar"] = Builder(_numpy_scalar)
    for module in ("builtins", "__builtin__"):
        names[module, "bytes"] = Builder(_nothing(bytes))  # how protocol 2 writes no bytes at all
        names[module, "set"] = Builder(_set(set))
        names[module, "frozenset"] = Builder(_set(frozenset))
    names |= {("torch", name): StorageType(dtype) for name, dtype in _STORAGES.items()}
    names |= {("torch", name): getattr(torch, name) for name in DTYPE_BYTES}
    names |= {("signal", each.name): each for each in signal.Signals}
    names |= {(each.module, each.qualname): each for each in FOREIGN}
    return names


NAMES: Final = _names()
"""By module and name: a value, a :class:`Builder`, or a :class:`Global` that stays a stand-in."""
