"""Llama 2 and 3, and the pieces that its many descendants share.

Source: transformers 5.23, models/llama; megatron-core 0.19.2, core/models/common/embeddings
(``RotaryEmbedding._apply_scaling`` has Llama 3.1's frequencies built in).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families.family import Config, Family, as_saved
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.nlpe import method_arguments, with_method
from flagscale.ckpt_convert.tensors import Row
from flagscale.errors import CheckpointError
from flagscale.layout.arguments import model_dims

__all__ = [
    "ATTENTION", "BODY", "EMBEDDING", "FAMILY", "HEAD", "MAY", "MLP", "NORMS",
    "llama_arguments", "llama_config", "refuse_config", "whole_base",
]  # fmt: skip

_HF, _MG = "model.layers.{layer}.", "decoder.layers.{layer}."
_QKV, _FC1 = f"{_MG}self_attention.linear_qkv.", f"{_MG}mlp.linear_fc1."

EMBEDDING: Final = (Row("model.embed_tokens.weight", "embedding.word_embeddings.weight", "vocab"),)
ATTENTION: Final = (
    Row(f"{_HF}self_attn.q_proj.weight", f"{_QKV}weight", "query"),
    Row(f"{_HF}self_attn.k_proj.weight", f"{_QKV}weight", "key"),
    Row(f"{_HF}self_attn.v_proj.weight", f"{_QKV}weight", "value"),
    Row(f"{_HF}self_attn.o_proj.weight", f"{_MG}self_attention.linear_proj.weight"),
)
MLP: Final = (
    Row(f"{_HF}mlp.gate_proj.weight", f"{_FC1}weight", "gate"),
    Row(f"{_HF}mlp.up_proj.weight", f"{_FC1}weight", "up"),
    Row(f"{_HF}mlp.down_proj.weight", f"{_MG}mlp.linear_fc2.weight"),
)
NORMS: Final = (
    Row(f"{_HF}input_layernorm.weight", f"{_QKV}layer_norm_weight"),
    Row(f"{_HF}post_attention_layernorm.weight", f"{_FC1}layer_norm_weight"),
)
HEAD: Final = (
    Row("model.norm.weight", "decoder.final_layernorm.weight"),
    Row("lm_head.weight", "output_layer.weight", "vocab", when="not tied"),
)
BODY: Final = as_saved((*EMBEDDING, *ATTENTION, *MLP, *NORMS, *HEAD))

MAY: Final = frozenset({"nlpe", "position_interpolation", "rope_scaling", "tied"})
"""What any family may have."""

_LLAMA3: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""What ``--use-rope-scaling`` means. Upstream takes no notice of ``--rope-scaling-factor``, and
builds every model with 8 (training/argument_utils.py, ``gpt_config_from_args``)."""


def llama_config(args: Arguments) -> Config:
    """What every decoder with rotary positions and grouped queries has in common.

    Raises:
        CheckpointError: Hugging Face has no field for something.
    """
    dims = model_dims(args)
    return {
        "attention_dropout": args["attention_dropout"] or 0.0,
        "head_dim": dims.head_dim,
        "hidden_act": "silu",
        "hidden_size": dims.hidden_size,
        "initializer_range": _given(args, "init_method_std", 0.02),
        "intermediate_size": dims.ffn_hidden_size,
        "max_position_embeddings": args["max_position_embeddings"] or args["seq_length"],
        "num_attention_heads": dims.num_attention_heads,
        "num_hidden_layers": dims.num_layers,
        "num_key_value_heads": dims.num_query_groups,
        "rms_norm_eps": _given(args, "layernorm_epsilon", _given(args, "norm_epsilon", 1e-5)),
        "rope_parameters": with_method(_rope_parameters(args), args),
        "tie_word_embeddings": dims.tied_embeddings,
    }


def _given(args: Arguments, dest: str, default: float) -> Any:
    """An argument, or upstream's default of it."""
    return default if args[dest] is None else args[dest]


def _rope_parameters(args: Arguments) -> dict[str, Any]:
    base = {"rope_theta": float(_given(args, "rotary_base", 10000))}
    interpolation = args["rotary_seq_len_interpolation_factor"] or 1
    if args["use_rope_scaling"]:
        _refuse_argument(args, "rope_scaling_factor", _LLAMA3["factor"])
        _refuse_argument(args, "rotary_seq_len_interpolation_factor", 1)
        return {**base, **_LLAMA3}
    if interpolation != 1:
        return {**base, "rope_type": "linear", "factor": float(interpolation)}
    return {**base, "rope_type": "default"}


def _refuse_argument(args: Arguments, dest: str, known: Any) -> None:
    if args[dest] not in (None, known):
        raise CheckpointError(
            "rotary positions of a model cannot be told to Hugging Face",
            where=f"--{dest.replace('_', '-')}, --use-rope-scaling",
            expected=known,
            got=args[dest],
            cure="Megatron scales by 8 whatever --rope-scaling-factor says; where that is what the "
            "model was trained with, correct the argument"
            if dest == "rope_scaling_factor"
            else None,
        )


def llama_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The converse of :func:`llama_config`.

    Raises:
        CheckpointError: Megatron has no argument for something.
    """
    refuse_config(config, hidden_act=("silu",))
    heads = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or heads
    return {
        "attention_dropout": config.get("attention_dropout") or 0.0,
        "hidden_dropout": 0.0,
        "add_bias_linear": False,
        "add_position_embedding": False,
        "ffn_hidden_size": config["intermediate_size"],
        "group_query_attention": groups != heads,
        "hidden_size": config["hidden_size"],
        "init_method_std": config.get("initializer_range", 0.02),
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "layernorm_epsilon": config["rms_norm_eps"],
        "max_position_embeddings": config["max_position_embeddings"],
        "normalization": "RMSNorm",
        "num_attention_heads": heads,
        "num_layers": config["num_hidden_layers"],
        "num_query_groups": groups,
        "position_embedding_type": "rope",
        "rotary_interleaved": False,
        "rotary_percent": 1.0,
        "swiglu": True,
        "untie_embeddings_and_output_weights": not config["tie_word_embeddings"],
        **_rope_arguments(config["rope_parameters"]),
    }


def _rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    method, rope = method_arguments(rope)
    return method | _plain_rope_arguments(rope)


def _plain_rope_arguments(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    refuse_config(rope, partial_rotary_factor=(None, 1.0))
    found = {"rotary_base": whole_base(rope), "use_rope_scaling": kind == "llama3"}
    if kind == "llama3":
        refuse_config(rope, **{key: (value,) for key, value in _LLAMA3.items()})
        return {**found, "rope_scaling_factor": _LLAMA3["factor"]}
    if kind == "linear" and float(rope["factor"]).is_integer():
        return {**found, "rotary_seq_len_interpolation_factor": int(rope["factor"])}
    refuse_config(rope, rope_type=("default", "linear, with a whole factor", "llama3"))
    return found


def whole_base(rope: Mapping[str, Any]) -> int:
    """The base of the rotary frequencies, which Megatron has as a whole number.

    Raises:
        CheckpointError: It is none.
    """
    base = float(rope["rope_theta"])
    if not base.is_integer():
        raise CheckpointError(
            "Megatron takes whole numbers only as the base of rotary positions",
            where="config.json, rope_theta",
            got=base,
        )
    return int(base)


def refuse_config(config: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    """Refuse fields whose value means a model that Megatron does not have.

    Args:
        config: A configuration, or a part of it; a missing field has a known value.
        known: For a field the values that can be converted.

    Raises:
        CheckpointError: A field has another one.
    """
    for field, values in known.items():
        if field in config and config[field] not in values:
            raise CheckpointError(
                "a model cannot be converted to Megatron",
                where=f"config.json, {field}",
                expected=" or ".join(map(repr, values)),
                got=repr(config[field]),
            )


def _config(args: Arguments) -> Config:
    fields = llama_config(args)
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise CheckpointError(
            "transformers refuses a Llama whose hidden size is no multiple of its heads",
            where="--hidden-size, --num-attention-heads",
            expected=f"a multiple of {fields['num_attention_heads']}",
            got=fields["hidden_size"],
            cure="--family mistral: the same model, without a window",
        )
    return fields | {"attention_bias": False, "mlp_bias": False}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_config(config, attention_bias=(False,), mlp_bias=(False,))
    return llama_arguments(config)


FAMILY: Final = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=BODY,
    config=_config,
    arguments=_arguments,
    may=MAY | {"rotary_interleaved"},
)
