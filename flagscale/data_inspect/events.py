"""TensorBoard event files as a curve.

An event file is a row of records, each ``length (8 bytes), its checksum (4), data, checksum (4)``;
the checksums are masked CRC-32C, the data a protocol buffer. The training loop writes the scalars
of one step after the other: a tag with the iteration as its step, and most of them again as ``TAG
vs samples`` with the samples consumed as its step.

TensorBoard itself stops at the first record that is damaged, and says nothing.

Source: megatron-core 0.19.2, training/training.py, ``training_log``; tensorboard 2.21,
compat/tensorflow_stub/pywrap_tensorflow.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from flagscale.data_inspect.curve import Curve, Place
from flagscale.data_inspect.scalars import LARGEST_COUNT, LOSSES, TAGS, ScalarRun, curve_of
from flagscale.errors import DataError

__all__ = ["event_files", "read_events"]

_VS_SAMPLES = " vs samples"
_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")


def event_files(folder: Path) -> list[Path]:
    """The event files in a folder and below it, by name, which begins with their time."""
    found = (path for path in folder.rglob("*tfevents*") if path.is_file())
    return sorted(found, key=lambda path: path.name)


def read_events(*paths: Path) -> Curve:
    """The curve of event files: each is one start of the job.

    The end of a file that was cut off, as ``kill -9`` does, or that is all zeros, as a crash of the
    machine does, is noted in :attr:`Curve.damaged`.

    Args:
        paths: Event files, and folders of such.

    Raises:
        DataError: There is none, one is damaged before its end, or none has the loss of a step.
    """
    files = [file for path in paths for file in (event_files(path) if path.is_dir() else [path])]
    read = [_read(file) for file in dict.fromkeys(files)]
    curve = curve_of(read)
    if curve is None:
        raise DataError(
            "no training step is in these event files",
            where=", ".join(map(str, paths)),
            expected=f"scalars named {' or '.join(LOSSES)}, as --tensorboard-dir writes them",
            got=f"{len(files)} event file(s) without one",
            cure="give the folder of --tensorboard-dir, or a log",
        )
    return curve


def _read(file: Path) -> ScalarRun:
    from tensorboard.compat.proto.event_pb2 import Event

    run = ScalarRun(file)
    iteration: int | None = None
    for offset, data in _records(run):
        try:
            event = Event.FromString(data)
        except Exception as error:  # whatever class this release of protobuf raises
            raise _damaged(file, offset, f"no event: {error}") from error
        if not event.HasField("summary"):
            continue
        for value in event.summary.value:
            if value.tag in TAGS and 0 < event.step < LARGEST_COUNT:
                iteration = event.step
                run.began = min(run.began, event.wall_time)
                run.places.setdefault(iteration, offset)
                run.steps.setdefault(iteration, {})[value.tag] = _scalar(value)
            elif iteration is not None and value.tag.removesuffix(_VS_SAMPLES) in TAGS:
                run.consumed[iteration] = event.step
    return run


def _scalar(value: Any) -> float:
    """Of either form that writers use."""
    if value.HasField("tensor"):
        tensor = value.tensor
        if len(tensor.float_val) == 1:
            return float(tensor.float_val[0])
        content = tensor.tensor_content
        return float(struct.unpack("<f", content)[0]) if len(content) == 4 else math.nan
    return float(value.simple_value)


def _records(run: ScalarRun) -> Iterator[tuple[int, bytes]]:
    """Offset and data of each record, up to where the file was cut off."""
    try:
        size = run.file.stat().st_size
        with run.file.open("rb") as stream:
            yield from _sound_records(stream, size, run)
    except OSError as error:
        raise DataError(
            "an event file cannot be read",
            where=str(run.file),
            got=str(error),
            cure="check the path, or give a log",
        ) from error


def _sound_records(stream: BinaryIO, size: int, run: ScalarRun) -> Iterator[tuple[int, bytes]]:
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    offset = 0
    sound_heads: set[bytes] = set()  # most records are of a few lengths
    while offset < size:
        head = stream.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            break
        length, checksum = _LENGTH.unpack(head)
        if head not in sound_heads and checksum != masked_crc32c(head[:8]):
            if _only_zeros(head, stream):
                break
            raise _damaged(run.file, offset, "a record of a length that its checksum denies")
        sound_heads.add(head)
        if offset + _LENGTH.size + length + _CHECKSUM.size > size:
            break
        data = stream.read(length)
        tail = stream.read(_CHECKSUM.size)
        if len(tail) < _CHECKSUM.size:
            break
        if _CHECKSUM.unpack(tail)[0] != masked_crc32c(data):
            raise _damaged(run.file, offset, "a record that its checksum denies")
        yield offset, data
        offset = stream.tell()
    if offset < size:
        run.cut = Place(str(run.file), offset)


def _only_zeros(head: bytes, stream: BinaryIO) -> bool:
    if any(head):
        return False
    while block := stream.read(1 << 20):
        if any(block):
            return False
    return True


def _damaged(file: Path, offset: int, got: str) -> DataError:
    return DataError(
        "an event file is damaged before its end",
        where=f"{file}, byte {offset}",
        expected="a record that agrees with its checksum",
        got=got,
        cure="restore the file, leave it out, or give the log of that start",
    )
