"""What families with experts share: their rows, and what a router must not do to be converted.

Source: transformers 5.23, conversion_mapping.py; megatron-core 0.19.2, core/transformer/moe,
router.py and moe_utils.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families.family import Config
from flagscale.ckpt_convert.families.llama import MLP
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.tensors import Row
from flagscale.errors import CheckpointError
from flagscale.layout.arguments import model_dims

__all__ = [
    "DENSE", "EXPERTS", "FUSED", "experts_arguments", "experts_config",
    "layers_with_experts", "refuse_arguments",
]  # fmt: skip

_HF, _MG = "model.layers.{layer}.mlp.", "decoder.layers.{layer}.mlp."
_FC1, _FC2 = f"{_MG}experts.experts.linear_fc1.weight", f"{_MG}experts.experts.linear_fc2.weight"

DENSE: Final = tuple(row._replace(when="not experts") for row in MLP)
EXPERTS: Final = (
    Row(f"{_HF}experts.{{expert}}.gate_proj.weight", _FC1, "gate", "experts"),
    Row(f"{_HF}experts.{{expert}}.up_proj.weight", _FC1, "up", "experts"),
    Row(f"{_HF}experts.{{expert}}.down_proj.weight", _FC2, "whole", "experts"),
    Row(f"{_HF}gate.weight", f"{_MG}router.weight", "whole", "experts"),
)
FUSED: Final = (
    Row(f"{_HF}experts.gate_up_proj", _FC1, "whole", "experts"),
    Row(f"{_HF}experts.down_proj", _FC2, "whole", "experts"),
)

_BALANCED_BY_LOSS: Final = ("aux_loss", "global_aux_loss", "none", "seq_aux_loss")


def experts_config(args: Arguments) -> Config:
    """What every model with experts has.

    Raises:
        CheckpointError: Its router does what no model of transformers does.
    """
    balanced = args["moe_router_load_balancing_type"] or "aux_loss"
    for kind in [balanced] if isinstance(balanced, str) else balanced:
        # The others choose experts by another rule than the best scores.
        refuse_arguments(
            {"moe_router_load_balancing_type": kind},
            moe_router_load_balancing_type=_BALANCED_BY_LOSS,
        )
    refuse_arguments(
        args,
        moe_expert_capacity_factor=(None,),
        moe_input_jitter_eps=(None,),
        moe_router_force_biased=(None,),
        moe_router_force_load_balancing=(None, False),
    )
    return {
        "moe_intermediate_size": args["moe_ffn_hidden_size"] or args["ffn_hidden_size"],
        "num_experts_per_tok": args["moe_router_topk"],
    }


def experts_arguments(
    experts: int, config: Mapping[str, Any], layers: Iterable[int], *, pre_softmax: bool = False
) -> dict[str, Any]:
    """The converse of :func:`experts_config`, for a router of softmax scores without groups.

    Args:
        experts: Experts of a layer.
        config: Content of ``config.json``.
        layers: Those that have experts.
        pre_softmax: Whether weights are probabilities among all experts, not among the chosen.

    Raises:
        CheckpointError: The weight of an only expert would always be 1.
    """
    if config["num_experts_per_tok"] == 1 and not pre_softmax:
        raise CheckpointError(
            "Megatron does not route to one expert with a weight of 1",
            where="config.json, num_experts_per_tok",
            expected="at least 2, or weights that are not normalized",
            got=1,
        )
    pattern = [0] * config["num_hidden_layers"]
    for layer in layers:
        pattern[layer] = 1
    return {
        "moe_ffn_hidden_size": config["moe_intermediate_size"],
        "moe_layer_freq": pattern if 0 in pattern else 1,
        "moe_router_enable_expert_bias": False,
        "moe_router_group_topk": None,
        "moe_router_num_groups": None,
        "moe_router_pre_softmax": pre_softmax,
        "moe_router_score_function": "softmax",
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_router_topk_scaling_factor": None,
        "moe_shared_expert_intermediate_size": None,
        "num_experts": experts,
    }


def layers_with_experts(args: Arguments) -> list[int]:
    """The layers that have experts, in order."""
    return sorted(model_dims(args).moe_layers)


def refuse_arguments(args: Mapping[str, Any], **known: tuple[Any, ...]) -> None:
    """Refuse arguments whose value means a model that a class of transformers does not compute.

    Args:
        args: Arguments by attribute.
        known: For an argument the values that can be converted.

    Raises:
        CheckpointError: An argument has another one.
    """
    for dest, values in known.items():
        if args[dest] not in values:
            raise CheckpointError(
                "the model class of transformers computes something else",
                where=f"--{dest.replace('_', '-')}",
                expected=" or ".join(map(str, values)),
                got=args[dest],
            )
