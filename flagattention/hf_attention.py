"""Attention and mask as transformers calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.masking_utils import causal_mask_function

from flagattention.errors import AttentionError, ShapeError
from flagattention.hf_rope import IMPLEMENTATION, settings_of
from flagattention.nlpe import nlpe_attention

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["attention", "mask"]

_REFUSED = ("cache", "position_bias", "s_aux", "sliding_window", "softcap")


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """Which tokens are no padding: [B, N], or None if all are none.

    Args:
        batch_size: B.
        q_length: M.
        kv_length: N, tokens in the cache included.
        q_offset: Tokens in the cache.
        kv_offset: Tokens that the cache has dropped.
        mask_function: What transformers would have made a mask of.
        attention_mask: [B, N], True for tokens that are no padding.
        **kwargs: Whatever else other masks need.

    Raises:
        AttentionError: The mask is more than a causal one with padding around each row, or the
            cache is not filled to its end.
    """
    if mask_function is not causal_mask_function:
        raise AttentionError(
            "only a causal mask can be served",
            where="position_ids, attention_mask",
            expected="position_ids that are consecutive, in layers that see all before them",
            got="positions that jump or restart, a sliding window, or a mask of the model's own",
        )
    if kv_offset != 0 or int(q_offset) + q_length != kv_length:
        raise AttentionError(
            "this kind of cache cannot be served",
            where="past_key_values",
            expected="a cache that holds all tokens so far and no empty places, as DynamicCache",
            got=f"{kv_length} places from {kv_offset} on, for {q_length} tokens after {q_offset}",
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    begins = attention_mask[:, 1:] & ~attention_mask[:, :-1]
    n_runs = begins.sum(1) + attention_mask[:, 0]
    if attention_mask.shape[1] != kv_length or bool((n_runs > 1).any()):
        raise AttentionError(
            "the tokens of a row do not follow each other",
            where="attention_mask",
            expected=f"[B, {kv_length}], padding before or behind the tokens of a row",
            got=f"{list(attention_mask.shape)}, {int(n_runs.max())} pieces in a row",
        )
    return attention_mask


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention of a layer, from rotated queries and keys.

    Args:
        module: The layer.
        query: [B, H, M, D], rotated.
        key: [B, Hk, N, D], rotated, those of the cache first.
        value: [B, Hk, N, D].
        attention_mask: As ``mask`` made it.
        dropout: 0.
        scaling: What scores are multiplied by; None for D ** -0.5.
        is_causal: None or True.
        position_ids: Of the queries, [B, M] or [1, M].
        **kwargs: Whatever else other attentions need.

    Returns:
        The output, [B, M, H, D], zero for padding, and no weights.

    Raises:
        AttentionError: An argument asks for what this attention does not do.
    """
    _refuse(module, dropout, is_causal, kwargs)
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ShapeError(
            "a mask of the caller's own cannot be served",
            where="attention_mask",
            expected="[B, N], padding before or behind the tokens of a row",
            got=list(attention_mask.shape),
        )
    if not getattr(module, "layer_idx", None):  # all layers have the positions of the first
        _check_positions(position_ids, attention_mask, query.shape[2], key.shape[2])
    settings = settings_of(module.config, query.device)
    call: dict[str, Any] = {
        "method": settings.method, "rotary": settings.rotary, "rotated": True, "sm_scale": scaling,
    }  # fmt: skip
    if attention_mask is None:
        dense: Any = nlpe_attention(query, key, value, **call)
        return dense.transpose(1, 2).contiguous(), None
    queries = attention_mask[:, -query.shape[2] :]
    packed: Any = nlpe_attention(
        query.transpose(1, 2)[queries],
        key.transpose(1, 2)[attention_mask],
        value.transpose(1, 2)[attention_mask],
        cu_seqlens_q=_begins(queries),
        cu_seqlens_k=_begins(attention_mask),
        max_seqlen_q=query.shape[2],
        max_seqlen_k=key.shape[2],
        **call,
    )
    out = query.new_zeros(query.transpose(1, 2).shape)
    return out.index_put((queries,), packed), None


def _begins(tokens: Tensor) -> Tensor:
    """Where each row of a mask [B, T] begins among the tokens it keeps, and where the last ends."""
    return torch.nn.functional.pad(tokens.sum(1).cumsum(0), (1, 0)).int()


def _refuse(module: Any, dropout: float, is_causal: bool | None, kwargs: dict[str, Any]) -> None:
    asked: dict[str, object] = {name: kwargs.get(name) for name in _REFUSED}
    asked["dropout"] = dropout or None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    asked["is_causal"] = None if causal else False
    for name, value in asked.items():
        if value is not None:
            raise AttentionError(
                f"the attention {IMPLEMENTATION} does not do what the model asks for",
                where=name,
                got=value if isinstance(value, int | float) else type(value).__name__,
            )


def _check_positions(
    position_ids: Tensor | None, tokens: Tensor | None, n_rows: int, n_cols: int
) -> None:
    """Checks that positions count the tokens of a row, or all places of it, padding included."""
    if position_ids is None:
        raise AttentionError("the model does not tell its positions", where="position_ids")
    places = position_ids.new_ones(1, n_cols).cumsum(1)[:, n_cols - n_rows :] - 1
    right = position_ids == places
    fits = right.all()
    if tokens is not None:
        counted = (tokens.cumsum(1) - 1)[:, n_cols - n_rows :]
        padding = ~tokens[:, n_cols - n_rows :]
        fits = (
            (right | padding).all(1) | ((position_ids == counted) | padding).all(1)
        ).all()  # fmt: skip
    if not bool(fits):
        raise AttentionError(
            "the positions are not consecutive",
            where="position_ids",
            expected=f"each token one further than the one before it, the first of the row at 0, "
            f"{n_cols - n_rows} in the cache before these",
            got=f"{position_ids[:4, :8].tolist()} ...",
        )
