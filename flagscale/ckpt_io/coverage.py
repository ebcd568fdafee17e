"""Whether boxes cover a tensor exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

from flagscale.layout.boxes import Box

__all__ = ["verify_tiling"]


def verify_tiling(shape: tuple[int, ...], boxes: Sequence[Box]) -> str | None:
    """What is wrong with boxes that should cover a tensor exactly once; ``None`` if nothing is.

    Args:
        shape: Of the tensor.
        boxes: In any order; those without elements do not count.
    """
    for box in boxes:
        if not box.within(shape):
            return f"a chunk out of bounds: offset {box.offset}, shape {box.shape}"
    solid = [box for box in boxes if box.numel]
    if pair := _overlap(solid, 0):
        first, second = pair
        return (
            f"chunks that overlap: offset {first.offset}, shape {first.shape}, and"
            f" offset {second.offset}, shape {second.shape}"
        )
    # Inside the tensor and disjoint: they cover it if there are enough of them.
    covered, numel = sum(box.numel for box in solid), prod(shape)
    return None if covered == numel else f"chunks for {covered} of {numel} elements"


def _overlap(boxes: Sequence[Box], dim: int) -> tuple[Box, Box] | None:
    """Two boxes that overlap, among boxes that share an index in every earlier dimension."""
    if len(boxes) < 2:
        return None
    if dim == len(boxes[0].shape):
        return boxes[0], boxes[1]
    edges = sorted({edge for box in boxes for edge in (box.offset[dim], box.stop[dim])})
    rows: dict[int, list[Box]] = {edge: [] for edge in edges}
    for box in boxes:
        rows[box.offset[dim]].append(box)
    current: list[Box] = []
    for edge, _ in pairwise(edges):
        current = [box for box in current if box.stop[dim] > edge] + rows[edge]
        if pair := _overlap(current, dim + 1):
            return pair
    return None
