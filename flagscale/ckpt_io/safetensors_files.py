"""Checkpoints of Hugging Face: where each tensor lies in its safetensors files.

The package safetensors gives tensors, but does not tell where in the file they lie, so the headers
are read here, and believed no more than by its own reader: the tensors must fill the file, without
a gap or an overlap, each with the bytes that its shape and type take.

Source: the format as in the README of safetensors 0.8; transformers 5.23 ``modeling_utils.py`` for
which file is taken.
"""

from __future__ import annotations

import json
import reprlib
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from math import prod
from pathlib import Path
from typing import Any, Final

from flagscale.ckpt_io.safetensors_plan import DTYPE_CODES, INDEX, METADATA, WEIGHTS
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.values import StoredTensor
from flagscale.errors import CheckpointError
from flagscale.layout.pieces import DTYPE_BYTES, dense_strides

__all__ = ["MAX_HEADER", "SafetensorsCheckpoint", "read"]

MAX_HEADER: Final = 100_000_000
"""Bytes of a header, at most: the limit of safetensors itself; and of an index."""

_MAX_DIMS: Final = 64  # of numpy
_PICKLES: Final = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_TORCH_DTYPES: Final = {code: dtype for dtype, code in DTYPE_CODES.items()}
_AGAIN: Final = "it was damaged: take another copy"


@dataclass(frozen=True, slots=True)
class SafetensorsCheckpoint:
    """The weights of a model, still in their files.

    Args:
        directory: Every file is named relative to it.
        tensors: By name; by file and, in a file, by place.
        metadata: What the headers say of their files, as far as all of them agree.
    """

    directory: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Header:
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


def read(directory: Path) -> SafetensorsCheckpoint:
    """Find the tensors of a model in a directory.

    Where there is both a single file and an index, the single file counts, as in transformers.

    Raises:
        CheckpointError: There are no such weights, or a file is missing, broken, or contradicts
            another.
    """
    names = _listing(directory)
    with Sources(directory) as sources:
        if WEIGHTS in names:
            headers = {WEIGHTS: _read_header(sources, WEIGHTS)}
        elif INDEX in names:
            weight_map = _read_index(sources)
            headers = {file: _read_header(sources, file) for file in sorted({*weight_map.values()})}
            _verify_index(directory, weight_map, headers)
        else:
            raise _no_weights(directory, names)
    tensors = {name: one for header in headers.values() for name, one in header.tensors.items()}
    agreed = set.intersection(*({*header.metadata.items()} for header in headers.values()))
    return SafetensorsCheckpoint(directory, tensors, dict(sorted(agreed)))


def _listing(directory: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in directory.iterdir())
    except OSError as error:
        raise CheckpointError(
            "this is no directory that can be read", where=str(directory), got=error.strerror
        ) from error


def _no_weights(directory: Path, names: list[str]) -> CheckpointError:
    pickles = [name for name in names if any(fnmatch(name, pattern) for pattern in _PICKLES)]
    if pickles:
        return CheckpointError(
            "the weights are in pickles, which can run code when they are read",
            where=str(directory / pickles[0]),
            expected=f"{WEIGHTS}, or {INDEX} and its files",
            cure="where they are trusted, load the model with transformers and save it again with "
            "save_pretrained(safe_serialization=True)",
        )
    return CheckpointError(
        "there are no weights of a Hugging Face model here",
        where=str(directory),
        expected=f"{WEIGHTS}, or {INDEX} and its files",
        got=_shown(names),
    )


def _read_index(sources: Sources) -> dict[str, str]:
    where = str(sources.directory / INDEX)
    size = sources.size(INDEX)
    if size > MAX_HEADER:
        raise _broken("an index is too large to be one", where, f"at most {MAX_HEADER} bytes", size)
    weight_map = _parse(sources.read(INDEX, 0, size), where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken("an index names no tensors", where, "an object weight_map", weight_map)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            raise _broken(
                "an index names no safetensors file for a tensor",
                f"{where}: {_shown(name)}",
                "a name that ends in .safetensors",
                file,
            )
    return weight_map


def _verify_index(
    directory: Path, weight_map: Mapping[str, str], headers: Mapping[str, _Header]
) -> None:
    for name, file in weight_map.items():
        if name not in headers[file].tensors:
            raise CheckpointError(
                "a tensor is not in the file that the index names",
                where=f"{directory / file}: {_shown(name)}",
                cure=_AGAIN,
            )
    for file, header in headers.items():
        for name in header.tensors:
            if weight_map.get(name) != file:
                raise CheckpointError(
                    "a file holds a tensor that the index does not look for in it",
                    where=f"{directory / file}: {_shown(name)}",
                    expected=f"{weight_map.get(name, 'no such tensor')}",
                    cure="files of two checkpoints are mixed: take another copy",
                )


def _read_header(sources: Sources, file: str) -> _Header:
    where = str(sources.directory / file)
    size = sources.size(file)
    if size < 8:
        raise _broken("a safetensors file is too short", where, "at least 8 bytes", size)
    (length,) = struct.unpack("<Q", sources.read(file, 0, 8))
    if length > min(MAX_HEADER, size - 8):
        raise _broken(
            "the header of a safetensors file is too long, or cut off",
            where,
            f"at most {min(MAX_HEADER, size - 8)} bytes",
            length,
        )
    entries = _parse(sources.read(file, 8, length), where)
    metadata = entries.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(
            "a header says of its file what is not text", f"{where}: {METADATA}", "text", metadata
        )
    tensors = [
        (name, _stored(entry, file, 8 + length, f"{where}: {_shown(name)}"))
        for name, entry in entries.items()
    ]
    tensors.sort(key=lambda one: (one[1].offset, one[1].nbytes))
    _verify_places(tensors, where, 8 + length, size)
    return _Header(dict(tensors), metadata)


def _stored(entry: object, file: str, start: int, where: str) -> StoredTensor:
    """A tensor as its entry in the header says, if that makes sense."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken("this describes no tensor", where, "dtype, shape and data_offsets", entry)
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _TORCH_DTYPES:
        raise CheckpointError(
            "the elements of a tensor are of a type that is not known",
            where=where,
            expected=f"one of {', '.join(_TORCH_DTYPES)}",
            got=_shown(code),
            cure="load the model with transformers and save it again in bfloat16 or float32",
        )
    if not _are_sizes(shape) or len(shape) > _MAX_DIMS or prod(max(n, 1) for n in shape) >> 60:
        raise _broken("a tensor has no shape that can be", where, "sizes of at least 0", shape)
    dtype = _TORCH_DTYPES[code]
    nbytes = prod(shape) * DTYPE_BYTES[dtype]
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[1] - offsets[0] != nbytes:
        raise _broken(
            "a tensor does not fit its place",
            where,
            f"offsets {nbytes} bytes apart, for {dtype} {tuple(shape)}",
            offsets,
        )
    strides = dense_strides(tuple(shape), DTYPE_BYTES[dtype])
    return StoredTensor(file, start + offsets[0], dtype, tuple(shape), strides)


def _are_sizes(value: Any) -> bool:
    # JSON's true is an int to Python.
    return isinstance(value, list) and all(type(each) is int and each >= 0 for each in value)


def _verify_places(
    tensors: list[tuple[str, StoredTensor]], where: str, start: int, size: int
) -> None:
    """Check that the tensors, given in the order they lie, fill the file behind its header."""
    end = start
    for name, tensor in tensors:
        if tensor.offset != end:
            raise _broken(
                "tensors overlap" if tensor.offset < end else "there is a gap before a tensor",
                f"{where}: {_shown(name)}",
                f"an offset of {end - start} bytes",
                tensor.offset - start,
            )
        end += tensor.nbytes
        if end > size:
            raise _broken(
                "a tensor goes beyond the end of its file",
                f"{where}: {_shown(name)}",
                f"at least {end} bytes",
                size,
            )
    if end != size:
        raise _broken("a file goes on behind its last tensor", where, f"{end} bytes", size)


def _parse(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object that makes up an index or a header."""
    try:
        parsed = json.loads(raw.decode(), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            "a header or index cannot be read",
            where=where,
            expected="JSON in UTF-8, with no name twice",
            got=str(error),
            cure=_AGAIN,
        ) from error
    if not isinstance(parsed, dict):
        raise _broken("a header or index cannot be read", where, "a JSON object", parsed)
    return parsed


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: A name is there twice, or something is not text.
    """
    made: dict[str, Any] = {}
    for name, value in pairs:
        if name in made:
            raise ValueError(f"{_shown(name)} is there twice")
        for text in (name, value):
            if isinstance(text, str):
                text.encode()  # half of a surrogate pair is no text
        made[name] = value
    return made


def _broken(what: str, where: str, expected: str, got: object) -> CheckpointError:
    return CheckpointError(what, where=where, expected=expected, got=_shown(got), cure=_AGAIN)


_REPR: Final = reprlib.Repr(maxlist=8, maxdict=4, maxstring=200, maxother=100, maxlong=40)


def _shown(value: object) -> str:
    """What was found, for a message: in ASCII, and cut short however large or deep it is."""
    return _REPR.repr(value).encode("ascii", "backslashreplace").decode()
