"""The forward kernel: one online softmax over far keys with pair 2, then near keys with pair 1."""

from __future__ import annotations

import triton
import triton.language as tl

from flagattention.kernels.ranges import key_ranges, split
from flagattention.kernels.tiles import (
    LOG2E,
    far_limits,
    load_queries,
    locate,
    read_rows,
    store_rows,
    vector,
)

__all__ = ["forward_kernel"]

# Below every score and finite, so that a row without a key needs no special case: its weights are
# 2 ** (-inf - LOWEST) = 0.
LOWEST = tl.constexpr(-1.0e38)


@triton.jit
def _attend(
    state, query, k, v, batch, head, first_key, begin, end, columns, limits, scale, mode,
    NEAR: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, end) to the state: output sum, row sum, row maximum (log2)."""
    acc, total, peak = state
    above, upto = limits
    for column in tl.range(begin, end, mode.block_n):
        left = columns - column
        key = read_rows(k, batch, head, first_key + column, left, mode.block_n, mode, GUARD)
        score = tl.dot(query, tl.trans(key), input_precision=mode.precision)
        if GUARD:
            n = column + tl.arange(0, mode.block_n)[None, :]
            kept = n <= upto[:, None]
            if NEAR and mode.far:
                kept = kept & (n > above[:, None])
            score = tl.where(kept, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1) * scale)
        weight = tl.math.exp2(score * scale - higher[:, None])
        decay = tl.math.exp2(peak - higher)
        total = total * decay + tl.sum(weight, 1)
        acc = acc * decay[:, None]
        value = read_rows(v, batch, head, first_key + column, left, mode.block_n, mode, GUARD)
        acc = tl.dot(weight.to(value.dtype), value, acc, input_precision=mode.precision)
        peak = higher
    return acc, total, peak


@triton.jit(do_not_specialize=["rows", "columns", "total_rows", "offset", "far_offset", "sink_end"])
def forward_kernel(
    q1, k1, q2, k2, v, out, lse, thresholds, packing, mode,
    scale, rows, columns, total_rows, offset, far_offset, sink_end,
):  # fmt: skip
    """One tile of query rows of one head; grid (query tiles, query heads, sequences).

    Args:
        q1, q2: ``Rows`` [B, H, M, D], with ``mode.turn`` ``Turned``.
        k1, k2, v: ``Rows``, or with ``mode.tma`` tensor descriptors, [B, Hk, N, D].
        out: ``Rows`` [B, H, M, D], written.
        lse: Pointer to float32 [B, H, total_rows], written: natural logarithm of the row sums.
        thresholds: ``Thresholds``.
        packing: ``Packing``.
        mode: ``Mode``.
        scale: What scores are multiplied by, > 0.
        rows: Queries (packed: unused).
        columns: Keys (packed: unused).
        total_rows: Rows of ``lse``.
        offset: Position of the first query less that of the first key.
        far_offset: That less the threshold; where ``thresholds`` has them, that alone.
        sink_end: Far keys at this column and later are masked.
    """
    # The longest rows first: under a causal mask they would otherwise be the stragglers.
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
    # Rows past the end repeat the last one; they are not stored.
    m = tl.minimum(row + tl.arange(0, mode.block_m), rows - 1)
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
    state = (
        tl.zeros((mode.block_m, mode.padded), tl.float32),
        tl.zeros((mode.block_m,), tl.float32),
        tl.zeros((mode.block_m,), tl.float32) + LOWEST,
    )
    if mode.far:
        query = load_queries(q2, batch, head, first_query + row, left, mode.block_m, mode, False)
        far = (limit, tl.minimum(tl.minimum(limit, seen), sink_end - 1))
        _, body_end = split(0, 0, far_full_end, far_end, mode.block_n)
        state = _attend(
            state, query, k2, v, batch, key_head, first_key, 0, body_end, columns, far,
            log2_scale, mode, False, False,
        )  # fmt: skip
        state = _attend(
            state, query, k2, v, batch, key_head, first_key, body_end, far_end, columns, far,
            log2_scale, mode, False, True,
        )  # fmt: skip
    query = load_queries(q1, batch, head, first_query + row, left, mode.block_m, mode, True)
    near = (limit, seen)
    head_end, body_end = split(near_begin, near_full_begin, near_full_end, near_end, mode.block_n)
    if mode.far:
        state = _attend(
            state, query, k1, v, batch, key_head, first_key, near_begin, head_end, columns, near,
            log2_scale, mode, True, True,
        )  # fmt: skip
    state = _attend(
        state, query, k1, v, batch, key_head, first_key, head_end, body_end, columns, near,
        log2_scale, mode, True, False,
    )  # fmt: skip
    state = _attend(
        state, query, k1, v, batch, key_head, first_key, body_end, near_end, columns, near,
        log2_scale, mode, True, True,
    )  # fmt: skip
    acc, total, peak = state
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    sums = tl.where(empty, float("-inf"), (peak + tl.math.log2(total)) / LOG2E)
    acc = acc / total[:, None]
    store_rows(out, acc, batch, head, first_query + row, left, mode.block_m, mode)
    address = vector(lse, batch, head, tl.num_programs(1), total_rows, first_query + row)
    down = tl.arange(0, mode.block_m)
    tl.store(address + down, sums, mask=down < left)
