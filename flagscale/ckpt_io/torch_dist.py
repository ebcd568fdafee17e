"""Checkpoints of the format ``torch_dist``, read in place.

A directory of PyTorch's distributed checkpoint: ``.metadata`` says which chunk of which tensor, and
which object, is which archive in which ``.distcp`` file. ``metadata.json`` names the format. The
common state, which every rank shares, is the object ``common_state`` since megatron-core 0.19, and
the file ``common.pt`` before.

Source: torch 2.14, ``distributed/checkpoint/{metadata,filesystem}.py``; megatron-core 0.19.2,
``core/dist_checkpointing/{serialization,core}.py``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, Final

import torch

from flagscale.ckpt_io.allowed import Storage
from flagscale.ckpt_io.archive import open_archive, read_tree
from flagscale.ckpt_io.coverage import verify_tiling
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.unpickle import unpickle
from flagscale.ckpt_io.values import Foreign, StoredTensor
from flagscale.errors import CheckpointError
from flagscale.layout.boxes import Box, flat_boxes
from flagscale.layout.pieces import DTYPE_BYTES, dense_strides

__all__ = [
    "COMMON_STATE",
    "CONFIG_FILE",
    "METADATA_FILE",
    "MetadataTable",
    "ObjectEntry",
    "Place",
    "TensorEntry",
    "TorchDistCheckpoint",
    "read",
    "read_metadata",
]

COMMON_STATE: Final = "common_state/shard_0_1"
"""Name of the object that holds the common state."""

METADATA_FILE: Final = ".metadata"
CONFIG_FILE: Final = "metadata.json"
_COMMON_FILE: Final = "common.pt"


@dataclass(frozen=True)
class TensorEntry:
    """A tensor, in chunks that cover it exactly once.

    Args:
        shape: Of the whole tensor.
        dtype: Torch's name of the element type, without ``torch.``.
        chunks: The chunks and where they lie.
    """

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[tuple[Box, StoredTensor], ...]


@dataclass(frozen=True)
class ObjectEntry:
    """An object that is still in its file.

    Args:
        directory: Of the iteration.
        key: Its name, which ends in ``/shard_<offset>_<shape>``.
        file: Relative path of its file.
        offset: Bytes from the start of the file.
        nbytes: Its length.
    """

    directory: Path
    key: str
    file: str
    offset: int
    nbytes: int

    def load(self) -> Any:
        """The object, with :class:`StoredTensor` for its tensors.

        Raises:
            CheckpointError: It is damaged, or holds what may not be opened.
        """
        with Sources(self.directory) as sources:
            return _object(sources, self)


@dataclass(frozen=True)
class TorchDistCheckpoint:
    """An opened checkpoint.

    Args:
        directory: Of the iteration.
        tensors: By key, as stored: layers may be stacked on the first axis.
        objects: By key; the common state is not among them.
        common: The common state, with :class:`StoredTensor` for its tensors.
        mcore_data: What megatron-core before 0.16 says of tensors it stored in another shape, which
            ``tensors`` has in their own; mostly empty.
    """

    directory: Path
    tensors: Mapping[str, TensorEntry]
    objects: Mapping[str, ObjectEntry]
    common: Mapping[str, Any]
    mcore_data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an archive lies: bytes from the start of a file, and its length."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class MetadataTable:
    """``.metadata``, checked for its form and not yet against the files.

    Args:
        tensors: Shape, element type and chunks, by key.
        objects: Keys.
        places: By key and offset of the chunk; the offset of an object is ``None``.
        mcore_data: See :class:`TorchDistCheckpoint`.
    """

    tensors: Mapping[str, tuple[tuple[int, ...], str, tuple[Box, ...]]]
    objects: tuple[str, ...]
    places: Mapping[tuple[str, tuple[int, ...] | None], Place]
    mcore_data: Mapping[str, Any] = field(default_factory=dict)


def read(directory: Path) -> TorchDistCheckpoint:
    """Open the checkpoint of one iteration; no tensor is loaded.

    Raises:
        CheckpointError: A file is missing, damaged or too short; chunks overlap, are out of bounds
            or do not cover their tensor; or a pickle names what may not be opened.
    """
    _verify_config(directory)
    with Sources(directory) as sources:
        table = read_metadata(sources)
        chunks, where = _Chunks(sources, table), f"{directory}/{METADATA_FILE}"
        tensors = {key: _tensor(where, chunks, key, *entry) for key, entry in table.tensors.items()}
        tensors |= dict(_restored(where, table.mcore_data, tensors))
        objects = {
            key: _entry(sources, key, _place(sources, table, key, None)) for key in table.objects
        }
        common = _common(sources, objects)
    objects.pop(COMMON_STATE, None)
    return TorchDistCheckpoint(directory, tensors, objects, common, table.mcore_data)


def _verify_config(directory: Path) -> None:
    if not (directory / CONFIG_FILE).exists() and (directory / METADATA_FILE).exists():
        raise CheckpointError(
            "checkpoints of the formats fsdp_dtensor and torch_dcp cannot be read",
            where=str(directory),
            expected=f"the file {CONFIG_FILE}, which torch_dist has",
            cure="load it with Megatron, and save it as torch_dist",
        )
    with Sources(directory) as sources:
        raw = sources.read(CONFIG_FILE, 0, sources.size(CONFIG_FILE))
    try:
        config = json.loads(raw)
        backend, version = config["sharded_backend"], config.get("sharded_backend_version", 1)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):
        backend, version = raw[:100], None
    if backend != "torch_dist" or version != 1:
        raise CheckpointError(
            "this checkpoint is of another format",
            where=str(directory / CONFIG_FILE),
            expected="sharded_backend torch_dist, version 1",
            got=f"{backend!a}, version {version!a}"[:200],
            cure="load it with the release of Megatron that wrote it, and save it again",
        )


def _common(sources: Sources, objects: Mapping[str, ObjectEntry]) -> Mapping[str, Any]:
    where = str(sources.directory / _COMMON_FILE)
    if (sources.directory / _COMMON_FILE).exists():  # upstream, too, prefers it
        common = read_tree(sources, _COMMON_FILE)
    elif COMMON_STATE in objects:
        common = _object(sources, objects[COMMON_STATE])
        where = f"{sources.directory / objects[COMMON_STATE].file}, {COMMON_STATE}"
    else:
        raise CheckpointError(
            "the common state (arguments, iteration) of a checkpoint is missing",
            where=str(sources.directory),
            expected=f"the file {_COMMON_FILE}, or the object {COMMON_STATE}",
        )
    if not isinstance(common, dict):
        raise CheckpointError(
            "the common state of a checkpoint is not a dict",
            where=where,
            got=type(common).__name__,
        )
    return common


def _object(sources: Sources, entry: ObjectEntry) -> Any:
    content = read_tree(sources, entry.file, entry.offset, entry.nbytes)
    # Upstream stores the list of a rank's objects of one name, and there is only ever one.
    return content[0] if type(content) is list and len(content) == 1 else content


def _entry(sources: Sources, key: str, place: Place) -> ObjectEntry:
    return ObjectEntry(sources.directory, key, place.file, place.offset, place.nbytes)


def _place(
    sources: Sources, table: MetadataTable, key: str, offset: tuple[int, ...] | None
) -> Place:
    where = f"{sources.directory}/{METADATA_FILE}, {key}"
    place = table.places.get((key, offset))
    if place is None:
        raise CheckpointError(
            "a chunk is announced, but not where it lies", where=where, got=f"offset {offset}"
        )
    size = sources.size(place.file)
    if place.offset + place.nbytes > size:
        raise CheckpointError(
            "a file of the checkpoint is too short",
            where=f"{sources.directory / place.file}, {key}",
            expected=f"{place.nbytes} bytes at {place.offset}",
            got=f"{size} bytes",
            cure="it was truncated: take another copy",
        )
    return place


def _tensor(
    where: str,
    chunks: _Chunks,
    key: str,
    shape: tuple[int, ...],
    dtype: str,
    boxes: tuple[Box, ...],
) -> TensorEntry:
    if problem := verify_tiling(shape, boxes):
        raise CheckpointError(
            "the chunks of a tensor do not cover it exactly once",
            where=f"{where}, {key}",
            expected=f"chunks of a tensor of shape {shape}",
            got=problem,
        )
    found = tuple((box, chunks.read(key, dtype, box)) for box in boxes if box.numel)
    return TensorEntry(shape, dtype, found)


def _restored(
    where: str, mcore_data: Mapping[str, Any], tensors: Mapping[str, TensorEntry]
) -> Iterator[tuple[str, TensorEntry]]:
    """Tensors in their own shape, of which each rank stored a range of its flattened part.

    A tensor of shape [X, Y] in parts of [x, y] lies there as [X / x, Y / y, x * y].

    Source: megatron-core 0.14.0, core/dist_checkpointing/strategies/torch.py.
    """
    for key, told in mcore_data.items():
        if not isinstance(told, dict) or "nd_reformulated_orig_global_shape" not in told:
            continue
        try:
            shape = _shape(told["nd_reformulated_orig_global_shape"])
            entry = tensors[key]
            grid, numel = entry.shape[:-1], entry.shape[-1]
            part = tuple(size // count for size, count in zip(shape, grid, strict=True))
            if prod(part) != numel or any(s % count for s, count in zip(shape, grid, strict=True)):
                raise ValueError(f"{entry.shape} for {shape}")
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                "a tensor does not have the shape in which it is said to be stored",
                where=f"{where}, {key}",
                expected="the number of parts along each dimension, and the size of a part",
                got=f"{type(error).__name__}: {error}"[:300],
            ) from error
        chunks = tuple(
            chunk for box, stored in entry.chunks for chunk in _unflattened(box, stored, part)
        )
        yield key, TensorEntry(shape, entry.dtype, chunks)


def _unflattened(
    box: Box, stored: StoredTensor, part: tuple[int, ...]
) -> Iterator[tuple[Box, StoredTensor]]:
    itemsize = DTYPE_BYTES[stored.dtype]
    first, numel = box.offset[-1], box.shape[-1]
    for place in product(*map(range, box.shape[:-1])):
        steps = zip(place, stored.strides[:-1], strict=True)
        offset = stored.offset + sum(index * step for index, step in steps)
        corner = tuple(
            (start + index) * size
            for start, index, size in zip(box.offset[:-1], place, part, strict=True)
        )
        for inner in flat_boxes(part, first, first + numel):
            strides = dense_strides(inner.shape, itemsize)
            yield (
                inner.shifted(corner),
                replace(stored, offset=offset, shape=inner.shape, strides=strides),
            )
            offset += inner.numel * itemsize


class _Chunks:
    """Reads chunks; those of one shape have the same pickle, which is looked at once."""

    def __init__(self, sources: Sources, table: MetadataTable) -> None:
        self._sources = sources
        self._table = table
        self._known: dict[tuple[bytes, int], Any] = {}

    def read(self, key: str, dtype: str, box: Box) -> StoredTensor:
        """Find the elements of a chunk.

        Raises:
            CheckpointError: It is damaged, or not the tensor that the metadata says.
        """
        place = _place(self._sources, self._table, key, box.offset)
        where = f"{self._sources.directory}/{place.file} at byte {place.offset}, {key}"
        archive = open_archive(self._sources, place.file, place.offset, place.nbytes)
        pickled = archive.read(self._sources, "data.pkl")
        storage = archive.storage(self._sources, "0")
        known = (pickled, storage.nbytes)
        if known not in self._known:
            only = Storage("", 0, storage.nbytes)
            self._known[known] = unpickle(pickled, where, {"0": only}.__getitem__)
        stored = self._known[known]
        got = (stored.shape, stored.dtype) if isinstance(stored, StoredTensor) else type(stored)
        if not isinstance(stored, StoredTensor) or got != (box.shape, dtype):
            raise CheckpointError(
                "a chunk is not what the metadata says",
                where=where,
                expected=f"a tensor of shape {box.shape} and type {dtype}",
                got=str(got),
            )
        return replace(stored, file=place.file, offset=storage.offset + stored.offset)


def read_metadata(sources: Sources) -> MetadataTable:
    """Read ``.metadata`` alone.

    Raises:
        CheckpointError: It is missing, damaged, or names what may not be opened.
    """
    where = str(sources.directory / METADATA_FILE)
    tree = unpickle(sources.read(METADATA_FILE, 0, sources.size(METADATA_FILE)), where)
    try:
        return _table(tree)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the metadata of a checkpoint does not have the form that torch gives it",
            where=where,
            got=f"{type(error).__name__}: {error}"[:300],
            cure="take another copy; files of torch before 2.1 must be saved again with it",
        ) from None


def _table(tree: Any) -> MetadataTable:
    state = _state(tree, "Metadata")
    tensors: dict[str, tuple[tuple[int, ...], str, tuple[Box, ...]]] = {}
    objects: list[str] = []
    for key, entry in _dict(state["state_dict_metadata"]).items():
        if type(key) is not str:
            raise TypeError("a name that is not text")
        if isinstance(entry, Foreign) and entry.qualname == "BytesStorageMetadata":
            objects.append(key)
        else:
            tensors[key] = _tensor_form(_state(entry, "TensorStorageMetadata"))
    places = dict(map(_placed, _dict(state["storage_data"]).items()))
    return MetadataTable(tensors, tuple(objects), places, _dict(state.get("mcore_data") or {}))


def _state(value: Any, name: str) -> dict[str, Any]:
    if not isinstance(value, Foreign) or value.qualname != name:
        raise TypeError(f"not a {name}")
    return _dict(value.state)


def _dict(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"a {type(value).__name__} for a dict")
    return value


def _tensor_form(entry: dict[str, Any]) -> tuple[tuple[int, ...], str, tuple[Box, ...]]:
    properties = entry["properties"]
    if not isinstance(properties, Foreign) or properties.qualname != "TensorProperties":
        raise TypeError("not TensorProperties")
    # A tuple since torch 2.0; where its class had no say, a dict of its fields.
    fields = properties.state
    dtype = fields[0] if isinstance(fields, tuple) else _dict(fields)["dtype"]
    name = str(dtype).removeprefix("torch.")
    if not isinstance(dtype, torch.dtype) or name not in DTYPE_BYTES:
        raise ValueError("an unknown element type")
    chunks = entry["chunks"]
    if type(chunks) is not list:
        raise TypeError("chunks that are not a list")
    return _shape(entry["size"]), name, tuple(map(_box, chunks))


def _box(chunk: Any) -> Box:
    state = _state(chunk, "ChunkStorageMetadata")
    box = Box(_shape(state["offsets"]), _shape(state["sizes"]))
    if len(box.offset) != len(box.shape):
        raise ValueError("a chunk with more or fewer offsets than sizes")
    return box


def _shape(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (tuple, list)):
        raise TypeError("a shape that is not a tuple")
    dims = tuple(value)
    if not all(type(dim) is int and 0 <= dim < 1 << 62 for dim in dims) or len(dims) > 64:
        raise ValueError("a shape out of range")
    return dims


def _placed(item: tuple[Any, Any]) -> tuple[tuple[str, tuple[int, ...] | None], Place]:
    index, info = _state(item[0], "MetadataIndex"), _state(item[1], "_StorageInfo")
    offset = index.get("offset")
    file, start, nbytes = info["relative_path"], info["offset"], info["length"]
    if info.get("transform_descriptors"):
        raise ValueError("files that were compressed while they were written")
    if type(index["fqn"]) is not str or type(file) is not str:
        raise TypeError("a name that is not text")
    start, nbytes = _shape((start, nbytes))
    return (index["fqn"], None if offset is None else _shape(offset)), Place(file, start, nbytes)
