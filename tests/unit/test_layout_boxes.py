"""Boxes, against the arrays they stand for."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.layout.boxes import Box, flat_boxes

SHAPES = st.lists(st.integers(1, 5), max_size=4).map(tuple)


def elements(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """Row-major numbers of the elements that a box holds, in its own order."""
    at = tuple(slice(first, stop) for first, stop in zip(box.offset, box.stop, strict=True))
    return np.arange(prod(shape)).reshape(shape)[at].ravel()


@st.composite
def boxes_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    ends = [sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))


@settings(deadline=None)
@given(data=st.data(), shape=SHAPES)
def test_a_box_has_the_elements_of_the_slice(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes_in(shape))
    assert box.within(shape)
    assert box.numel == elements(shape, box).size
    assert Box.whole(shape).numel == prod(shape)
    assert elements(shape, Box.whole(shape)).tolist() == list(range(prod(shape)))


@settings(deadline=None)
@given(data=st.data(), shape=SHAPES)
def test_an_intersection_has_what_both_have(data: st.DataObject, shape: tuple[int, ...]) -> None:
    a, b = data.draw(boxes_in(shape)), data.draw(boxes_in(shape))
    common = sorted({*elements(shape, a).tolist()} & {*elements(shape, b).tolist()})
    intersection = a.intersection(b)
    assert intersection == b.intersection(a)
    assert (elements(shape, intersection).tolist() if intersection else []) == common
    assert (intersection is None) == (not common)


@settings(deadline=None)
@given(data=st.data(), shape=SHAPES.filter(bool))
def test_what_sticks_out_is_not_within(data: st.DataObject, shape: tuple[int, ...]) -> None:
    box = data.draw(boxes_in(shape))
    dim = data.draw(st.integers(0, len(shape) - 1))
    far = tuple(shape[dim] if i == dim else 0 for i in range(len(shape)))
    near = tuple(-box.offset[i] - 1 if i == dim else 0 for i in range(len(shape)))
    if box.shape[dim]:
        assert not box.shifted(far).within(shape)
    assert not box.shifted(near).within(shape)
    assert box.shifted(far).shifted(tuple(-step for step in far)) == box
    assert not box.within((*shape, 1))


@settings(deadline=None)
@given(data=st.data(), shape=SHAPES)
def test_a_range_is_a_few_boxes_in_its_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    start, stop = sorted(
        data.draw(st.tuples(st.integers(0, prod(shape)), st.integers(0, prod(shape))))
    )
    boxes = flat_boxes(shape, start, stop)
    covered = [element for box in boxes for element in elements(shape, box).tolist()]
    assert covered == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)
    assert all(box.within(shape) and box.numel for box in boxes)


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 13)])
def test_a_range_outside_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="of a tensor of 12"):
        flat_boxes((3, 4), start, stop)
