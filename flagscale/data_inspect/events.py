"""TensorBoard event files as a curve.

An event file is a row of records, each ``length (8 bytes), its checksum (4), data, checksum (4)``;
the checksums are masked CRC-32C, the data a protocol buffer. The training loop writes the scalars
of one step after the other: a tag with the iteration as its step, and most of them again as ``TAG
vs samples`` with the samples consumed as its step. Every value is of one step: nothing is averaged.
Whether the optimizer refused a step is not written, but then there is no gradient norm.

TensorBoard itself stops at the first record that is damaged, and says nothing.

Source: megatron-core 0.19.2, training/training.py, ``training_log``; tensorboard 2.21,
compat/tensorflow_stub/pywrap_tensorflow.py.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO

from flagscale.data_inspect.curve import Attempt, Curve, Place, Point, usual_interval
from flagscale.errors import DataError

__all__ = ["event_files", "read_events"]

_LOSSES = ("lm loss", "loss")
_TAGS = (*_LOSSES, "grad-norm", "learning-rate", "batch-size", "loss-scale")
_VS_SAMPLES = " vs samples"
_LENGTH = struct.Struct("<QI")
_CHECKSUM = struct.Struct("<I")
_LARGEST_COUNT = 2**62


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
    runs = [run for run in read if run.steps]
    if not runs:
        raise DataError(
            "no training step is in these event files",
            where=", ".join(map(str, paths)),
            expected=f"scalars named {' or '.join(_LOSSES)}, as --tensorboard-dir writes them",
            got=f"{len(files)} event file(s) without one",
            cure="give the folder of --tensorboard-dir, or a log",
        )
    runs.sort(key=lambda run: run.began)
    points: list[Point] = []
    attempts = []
    for ordinal, run in enumerate(runs):
        mine = _points(run, ordinal)
        points += mine
        attempts.append(_attempt(run, mine, ordinal))
    damaged = tuple(run.cut for run in read if run.cut is not None)
    return Curve(tuple(points), tuple(attempts), damaged)


@dataclass
class _Run:
    """What one file holds: the values of each iteration by tag, and where its first stands."""

    file: Path
    began: float = math.inf
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    places: dict[int, int] = field(default_factory=dict)
    consumed: dict[int, int] = field(default_factory=dict)
    cut: Place | None = None


def _read(file: Path) -> _Run:
    from tensorboard.compat.proto.event_pb2 import Event

    run = _Run(file)
    iteration: int | None = None
    for offset, data in _records(run):
        try:
            event = Event.FromString(data)
        except Exception as error:  # whatever class this release of protobuf raises
            raise _damaged(file, offset, f"no event: {error}") from error
        if not event.HasField("summary"):
            continue
        for value in event.summary.value:
            if value.tag in _TAGS and 0 < event.step < _LARGEST_COUNT:
                iteration = event.step
                run.began = min(run.began, event.wall_time)
                run.places.setdefault(iteration, offset)
                run.steps.setdefault(iteration, {})[value.tag] = _scalar(value)
            elif iteration is not None and value.tag.removesuffix(_VS_SAMPLES) in _TAGS:
                run.consumed[iteration] = event.step
    losses = any(tag in values for values in run.steps.values() for tag in _LOSSES)
    return run if losses else replace(run, steps={})


def _scalar(value: Any) -> float:
    """Of either form that writers use."""
    if value.HasField("tensor"):
        tensor = value.tensor
        if len(tensor.float_val) == 1:
            return float(tensor.float_val[0])
        content = tensor.tensor_content
        return float(struct.unpack("<f", content)[0]) if len(content) == 4 else math.nan
    return float(value.simple_value)


def _records(run: _Run) -> Iterator[tuple[int, bytes]]:
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


def _sound_records(stream: BinaryIO, size: int, run: _Run) -> Iterator[tuple[int, bytes]]:
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


def _points(run: _Run, ordinal: int) -> list[Point]:
    has_norms = any("grad-norm" in values for values in run.steps.values())
    tag = next(tag for tag in _LOSSES if any(tag in values for values in run.steps.values()))
    points = []
    for iteration, values in sorted(run.steps.items()):
        if tag not in values:  # cut off between two scalars of a step
            continue
        loss = values[tag]
        points.append(
            Point(
                iteration=iteration,
                loss=loss if math.isfinite(loss) and loss != 0.0 else None,
                nan=not math.isfinite(loss),
                skipped=int(has_norms and "grad-norm" not in values),
                consumed_after=run.consumed.get(iteration),
                batch_size=_count(values.get("batch-size")),
                grad_norm=_finite(values.get("grad-norm")),
                learning_rate=_finite(values.get("learning-rate")),
                loss_scale=_finite(values.get("loss-scale")),
                attempt=ordinal,
                source=Place(str(run.file), run.places[iteration]),
            )
        )
    return points


def _attempt(run: _Run, points: list[Point], ordinal: int) -> Attempt:
    return Attempt(
        ordinal=ordinal,
        first_iteration=points[0].iteration,
        last_iteration=points[-1].iteration,
        interval=usual_interval([point.iteration for point in points]),
        started=f"{run.began:.6f}",
        source=points[0].source,
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _count(value: float | None) -> int | None:
    finite = _finite(value)
    return int(finite) if finite is not None and 0 < finite < _LARGEST_COUNT else None
