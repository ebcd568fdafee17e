"""Mixtral: Llama with experts in every layer, whose weights are normalized over the chosen ones.

In memory its tensors are called as other families' are, and so are they in fused files; one by one
they keep the names of Mixtral's own code.

Source: transformers 5.23, models/mixtral.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families.experts import (
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
)
from flagscale.ckpt_convert.families.mistral import sliding_window, window_size
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.tensors import Row
from flagscale.errors import CheckpointError

__all__ = ["FAMILY"]

_ON_DISK: Final = {
    "mlp.": "block_sparse_moe.",
    "gate_proj": "w1",
    "down_proj": "w2",
    "up_proj": "w3",
}


def _on_disk(row: Row) -> Row:
    name = row.hf
    if row in EXPERTS:
        for memory, disk in _ON_DISK.items():
            name = name.replace(memory, disk)
    return row._replace(hf=name)


def _config(args: Arguments) -> Config:
    refuse_arguments(
        args, moe_router_pre_softmax=(None, False), moe_router_topk_scaling_factor=(None, 0, 1)
    )
    if len(layers_with_experts(args)) < args["num_layers"]:
        raise CheckpointError(
            "Mixtral has experts in every layer",
            where="--moe-layer-freq",
            expected=1,
            got=args["moe_layer_freq"],
        )
    found = llama_config(args) | experts_config(args)
    return found | {
        "intermediate_size": found.pop("moe_intermediate_size"),
        "num_local_experts": args["num_experts"],
        "sliding_window": sliding_window(args),
    }


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    layers = range(config["num_hidden_layers"])
    known = {**config, "moe_intermediate_size": config["intermediate_size"]}
    return {
        **llama_arguments(config),
        **experts_arguments(config["num_local_experts"], known, layers),
        "window_size": window_size(config["sliding_window"]),
    }


FAMILY: Final = Family(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=tuple(map(_on_disk, as_saved((*EMBEDDING, *ATTENTION, *EXPERTS, *NORMS, *HEAD)))),
    config=_config,
    arguments=_arguments,
    needs=frozenset({"experts"}),
    may=MAY | {"rotary_interleaved", "window"},
    fused=(*FUSED, EXPERTS[-1]),
)
