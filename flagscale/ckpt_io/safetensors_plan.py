"""Safetensors files to be written, byte for byte as ``save_pretrained`` writes them.

A file is eight bytes that hold the length of the header (little-endian), the header (JSON, filled
up with spaces to a multiple of eight bytes) and the tensors, dense and without gaps. The tensors
lie by type, the widest first, then by name, whatever the order they are given in; that order only
decides which shard each of them goes to.

Source: safetensors 0.8, transformers 5.23 ``modeling_utils.py`` (``save_pretrained``).
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Final

from huggingface_hub import split_state_dict_into_shards_factory

from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.errors import ConfigError
from flagscale.layout.pieces import DTYPE_BYTES

__all__ = [
    "DTYPE_CODES",
    "INDEX",
    "METADATA",
    "WEIGHTS",
    "PlannedTensor",
    "SafetensorsPlan",
    "plan_files",
]

WEIGHTS: Final = "model.safetensors"
"""The file of a model that needs no more than one."""

INDEX: Final = "model.safetensors.index.json"
"""Names the file of each tensor, where there are several files."""

METADATA: Final = "__metadata__"
"""In a header, what is said of the whole file; hence no name of a tensor."""

DTYPE_CODES: Final = {
    "int64": "I64",
    "float64": "F64",
    "float32": "F32",
    "int32": "I32",
    "bfloat16": "BF16",
    "float16": "F16",
    "int16": "I16",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
"""The name of an element type in a header, by torch's; in the order the tensors lie in a file."""

_ORDER: Final = {dtype: rank for rank, dtype in enumerate(DTYPE_CODES)}


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A tensor of the state dict that is saved.

    Args:
        name: Its key.
        dtype: Torch's name of the element type, without ``torch.``.
        shape: Elements in each dimension.
        block: Tensors of one block go to one file and count as one tensor, of all their bytes, at
            the place of the first. To transformers those are one that share memory: the experts'
            weights of one layer and one projection, which it cuts out of one tensor.
        parameter: Whether the model counts it among its parameters; it does not count buffers.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    block: str | None = None
    parameter: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class SafetensorsPlan:
    """The files of a model's weights.

    Args:
        files: The files of tensors in the order of their numbers, then the index, if there is one.
        holes: The file and the hole of each tensor, by name.
        total_size: Bytes of all tensors.
    """

    files: tuple[OutputFile, ...]
    holes: Mapping[str, tuple[str, Hole]]
    total_size: int


def plan_files(
    tensors: Sequence[PlannedTensor], max_shard_size: int | str = "5GB"
) -> SafetensorsPlan:
    """Plan the files of a model's weights as ``save_pretrained`` writes them.

    Args:
        tensors: In the order of the state dict that is saved.
        max_shard_size: Bytes of tensors in a file, at most, unless a single one is larger; or a
            text such as ``"500MB"``, where a kilobyte is 1000 bytes.

    Raises:
        ConfigError: A tensor or the size cannot be, or there is no tensor.
    """
    by_name = _by_name(tensors)
    split = _split(by_name, max_shard_size)
    files, holes = [], {}
    for path, names in split.filename_to_tensors.items():
        members = sorted(
            (by_name[name] for name in names), key=lambda one: (_ORDER[one.dtype], one.name)
        )
        file = _plan_file(path, members)
        files.append(file)
        for member, hole in zip(members, file.holes, strict=True):
            holes[member.name] = (path, hole)
    total_size: int = split.metadata["total_size"]
    if split.is_sharded:
        files.append(_plan_index(tensors, split.tensor_to_filename, total_size))
    return SafetensorsPlan(tuple(files), holes, total_size)


def _by_name(tensors: Iterable[PlannedTensor]) -> dict[str, PlannedTensor]:
    by_name: dict[str, PlannedTensor] = {}
    for tensor in tensors:
        name = tensor.name
        if name == METADATA or name in by_name or not _is_text(name):
            raise ConfigError(
                "this cannot be the name of a tensor in a safetensors file",
                where=ascii(name),
                expected=f"Unicode text other than {METADATA}, once",
            )
        if tensor.dtype not in DTYPE_CODES or any(size < 0 for size in tensor.shape):
            raise ConfigError(
                "a safetensors file cannot hold such a tensor",
                where=ascii(name),
                expected=f"sizes of at least 0, and one of {', '.join(DTYPE_CODES)}",
                got=f"{tensor.dtype} {tensor.shape}",
            )
        by_name[name] = tensor
    if not by_name:
        raise ConfigError("there is no tensor to write", where=WEIGHTS)
    return by_name


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split(tensors: dict[str, PlannedTensor], max_shard_size: int | str) -> Any:
    """Distribute the tensors over files, as transformers does: by the hub's own function."""
    _verify_size(max_shard_size)
    block_bytes: dict[str, int] = {}
    for tensor in tensors.values():
        if tensor.block is not None:
            block_bytes[tensor.block] = block_bytes.get(tensor.block, 0) + tensor.nbytes

    def storage_size(tensor: PlannedTensor) -> int:
        return tensor.nbytes if tensor.block is None else block_bytes[tensor.block]

    def storage_id(tensor: PlannedTensor) -> tuple[str, ...] | None:
        if not storage_size(tensor):
            return ()  # empty tensors have no memory, and count as one that shares it
        return None if tensor.block is None else (tensor.block,)

    return split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=storage_size,
        get_storage_id=storage_id,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )


def _verify_size(size: int | str) -> None:
    text = isinstance(size, str) and re.fullmatch(r"\s*(\d{1,15}(\.\d{1,15})?) ?[KMGT]B\s*", size)
    if size > 0 if isinstance(size, int) else text and float(text[1]) > 0:
        return
    raise ConfigError(
        "this is no size of a file",
        where="max_shard_size",
        expected="bytes, or a number with KB, MB, GB or TB",
        got=ascii(size),
    )


def _plan_file(path: str, tensors: Sequence[PlannedTensor]) -> OutputFile:
    """One file of tensors, given in the order they lie."""
    header: dict[str, object] = {METADATA: {"format": "pt"}}
    ends = []
    end = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (end, end := end + tensor.nbytes),
        }
        ends.append(end)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    holes = tuple(
        Hole(start + end - tensor.nbytes, tensor.nbytes, tensor.dtype, tensor.shape)
        for tensor, end in zip(tensors, ends, strict=True)
    )
    literal = struct.pack("<Q", len(text)) + text
    return OutputFile(path, start + end, ((0, literal),), holes)


def _plan_index(
    tensors: Iterable[PlannedTensor], weight_map: Mapping[str, str], total_size: int
) -> OutputFile:
    parameters = sum(prod(tensor.shape) for tensor in tensors if tensor.parameter)
    index = {
        "metadata": {"total_parameters": parameters, "total_size": total_size},
        "weight_map": weight_map,
    }
    text = json.dumps(index, indent=2, sort_keys=True).encode() + b"\n"
    return OutputFile(INDEX, len(text), ((0, text),))
