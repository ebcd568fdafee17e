"""Piecewise attention on a CPU: torch's own flash attention on pieces, merged by their lse.

The pieces (see ``pieces``) need no mask, so that torch's kernel skips what is not seen. Its
backward pass is exact for a piece when it is given the merged out and lse of the whole row, for
then exp(score - lse) is the true probability and sum(dout * out) the true delta. Thresholds that
differ by row are served in chunks of rows under masks. Extra memory is O((M + N) * D).

Source: ``aten::_scaled_dot_product_flash_attention_for_cpu`` of torch >= 2.11, which sees keys
j <= i of any M x N when causal, and reads k and v of stride 0 over heads, so that the heads of a
group share theirs without a copy (a batch of blocks takes one copy for each head).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from flagattention.pieces import Kind, Piece, plan
from flagattention.sequences import each_backward, each_forward
from flagattention.total import total_attention

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from flagattention.problem import Problem

__all__ = ["CHUNK", "EXTRA", "backward", "forward", "total_attention"]

CHUNK = 256
"""Rows under one mask, where the threshold differs by row."""

EXTRA = 8
"""Columns by which the head size grows when the lse has a gradient."""

_TRIANGLES = (Kind.LOWER, Kind.UPPER)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """The forward pass; shapes as in ``problem``."""
    return each_forward(_dense_forward, q1, k1, q2, k2, v, problem)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The backward pass; shapes as in ``problem``."""
    return each_backward(_dense_backward, dout, dlse, q1, k1, q2, k2, v, out, lse, problem)


def _dense_forward(
    q1: Tensor, k1: Tensor, q2: Tensor, k2: Tensor, v: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    shape, n_cols, n_groups = q1.shape, k1.shape[2], k1.shape[1]
    queries = [_grouped(x, n_groups) for x in (q1, q2)]
    keys = [_grouped(x, n_groups) for x in (k1, k2)]
    values = _grouped(v, n_groups)
    out = _zeros(queries[0])
    lse = torch.full(out.shape[:3], -torch.inf, dtype=out.dtype)
    for piece, mask in _pieces(problem, shape[2], n_cols, q1):
        part, part_lse = _flash(
            *_arguments(piece, queries[piece.pair - 1], keys[piece.pair - 1], values),
            0.0,
            piece.kind in _TRIANGLES,
            attn_mask=mask,
            scale=problem.sm_scale,
        )
        if mask is not None:
            # The kernel says 0 for a row whose mask hides every key.
            part_lse = part_lse.masked_fill((mask == -torch.inf).all(-1), -torch.inf)
        _merge(out, lse, piece, part, part_lse)
    return out.view(shape).to(q1.dtype), lse.view(shape[:3])


def _dense_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q1: Tensor,
    k1: Tensor,
    q2: Tensor,
    k2: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, n_cols, n_groups = q1.shape, k1.shape[2], k1.shape[1]
    if dlse is not None:
        q1, k1, q2, k2, v = (_widened(x) for x in (q1, k1, q2, k2, v))
        dout, out = _with_dlse(dout, out, dlse)
    queries = [_grouped(x, n_groups) for x in (q1, q2)]
    keys = [_grouped(x, n_groups) for x in (k1, k2)]
    values, dout, out = (_grouped(x, n_groups) for x in (v, dout, out))
    # A row that sees nothing has lse -inf; +inf makes its probabilities 0, as they must be.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf).reshape(dout.shape[:3])
    dqueries, dkeys = [_zeros(x) for x in queries], [_zeros(x) for x in keys]
    dvalues = _zeros(values)
    for piece, mask in _pieces(problem, shape[2], n_cols, q1):
        pair = piece.pair - 1
        dq, dk, dv = _flash_backward(
            _call_rows(dout, piece),
            *_arguments(piece, queries[pair], keys[pair], values),
            _call_rows(out, piece),
            _call_rows(lse.unsqueeze(-1), piece).squeeze(-1),
            0.0,
            piece.kind in _TRIANGLES,
            attn_mask=mask,
            scale=problem.sm_scale,
        )
        group = dout.shape[1]
        _rows(dqueries[pair], piece).add_(_as_cut(dq, piece, group))
        for total, grad in ((dkeys[pair], dk), (dvalues, dv)):
            heads = _as_cut(grad, piece, group)
            if group > 1:
                heads = heads.sum(1, keepdim=True, dtype=total.dtype)
            _cols(total, piece).add_(heads)
    totals = (dqueries[0], dkeys[0], dqueries[1], dkeys[1], dvalues)
    dq1, dk1, dq2, dk2, dv = (
        total.view(x.shape)[..., : shape[3]].to(x.dtype)
        for total, x in zip(totals, (q1, k1, q2, k2, v), strict=True)
    )
    return dq1, dk1, dq2, dk2, dv


def _pieces(
    problem: Problem, n_rows: int, n_cols: int, like: Tensor
) -> Iterator[tuple[Piece, Tensor | None]]:
    """The calls to make, each with the mask it needs, which is added to the scores."""
    if 0 in (like.numel(), n_cols):
        return
    offset = (problem.q_offset or 0) - problem.k_offset
    n_far_cols = n_cols
    if problem.n_sink > 0:
        n_far_cols = min(max(problem.n_sink - problem.k_offset, 0), n_cols)
    threshold = problem.threshold
    if isinstance(threshold, torch.Tensor):
        for start in range(0, n_rows, CHUNK):
            rows = torch.arange(start, min(start + CHUNK, n_rows))
            border = offset + rows - threshold[start : start + CHUNK]
            end = offset + rows if problem.causal else torch.full_like(rows, n_cols)
            yield from _masked(1, start, border, end, n_cols, like)
            yield from _masked(2, start, None, torch.minimum(border, end), n_far_cols, like)
        return
    for piece in plan(n_rows, n_cols, problem.causal, threshold, offset, n_far_cols):
        mask = None
        if piece.kind is Kind.BAND:
            seen = torch.ones(piece.height, piece.width, dtype=torch.bool)
            mask = _added(seen.triu(piece.lo + 1).tril(piece.hi), like)
        yield piece, mask


def _masked(
    pair: int, start: int, lo: Tensor | None, hi: Tensor, n_cols: int, like: Tensor
) -> Iterator[tuple[Piece, Tensor]]:
    """The cells lo < n <= hi of a chunk of rows, where lo and hi hold a number for each row."""
    first = 0 if lo is None else max(int(lo.min()) + 1, 0)
    stop = min(int(hi.max()) + 1, n_cols)
    if first < stop:
        cols = torch.arange(first, stop)
        seen = cols <= hi.unsqueeze(1)
        if lo is not None:
            seen &= cols > lo.unsqueeze(1)
        piece = Piece(pair, Kind.BAND, start, len(hi), first, stop - first)
        yield piece, _added(seen, like)


def _added(seen: Tensor, like: Tensor) -> Tensor:
    return torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf)


def _grouped(x: Tensor, n_groups: int) -> Tensor:
    """[B, H, L, D] -> [B * Hk, heads of a group, L, D] as the kernel can read it; a copy if not."""
    batch, heads, length, size = x.shape
    x = x.reshape(batch * n_groups, heads // n_groups, length, size)
    return x if x.stride(3) == 1 and x.stride(2) >= size else x.contiguous()


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


def _cut(x: Tensor, start: int, size: int, piece: Piece) -> Tensor:
    """The view [X, heads, count, size, D] of a tensor [X, heads, L, D]."""
    span = x.narrow(2, start, (piece.count - 1) * piece.step + size)
    return span.unfold(2, size, piece.step or size).transpose(-1, -2)


def _rows(x: Tensor, piece: Piece) -> Tensor:
    return _cut(x, piece.row, piece.height, piece)


def _cols(x: Tensor, piece: Piece) -> Tensor:
    return _cut(x, piece.col, piece.width, piece)


def _as_call(cut: Tensor, piece: Piece, group: int) -> Tensor:
    """A cut as the kernel takes it: turned round if need be, four dimensions, every query head."""
    if piece.kind is Kind.UPPER:
        cut = cut.flip(-2)
    cut = cut.expand(-1, group, -1, -1, -1)
    return cut.squeeze(2) if piece.count == 1 else cut.flatten(0, 1)


def _as_cut(result: Tensor, piece: Piece, group: int) -> Tensor:
    """What a call gave, as ``_as_call`` found it: [X, heads, count, size, D]."""
    cut = result.unsqueeze(2) if piece.count == 1 else result.view(-1, group, *result.shape[1:])
    return cut.flip(-2) if piece.kind is Kind.UPPER else cut


def _call_rows(x: Tensor, piece: Piece) -> Tensor:
    return _as_call(_rows(x, piece), piece, x.shape[1])


def _arguments(piece: Piece, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    group = q.shape[1]
    return (
        _call_rows(q, piece),
        _as_call(_cols(k, piece), piece, group),
        _as_call(_cols(v, piece), piece, group),
    )


def _merge(out: Tensor, lse: Tensor, piece: Piece, part: Tensor, part_lse: Tensor) -> None:
    """Adds what one piece found to what its rows have found so far."""
    group = out.shape[1]
    rows, sums = _rows(out, piece), _rows(lse.unsqueeze(-1), piece)
    part_sums = _as_cut(part_lse.unsqueeze(-1), piece, group)
    # exp(part) / (exp(sums) + exp(part)), which is nan where neither has seen anything.
    share = torch.sigmoid(part_sums - sums).masked_fill_(sums == -torch.inf, 1.0)
    rows.lerp_(_as_cut(part, piece, group).to(out.dtype), share)
    sums.copy_(torch.logaddexp(sums, part_sums))


def _widened(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, EXTRA))


def _with_dlse(dout: Tensor, out: Tensor, dlse: Tensor) -> tuple[Tensor, Tensor]:
    """Columns that make the kernel's sum(dout * out) come to delta - dlse.

    The kernel knows no gradient of the lse; but it enters just there, and columns in which q, k and
    v are zero change nothing else. A power of two times three numbers of 8 bits hold a float32.
    """
    _, exponent = torch.frexp(dlse)
    scale = torch.ldexp(torch.ones_like(dlse), exponent.clamp(-14, 15))
    rest = -dlse / scale
    wide_dout, wide_out = _widened(dout), _widened(out)
    for column in range(-EXTRA, 3 - EXTRA):
        wide_dout[..., column] = scale
        wide_out[..., column] = rest
        rest = rest - wide_out[..., column]
    return wide_dout, wide_out
