"""The buffer map: which parameter lies where in the flat buffers of a distributed optimizer.

Upstream's ``dp_reshardable`` and legacy checkpoints hold flat buffers and no map. While training we
write one beside each checkpoint, a JSON file for each optimizer and data-parallel group::

    iter_0000100/flagscale_buffers/optimizer_0_group_3.json

Offsets are in elements of the padded buffer, as upstream counts them: the data of bucket ``b``
begins at its ``start``, and of its elements only the first ``numel_unpadded`` are saved.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from flagscale.errors import CheckpointError

__all__ = [
    "BUFFER_MAP_DIR",
    "BucketMap",
    "BufferMap",
    "OptimizerMap",
    "ParameterMap",
    "read_maps",
    "write_map",
]

BUFFER_MAP_DIR: Final = "flagscale_buffers"
"""Directory of the maps, in the directory of the iteration."""

_VERSION: Final = 1


@dataclass(frozen=True)
class BucketMap:
    """One bucket of a buffer.

    Args:
        start: First element, in the buffer.
        end: First element past it and its padding.
        numel_unpadded: Elements without the padding at its end.
    """

    start: int
    end: int
    numel_unpadded: int


@dataclass(frozen=True)
class ParameterMap:
    """One parameter of a buffer.

    Args:
        name: In the rank's own model chunk, without wrappers.
        shape: On this rank.
        start: First element, in the buffer.
        end: First element past it.
        bucket: Index of the bucket that holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    end: int
    bucket: int


@dataclass(frozen=True)
class BufferMap:
    """One flat buffer, the ``gbuf_idx``-th of its optimizer.

    Args:
        chunk: Index of the model chunk (virtual pipeline stage) it belongs to.
        param_dtype: Torch's name of the parameters' type, without ``torch.``.
        grad_dtype: The same of the gradients.
        buckets: In the order they lie.
        parameters: In the order they lie.
    """

    chunk: int
    param_dtype: str
    grad_dtype: str
    buckets: tuple[BucketMap, ...]
    parameters: tuple[ParameterMap, ...]


@dataclass(frozen=True)
class OptimizerMap:
    """The buffers of one optimizer on one data-parallel group.

    Args:
        optimizer: Index among the chained optimizers; 0 where there is one.
        group: Upstream's ``dp_group_idx``, which names the group in a checkpoint.
        tp_rank: Tensor parallel rank of the group's members; the experts' own for experts.
        pp_rank: Pipeline rank.
        ep_rank: Expert parallel rank; 0 for an optimizer of dense parameters.
        expert: Whether these are the experts' parameters.
        buffers: In the order of ``gbuf_idx``.
    """

    optimizer: int
    group: int
    tp_rank: int
    pp_rank: int
    ep_rank: int
    expert: bool
    buffers: tuple[BufferMap, ...]

    @property
    def file_name(self) -> str:
        """Name of its file in :data:`BUFFER_MAP_DIR`."""
        return f"optimizer_{self.optimizer}_group_{self.group}.json"


def write_map(iteration_dir: Path, optimizer_map: OptimizerMap) -> None:
    """Write a map into the directory of an iteration, whole or not at all."""
    directory = iteration_dir / BUFFER_MAP_DIR
    directory.mkdir(exist_ok=True)
    partial = directory / f".{optimizer_map.file_name}.partial-{os.getpid()}"
    partial.write_text(json.dumps({"version": _VERSION, **asdict(optimizer_map)}) + "\n")
    partial.rename(directory / optimizer_map.file_name)


def read_maps(iteration_dir: Path) -> tuple[OptimizerMap, ...]:
    """The maps beside a checkpoint, in the order of their names; empty where there are none.

    Raises:
        CheckpointError: A map cannot be read.
    """
    paths = sorted((iteration_dir / BUFFER_MAP_DIR).glob("optimizer_*_group_*.json"))
    return tuple(_read_map(path) for path in paths)


def _read_map(path: Path) -> OptimizerMap:
    try:
        content = json.loads(path.read_text())
        if content.pop("version") != _VERSION:
            raise ValueError("an unknown version")
        content["buffers"] = tuple(_buffer(buffer) for buffer in content["buffers"])
        return OptimizerMap(**content)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            "a buffer map cannot be read",
            where=str(path),
            expected=f"a map of version {_VERSION}, as written while training",
            got=f"{type(error).__name__}: {error}",
            cure="remove the directory of the maps: the order of the parameters is then proved "
            "by comparing the optimizer's copies with the weights",
        ) from error


def _buffer(content: Mapping[str, Any]) -> BufferMap:
    return BufferMap(
        chunk=int(content["chunk"]),
        param_dtype=str(content["param_dtype"]),
        grad_dtype=str(content["grad_dtype"]),
        buckets=tuple(BucketMap(**bucket) for bucket in content["buckets"]),
        parameters=tuple(
            ParameterMap(**{**parameter, "shape": tuple(parameter["shape"])})
            for parameter in content["parameters"]
        ),
    )
