"""Qwen3: Qwen2 with norms of queries and keys in the place of biases.

These norms have a weight for each channel of a head, so heads whose rotary pairs are neighbours are
not converted: their channels would have to change places too.

Source: transformers 5.23, models/qwen3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families.family import Config, Family, as_saved
from flagscale.ckpt_convert.families.llama import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    MLP,
    NORMS,
    refuse_config,
)
from flagscale.ckpt_convert.families.qwen2 import QWEN_MAY, qwen_arguments, qwen_config
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.tensors import Row

__all__ = ["FAMILY", "QK_NORMS"]

_HF, _MG = "model.layers.{layer}.self_attn.", "decoder.layers.{layer}.self_attention."

QK_NORMS: Final = (
    Row(f"{_HF}q_norm.weight", f"{_MG}q_layernorm.weight"),
    Row(f"{_HF}k_norm.weight", f"{_MG}k_layernorm.weight"),
)


def _config(args: Arguments) -> Config:
    return qwen_config(args) | {"attention_bias": False}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_config(config, attention_bias=(False,))
    return qwen_arguments(config) | {"qk_layernorm": True}


FAMILY: Final = Family(
    name="qwen3",
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    rows=as_saved((*EMBEDDING, *ATTENTION, *QK_NORMS, *MLP, *NORMS, *HEAD)),
    config=_config,
    arguments=_arguments,
    needs=frozenset({"qk_norm"}),
    may=QWEN_MAY,
)
