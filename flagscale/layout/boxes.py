"""Boxes of a tensor: the one shape in which every format's shards are described.

A shard of a tensor is a box. A range of a flat buffer is at most ``2 * ndim - 1`` boxes. What two
checkpoints have in common is the intersection of their boxes. All sizes are in elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

__all__ = ["Box", "flat_boxes"]


@dataclass(frozen=True, slots=True)
class Box:
    """An axis-aligned part of a tensor; of a scalar, both fields are empty.

    Args:
        offset: First index of each dimension.
        shape: Elements in each dimension.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Box:
        """All of a tensor."""
        return cls((0,) * len(shape), shape)

    @property
    def stop(self) -> tuple[int, ...]:
        """First index past the end of each dimension."""
        return tuple(first + size for first, size in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Elements in all."""
        return prod(self.shape)

    def within(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape holds the box."""
        return len(shape) == len(self.shape) and all(
            first >= 0 and size >= 0 and first + size <= limit
            for first, size, limit in zip(self.offset, self.shape, shape, strict=True)
        )

    def intersection(self, other: Box) -> Box | None:
        """What both hold; ``None`` when that is nothing."""
        offset = tuple(map(max, self.offset, other.offset))
        stop = tuple(map(min, self.stop, other.stop))
        shape = tuple(last - first for first, last in zip(offset, stop, strict=True))
        return Box(offset, shape) if all(size > 0 for size in shape) else None

    def shifted(self, by: tuple[int, ...]) -> Box:
        """The box moved by ``by``, which may be negative."""
        return Box(tuple(a + b for a, b in zip(self.offset, by, strict=True)), self.shape)


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> tuple[Box, ...]:
    """The boxes that a range of a row-major tensor's elements covers, in the order they lie.

    Args:
        shape: Of the tensor.
        start: First element of the range.
        stop: First element past it.

    Raises:
        ValueError: The range is not inside the tensor.
    """
    if not 0 <= start <= stop <= prod(shape):
        raise ValueError(f"elements {start}:{stop} of a tensor of {prod(shape)}")
    if start == stop:
        return ()
    if not shape:
        return (Box((), ()),)
    if len(shape) == 1:
        return (Box((start,), (stop - start,)),)
    rest = prod(shape[1:])
    first, last = start // rest, (stop - 1) // rest  # rows that the range touches
    boxes: list[Box] = []

    def add_part(row: int, begin: int, end: int) -> None:
        parts = flat_boxes(shape[1:], begin, end)
        boxes.extend(Box((row, *box.offset), (1, *box.shape)) for box in parts)

    if first == last:
        if stop - start == rest:
            return (Box((first,) + (0,) * (len(shape) - 1), (1, *shape[1:])),)
        add_part(first, start - first * rest, stop - first * rest)
        return tuple(boxes)
    whole_first = first if start == first * rest else first + 1
    whole_stop = last + 1 if stop == (last + 1) * rest else last
    if whole_first > first:
        add_part(first, start - first * rest, rest)
    if whole_stop > whole_first:
        offset = (whole_first,) + (0,) * (len(shape) - 1)
        boxes.append(Box(offset, (whole_stop - whole_first, *shape[1:])))
    if whole_stop <= last:
        add_part(last, 0, stop - last * rest)
    return tuple(boxes)
