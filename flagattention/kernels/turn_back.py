"""The gradient of queries or keys that were rotated two ways, from those of the pairs."""

from __future__ import annotations

import triton
import triton.language as tl

from flagattention.kernels.tiles import store_rows, turned

__all__ = ["turn_back_kernel"]


@triton.jit(do_not_specialize=["total_rows"])
def turn_back_kernel(near, far, result, total_rows, mode):
    """Turns a tile of both back and adds them, rounded once; grid (tiles of rows, heads, batch).

    Args:
        near: ``Turned`` [B, H, total_rows, D], by minus the angles of pair 1.
        far: ``Turned`` of that shape, by minus the angle of pair 2; read only with ``mode.far``.
        result: ``Rows`` of that shape, written.
        total_rows: Rows of all sequences.
        mode: ``Mode``.
    """
    row = tl.program_id(0) * mode.block_m
    head = tl.program_id(1)
    batch = tl.program_id(2)
    left = total_rows - row
    total = turned(near, batch, head, row, left, mode.block_m, mode, True)
    if mode.far:
        total += turned(far, batch, head, row, left, mode.block_m, mode, False)
    store_rows(result, total, batch, head, row, left, mode.block_m, mode)
