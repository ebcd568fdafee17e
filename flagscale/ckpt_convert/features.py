"""What a model has, as the arguments of its job say it, in words that families understand.

A family lists the features it needs and those it may have. One that no family knows is what makes a
model impossible to convert, and is told by the argument it comes from.

Source: megatron-core 0.19.2, training/arguments.py, core/transformer/transformer_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.nlpe import SPEC

__all__ = ["Arguments", "features"]


class Arguments(dict[str, Any]):
    """Arguments by attribute, in which one that is missing was not given."""

    def __missing__(self, dest: str) -> None:
        return None


_ON: Final = {
    "qkv_bias": "add_qkv_bias",
    "linear_bias": "add_bias_linear",
    "qk_norm": "qk_layernorm",
    "rope_scaling": "use_rope_scaling",
    "window": "window_size",
    "experts": "num_experts",
    "shared_experts": "moe_shared_expert_intermediate_size",
    "shared_expert_gate": "moe_shared_expert_gate",
    "expert_bias": "moe_router_enable_expert_bias",
    "expert_groups": "moe_router_num_groups",
    "mla": "multi_latent_attention",
    "nlpe": "nlpe_method",
    "q_lora": "q_lora_rank",
    "rotary_interleaved": "rotary_interleaved",
    **{
        dest: dest
        for dest in (
            "activation_func_clamp_value", "apply_residual_connection_post_layernorm",
            "attention_output_gate", "experimental_attention_variant", "glu_linear_offset",
            "layernorm_zero_centered_gamma", "linear_attention_freq", "moe_apply_probs_on_input",
            "moe_latent_size", "moe_mlp_glu_interleave_size", "mtp_num_layers", "no_rope_freq",
            "qk_l2_norm", "quick_geglu", "spec", "squared_relu", "use_mup", "window_attn_skip_freq",
        )
    },
}  # fmt: skip
"""Features that are there where an argument is given; further ones are called as the argument."""

_NOT: Final[Mapping[str, tuple[str, tuple[Any, ...]]]] = {
    "tied": ("untie_embeddings_and_output_weights", (True,)),
    "position_interpolation": ("rotary_seq_len_interpolation_factor", (None, 1)),
    "layer_norm": ("normalization", ("RMSNorm",)),
    "ungated": ("swiglu", (True,)),
    "partial_rotary": ("rotary_percent", (None, 1)),
    "softmax": ("softmax_type", (None, "vanilla")),
    "sigmoid_router": ("moe_router_score_function", (None, "softmax")),
    "positions": ("position_embedding_type", ("rope",)),
}
"""Features that are there unless an argument has one of these values."""


def features(args: Mapping[str, Any]) -> dict[str, str]:
    """The features of a model, each with the argument that it comes from.

    Args:
        args: Arguments of its job, by attribute.
    """
    given = Arguments(args)
    found = {name: dest for name, dest in _ON.items() if given[dest]}
    found |= {name: dest for name, (dest, usual) in _NOT.items() if given[dest] not in usual}
    if "nlpe" in found and tuple(given["spec"] or ()) == SPEC:
        found.pop("spec", None)  # of the layers, it changes nothing else
    if "experts" not in found:
        found = {name: dest for name, dest in found.items() if not dest.startswith("moe_")}
        found.pop("sigmoid_router", None)
    return {name: f"--{dest.replace('_', '-')}" for name, dest in found.items()}
