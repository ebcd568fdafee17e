"""Where queries and keys lie: consecutive numbers inside each sequence."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flagattention.errors import AttentionError, DtypeError, ShapeError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["consecutive", "log_scale", "offsets"]


def consecutive(
    tensors: Sequence[Tensor],
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    q_offset: int | None,
    k_offset: int,
) -> tuple[Tensor, Tensor]:
    """The position of every query and key, made without waiting for the device.

    Args:
        tensors: q and k first: [B, H, M, D] and [B, Hk, N, D], packed [T, H, D] and [Tk, Hk, D].
        cu_seqlens: Where each packed sequence begins, of queries and of keys.
        q_offset: Position of the first query (of each sequence). None puts the last query on the
            last key.
        k_offset: Position of the first key (of each sequence).

    Returns:
        int64 [M] and [N], packed [T] and [Tk].
    """
    q, k = tensors[:2]
    cu_q, cu_k = cu_seqlens
    if cu_q is None or cu_k is None:
        if q_offset is None:
            q_offset = k_offset + k.shape[2] - q.shape[2]
        rows, cols = (torch.arange(x.shape[2], device=x.device) for x in (q, k))
        return rows + q_offset, cols + k_offset
    first = cu_k.diff() - cu_q.diff() + k_offset if q_offset is None else q_offset
    return _in_sequences(cu_q, q, first), _in_sequences(cu_k, k, k_offset)


def _in_sequences(cu_seqlens: Tensor, x: Tensor, first: Tensor | int) -> Tensor:
    tokens = torch.arange(x.shape[0], device=x.device)
    if len(cu_seqlens) < 2:
        return tokens
    # Tokens behind the last sequence belong to none; they count on from its start.
    cu_seqlens = cu_seqlens.long()
    sequence = torch.searchsorted(cu_seqlens[1:-1].contiguous(), tokens, right=True)
    begin = first - cu_seqlens[:-1]
    return tokens + begin[sequence]


def offsets(
    tensors: Sequence[Tensor],
    cu_seqlens: tuple[Tensor | None, Tensor | None],
    q_positions: Tensor | int | None,
    k_positions: Tensor | int,
) -> tuple[Any, Any]:
    """What positions come to: the first query's and the first key's (of each sequence).

    Args:
        tensors: q and k first, as for ``consecutive``.
        cu_seqlens: As for ``consecutive``.
        q_positions: The offset, None for the last query on the last key, or a position for every
            query: [M], [B, M] or packed [T].
        k_positions: The offset, or a position for every key: [N], [B, N] or packed [Tk].

    Returns:
        q_offset and k_offset, as ``piecewise_attention`` takes them.

    Raises:
        AttentionError: The positions are not consecutive inside a sequence, or not alike for all
            rows of the batch.
    """
    k_offset = _first(k_positions)
    q_offset = None if isinstance(q_positions, Tensor) else q_positions
    if not isinstance(q_positions, Tensor) and not isinstance(k_positions, Tensor):
        return q_offset, k_offset
    rows, cols = consecutive(tensors, cu_seqlens, q_offset, k_offset)
    if isinstance(k_positions, Tensor):
        _check_positions("k_positions", k_positions, cols, tensors[1])
    if isinstance(q_positions, Tensor) and not _same(q_positions, rows):
        q_offset = _first(q_positions)
        rows, _ = consecutive(tensors, cu_seqlens, q_offset, k_offset)
        _check_positions("q_positions", q_positions, rows, tensors[0])
    return q_offset, k_offset


def _first(positions: Tensor | int) -> int:
    if not isinstance(positions, Tensor):
        return positions
    return int(positions.flatten()[0]) if positions.numel() else 0


def _same(given: Tensor, wanted: Tensor) -> bool:
    fits = given.shape[-1:] == wanted.shape and given.device == wanted.device
    return bool(fits and (given == wanted).all())


def _check_positions(name: str, given: Tensor, wanted: Tensor, x: Tensor) -> None:
    shapes = [list(wanted.shape)]
    if x.dim() == 4:
        shapes.append([x.shape[0], len(wanted)])
    if list(given.shape) not in shapes:
        raise ShapeError(
            "the positions have the wrong shape",
            where=name,
            expected=" or ".join(map(str, shapes)),
            got=list(given.shape),
        )
    if given.is_complex() or given.dtype == torch.bool:
        raise DtypeError("the positions are no numbers", where=name, got=given.dtype)
    if not _same(given, wanted):
        raise AttentionError(
            "the positions are not consecutive, or differ between the rows of the batch",
            where=name,
            expected="each token one further than the one before it in its sequence, and every "
            "sequence to begin alike",
            got=f"{given.flatten()[:10].tolist()} ...",
            cure="pack sequences of different lengths (cu_seqlens), padding left out",
        )


def log_scale(positions: Tensor, length: int | None) -> Tensor | None:
    """What a query at each position is multiplied by: max(1, log(m + 1) / log(length)).

    Args:
        positions: Of the queries, from 0 on.
        length: The trained length; None for no scale.

    Returns:
        Shaped like positions, float64; None for no scale.
    """
    if length is None:
        return None
    return ((positions.double() + 1).clamp(min=1).log() / math.log(length)).clamp(min=1)
