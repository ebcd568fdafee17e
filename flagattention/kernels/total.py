"""The attention each key gets: the sum of its weights over all query rows."""

from __future__ import annotations

import triton
import triton.language as tl

from flagattention.kernels.backward_kv import keep_rows
from flagattention.kernels.ranges import query_ranges, split
from flagattention.kernels.tiles import (
    LOG2E,
    load_rows,
    locate,
    read_rows,
    scan_limits,
    vector,
)

__all__ = ["total_kernel"]


@triton.jit
def _sum_weights(
    total, key, q, sums, where, begin, end, n, scale, mode,
    NEAR: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    thresholds, batch, head, first_query, rows, columns, offset, far_offset, sink_end = where
    down = tl.arange(0, mode.block_m)
    for row in tl.range(begin, end, mode.block_m):
        left = rows - row
        query = read_rows(q, batch, head, first_query + row, left, mode.block_m, mode, GUARD)
        logs = tl.load(sums + row + down, mask=down < left, other=float("-inf")) * LOG2E
        score = tl.dot(key, tl.trans(query), input_precision=mode.precision)
        logs = tl.where(logs == float("-inf"), float("inf"), logs)
        weight = tl.math.exp2(score * scale - logs[None, :])
        if GUARD:
            kept = keep_rows(
                n, row + down, thresholds, batch, first_query, rows, columns, offset, far_offset,
                sink_end, mode, NEAR,
            )  # fmt: skip
            weight = tl.where(kept, weight, 0.0)
        total += tl.sum(weight, 1)
    return total


@triton.jit(
    do_not_specialize=[
        "rows", "columns", "total_rows", "total_columns", "offset", "far_offset", "sink_end"
    ]
)  # fmt: skip
def total_kernel(
    q1, k1, q2, k2, lse, totals, thresholds, packing, mode,
    scale, rows, columns, total_rows, total_columns, offset, far_offset, sink_end,
):  # fmt: skip
    """One tile of keys under one query head; grid (key tiles, query heads, sequences).

    Args:
        q1, q2: ``Rows``, or with ``mode.tma`` tensor descriptors, [B, H, M, D].
        k1, k2: ``Rows`` [B, Hk, N, D].
        lse: Pointer to float32 [B, H, total_rows].
        totals: Pointer to float32 [B, H, total_columns], written.
        thresholds, packing, mode, scale, rows, columns, total_rows, offset, far_offset, sink_end:
            As in ``forward_kernel``.
        total_columns: Keys of all sequences.
    """
    column = tl.program_id(0) * mode.block_n
    head = tl.program_id(1)
    heads = tl.num_programs(1)
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
    at = first_key + column
    key_head = head // mode.group
    where = (thresholds, batch, head, first_query, rows, columns, offset, far_offset, sink_end)
    logs = vector(lse, batch, head, heads, total_rows, first_query)
    total = tl.zeros((mode.block_n,), tl.float32)
    key = load_rows(k1, batch, key_head, at, left, mode.block_n, mode, True)
    head_end, body_end = split(near_begin, near_full_begin, near_full_end, near_end, mode.block_m)
    total = _sum_weights(
        total, key, q1, logs, where, near_begin, head_end, n, log2_scale, mode, True, True
    )
    total = _sum_weights(
        total, key, q1, logs, where, head_end, body_end, n, log2_scale, mode, True, False
    )
    total = _sum_weights(
        total, key, q1, logs, where, body_end, near_end, n, log2_scale, mode, True, True
    )
    if mode.far:
        key = load_rows(k2, batch, key_head, at, left, mode.block_n, mode, True)
        head_end, body_end = split(far_begin, far_full_begin, rows, rows, mode.block_m)
        total = _sum_weights(
            total, key, q2, logs, where, far_begin, head_end, n, log2_scale, mode, False, True
        )
        total = _sum_weights(
            total, key, q2, logs, where, head_end, body_end, n, log2_scale, mode, False, False
        )
        total = _sum_weights(
            total, key, q2, logs, where, body_end, rows, n, log2_scale, mode, False, True
        )
    down = tl.arange(0, mode.block_n)
    address = vector(totals, batch, head, heads, total_columns, at)
    tl.store(address + down, total, mask=down < left)
