"""DeepSeek-V2 and V3: attention over low ranks, and experts beside shared ones.

In Megatron's modules and in these classes alike, neighbouring channels make a rotary pair, so
nothing is permuted. Not every model of one has a counterpart in the other:

* Norms of the low ranks have a fixed epsilon of 1e-6 in transformers. Without a low rank of the
  queries, Megatron normalizes what queries are made from, or nothing; transformers only keys and
  values.
* The best groups of experts are, in Megatron, those whose best ``topk // group_topk`` experts have
  the highest sum; in transformers those with the one best expert (V2) or the two best (V3).
* V2 never divides weights by their sum, V3 in Megatron always does.

Source: transformers 5.23, models/deepseek_v2 and deepseek_v3, modeling_rope_utils.py
(``_compute_yarn_parameters``); megatron-core 0.19.2, core/transformer/multi_latent_attention.py,
mla_qk_norm_config.py and moe/moe_utils.py (``group_limited_topk``),
core/models/common/embeddings/yarn_rotary_pos_embedding.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isclose, log
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
    EMBEDDING,
    HEAD,
    NORMS,
    llama_arguments,
    llama_config,
    refuse_config,
    whole_base,
)
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.tensors import Row
from flagscale.errors import CheckpointError

__all__ = ["V2", "V3"]

_HF, _MG = "model.layers.{layer}.", "decoder.layers.{layer}."
_SELF, _SHARED = f"{_MG}self_attention.", f"{_MG}mlp.shared_experts."

_LATENT: Final = tuple(
    Row(f"{_HF}self_attn.{theirs}.weight", f"{_SELF}{ours}.weight")
    for theirs, ours in (
        ("q_a_proj", "linear_q_down_proj"),
        ("q_a_layernorm", "q_layernorm"),
        ("q_b_proj", "linear_q_up_proj"),
        ("kv_a_proj_with_mqa", "linear_kv_down_proj"),
        ("kv_a_layernorm", "kv_layernorm"),
        ("kv_b_proj", "linear_kv_up_proj"),
        ("o_proj", "linear_proj"),
    )
)
_SHARED_EXPERTS: Final = (
    Row(
        f"{_HF}mlp.shared_experts.gate_proj.weight",
        f"{_SHARED}linear_fc1.weight",
        "gate",
        "experts",
    ),
    Row(f"{_HF}mlp.shared_experts.up_proj.weight", f"{_SHARED}linear_fc1.weight", "up", "experts"),
    Row(
        f"{_HF}mlp.shared_experts.down_proj.weight",
        f"{_SHARED}linear_fc2.weight",
        "whole",
        "experts",
    ),
)
_BIAS: Final = Row(
    f"{_HF}mlp.gate.e_score_correction_bias",
    f"{_MG}mlp.router.expert_bias",
    when="experts",
    dtype="float32",
)
_BODY: Final = (*EMBEDDING, *_LATENT, *DENSE, *EXPERTS, *_SHARED_EXPERTS, *NORMS, *HEAD)

_LATENT_EPSILON: Final = 1e-6
_GREEDY, _GROUPED = "greedy", "group_limited_greedy"
# No option sets these: they are what upstream's configuration class has.
_YARN: Final = {
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}


def _config(args: Arguments, best_of_a_group: int) -> Config:
    """What both versions have.

    Args:
        args: Of the job.
        best_of_a_group: Experts whose scores make that of a group.
    """
    fields = llama_config(args) | experts_config(args)
    refuse_arguments({"norm_epsilon": fields["rms_norm_eps"]}, norm_epsilon=(_LATENT_EPSILON,))
    rope, positions = _rope_parameters(args)
    return {
        **fields,
        **_groups(args, best_of_a_group),
        "attention_bias": False,
        "first_k_dense_replace": _dense_layers(args),
        "head_dim": args["qk_pos_emb_head_dim"],
        "kv_lora_rank": args["kv_lora_rank"],
        "max_position_embeddings": positions,
        "n_routed_experts": args["num_experts"],
        "n_shared_experts": _shared_experts(args, fields["moe_intermediate_size"]),
        "num_key_value_heads": fields["num_attention_heads"],
        "q_lora_rank": args["q_lora_rank"],
        "qk_head_dim": args["qk_head_dim"] + args["qk_pos_emb_head_dim"],
        "qk_nope_head_dim": args["qk_head_dim"],
        "qk_rope_head_dim": args["qk_pos_emb_head_dim"],
        "rope_parameters": rope,
        "routed_scaling_factor": float(args["moe_router_topk_scaling_factor"] or 1),
        "v_head_dim": args["v_head_dim"],
    }


def _dense_layers(args: Arguments) -> int:
    layers, dense = args["num_layers"], args["num_layers"] - len(layers_with_experts(args))
    if layers_with_experts(args) != list(range(dense, layers)):
        raise CheckpointError(
            "DeepSeek has experts in all layers from some layer on",
            where="--moe-layer-freq",
            expected=f"[0]*{dense}+[1]*{layers - dense}, or the like",
            got=args["moe_layer_freq"],
        )
    return int(dense)


def _shared_experts(args: Arguments, size: int) -> int:
    shared = args["moe_shared_expert_intermediate_size"]
    if shared % size:
        raise CheckpointError(
            "DeepSeek's shared experts are as wide as the others",
            where="--moe-shared-expert-intermediate-size",
            expected=f"a multiple of {size}",
            got=shared,
        )
    return int(shared // size)


def _groups(args: Arguments, best_of_a_group: int) -> Config:
    chosen = args["moe_router_group_topk"]
    if not chosen:
        return {"n_group": 1, "topk_group": 1}
    if args["moe_router_topk"] // chosen != best_of_a_group:
        raise _other_groups(
            "--moe-router-topk, --moe-router-group-topk",
            args["moe_router_topk"],
            chosen,
            best_of_a_group,
        )
    return {"n_group": args["moe_router_num_groups"], "topk_group": chosen}


def _other_groups(where: str, topk: int, chosen: int, best_of_a_group: int) -> CheckpointError:
    return CheckpointError(
        "Megatron and transformers prefer other groups of experts",
        where=where,
        expected=f"topk // groups = {best_of_a_group}: so many experts make the score of a group "
        "in transformers",
        got=f"{topk} // {chosen}",
    )


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0


def _rope_parameters(args: Arguments) -> tuple[dict[str, Any], int]:
    """The positions, and how many there are."""
    base = {"rope_theta": float(args["rotary_base"])}
    positions = int(args["max_position_embeddings"])
    factor, scale = float(args["rotary_scaling_factor"]), float(args["mscale"])
    scale_all = float(args["mscale_all_dim"])
    if args["rope_type"] == "rope":
        if _mscale(factor, scale_all) != 1:
            # Upstream scales the scores of attention all the same.
            refuse_arguments(args, mscale_all_dim=(0,))
        return {**base, "rope_type": "default"}, positions
    if factor == 1:
        return {**base, "rope_type": "default"}, positions
    yarn = {key: args[key] or value for key, value in _YARN.items()}
    found = {**base, **yarn, "rope_type": "yarn", "factor": factor, "mscale": scale}
    found |= {"mscale_all_dim": scale_all}
    if not (scale and scale_all):
        # Without one of them transformers takes neither.
        found["attention_factor"] = _mscale(factor, scale) / _mscale(factor, scale_all)
    original = yarn["original_max_position_embeddings"]
    if positions not in (original, original * factor):
        positions = round(original * factor)  # any other number makes transformers warn
    return found, positions


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """What both versions have."""
    refuse_config(
        config,
        attention_bias=(False,),
        num_key_value_heads=(None, config["num_attention_heads"]),
        quantization_config=(None,),
        rms_norm_eps=(_LATENT_EPSILON,),
    )
    if config["q_lora_rank"] is None:
        raise CheckpointError(
            "Megatron has no such queries: without a low rank it normalizes them once more",
            where="config.json, q_lora_rank",
            expected="a rank",
            got=None,
        )
    layers = range(config["first_k_dense_replace"], config["num_hidden_layers"])
    plain = {**config, "rope_parameters": {"rope_theta": config["rope_parameters"]["rope_theta"]}}
    factor = config["routed_scaling_factor"]
    return {
        **llama_arguments(plain),
        **experts_arguments(config["n_routed_experts"], config, layers, pre_softmax=True),
        **_rope_arguments(config["rope_parameters"]),
        "kv_channels": config["v_head_dim"],
        "kv_lora_rank": config["kv_lora_rank"],
        "moe_router_topk_scaling_factor": None if factor == 1 else float(factor),
        "moe_shared_expert_intermediate_size": config["n_shared_experts"]
        * config["moe_intermediate_size"],
        "multi_latent_attention": True,
        "q_lora_rank": config["q_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_layernorm": True,
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
    }


def _rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    refuse_config(rope, rope_type=("default", "yarn"))
    found = {"rotary_base": whole_base(rope), "use_rope_scaling": False}
    if rope.get("rope_type", "default") == "default":
        return {
            **found,
            "rope_type": "rope",
            "rotary_scaling_factor": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 0.0,
        }
    refuse_config(rope, truncate=(None, True), **{key: (None, of) for key, of in _YARN.items()})
    factor, told = float(rope["factor"]), rope.get("attention_factor")
    scale, scale_all = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if told is None and not (scale and scale_all):
        scale = 1.0  # transformers takes neither
        told = _mscale(factor, scale)
    attention = _mscale(factor, scale) / _mscale(factor, scale_all)
    if told is not None and not isclose(told, attention, rel_tol=1e-9):
        raise CheckpointError(
            "Megatron has no such attention factor",
            where="config.json, rope_parameters",
            expected=f"attention_factor {attention!r}, as mscale and mscale_all_dim make it",
            got=told,
        )
    return {
        **found,
        "rope_type": "yarn",
        "rotary_scaling_factor": factor,
        "mscale": float(scale),
        "mscale_all_dim": float(scale_all),
    }


def _group_arguments(config: Mapping[str, Any], best_of_a_group: int) -> dict[str, Any]:
    groups, chosen = config["n_group"], config["topk_group"]
    if groups == chosen:
        return {}
    topk = config["num_experts_per_tok"]
    if topk // chosen != best_of_a_group:
        raise _other_groups(
            "config.json, num_experts_per_tok, topk_group", topk, chosen, best_of_a_group
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": chosen}


def _v2_config(args: Arguments) -> Config:
    refuse_arguments(args, moe_router_pre_softmax=(True,))
    fields = _config(args, best_of_a_group=1)
    return fields | {
        "mlp_bias": False,
        "norm_topk_prob": False,
        "topk_method": _GREEDY if fields["n_group"] == 1 else _GROUPED,
    }


def _v2_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_config(
        config, mlp_bias=(False,), norm_topk_prob=(None, False), topk_method=(_GREEDY, _GROUPED)
    )
    grouped = config["topk_method"] == _GROUPED
    return {
        **_arguments(config),
        **(_group_arguments(config, best_of_a_group=1) if grouped else {}),
    }


def _v3_config(args: Arguments) -> Config:
    refuse_arguments(args, moe_router_score_function=("sigmoid",))
    return _config(args, best_of_a_group=2) | {
        "norm_topk_prob": args["moe_router_topk"] > 1,
        "num_nextn_predict_layers": 0,
        "rope_interleave": True,
    }


def _v3_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_config(
        config, norm_topk_prob=(config["num_experts_per_tok"] > 1,), rope_interleave=(None, True)
    )
    return {
        **_arguments(config),
        **_group_arguments(config, best_of_a_group=2),
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "sigmoid",
    }


_NEEDS: Final = frozenset({"experts", "mla", "q_lora", "qk_norm", "shared_experts"})

V2: Final = Family(
    name="deepseek_v2",
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    rows=as_saved(_BODY),
    config=_v2_config,
    arguments=_v2_arguments,
    needs=_NEEDS,
    may=frozenset({"expert_groups", "tied"}),
    fused=FUSED,
)
V3: Final = Family(
    name="deepseek_v3",
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    rows=as_saved((*_BODY, _BIAS)),
    config=_v3_config,
    arguments=_v3_arguments,
    needs=_NEEDS | {"expert_bias", "sigmoid_router"},
    may=frozenset({"expert_groups", "tied"}),
    fused=FUSED,
)
