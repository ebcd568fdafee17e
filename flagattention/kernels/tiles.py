"""What the kernels share: the types of their arguments, and loads of tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = [
    "LOG2E",
    "Mode",
    "Packing",
    "Rows",
    "Thresholds",
    "Turned",
    "far_limits",
    "load_queries",
    "load_rows",
    "locate",
    "read_rows",
    "scan_limits",
    "store_rows",
    "turned",
    "vector",
]

LOG2E = tl.constexpr(1.4426950408889634)
_LIMIT = tl.constexpr(1 << 30)


class Rows(NamedTuple):
    """A tensor [B, H, T, D] whose last dimension is contiguous; strides in elements."""

    pointer: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any


class Turned(NamedTuple):
    """``Rows`` that are rotated when they are loaded."""

    pointer: Any
    batch_stride: Any
    head_stride: Any
    row_stride: Any
    cos: Any  # float32 [T, mode.half], or [1, mode.half] for all rows
    sin: Any
    scales: Any  # float32 [T], what rows are multiplied by; or None


class Packing(NamedTuple):
    """Where packed sequences begin, int32 [S + 1]; None in dense calls."""

    query_starts: Any
    key_starts: Any


class Thresholds(NamedTuple):
    """A threshold for each row, int32 [B or 1, M] or packed [T]; None where there is one number."""

    pointer: Any
    batch_stride: Any


class Mode(NamedTuple):
    """What a kernel is compiled for; every field is a ``tl.constexpr``."""

    causal: Any
    far: Any  # some key may be far: without it the kernel is plain flash attention with pair 1
    per_row: Any  # the threshold is a tensor
    packed: Any  # sequences of different lengths, one after the other
    flush: Any  # packed: the last query of each sequence sits on its last key
    group: Any  # query heads for each key head
    block_m: Any
    block_n: Any
    head_dim: Any
    padded: Any  # head_dim, or the power of two above it
    tma: Any  # the tensors walked in loops are tensor descriptors
    precision: Any  # of the matrix products, for float32
    turn: Any  # queries are ``Turned``: dims i and i + half make a pair (1), or 2i and 2i + 1 (2)
    half: Any  # pairs of dims that are rotated


@triton.jit
def locate(packing, sequence, rows, columns, offset, far_offset, mode):
    """Find a sequence.

    Returns:
        Batch index, first row of queries and of keys, number of queries and of keys, and the two
        offsets for this sequence.
    """
    if mode.packed:
        first_query = tl.load(packing.query_starts + sequence)
        first_key = tl.load(packing.key_starts + sequence)
        query_count = tl.load(packing.query_starts + sequence + 1) - first_query
        key_count = tl.load(packing.key_starts + sequence + 1) - first_key
        if mode.flush:
            offset += key_count - query_count
            far_offset += key_count - query_count
        return 0, first_query, first_key, query_count, key_count, offset, far_offset
    else:
        return sequence, 0, 0, rows, columns, offset, far_offset


@triton.jit
def _addresses(tensor, batch, head, row, across, BLOCK: tl.constexpr):
    # In 64 bits: a tensor may hold more than 2**31 elements.
    start = (
        tl.cast(batch, tl.int64) * tensor.batch_stride
        + tl.cast(head, tl.int64) * tensor.head_stride
        + tl.cast(row, tl.int64) * tensor.row_stride
    )
    down = tl.arange(0, BLOCK)[:, None] * tensor.row_stride
    return tensor.pointer + start + down + across[None, :]


@triton.jit
def load_rows(tensor, batch, head, row, left, BLOCK: tl.constexpr, mode, GUARD: tl.constexpr):
    """Load a tile [BLOCK, padded]; with GUARD, rows from the ``left``-th on are zero."""
    addresses = _addresses(tensor, batch, head, row, tl.arange(0, mode.padded), BLOCK)
    down = tl.arange(0, BLOCK)[:, None]
    across = tl.arange(0, mode.padded)[None, :]
    if GUARD:
        if mode.head_dim == mode.padded:
            return tl.load(addresses, mask=down < left, other=0.0)
        else:
            return tl.load(addresses, mask=(down < left) & (across < mode.head_dim), other=0.0)
    elif mode.head_dim == mode.padded:
        return tl.load(addresses)
    else:
        return tl.load(addresses, mask=across < mode.head_dim, other=0.0)


@triton.jit
def turned(tensor, batch, head, row, left, BLOCK: tl.constexpr, mode, EACH: tl.constexpr):
    """Load a tile of a ``Turned`` tensor, float32; with EACH every row has its own angles.

    The other element of a pair is in another thread's registers; a second load finds it in the
    cache.
    """
    x = load_rows(tensor, batch, head, row, left, BLOCK, mode, True).to(tl.float32)
    down = tl.arange(0, BLOCK)
    if tensor.scales is not None:
        scale = tl.load(tensor.scales + row + down, mask=down < left, other=1.0)
        x = x * scale[:, None]
    if mode.half > 0:
        across = tl.arange(0, mode.padded)
        if mode.turn == 1:
            pair = across % mode.half
            other = (across + mode.half) % (2 * mode.half)
            first = across < mode.half
        else:
            pair = across // 2
            other = across ^ 1
            first = across % 2 == 0
        rotates = (across < 2 * mode.half)[None, :]
        at = pair[None, :]
        if EACH:
            at += (tl.cast(row, tl.int64) + down[:, None]) * mode.half
            rotates = rotates & (down < left)[:, None]
        cos = tl.load(tensor.cos + at, mask=rotates, other=1.0)
        sin = tl.load(tensor.sin + at, mask=rotates, other=0.0)
        sin = tl.where(first[None, :], -sin, sin)
        addresses = _addresses(tensor, batch, head, row, other, BLOCK)
        kept = (across < 2 * mode.half)[None, :] & (down < left)[:, None]
        partner = tl.load(addresses, mask=kept, other=0.0).to(tl.float32)
        if tensor.scales is not None:
            partner = partner * scale[:, None]
        x = x * cos + partner * sin
    return x


@triton.jit
def load_queries(tensor, batch, head, row, left, BLOCK: tl.constexpr, mode, EACH: tl.constexpr):
    """Load a tile of query rows, zero from the ``left``-th on; rotated if they are ``Turned``."""
    if mode.turn:
        tile = turned(tensor, batch, head, row, left, BLOCK, mode, EACH)
        return tile.to(tensor.pointer.dtype.element_ty)
    else:
        return load_rows(tensor, batch, head, row, left, BLOCK, mode, True)


@triton.jit
def read_rows(tensor, batch, head, row, left, BLOCK: tl.constexpr, mode, GUARD: tl.constexpr):
    """Load a tile of a tensor that is walked in a loop: by its descriptor, where it has one."""
    if mode.tma:
        return tensor.load([batch, head, row, 0]).reshape(BLOCK, mode.padded)
    else:
        return load_rows(tensor, batch, head, row, left, BLOCK, mode, GUARD)


@triton.jit
def store_rows(tensor, tile, batch, head, row, left, BLOCK: tl.constexpr, mode):
    """Store the first ``left`` rows of a tile [BLOCK, padded], rounded to the tensor's type."""
    addresses = _addresses(tensor, batch, head, row, tl.arange(0, mode.padded), BLOCK)
    kept = tl.arange(0, BLOCK)[:, None] < left
    if mode.head_dim != mode.padded:
        kept = kept & (tl.arange(0, mode.padded)[None, :] < mode.head_dim)
    tl.store(addresses, tile.to(tensor.pointer.dtype.element_ty), mask=kept)


@triton.jit
def vector(pointer, batch, head, heads, length, first):
    """Address of element ``first`` of [batch, head] in a contiguous [B, heads, length]."""
    return pointer + (tl.cast(batch, tl.int64) * heads + head) * length + first


@triton.jit
def far_limits(thresholds, batch, first_query, row, far_offset, mode):
    """The far limit of rows that exist: keys up to it, inclusive, are far."""
    if mode.per_row:
        start = tl.cast(batch, tl.int64) * thresholds.batch_stride + first_query
        given = tl.load(thresholds.pointer + start + row)
        limit = tl.cast(far_offset, tl.int64) + row - given
        return tl.minimum(tl.maximum(limit, -_LIMIT), _LIMIT).to(tl.int32)
    else:
        return far_offset + row


@triton.jit
def scan_limits(
    thresholds, batch, first_query, rows, far_offset, first, last, mode, BLOCK: tl.constexpr
):
    """From which row on a tile of keys [first, last] is partly far, and from which wholly.

    Limits that go up and down are enclosed: rows below the first number see the tile as near, rows
    from the second on as far, and those between need a mask.
    """
    if mode.per_row:
        far_start = rows
        near_stop = rows * 0
        for begin in tl.range(0, rows, BLOCK):
            row = begin + tl.arange(0, BLOCK)
            exists = row < rows
            limit = far_limits(
                thresholds, batch, first_query, tl.minimum(row, rows - 1), far_offset, mode
            )
            far = tl.where(exists & (limit >= first), row, rows)
            near = tl.where(exists & (limit < last), row + 1, 0)
            far_start = tl.minimum(far_start, tl.min(far, 0))
            near_stop = tl.maximum(near_stop, tl.max(near, 0))
        return far_start, near_stop
    else:
        return first - far_offset, last - far_offset
