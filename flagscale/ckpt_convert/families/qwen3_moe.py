"""Qwen3-MoE: Qwen3, with experts in some layers or in all.

Source: transformers 5.23, models/qwen3_moe.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families.experts import (
    DENSE,
    EXPERTS,
    FUSED,
    experts_arguments,
    experts_config,
    layers_with_experts,
    refuse_arguments,
)
from flagscale.ckpt_convert.families.family import Config, Family, as_saved
from flagscale.ckpt_convert.families.llama import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    MAY,
    NORMS,
    llama_arguments,
    llama_config,
    refuse_config,
)
from flagscale.ckpt_convert.families.mistral import sliding_window, window_size
from flagscale.ckpt_convert.families.qwen3 import QK_NORMS
from flagscale.ckpt_convert.features import Arguments

__all__ = ["FAMILY"]


def _config(args: Arguments) -> Config:
    refuse_arguments(args, moe_router_topk_scaling_factor=(None, 0, 1))
    window = sliding_window(args)
    return {
        **llama_config(args),
        **experts_config(args),
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted({*range(args["num_layers"])} - {*layers_with_experts(args)}),
        "norm_topk_prob": not args["moe_router_pre_softmax"],
        "num_local_experts": args["num_experts"],
        "sliding_window": window,
        "use_sliding_window": window is not None,
    }


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_config(config, attention_bias=(False,))
    step, dense = config["decoder_sparse_step"], config["mlp_only_layers"] or ()
    layers = [
        layer
        for layer in range(config["num_hidden_layers"])
        if (layer + 1) % step == 0 and layer not in dense
    ]
    # transformers 5 renamed the field; files of earlier releases have the other name.
    experts = config.get("num_local_experts") or config["num_experts"]
    window = config["sliding_window"] if config["use_sliding_window"] else None
    return {
        **llama_arguments(config),
        **experts_arguments(experts, config, layers, pre_softmax=not config["norm_topk_prob"]),
        "qk_layernorm": True,
        "window_size": window_size(window),
    }


FAMILY: Final = Family(
    name="qwen3_moe",
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    rows=as_saved((*EMBEDDING, *ATTENTION, *QK_NORMS, *DENSE, *EXPERTS, *NORMS, *HEAD)),
    config=_config,
    arguments=_arguments,
    needs=frozenset({"experts", "qk_norm"}),
    may=MAY | {"window"},
    fused=FUSED,
)
