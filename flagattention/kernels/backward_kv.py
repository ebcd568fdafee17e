"""Gradients of the keys and values."""

from __future__ import annotations

import triton
import triton.language as tl

from flagattention.kernels.ranges import query_ranges, split
from flagattention.kernels.tiles import (
    LOG2E,
    far_limits,
    load_rows,
    locate,
    read_rows,
    scan_limits,
    store_rows,
    vector,
)

__all__ = ["backward_kv_kernel", "keep_rows"]


@triton.jit
def keep_rows(
    n, m, thresholds, batch, first_query, rows, columns, offset, far_offset, sink_end, mode,
    NEAR: tl.constexpr,
):  # fmt: skip
    """Mask [keys, rows] of the weights a tile of keys has for the rows m, with one of the pairs."""
    exists = tl.minimum(m, rows - 1)
    seen = exists * 0 + columns - 1
    if mode.causal:
        seen = tl.minimum(offset + exists, columns - 1)
    if not mode.far:
        return n[:, None] <= seen[None, :]
    else:
        limit = far_limits(thresholds, batch, first_query, exists, far_offset, mode)
        if NEAR:
            return (n[:, None] <= seen[None, :]) & (n[:, None] > limit[None, :])
        else:
            upto = tl.minimum(tl.minimum(limit, seen), sink_end - 1)
            return n[:, None] <= upto[None, :]


@triton.jit
def _collect(
    dk, dv, key, value, q, dout, sums, deltas, where, begin, end, n, scale, mode,
    NEAR: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Add what the query rows [begin, end) of one head give to the gradients of a tile of keys."""
    thresholds, batch, head, first_query, rows, columns, offset, far_offset, sink_end = where
    down = tl.arange(0, mode.block_m)
    for row in tl.range(begin, end, mode.block_m):
        left = rows - row
        query = read_rows(q, batch, head, first_query + row, left, mode.block_m, mode, GUARD)
        if GUARD:
            logs = tl.load(sums + row + down, mask=down < left, other=float("inf"))
            delta = tl.load(deltas + row + down, mask=down < left, other=0.0)
        else:
            logs = tl.load(sums + row + down)
            delta = tl.load(deltas + row + down)
        score = tl.dot(key, tl.trans(query), input_precision=mode.precision)
        weight = tl.math.exp2(score * scale - logs[None, :])
        if GUARD:
            kept = keep_rows(
                n, row + down, thresholds, batch, first_query, rows, columns, offset, far_offset,
                sink_end, mode, NEAR,
            )  # fmt: skip
            weight = tl.where(kept, weight, 0.0)
        gradient = read_rows(dout, batch, head, first_query + row, left, mode.block_m, mode, GUARD)
        dv = tl.dot(weight.to(gradient.dtype), gradient, dv, input_precision=mode.precision)
        dweight = tl.dot(value, tl.trans(gradient), input_precision=mode.precision)
        dscore = (weight * (dweight - delta[None, :])).to(query.dtype)
        dk = tl.dot(dscore, query, dk, input_precision=mode.precision)
    return dk, dv


@triton.jit(do_not_specialize=["rows", "columns", "total_rows", "offset", "far_offset", "sink_end"])
def backward_kv_kernel(
    q1, k1, q2, k2, v, dout, sums, deltas, dk1, dk2, dv, thresholds, packing, mode,
    scale, rows, columns, total_rows, offset, far_offset, sink_end,
):  # fmt: skip
    """Gradients of one tile of keys of one key head; grid (key tiles, key heads, sequences).

    The query heads of the group are summed here, in order, so that the result is the same each
    time. dk1 is stored before dk2 is begun: one accumulator of the two lives at a time.

    Args:
        q1, q2, dout: ``Rows``, or with ``mode.tma`` tensor descriptors, [B, H, M, D].
        k1, k2, v: ``Rows`` [B, Hk, N, D].
        sums, deltas: From ``prepare_kernel``.
        dk1, dk2, dv: ``Rows`` [B, Hk, N, D], written (dk2 only with ``mode.far``).
        thresholds, packing, mode, scale, rows, columns, total_rows, offset, far_offset, sink_end:
            As in ``forward_kernel``.
    """
    # Under a causal mask the first keys are seen by most rows: they begin first.
    column = tl.program_id(0) * mode.block_n
    key_head = tl.program_id(1)
    batch, first_query, first_key, rows, columns, offset, far_offset = locate(
        packing, tl.program_id(2), rows, columns, offset, far_offset, mode
    )
    if mode.packed:
        if column >= columns:
            return
    left = columns - column
    last = tl.minimum(column + mode.block_n, columns) - 1
    n = column + tl.arange(0, mode.block_n)
    far_start = rows
    near_stop = rows
    if mode.far:
        far_start, near_stop = scan_limits(
            thresholds, batch, first_query, rows, far_offset, column, last, mode, 1024
        )
    near_begin, near_full_begin, near_full_end, near_end, far_begin, far_full_begin = query_ranges(
        column, last, far_start, near_stop, rows, offset, sink_end, mode.causal
    )
    log2_scale = scale * LOG2E
    heads = tl.num_programs(1) * mode.group
    at = first_key + column
    value = load_rows(v, batch, key_head, at, left, mode.block_n, mode, True)
    dv_sum = tl.zeros((mode.block_n, mode.padded), tl.float32)

    key = load_rows(k1, batch, key_head, at, left, mode.block_n, mode, True)
    dk_sum = tl.zeros((mode.block_n, mode.padded), tl.float32)
    head_end, body_end = split(near_begin, near_full_begin, near_full_end, near_end, mode.block_m)
    for head in range(key_head * mode.group, (key_head + 1) * mode.group):
        where = (
            thresholds, batch, head, first_query, rows, columns, offset, far_offset, sink_end
        )  # fmt: skip
        logs = vector(sums, batch, head, heads, total_rows, first_query)
        delta = vector(deltas, batch, head, heads, total_rows, first_query)
        dk_sum, dv_sum = _collect(
            dk_sum, dv_sum, key, value, q1, dout, logs, delta, where, near_begin, head_end, n,
            log2_scale, mode, True, True,
        )  # fmt: skip
        dk_sum, dv_sum = _collect(
            dk_sum, dv_sum, key, value, q1, dout, logs, delta, where, head_end, body_end, n,
            log2_scale, mode, True, False,
        )  # fmt: skip
        dk_sum, dv_sum = _collect(
            dk_sum, dv_sum, key, value, q1, dout, logs, delta, where, body_end, near_end, n,
            log2_scale, mode, True, True,
        )  # fmt: skip
    store_rows(dk1, dk_sum * scale, batch, key_head, at, left, mode.block_n, mode)

    if mode.far:
        key = load_rows(k2, batch, key_head, at, left, mode.block_n, mode, True)
        dk_sum = tl.zeros((mode.block_n, mode.padded), tl.float32)
        head_end, body_end = split(far_begin, far_full_begin, rows, rows, mode.block_m)
        for head in range(key_head * mode.group, (key_head + 1) * mode.group):
            where = (
                thresholds, batch, head, first_query, rows, columns, offset, far_offset, sink_end
            )  # fmt: skip
            logs = vector(sums, batch, head, heads, total_rows, first_query)
            delta = vector(deltas, batch, head, heads, total_rows, first_query)
            dk_sum, dv_sum = _collect(
                dk_sum, dv_sum, key, value, q2, dout, logs, delta, where, far_begin, head_end, n,
                log2_scale, mode, False, True,
            )  # fmt: skip
            dk_sum, dv_sum = _collect(
                dk_sum, dv_sum, key, value, q2, dout, logs, delta, where, head_end, body_end, n,
                log2_scale, mode, False, False,
            )  # fmt: skip
            dk_sum, dv_sum = _collect(
                dk_sum, dv_sum, key, value, q2, dout, logs, delta, where, body_end, rows, n,
                log2_scale, mode, False, True,
            )  # fmt: skip
        store_rows(dk2, dk_sum * scale, batch, key_head, at, left, mode.block_n, mode)
    store_rows(dv, dv_sum, batch, key_head, at, left, mode.block_n, mode)
