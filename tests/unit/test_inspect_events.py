"""TensorBoard event files as curves, against files that TensorBoard's own writer made."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.summary.writer.record_writer import RecordWriter

from flagscale.data_inspect.curve import surviving
from flagscale.data_inspect.events import event_files, read_events
from flagscale.errors import DataError

_Scalars = Sequence[tuple[str, float, int]]


def _write(path: Path, scalars: _Scalars, began: float = 1000.0) -> Path:
    with path.open("wb") as stream:
        writer = RecordWriter(stream)
        writer.write(Event(wall_time=began, file_version="brain.Event:2").SerializeToString())
        for number, (tag, value, step) in enumerate(scalars):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            event = Event(wall_time=began + number, step=step, summary=summary)
            writer.write(event.SerializeToString())
        writer.flush()
    return path


def _step(iteration: int, loss: float = 2.5, norm: float | None = 0.5, batch: int = 8) -> _Scalars:
    consumed = iteration * batch
    scalars = [
        ("learning-rate", 1e-3, iteration),
        ("learning-rate vs samples", 1e-3, consumed),
        ("batch-size", float(batch), iteration),
        ("batch-size vs samples", float(batch), consumed),
        ("lm loss", loss, iteration),
        ("lm loss vs samples", loss, consumed),
    ]
    if norm is not None:
        scalars += [("grad-norm", norm, iteration), ("grad-norm vs samples", norm, consumed)]
    return scalars


def _steps(losses: Mapping[int, float]) -> _Scalars:
    return [scalar for iteration, loss in losses.items() for scalar in _step(iteration, loss)]


def test_a_step_has_all_that_was_written(tmp_path: Path) -> None:
    file = _write(tmp_path / "events.out.tfevents.1.vm.1.0", _steps({3: 2.5, 4: 2.25}))
    curve = read_events(file)
    point = curve.points[1]
    assert (point.iteration, point.loss, point.grad_norm) == (4, 2.25, 0.5)
    assert (point.consumed_after, point.batch_size, point.interval) == (32, 8, 1)
    assert point.learning_rate == pytest.approx(1e-3)
    assert (point.skipped, point.nan) == (0, False)
    assert (curve.attempts[0].first_iteration, curve.attempts[0].last_iteration) == (3, 4)


def test_restarts_are_files_in_order_of_time(tmp_path: Path) -> None:
    _write(tmp_path / "events.out.tfevents.9.a", _steps({1: 1.0, 2: 1.0, 3: 1.0}), began=10.0)
    _write(tmp_path / "events.out.tfevents.3.a", _steps({2: 3.0}), began=30.0)
    _write(tmp_path / "events.out.tfevents.4.a", [], began=40.0)  # died before its first step
    (tmp_path / "deeper").mkdir()
    _write(tmp_path / "deeper" / "events.out.tfevents.2.a", _steps({3: 2.0, 4: 2.0}), began=20.0)
    curve = read_events(tmp_path)
    assert [point.attempt for point in curve.points] == [0, 0, 0, 1, 1, 2]
    assert {point.iteration: point.loss for point in surviving(curve).points} == {1: 1.0, 2: 3.0}


def test_nan_zero_and_refused_steps(tmp_path: Path) -> None:
    scalars = [*_step(1), *_step(2, math.nan), *_step(3, 0.0), *_step(4, 9.0, norm=None)]
    scalars += _step(5, 2.0, norm=None)  # the last: the rest of it may still come
    points = read_events(_write(tmp_path / "tfevents", scalars)).points
    assert [(p.loss, p.nan, p.skipped) for p in points] == [
        (2.5, False, 0),
        (None, True, 0),
        (None, False, 0),
        (9.0, False, 1),
        (2.0, False, 0),
    ]


def test_scalars_of_the_newer_form(tmp_path: Path) -> None:
    path = tmp_path / "tfevents"
    with path.open("wb") as stream:
        writer = RecordWriter(stream)
        for tensor in (TensorProto(float_val=[1.5]), TensorProto(tensor_content=b"\0\0\x20\x40")):
            step = 1 if tensor.float_val else 2
            value = Summary.Value(tag="lm loss", tensor=tensor)
            writer.write(Event(step=step, summary=Summary(value=[value])).SerializeToString())
        writer.flush()
    assert [point.loss for point in read_events(path).points] == [1.5, 2.5]


def test_evaluation_and_text_are_no_points(tmp_path: Path) -> None:
    scalars = [*_step(1), ("lm loss validation", 7.0, 1), ("lm loss validation ppl", 9.0, 2)]
    assert len(read_events(_write(tmp_path / "tfevents", scalars)).points) == 1
    with pytest.raises(DataError, match="no training step is in these event files"):
        read_events(_write(tmp_path / "tfevents", scalars[-2:]))


@settings(deadline=None)
@given(cut=st.integers(0, 10**6))
def test_cut_off_anywhere_reads_up_to_there(
    cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("cut") / "tfevents"
    data = _write(path, _steps(dict.fromkeys(range(1, 6), 2.5))).read_bytes()
    whole = read_events(path).points
    cut %= len(data)
    path.write_bytes(data[:cut])
    losses = [scalar.end for scalar in _scalars(data) if scalar.tag == "lm loss"]
    if cut < losses[0]:
        with pytest.raises(DataError, match="no training step"):
            read_events(path)
        return
    curve = read_events(path)
    assert len(curve.points) == sum(end <= cut for end in losses)
    assert curve.points[:-1] == whole[: len(curve.points) - 1]
    assert bool(curve.damaged) == (cut not in {scalar.end for scalar in _scalars(data)})


@dataclass(frozen=True)
class _Scalar:
    """The tag of a record, and where it ends."""

    tag: str
    end: int


def _scalars(data: bytes) -> list[_Scalar]:
    scalars, offset = [], 0
    while offset < len(data):
        (length,) = struct.unpack_from("<Q", data, offset)
        event = Event.FromString(data[offset + 12 : offset + 12 + length])
        offset += 16 + length
        scalars.append(_Scalar("".join(value.tag for value in event.summary.value), offset))
    return scalars


def test_a_tail_of_zeros_is_a_cut(tmp_path: Path) -> None:
    path = _write(tmp_path / "tfevents", _steps({1: 2.5, 2: 2.5}))
    size = path.stat().st_size
    path.write_bytes(path.read_bytes() + bytes(5000))
    curve = read_events(path)
    assert len(curve.points) == 2
    assert [place.position for place in curve.damaged] == [size]


@settings(deadline=None)
@given(position=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_a_changed_byte_is_always_named(
    position: int, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("flip") / "tfevents"
    data = bytearray(_write(path, _steps({1: 2.5, 2: 2.5})).read_bytes())
    data[position % len(data)] ^= flip
    path.write_bytes(bytes(data))
    with pytest.raises(DataError, match="damaged before its end"):
        read_events(path)


def test_files_that_are_no_event_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training step"):
        read_events(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        read_events(tmp_path / "tfevents")
    (tmp_path / "tfevents").write_text("iteration 1/10 | lm loss: 2.5 |\n" * 20)
    with pytest.raises(DataError, match="damaged before its end"):
        read_events(tmp_path)
    assert event_files(tmp_path) == [tmp_path / "tfevents"]
