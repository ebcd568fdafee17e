"""Gradient of the queries, and the row statistics that both backward kernels read.

With weights p and dp = dout v^T the gradient of a score is p * (dp - delta + dlse), where delta is
the row sum of dout * out. ``prepare_kernel`` stores delta - dlse once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flagattention.kernels.ranges import key_ranges, split
from flagattention.kernels.tiles import (
    LOG2E,
    far_limits,
    load_queries,
    load_rows,
    locate,
    read_rows,
    store_rows,
    vector,
)

__all__ = ["backward_q_kernel", "prepare_kernel"]


@triton.jit(do_not_specialize=["total_rows"])
def prepare_kernel(out, dout, lse, dlse, sums, deltas, total_rows, mode):
    """Statistics of a tile of rows; grid (tiles of all rows, query heads, batch).

    Args:
        out: ``Rows`` [B, H, total_rows, D].
        dout: ``Rows`` of the same shape.
        lse: Pointer to float32 [B, H, total_rows].
        dlse: Pointer to its gradient, or None for zero.
        sums: Pointer to float32 [B, H, total_rows], written: the row sums as log2, +inf for rows
            without a key, so that every weight of theirs comes out as 0.
        deltas: Pointer to float32 of that shape, written: delta - dlse.
        total_rows: Rows of all sequences.
        mode: ``Mode``.
    """
    row = tl.program_id(0) * mode.block_m
    head = tl.program_id(1)
    batch = tl.program_id(2)
    left = total_rows - row
    down = tl.arange(0, mode.block_m)
    kept = down < left
    output = load_rows(out, batch, head, row, left, mode.block_m, mode, True).to(tl.float32)
    gradient = load_rows(dout, batch, head, row, left, mode.block_m, mode, True).to(tl.float32)
    delta = tl.sum(output * gradient, 1)
    heads = tl.num_programs(1)
    logs = tl.load(vector(lse, batch, head, heads, total_rows, row) + down, mask=kept, other=0.0)
    if dlse is not None:
        address = vector(dlse, batch, head, heads, total_rows, row)
        delta -= tl.load(address + down, mask=kept, other=0.0)
    empty = logs == float("-inf")
    address = vector(sums, batch, head, heads, total_rows, row)
    tl.store(address + down, tl.where(empty, float("inf"), logs * LOG2E), mask=kept)
    address = vector(deltas, batch, head, heads, total_rows, row)
    tl.store(address + down, tl.where(empty, 0.0, delta), mask=kept)


@triton.jit
def _collect(
    dq, query, gradient, statistics, k, v, batch, head, first_key, begin, end, columns, limits,
    scale, mode, NEAR: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Add what the keys [begin, end) give to the gradient of the queries."""
    sums, delta = statistics
    above, upto = limits
    for column in tl.range(begin, end, mode.block_n):
        left = columns - column
        key = read_rows(k, batch, head, first_key + column, left, mode.block_n, mode, GUARD)
        score = tl.dot(query, tl.trans(key), input_precision=mode.precision)
        weight = tl.math.exp2(score * scale - sums[:, None])
        if GUARD:
            n = column + tl.arange(0, mode.block_n)[None, :]
            kept = n <= upto[:, None]
            if NEAR and mode.far:
                kept = kept & (n > above[:, None])
            weight = tl.where(kept, weight, 0.0)
        value = read_rows(v, batch, head, first_key + column, left, mode.block_n, mode, GUARD)
        dweight = tl.dot(gradient, tl.trans(value), input_precision=mode.precision)
        dscore = (weight * (dweight - delta[:, None])).to(key.dtype)
        dq = tl.dot(dscore, key, dq, input_precision=mode.precision)
    return dq


@triton.jit(do_not_specialize=["rows", "columns", "total_rows", "offset", "far_offset", "sink_end"])
def backward_q_kernel(
    q1, k1, q2, k2, v, dout, sums, deltas, dq1, dq2, thresholds, packing, mode,
    scale, rows, columns, total_rows, offset, far_offset, sink_end,
):  # fmt: skip
    """Gradient of one tile of query rows of one head; grid as ``forward_kernel``.

    dq2 is stored before dq1 is begun, so that one accumulator lives at a time.

    Args:
        q1, q2: ``Rows`` [B, H, M, D], with ``mode.turn`` ``Turned``.
        dout: ``Rows`` [B, H, M, D].
        k1, k2, v: ``Rows``, or with ``mode.tma`` tensor descriptors, [B, Hk, N, D].
        sums, deltas: From ``prepare_kernel``.
        dq1, dq2: ``Rows`` [B, H, M, D], written (dq2 only with ``mode.far``).
        thresholds, packing, mode, scale, rows, columns, total_rows, offset, far_offset, sink_end:
            As in ``forward_kernel``.
    """
    row = (tl.num_programs(0) - 1 - tl.program_id(0)) * mode.block_m
    head = tl.program_id(1)
    batch, first_query, first_key, rows, columns, offset, far_offset = locate(
        packing, tl.program_id(2), rows, columns, offset, far_offset, mode
    )
    if mode.packed:
        if row >= rows:
            return
    key_head = head // mode.group
    left = rows - row
    last = tl.minimum(row + mode.block_m, rows) - 1
    down = tl.arange(0, mode.block_m)
    m = tl.minimum(row + down, rows - 1)
    seen = m * 0 + columns - 1
    if mode.causal:
        seen = tl.minimum(offset + m, columns - 1)
    limit = seen
    far_low = -1
    far_high = -1
    if mode.far:
        limit = far_limits(thresholds, batch, first_query, m, far_offset, mode)
        if mode.per_row:
            far_low = tl.min(limit, 0)
            far_high = tl.max(limit, 0)
        else:
            far_low = far_offset + row
            far_high = far_offset + last
    far_full_end, far_end, near_begin, near_full_begin, near_full_end, near_end = key_ranges(
        row, last, far_low, far_high, columns, offset, sink_end, mode.causal
    )
    log2_scale = scale * LOG2E
    heads = tl.num_programs(1)
    address = vector(sums, batch, head, heads, total_rows, first_query + row)
    logs = tl.load(address + down, mask=down < left, other=float("inf"))
    address = vector(deltas, batch, head, heads, total_rows, first_query + row)
    delta = tl.load(address + down, mask=down < left, other=0.0)
    statistics = (logs, delta)
    at = first_query + row
    gradient = load_rows(dout, batch, head, at, left, mode.block_m, mode, True)
    if mode.far:
        dq = tl.zeros((mode.block_m, mode.padded), tl.float32)
        query = load_queries(q2, batch, head, at, left, mode.block_m, mode, False)
        far = (limit, tl.minimum(tl.minimum(limit, seen), sink_end - 1))
        _, body_end = split(0, 0, far_full_end, far_end, mode.block_n)
        dq = _collect(
            dq, query, gradient, statistics, k2, v, batch, key_head, first_key, 0, body_end,
            columns, far, log2_scale, mode, False, False,
        )  # fmt: skip
        dq = _collect(
            dq, query, gradient, statistics, k2, v, batch, key_head, first_key, body_end, far_end,
            columns, far, log2_scale, mode, False, True,
        )  # fmt: skip
        store_rows(dq2, dq * scale, batch, head, at, left, mode.block_m, mode)
    dq = tl.zeros((mode.block_m, mode.padded), tl.float32)
    query = load_queries(q1, batch, head, at, left, mode.block_m, mode, True)
    near = (limit, seen)
    head_end, body_end = split(near_begin, near_full_begin, near_full_end, near_end, mode.block_n)
    if mode.far:
        dq = _collect(
            dq, query, gradient, statistics, k1, v, batch, key_head, first_key, near_begin,
            head_end, columns, near, log2_scale, mode, True, True,
        )  # fmt: skip
    dq = _collect(
        dq, query, gradient, statistics, k1, v, batch, key_head, first_key, head_end, body_end,
        columns, near, log2_scale, mode, True, False,
    )  # fmt: skip
    dq = _collect(
        dq, query, gradient, statistics, k1, v, batch, key_head, first_key, body_end, near_end,
        columns, near, log2_scale, mode, True, True,
    )  # fmt: skip
    store_rows(dq1, dq * scale, batch, head, at, left, mode.block_m, mode)
