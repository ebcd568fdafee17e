"""Weights & Biases' offline files as a curve.

``run-<id>.wandb`` is a log in blocks of 32 KiB, after a head of 7 bytes: records ``checksum (4
bytes), length (2), kind (1), data``, of which several follow each other where one does not fit into
a block. The data is a protocol buffer, whose classes the wandb package has. The training loop logs
on the last rank, every value of a step under the iteration.

Source: wandb 0.31.0, proto/wandb_internal.proto; the blocks are those of LevelDB's log with CRC-32
in place of CRC-32C. megatron-core 0.19.2, training/training.py, ``training_log``.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flagscale.data_inspect.curve import Curve, Place
from flagscale.data_inspect.scalars import LARGEST_COUNT, LOSSES, TAGS, ScalarRun, curve_of
from flagscale.errors import ConfigError, DataError

__all__ = ["read_wandb", "wandb_files"]

_MAGIC = b":W&B"
_FILE_HEAD = 7
_BLOCK = 1 << 15
_HEAD = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_CONSUMED = "samples vs steps"


def wandb_files(folder: Path) -> list[Path]:
    """The files of offline runs in a folder and below it."""
    found = (path for path in folder.rglob("run-*.wandb") if path.is_file())
    return sorted({path.resolve() for path in found})  # latest-run is a link to one of them


def read_wandb(*paths: Path) -> Curve:
    """The curve of offline files: each is one start of the job.

    The end of a file that was cut off is noted in :attr:`Curve.damaged`.

    Args:
        paths: Files, and folders of such, as ``--wandb-save-dir`` names them.

    Raises:
        ConfigError: The wandb package, which knows the format, is not installed.
        DataError: There is no file, one is damaged before its end, or none has the loss of a step.
    """
    files = [file for path in paths for file in (wandb_files(path) if path.is_dir() else [path])]
    curve = curve_of([_read(file) for file in dict.fromkeys(files)])
    if curve is None:
        raise DataError(
            "no training step is in these Weights & Biases files",
            where=", ".join(map(str, paths)),
            expected=f"values named {' or '.join(LOSSES)} in run-*.wandb",
            got=f"{len(files)} file(s) without one",
            cure="give the folder of --wandb-save-dir, or a log",
        )
    return curve


def _read(file: Path) -> ScalarRun:
    record_class = _record_class()
    run = ScalarRun(file)
    for offset, data in _records(run):
        try:
            record = record_class.FromString(data)
        except Exception as error:  # whatever class this release of protobuf raises
            raise _damaged(file, offset, f"no record: {error}") from error
        if record.HasField("run"):
            start = record.run.start_time
            run.began = min(run.began, start.seconds + start.nanos / 1e9)
        elif record.HasField("history"):
            _add_step(run, offset, record.history)
    return run


def _record_class() -> Any:
    try:
        from wandb.proto.wandb_internal_pb2 import Record
    except ImportError as error:
        raise ConfigError(
            "Weights & Biases' files cannot be read",
            where="the wandb package",
            got=str(error),
            cure="pip install wandb, or give a log or TensorBoard's event files",
        ) from error
    return Record


def _add_step(run: ScalarRun, offset: int, history: Any) -> None:
    iteration = history.step.num
    if not 0 < iteration < LARGEST_COUNT:
        return
    for item in history.item:
        tag = item.key or "".join(item.nested_key)
        if tag not in TAGS and tag != _CONSUMED:
            continue
        value = _number(item.value_json)
        if tag != _CONSUMED:
            run.steps.setdefault(iteration, {})[tag] = value
            run.places.setdefault(iteration, offset)
        elif 0 < value < LARGEST_COUNT:
            run.consumed[iteration] = int(value)


def _number(text: str) -> float:
    try:
        return float(json.loads(text))
    except (ValueError, TypeError, RecursionError):
        return math.nan


def _records(run: ScalarRun) -> Iterator[tuple[int, bytes]]:
    """Offset and data of each record, up to where the file was cut off."""
    try:
        size = run.file.stat().st_size
        with run.file.open("rb") as stream:
            if not stream.read(_FILE_HEAD).startswith(_MAGIC):
                raise _damaged(run.file, 0, "another kind of file")
            yield from _joined(stream, size, run)
    except OSError as error:
        raise DataError(
            "a Weights & Biases file cannot be read",
            where=str(run.file),
            got=str(error),
            cure="check the path, or give a log",
        ) from error


def _joined(stream: BinaryIO, size: int, run: ScalarRun) -> Iterator[tuple[int, bytes]]:
    parts: list[bytes] = []
    began = _FILE_HEAD
    for offset, kind, data in _parts(stream, size, run):
        if (kind in (_WHOLE, _FIRST)) == bool(parts):
            raise _damaged(run.file, offset, f"a part of kind {kind} out of its order")
        began = began if parts else offset
        parts.append(data)
        if kind in (_WHOLE, _LAST):
            yield began, b"".join(parts)
            parts = []
    if parts:
        run.cut = Place(str(run.file), began)


def _parts(stream: BinaryIO, size: int, run: ScalarRun) -> Iterator[tuple[int, int, bytes]]:
    """Offset, kind and data of what lies in one block each."""
    offset = _FILE_HEAD
    while offset < size:
        left = _BLOCK - offset % _BLOCK
        if left < _HEAD.size:  # no head fits: zeros
            offset += len(stream.read(left))
            continue
        head = stream.read(_HEAD.size)
        if len(head) < _HEAD.size:
            break
        checksum, length, kind = _HEAD.unpack(head)
        if not any(head) and not any(stream.read()):
            break  # a crash of the machine leaves zeros
        if length > left - _HEAD.size or not _WHOLE <= kind <= _LAST:
            raise _damaged(run.file, offset, f"a part of {length} bytes and of kind {kind}")
        data = stream.read(length)
        if len(data) < length:
            break
        if zlib.crc32(data, zlib.crc32(head[-1:])) != checksum:
            raise _damaged(run.file, offset, "a part that its checksum denies")
        yield offset, kind, data
        offset += _HEAD.size + length
    if offset < size:
        run.cut = Place(str(run.file), offset)


def _damaged(file: Path, offset: int, got: str) -> DataError:
    return DataError(
        "a Weights & Biases file is damaged before its end",
        where=f"{file}, byte {offset}",
        expected="a record that agrees with its checksum",
        got=got,
        cure="restore the file, leave it out, or give the log of that start",
    )
