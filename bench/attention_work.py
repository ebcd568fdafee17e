"""Counts the matrix products that the kernels do, and those of plain attention at the same tiles.

The ranges are those of the kernels (``flagattention.kernels.ranges``), called as Python; the tests
hold the counts to what the kernels multiply in the interpreter.
"""

from __future__ import annotations

from dataclasses import dataclass

from flagattention.kernels.ranges import key_ranges, query_ranges, split

__all__ = ["PRODUCTS", "Work", "ratio", "visits"]

PRODUCTS = {"forward": 2, "backward_kv": 4, "backward_q": 3}
"""Matrix products for each visit to a tile."""

_NEVER = 1 << 30


@dataclass(frozen=True)
class Work:
    """A problem without sinks, one threshold for all rows, and the tiles it is cut into."""

    rows: int
    columns: int
    threshold: int
    causal: bool
    block_m: int
    block_n: int

    @property
    def offset(self) -> int:
        """The last query on the last key."""
        return self.columns - self.rows


def visits(kernel: str, work: Work, *, far: bool = True) -> int:
    """Tiles that one head of a kernel visits; one that holds far and near cells counts twice."""
    spans = _query_spans(work, far) if kernel == "backward_kv" else _key_spans(work, far)
    step = work.block_m if kernel == "backward_kv" else work.block_n
    return sum(-(-(end - begin) // step) for begin, end in spans if end > begin)


def ratio(kernels: tuple[str, ...], work: Work) -> float:
    """Matrix work over that of plain attention, for kernels that run one after the other."""
    far, plain = (
        sum(visits(kernel, work, far=far) * PRODUCTS[kernel] for kernel in kernels)
        for far in (True, False)
    )
    return far / plain


def _key_spans(work: Work, far: bool) -> list[tuple[int, int]]:
    spans = []
    for first in range(0, work.rows, work.block_m):
        last = min(first + work.block_m, work.rows) - 1
        shift = work.offset - work.threshold
        limits = (shift + first, shift + last) if far else (-1, -1)
        far_full_end, far_end, near_begin, near_full_begin, near_full_end, near_end = key_ranges.fn(
            first, last, *limits, work.columns, work.offset, _NEVER, work.causal
        )
        _, body = split.fn(0, 0, far_full_end, far_end, work.block_n)
        spans += [(0, body), (body, far_end)] if far else []
        spans += _three(near_begin, near_full_begin, near_full_end, near_end, work.block_n)
    return spans


def _query_spans(work: Work, far: bool) -> list[tuple[int, int]]:
    spans = []
    for first in range(0, work.columns, work.block_n):
        last = min(first + work.block_n, work.columns) - 1
        shift = work.threshold - work.offset
        limits = (first + shift, last + shift) if far else (work.rows, work.rows)
        *near, far_begin, far_full_begin = query_ranges.fn(
            first, last, *limits, work.rows, work.offset, _NEVER, work.causal
        )
        spans += _three(*near, work.block_m)
        if far:
            spans += _three(far_begin, far_full_begin, work.rows, work.rows, work.block_m)
    return spans


def _three(
    begin: int, full_begin: int, full_end: int, end: int, step: int
) -> list[tuple[int, int]]:
    head, body = split.fn(begin, full_begin, full_end, end, step)
    return [(begin, head), (head, body), (body, end)]
