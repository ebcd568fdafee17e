"""Which tiles a program visits: plain arithmetic, the same for the kernels and for the host.

A query row m has the far limit f[m] = offset + m - threshold[m] (offset: position of the first
query less that of the first key): it scores the keys n <= f[m] with pair 2 and the later ones with
pair 1. A range of tiles is walked in three loops, head, body and tail; only the body needs no mask.

The functions are compiled as part of the kernels, and their ``fn`` is ordinary Python: the counted
work of a launch is what the launch does. ``//`` truncates in one and floors in the other, so that
only numbers >= 0 are divided.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["key_ranges", "query_ranges", "split"]


@triton.jit
def split(begin, full_begin, full_end, end, STEP: tl.constexpr):
    """Cut the tiles of [begin, end) into head, body and tail.

    Args:
        begin: First element visited; tiles start here, aligned to nothing.
        full_begin: From here on no element needs a mask,
        full_end: up to here; <= end, unless nothing is to be visited.
        end: No tile starts here or later; nothing is visited if it is <= begin.
        STEP: Elements of a tile, > 0.

    Returns:
        Where the head ends and where the body ends. The head is walked over [begin, head_end), the
        body over [head_end, body_end), the tail over [body_end, end).
    """
    head_end = begin + (max(min(full_begin, end) - begin, 0) + STEP - 1) // STEP * STEP
    body_end = head_end + max(full_end - head_end, 0) // STEP * STEP
    return head_end, body_end


@triton.jit
def key_ranges(
    first,
    last,
    far_low,
    far_high,
    columns,
    offset,
    sink_end,
    CAUSAL: tl.constexpr,
):
    """The keys a tile of query rows sees (forward and dq).

    Args:
        first: First row of the tile.
        last: Last row, inclusive.
        far_low: Smallest far limit of the rows.
        far_high: Largest far limit of the rows.
        columns: Number of keys.
        offset: Position of the first query less that of the first key.
        sink_end: Far keys at this column and later are masked.
        CAUSAL: Keys behind a row are masked.

    Returns:
        far_full_end, far_end, near_begin, near_full_begin, near_full_end, near_end: far keys are
        [0, far_end) and need no mask below far_full_end; near keys are [near_begin, near_end) and
        need none inside [near_full_begin, near_full_end).
    """
    seen_by_all = columns
    seen = columns
    if CAUSAL:
        seen_by_all = max(min(offset + first + 1, columns), 0)
        seen = max(min(offset + last + 1, columns), 0)
    far_full_end = max(min(far_low + 1, min(seen_by_all, sink_end)), 0)
    far_end = max(min(far_high + 1, min(seen, sink_end)), 0)
    near_begin = max(min(far_low + 1, seen), 0)
    near_full_begin = max(min(far_high + 1, seen), 0)
    return far_full_end, far_end, near_begin, near_full_begin, seen_by_all, seen


@triton.jit
def query_ranges(
    first,
    last,
    far_start,
    near_stop,
    rows,
    offset,
    sink_end,
    CAUSAL: tl.constexpr,
):
    """The query rows that see a tile of keys (dk/dv and the total attention).

    Args:
        first: First column of the tile.
        last: Last column, inclusive.
        far_start: First row for which any key of the tile is far; below it all keys are near.
        near_stop: From this row on all keys of the tile are far; >= far_start.
        rows: Number of query rows.
        offset: Position of the first query less that of the first key.
        sink_end: Far keys at this column and later are masked.
        CAUSAL: Keys behind a row are masked.

    Returns:
        near_begin, near_full_begin, near_full_end, near_end, far_begin, far_full_begin: near rows
        are [near_begin, near_end) and need no mask inside [near_full_begin, near_full_end); far
        rows are [far_begin, rows) and need none from far_full_begin on.
    """
    seen = 0
    seen_whole = 0
    if CAUSAL:
        seen = max(min(first - offset, rows), 0)
        seen_whole = max(min(last - offset, rows), 0)
    near_full_end = max(min(far_start, rows), 0)
    near_end = max(min(near_stop, rows), 0)
    far_begin = max(near_full_end, seen)
    far_full_begin = max(near_end, seen_whole)
    if first >= sink_end:
        far_begin = rows
    if last >= sink_end:
        far_full_begin = rows
    return seen, seen_whole, near_full_end, near_end, far_begin, far_full_begin
