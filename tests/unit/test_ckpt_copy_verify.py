"""The verification: silent on every sound plan, and not on one that is broken anywhere."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from harness.regions import Case, draw_case, strides_of
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flagscale.ckpt_copy.plan import CopyItem, CopyPlan, Unit, plan_copy
from flagscale.ckpt_copy.verify import _overlaps, _Region, verify_plan
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import Piece, Region, TensorKey

W = TensorKey("param", "w")


def plan_of(case: Case, unit_bytes: int = 96) -> CopyPlan:
    return plan_copy(case.sources, case.files, case.targets, unit_bytes=unit_bytes)


@settings(max_examples=150, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([64, 100, 1 << 20]))
def test_a_sound_plan_has_no_problem(rng: random.Random, unit_bytes: int) -> None:
    case = draw_case(rng)
    assert verify_plan(plan_of(case, unit_bytes), case.source_sizes) == []


def drop(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    return []


def duplicate(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    return [item, item]


def shift(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    by = rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
    return [replace(item, offset=item.offset + by)]


def shift_source(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    by = rng.choice((-8, -4, -2, -1, 1, 2, 4, 8))
    return [replace(item, source_offset=item.source_offset + by)]


def shorten(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    return [replace(item, shape=(item.shape[0] - 1, *item.shape[1:]))] if item.shape else []


def rename(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    return [replace(item, source="elsewhere")]


def retype(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    return [replace(item, source_dtype="bool" if item.source_dtype != "bool" else "uint8")]


def zero(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    return [replace(item, source=None)]


def retype_both(item: CopyItem, rng: random.Random) -> list[CopyItem]:
    """Another type of the same size, for which the bytes would be the same."""
    other = {"float32": "int32", "bfloat16": "int16", "uint8": "bool", "int64": "float64"}
    return [replace(item, source_dtype=other[item.dtype], dtype=other[item.dtype])]


BREAKS = [drop, duplicate, shift, shift_source, shorten, rename, retype, retype_both, zero]


@pytest.mark.parametrize("break_it", BREAKS)
@settings(max_examples=40, deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([64, 1 << 20]))
def test_a_broken_item_is_found(
    break_it: Callable[[CopyItem, random.Random], list[CopyItem]],
    rng: random.Random,
    unit_bytes: int,
) -> None:
    case = draw_case(rng)
    plan = plan_of(case, unit_bytes)
    all_units = [list(plan.units(index)) for index in range(len(plan.files))]
    places = [
        (file, unit, item)
        for file, units in enumerate(all_units)
        for unit, found in enumerate(units)
        for item in range(len(found.items))
    ]
    assume(places)
    file, unit, at = rng.choice(places)
    whole = all_units[file][unit]
    items = (*whole.items[:at], *break_it(whole.items[at], rng), *whole.items[at + 1 :])
    all_units[file][unit] = replace(whole, items=items)

    def units(index: int) -> Iterator[Unit]:
        return iter(all_units[index])

    problems = verify_plan(plan, case.source_sizes, units)
    assert problems
    assert all(problem.where.startswith(plan.files[file].path) for problem in problems)


def test_one_half_twice_is_not_both_halves() -> None:
    """Every count is right, and only the overlap is wrong."""
    file = OutputFile("out", 48, (), (Hole(0, 48, "float32", (4, 3)),))
    target = Piece(W, Box.whole((4, 3)), "float32", Region("out", 0, (12, 4)))
    sources = [
        Piece(W, Box((row, 0), (2, 3)), "float32", Region(f"{row}", 0, (12, 4))) for row in (0, 2)
    ]
    plan = plan_copy(sources, [file], [target])
    (unit,) = plan.units(0)
    twice = replace(unit, items=(unit.items[0], unit.items[0]))
    sizes = {"0": 24, "2": 24}
    assert verify_plan(plan, sizes) == []
    (problem,) = verify_plan(plan, sizes, lambda _: [twice])
    assert str(problem) == "out: param w: is written more than once"


@settings(max_examples=60, deadline=None)
@given(st.randoms(use_true_random=False))
def test_a_truncated_source_is_found(rng: random.Random) -> None:
    case = draw_case(rng)
    plan = plan_of(case)
    needed = {
        item.source: item.source_offset + item.source_extent
        for index in range(len(plan.files))
        for unit in plan.units(index)
        for item in unit.items
    }
    assume(needed)
    name = rng.choice(sorted(needed))
    sizes = case.source_sizes | {name: needed[name] - 1}
    assert any(name in problem.what for problem in verify_plan(plan, sizes))
    del sizes[name]
    assert any("missing" in problem.what for problem in verify_plan(plan, sizes))


def test_what_has_no_source_is_named_and_counted() -> None:
    file = OutputFile("out", 72, (), (Hole(0, 72, "float32", (6, 3)),))
    target = Piece(W, Box.whole((6, 3)), "float32", Region("out", 0, (12, 4)))
    source = Piece(W, Box((0, 0), (4, 3)), "float32", Region("a", 0, (12, 4)))
    problems = verify_plan(plan_copy([source], [file], [target]), {"a": 48})
    assert [str(problem) for problem in problems if "source" in problem.what] == [
        "out: param w: 6 of 18 elements have no source, the first at (4, 0), (2, 3)"
    ]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"size": 40}, "outside"),
        ({"literals": ((44, b"ab"),)}, "a hole and a literal overlap|a literal and a hole overlap"),
        ({"literals": ((60, b"a"), (56, b"b"))}, "order"),
        ({"holes": (Hole(0, 48, "float32", (4, 3), (46,)),)}, "a hole and a checksum overlap"),
        ({"holes": (Hole(0, 48, "float32", (4, 3), (61,)),)}, "outside"),
        ({"holes": (Hole(0, 48, "float32", (4, 4)),)}, "48 bytes for"),
        ({"holes": (Hole(0, 48, "complex64", (4, 3)),)}, "dtype complex64"),
        ({"holes": (Hole(0, 48, "int32", (4, 3)),)}, "no hole of float32"),
        (
            {"holes": (Hole(0, 48, "float32", (4, 3)), Hole(48, 4, "float32", (1,)))},
            "0 are written",
        ),
        ({"holes": (Hole(0, 48, "float32", (4, 3)), Hole(44, 4, "float32", (1,)))}, "overlap"),
        ({"path": "other"}, "not to be written"),
    ],
)
def test_a_broken_file_is_found(change: dict[str, object], what: str) -> None:
    file = OutputFile("out", 64, (), (Hole(0, 48, "float32", (4, 3)),))
    pieces = [
        Piece(W, Box.whole((4, 3)), "float32", Region(name, 0, (12, 4))) for name in ("a", "out")
    ]
    assert verify_plan(plan_copy(pieces[:1], [file], pieces[1:]), {"a": 48}) == []
    plan = plan_copy(pieces[:1], [replace(file, **change)], pieces[1:])
    text = "\n".join(map(str, verify_plan(plan, {"a": 48})))
    assert any(part in text for part in what.split("|")), text


@settings(max_examples=300, deadline=None)
@given(st.randoms(use_true_random=False))
def test_overlaps_are_those_of_painting(rng: random.Random) -> None:
    regions, painted = [], np.zeros(400, int)
    for _ in range(rng.randint(2, 5)):
        size = rng.choice((1, 2, 4))
        strides, extent = [], size
        shape = [rng.randint(1, 4) for _ in range(rng.randint(0, 3))]
        for count in shape:
            step = extent + rng.choice((0, 0, 1, 4))
            strides.append(step)
            extent = step * (count - 1) + extent
        if extent > 300:
            continue
        low = rng.randrange(100)
        region = _Region.make(low, shape, strides, size)
        assert region is not None
        regions.append(region)
        for index in np.ndindex(*shape):
            at = low + sum(i * step for i, step in zip(index, strides, strict=True))
            painted[at : at + size] += 1
    found = list(_overlaps(regions))
    assert bool(found) == bool((painted > 1).any())
    assert all(painted[at] > 1 for at in found)


def test_interleaved_columns_are_not_compared_in_pairs() -> None:
    """1,000 columns in 20 bands each: comparing all in pairs takes many minutes."""
    rows, columns, bands = 200, 1000, 20
    file = OutputFile(
        "out", rows * columns * 4, (), (Hole(0, rows * columns * 4, "float32", (rows, columns)),)
    )
    target = Piece(W, Box.whole((rows, columns)), "float32", Region("out", 0, (columns * 4, 4)))
    height = rows // bands
    sources = [
        Piece(W, Box((band * height, column), (height, 1)), "float32", Region("a", 0, (4, 4)))
        for band in range(bands)
        for column in range(columns)
    ]
    sources = [
        replace(piece, region=Region("a", index * height * 4, strides_of(piece.box.shape, 4)))
        for index, piece in enumerate(sources)
    ]
    begin = time.process_time()
    assert verify_plan(plan_copy(sources, [file], [target]), {"a": rows * columns * 4}) == []
    assert time.process_time() - begin < 20
