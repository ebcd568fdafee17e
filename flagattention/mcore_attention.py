"""The core attention of a Megatron layer: between upstream's rotation and its output projection."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule

from flagattention.errors import AttentionError, ShapeError
from flagattention.mcore_refusals import raise_refusals
from flagattention.nlpe import nlpe_attention

if TYPE_CHECKING:
    from torch import Tensor

    from flagattention.nlpe import Method, Rotary

__all__ = ["PiecewiseCoreAttention"]

_CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class PiecewiseCoreAttention(MegatronModule):  # type: ignore[misc]
    """Takes the place of upstream's ``DotProductAttention``; it has no parameters and no state.

    It sees every head of this tensor-parallel rank and whole sequences, also under sequence
    parallelism. Queries are the last of the keys, as in a cache of ``StaticInferenceContext``.
    Attention is causal; a mask is not read, as Transformer Engine reads none that is causal.

    Args:
        config: Upstream's.
        layer_number: Not used, and so all others that upstream gives and are not named below.
        attn_mask_type: Must be causal.
        attention_type: Must be "self".
        attention_dropout: Must be 0; ``None`` for that of ``config``.
        softmax_scale: What scores are multiplied by; ``None`` for D ** -0.5.
        others: See ``layer_number``.

    Raises:
        AttentionError: Something cannot be served.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **others: Any,
    ) -> None:
        raise_refusals(config)
        if attention_type != "self" or attn_mask_type not in _CAUSAL or attention_dropout:
            raise AttentionError(
                "piecewise attention serves causal self-attention without dropout",
                where=f"layer {layer_number}",
                got=f"{attention_type}, {attn_mask_type.name}, dropout {attention_dropout}",
                cure="give such layers another core attention",
            )
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self._method: Method | None = None
        self._rotary: Rotary | None = None

    def use(self, method: Method, rotary: Rotary) -> None:
        """Say which pairs to make, and how the model rotates.

        Args:
            method: Which pairs.
            rotary: What upstream rotates by.
        """
        self._method, self._rotary = method, rotary

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: Rotated: [M, B, H, D], packed [T, H, D].
            key: Rotated: [N, B, Hk, D], packed [T, Hk, D].
            value: Like key.
            attention_mask: Not read.
            attn_mask_type: ``None``, causal, or, where keys come from a cache, no mask.
            attention_bias: Must be ``None``.
            packed_seq_params: Where the sequences of packed tensors begin.

        Returns:
            [M, B, H * D], packed [T, H * D].

        Raises:
            AttentionError: No method was given, or the call asks for what is not served.
        """
        cached = packed_seq_params is None and key.shape[0] > query.shape[0]
        allowed = (None, *_CAUSAL, *((AttnMaskType.no_mask,) if cached else ()))
        if attention_bias is not None or attn_mask_type not in allowed:
            raise AttentionError(
                "piecewise attention serves causal attention without a bias",
                where="core_attention",
                got="a bias" if attention_bias is not None else attn_mask_type,
                cure="use stock attention",
            )
        settings = self._settings(query.device)
        if packed_seq_params is None:
            return self._dense(query, key, value, settings)
        return self._packed(query, key, value, packed_seq_params, settings)

    def _settings(self, device: torch.device) -> dict[str, Any]:
        if self._method is None or self._rotary is None:
            raise AttentionError(
                "this model was built for piecewise attention and given no method",
                where="core_attention",
                expected="a call of flagattention.mcore.bind before the first step",
                cure="give --nlpe-method, or call bind in a pre-wrap hook",
            )
        if self._rotary.inv_freq.device != device:
            self._rotary = replace(self._rotary, inv_freq=self._rotary.inv_freq.to(device))
        return {
            "method": self._method,
            "rotary": self._rotary,
            "rotated": True,
            "sm_scale": self.softmax_scale,
        }

    def _dense(self, query: Tensor, key: Tensor, value: Tensor, settings: dict[str, Any]) -> Tensor:
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = cast("Tensor", nlpe_attention(query, key, value, **settings))
        return out.permute(2, 0, 1, 3).flatten(2)

    def _packed(
        self, query: Tensor, key: Tensor, value: Tensor, packed: Any, settings: dict[str, Any]
    ) -> Tensor:
        if packed.qkv_format != "thd" or packed.cu_seqlens_q_padded is not None:
            raise ShapeError(
                "packed sequences must lie one behind the other, without padding",
                where="packed_seq_params",
                expected="qkv_format thd, no padded cu_seqlens",
                got=f"qkv_format {packed.qkv_format}",
                cure="--dataloader-inter-document-masking packs so",
            )
        out = nlpe_attention(
            query,
            key,
            value,
            cu_seqlens_q=packed.cu_seqlens_q,
            cu_seqlens_k=packed.cu_seqlens_kv,
            max_seqlen_q=int(packed.max_seqlen_q),
            max_seqlen_k=int(packed.max_seqlen_kv),
            **settings,
        )
        return cast("Tensor", out).flatten(1)
