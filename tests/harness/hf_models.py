"""Small configurations of every family, drawn at random, as transformers' own classes have them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, PreTrainedConfig

from flagscale.ckpt_convert.families import Family

__all__ = ["configs", "fields_of"]


def fields_of(model_type: str) -> set[str]:
    """What a configuration of this type has, beside what all have."""
    return {*CONFIG_MAPPING[model_type]().to_dict()}


@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Rotary positions that Megatron has too."""
    theta = float(draw(st.sampled_from([10000, 500000, 1000000])))
    linear = {"rope_type": "linear", "factor": float(draw(st.integers(2, 8)))}
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "rope_theta": theta,
        **draw(st.sampled_from([{"rope_type": "default"}, linear, llama3])),
    }


@st.composite
def configs(draw: st.DrawFn, family: Family) -> tuple[PreTrainedConfig, dict[str, Any]]:
    """A small configuration of a family, and what of it was drawn."""

    def number(low: int, high: int) -> int:
        return draw(st.integers(low, high))

    known = fields_of(family.model_type)
    latent = "kv_lora_rank" in known
    groups, layers, experts = number(1, 3), number(1, 3), draw(st.sampled_from([4, 8]))
    heads = groups * number(1, 3)
    drawn = {
        "hidden_size": 2 * heads * number(1, 3),
        "intermediate_size": number(1, 9),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if latent else groups,
        "head_dim": 2 * number(1, 4),
        "vocab_size": number(4, 70),
        "tie_word_embeddings": draw(st.booleans()),
        "max_position_embeddings": 1 << number(14, 17),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "initializer_range": draw(st.sampled_from([0.02, 0.0165])),
        "attention_dropout": draw(st.sampled_from([0.0, 0.25])),
        "sliding_window": draw(st.none() | st.integers(1, 9)),
        # Experts.
        "moe_intermediate_size": number(1, 5),
        "num_local_experts": experts,
        "num_experts": experts,
        "n_routed_experts": experts,
        "num_experts_per_tok": number(2, 3),
        "n_shared_experts": number(1, 2),
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": number(0, layers - 1),
        "num_nextn_predict_layers": 0,
        # Latent attention.
        "q_lora_rank": number(2, 5),
        "kv_lora_rank": number(2, 5),
        "qk_nope_head_dim": 2 * number(1, 3),
        "qk_rope_head_dim": 2 * number(1, 3),
        "v_head_dim": 2 * number(1, 3),
    }
    if latent:
        # What Megatron can do is less here, and the other kinds of positions are tested elsewhere.
        drawn |= {"rms_norm_eps": 1e-6, "topk_method": "group_limited_greedy"}
        drawn["num_experts_per_tok"] = 1 if "topk_method" in known else 2
        del drawn["head_dim"]
    else:
        drawn["rope_parameters"] = draw(rope_parameters())
    if "layer_types" in known:
        kinds = ["full_attention"] + ["sliding_attention"] * (drawn["sliding_window"] is not None)
        drawn["layer_types"] = [draw(st.sampled_from(kinds)) for _ in range(layers)]
        if "sliding_attention" not in drawn["layer_types"]:
            drawn["sliding_window"] = None
    drawn["use_sliding_window"] = drawn["sliding_window"] is not None
    drawn = {key: value for key, value in drawn.items() if key in known}
    return CONFIG_MAPPING[family.model_type](**drawn), drawn
