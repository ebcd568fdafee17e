"""Plans a checkpoint of the format ``torch_dist`` before its tensors are there.

Source: what megatron-core 0.19.2 and torch 2.14 write; ``all_local_plans`` of ``.metadata`` is left
out, which only lets a job with ``--ckpt-assume-constant-structure`` skip planning its first save.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from flagscale.ckpt_io.archive_plan import PlannedArchive, plan_archive
from flagscale.ckpt_io.coverage import verify_tiling
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.pickling import dump_by_value
from flagscale.ckpt_io.torch_dist import COMMON_STATE, CONFIG_FILE, METADATA_FILE
from flagscale.ckpt_io.values import TensorSlot
from flagscale.errors import ConfigError
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import DTYPE_BYTES

__all__ = ["ChunkKey", "PlannedCheckpoint", "TensorPlan", "plan_checkpoint"]


@dataclass(frozen=True, slots=True)
class ChunkKey:
    """One chunk of one tensor.

    Args:
        key: Of the tensor.
        box: The chunk.
    """

    key: str
    box: Box


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """A tensor to be written.

    Args:
        shape: Of the whole tensor.
        dtype: Torch's name of the element type, without ``torch.``.
    """

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class PlannedCheckpoint:
    """The files of a checkpoint, and which hole each chunk became.

    Args:
        files: All of them, ``.metadata`` and ``metadata.json`` last.
        chunks: File and hole of each chunk with elements.
        slots: File and hole of each slot in an object, by its key.
    """

    files: tuple[OutputFile, ...]
    chunks: Mapping[ChunkKey, tuple[str, Hole]]
    slots: Mapping[str, tuple[str, Hole]]


def plan_checkpoint(
    tensors: Mapping[str, TensorPlan],
    files: Sequence[Sequence[ChunkKey]],
    objects: Mapping[str, Any],
    common: Mapping[str, Any],
) -> PlannedCheckpoint:
    """Plan a checkpoint as megatron-core 0.19.2 writes it.

    Args:
        tensors: By key; the layers of a homogeneous model are stacked already.
        files: For each ``.distcp`` file, its chunks in order; one file at least.
        objects: By unique key (``rng_state/shard_0.0_1.1``); trees as for
            :func:`~flagscale.ckpt_io.archive_plan.plan_archive`. They go into the first file.
        common: The common state: ``args``, ``iteration``, ``content_metadata`` and so on.

    Raises:
        ConfigError: Chunks do not cover a tensor exactly once, or an object cannot be written.
    """
    _verify_plan(tensors, files)
    outputs: list[OutputFile] = []
    chunks: dict[ChunkKey, tuple[str, Hole]] = {}
    slots: dict[str, tuple[str, Hole]] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    stored = {**objects, COMMON_STATE: common}
    archive_of = cache(lambda dtype, shape: plan_archive(TensorSlot(dtype, shape, "chunk")))
    for number, members in enumerate(files):
        writer = _FileWriter(f"__{number}_0.distcp", places)
        for key, value in stored.items() if number == 0 else ():
            added = writer.add(MetadataIndex(key), plan_archive([value])).holes
            if repeated := slots.keys() & added:
                raise ConfigError("two slots have the same key", got=", ".join(sorted(repeated)))
            slots |= {slot: (writer.path, hole) for slot, hole in added.items()}
        for member in members:
            unplaced = archive_of(tensors[member.key].dtype, member.box.shape)
            archive = writer.add(MetadataIndex(member.key, member.box.offset), unplaced)
            if "chunk" in archive.holes:
                chunks[member] = writer.path, archive.holes["chunk"]
        outputs.append(writer.finish())
    outputs.append(_whole(METADATA_FILE, _metadata(tensors, files, stored, places)))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    outputs.append(_whole(CONFIG_FILE, json.dumps(config).encode()))
    return PlannedCheckpoint(tuple(outputs), chunks, slots)


def _verify_plan(tensors: Mapping[str, TensorPlan], files: Sequence[Sequence[ChunkKey]]) -> None:
    if not files:
        raise ConfigError("a checkpoint needs a file", expected="one list of chunks or more")
    boxes: dict[str, list[Box]] = {key: [] for key in tensors}
    for member in _members(files):
        if member.key not in boxes:
            raise ConfigError("a chunk of an unknown tensor", got=member.key)
        boxes[member.key].append(member.box)
    for key, tensor in tensors.items():
        if tensor.dtype not in DTYPE_BYTES:
            raise ConfigError("a tensor of an unknown element type", where=key, got=tensor.dtype)
        if problem := verify_tiling(tensor.shape, boxes[key]):
            raise ConfigError(
                "the chunks of a tensor do not cover it exactly once", where=key, got=problem
            )


def _members(files: Iterable[Iterable[ChunkKey]]) -> Iterator[ChunkKey]:
    for members in files:
        yield from members


def _whole(path: str, content: bytes) -> OutputFile:
    return OutputFile(path, len(content), ((0, content),))


class _FileWriter:
    """Strings archives together."""

    def __init__(self, path: str, places: dict[MetadataIndex, _StorageInfo]) -> None:
        self.path = path
        self._places = places
        self._size = 0
        self._literals: list[tuple[int, bytes]] = []
        self._holes: list[Hole] = []

    def add(self, index: MetadataIndex, unplaced: PlannedArchive) -> PlannedArchive:
        archive = unplaced.shifted(self._size)
        self._places[index] = _StorageInfo(self.path, self._size, archive.size)
        self._size += archive.size
        self._literals.extend(archive.literals)
        self._holes.extend(archive.holes.values())
        return archive

    def finish(self) -> OutputFile:
        return OutputFile(self.path, self._size, tuple(self._literals), tuple(self._holes))


def _metadata(
    tensors: Mapping[str, TensorPlan],
    files: Sequence[Sequence[ChunkKey]],
    objects: Iterable[str],
    places: dict[MetadataIndex, _StorageInfo],
) -> bytes:
    chunks: dict[str, list[ChunkStorageMetadata]] = {key: [] for key in tensors}
    for member in _members(files):
        box = member.box
        chunks[member.key].append(
            ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape))
        )
    entries: dict[str, Any] = {
        key: TensorStorageMetadata(
            TensorProperties(getattr(torch, tensor.dtype)), torch.Size(tensor.shape), chunks[key]
        )
        for key, tensor in tensors.items()
    }
    entries |= {key: BytesStorageMetadata() for key in objects}
    metadata = Metadata(entries, None, places, StorageMeta(), version="1.0.0")
    return dump_by_value(metadata, protocol=4)
