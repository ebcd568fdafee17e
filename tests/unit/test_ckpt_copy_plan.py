"""The plan: carried out element by element in plain Python, it gives what numpy gives."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from harness.regions import Case, apply_items, draw_case, strides_of
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.ckpt_copy.plan import CopyPlan, cut_file, plan_copy
from flagscale.ckpt_copy.verify import verify_plan
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.errors import ConfigError
from flagscale.layout.boxes import Box, flat_boxes
from flagscale.layout.pieces import Piece, Region, TensorKey

W = TensorKey("param", "w")


def plan_of(case: Case, unit_bytes: int = 96, **options: object) -> CopyPlan:
    return plan_copy(case.sources, case.files, case.targets, unit_bytes=unit_bytes, **options)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([64, 65, 100, 1000, 1 << 20]))
def test_carried_out_it_gives_what_numpy_gives(rng: random.Random, unit_bytes: int) -> None:
    case = draw_case(rng)
    plan = plan_of(case, unit_bytes)
    for index, file in enumerate(case.files):
        units = list(plan.units(index))
        assert apply_items(case, file, units) == case.expected[file.path]
        assert [unit.index for unit in units] == list(range(len(units)))
        for unit in units:
            assert 0 < unit.nbytes <= unit_bytes
            assert not unit.gaps
            assert all(i.offset >= 0 and i.offset + i.extent <= unit.nbytes for i in unit.items)


@settings(max_examples=50, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(64, 200))
def test_no_cut_goes_through_an_element(rng: random.Random, unit_bytes: int) -> None:
    for file in draw_case(rng).files:
        cuts = cut_file(file, unit_bytes)
        assert cuts == sorted(set(cuts))
        assert cuts[-1] == file.size
        for hole in file.holes:
            size = hole.nbytes // max(1, int(np.prod(hole.shape)))
            inside = [cut for cut in cuts if hole.offset < cut < hole.offset + hole.nbytes]
            assert all((cut - hole.offset) % size == 0 for cut in inside)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30))
def test_the_plan_depends_on_its_inputs_only(seed: int) -> None:
    first, second = draw_case(random.Random(seed)), draw_case(random.Random(seed))
    ours, again = plan_of(first), plan_of(second)
    assert ours.fingerprint == again.fingerprint
    for index in range(len(first.files)):
        assert list(ours.units(index)) == list(again.units(index))
        assert list(ours.units(index)) == list(ours.units(index))


def one_file(shape: tuple[int, ...], dtype: str = "float32", size: int = 4) -> OutputFile:
    nbytes = int(np.prod(shape)) * size
    return OutputFile("out", nbytes, (), (Hole(0, nbytes, dtype, shape),))


def whole(shape: tuple[int, ...], file: str, dtype: str = "float32", size: int = 4) -> Piece:
    return Piece(W, Box.whole(shape), dtype, Region(file, 0, strides_of(shape, size)))


def test_every_input_changes_the_fingerprint() -> None:
    shape = (4, 6)
    source, target, file = whole(shape, "a"), whole(shape, "out"), one_file(shape)
    moved = replace(source, region=Region("a", 4, source.region.strides))
    literal = replace(file, size=file.size + 4, literals=((file.size, b"abcd"),))
    other = replace(literal, literals=((file.size, b"abce"),))
    crc = replace(literal, holes=(replace(file.holes[0], crc_offsets=(96,)),))
    plans = [
        plan_copy([source], [file], [target]),
        plan_copy([moved], [file], [target]),
        plan_copy([source, moved], [file], [target]),
        plan_copy([source], [literal], [target]),
        plan_copy([source], [other], [target]),
        plan_copy([source], [crc], [target]),
        plan_copy([source], [file], [target, target]),
        plan_copy([source], [file], [target], unit_bytes=4096),
        plan_copy([source], [file], [target], zero_fill=[W]),
        plan_copy([source], [file], [target], conversions=[("float32", "bfloat16")]),
    ]
    assert len({plan.fingerprint for plan in plans}) == len(plans)


def test_new_rows_of_a_vocabulary_repeat_a_trained_one() -> None:
    old, new, width = 5, 9, 3
    values = np.arange(old * width, dtype="<u4").reshape(old, width)
    case = Case(source_bytes={"a": bytearray(values.tobytes())}, files=[one_file((new, width))])
    grown = Box((old, 0), (new - old, width))
    repeated = Piece(W, grown, "float32", Region("a", (old - 1) * width * 4, (0, 4)))
    case.sources = [whole((old, width), "a"), repeated]
    case.targets = [whole((new, width), "out")]
    got = apply_items(case, case.files[0], plan_of(case).units(0))
    assert np.frombuffer(got, "<u4").reshape(new, width).tolist() == [
        *values.tolist(),
        *[values[-1].tolist()] * (new - old),
    ]


def test_what_no_source_covers_is_a_gap_unless_zeros_are_asked_for() -> None:
    source = Piece(W, Box((0, 0), (4, 3)), "float32", Region("a", 0, (12, 4)))
    case = Case(source_bytes={"a": bytearray(b"\1" * 48)}, files=[one_file((6, 3))])
    case.sources, case.targets = [source], [whole((6, 3), "out")]
    gaps = [gap for unit in plan_of(case).units(0) for gap in unit.gaps]
    assert [(gap.tensor, gap.box) for gap in gaps] == [(W, Box((4, 0), (2, 3)))]
    units = list(plan_of(case, zero_fill=[W]).units(0))
    assert not any(unit.gaps for unit in units)
    assert apply_items(case, case.files[0], units) == b"\1" * 48 + bytes(24)


def test_shards_of_a_flat_buffer_become_one_run_each() -> None:
    shape, shards = (64, 48), 5
    cuts = [int(np.prod(shape)) * shard // shards + shard for shard in range(shards)]
    cuts.append(int(np.prod(shape)))
    sources = []
    for shard, (start, stop) in enumerate(pairwise(cuts)):
        offset = 0
        for box in flat_boxes(shape, start, stop):
            region = Region(f"{shard}", offset, strides_of(box.shape, 4))
            sources.append(Piece(W, box, "float32", region))
            offset += box.numel * 4
    plan = plan_copy(sources, [one_file(shape)], [whole(shape, "out")])
    (unit,) = plan.units(0)
    assert len(sources) > shards
    assert [item.shape for item in unit.items] == [
        (stop - start,) for start, stop in pairwise(cuts)
    ]


def test_columns_stay_one_item_each() -> None:
    shape, ranks = (32, 64), 4
    part = shape[1] // ranks
    sources = [
        Piece(W, Box((0, rank * part), (32, part)), "float32", Region(f"{rank}", 0, (part * 4, 4)))
        for rank in range(ranks)
    ]
    (unit,) = plan_copy(sources, [one_file(shape)], [whole(shape, "out")]).units(0)
    assert [(item.shape, item.strides) for item in unit.items] == [((32, part), (256, 4))] * ranks


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"unit_bytes": 63}, "too small"),
        ({"conversions": [("float32", "int8")]}, "no such conversion"),
    ],
)
def test_wrong_arguments(options: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        plan_copy([], [], [], **options)


def test_many_pieces_take_seconds() -> None:
    """A tenth of the pieces of a 34B job on each of 600 ranks; a quadratic search takes minutes."""
    rows, columns, shards = 6144, 24576, 20_000
    numel = rows * columns
    sources = []
    for shard in range(shards):
        start, stop = numel * shard // shards, numel * (shard + 1) // shards
        offset = 0
        for box in flat_boxes((rows, columns), start, stop):
            region = Region(f"{shard}", offset, strides_of(box.shape, 4))
            sources.append(Piece(W, box, "float32", region))
            offset += box.numel * 4
    tp_size = 8
    files, targets = [], []
    for rank in range(tp_size):
        part = columns // tp_size
        name, nbytes = f"{rank}", rows * part * 4
        files.append(OutputFile(name, nbytes, (), (Hole(0, nbytes, "float32", (rows, part)),)))
        box = Box((0, rank * part), (rows, part))
        targets.append(Piece(W, box, "float32", Region(name, 0, (part * 4, 4))))
    begin = time.process_time()
    plan = plan_copy(sources, files, targets)
    numbers = [
        sum(item.numel for unit in plan.units(index) for item in unit.items)
        for index in range(tp_size)
    ]
    assert numbers == [rows * columns // tp_size] * tp_size
    assert time.process_time() - begin < 20


def test_holes_that_touch_are_filled_one_by_one() -> None:
    """The halves of one source, one behind the other: joined, the copy would be of neither hole."""
    source = Piece(W, Box.whole((8,)), "float32", Region("s", 0, (4,)))
    holes = tuple(Hole(at, 16, "float32", (4,)) for at in (0, 16))
    targets = [
        Piece(W, Box((first,), (4,)), "float32", Region("t", first * 4, (4,))) for first in (0, 4)
    ]
    plan = plan_copy([source], [OutputFile("t", 32, (), holes)], targets, unit_bytes=64)
    assert [(item.offset, item.numel) for item in next(plan.units(0)).items] == [(0, 4), (16, 4)]
    assert verify_plan(plan, {"s": 32}) == []
