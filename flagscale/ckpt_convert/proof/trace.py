"""Places in which a Megatron model and a transformers model should give the same numbers.

They are called as transformers calls its modules. Where Megatron has one module for several of
transformers', its output is taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch

from flagscale.ckpt_convert.proof.forward import Array

__all__ = ["PLACES", "Place", "trace_megatron", "trace_transformers"]

Part = Literal["input", "output", "query", "key", "value", "gate", "up", "routes"]


@dataclass(frozen=True)
class Place:
    """A place in a layer.

    Args:
        name: Of the module in transformers, below ``model.layers.N``.
        megatron: Of the module in Megatron, below ``decoder.layers.N``.
        part: What of Megatron's module is meant. In transformers it is the input, the routes or
            the output of the module.
    """

    name: str
    megatron: str
    part: Part = "output"

    @property
    def key(self) -> str:
        """Names it among the places of a layer."""
        return f"input of {self.name}" if self.part == "input" else self.name


PLACES: Final = (
    Place("input_layernorm", "input_layernorm"),
    Place("self_attn.q_a_proj", "self_attention.linear_q_down_proj"),
    Place("self_attn.q_a_layernorm", "self_attention.q_layernorm"),
    Place("self_attn.q_b_proj", "self_attention.linear_q_up_proj"),
    Place("self_attn.q_proj", "self_attention.linear_q_proj"),
    Place("self_attn.kv_a_proj_with_mqa", "self_attention.linear_kv_down_proj"),
    Place("self_attn.kv_a_layernorm", "self_attention.kv_layernorm"),
    Place("self_attn.kv_b_proj", "self_attention.linear_kv_up_proj"),
    Place("self_attn.q_proj", "self_attention.linear_qkv", "query"),
    Place("self_attn.k_proj", "self_attention.linear_qkv", "key"),
    Place("self_attn.v_proj", "self_attention.linear_qkv", "value"),
    Place("self_attn.q_norm", "self_attention.q_layernorm"),
    Place("self_attn.k_norm", "self_attention.k_layernorm"),
    Place("self_attn.o_proj", "self_attention.linear_proj", "input"),
    Place("self_attn.o_proj", "self_attention.linear_proj"),
    Place("post_attention_layernorm", "pre_mlp_layernorm"),
    Place("mlp.gate_proj", "mlp.linear_fc1", "gate"),
    Place("mlp.up_proj", "mlp.linear_fc1", "up"),
    Place("mlp.down_proj", "mlp.linear_fc2", "input"),
    Place("mlp.experts", "mlp.router", "routes"),
    Place("mlp.shared_experts", "mlp.shared_experts"),
    Place("mlp", "mlp"),
    Place("", ""),
)
"""Those of a layer, in the order of the computation; the last is its output."""


def trace_megatron(model: Any) -> dict[str, Array]:
    """Listen to a ``GPTModel``; what it gives is in the result once it has run on one sequence."""
    told: dict[str, Array] = {}
    config = model.config
    _listen(told, "embed_tokens", model.embedding, _sequence_first)
    for number, layer in enumerate(model.decoder.layers):
        for place in PLACES:
            module = _find(layer, place.megatron)
            if module is None:
                continue
            take = _taker(place, config)
            _listen(told, f"{number}/{place.key}", module, take, of_input=place.part == "input")
    _listen(told, "norm", model.decoder.final_layernorm, _sequence_first)
    return told


def trace_transformers(model: Any) -> dict[str, Array]:
    """Listen to a causal model of transformers, as :func:`trace_megatron` does."""
    told: dict[str, Array] = {}
    _listen(told, "embed_tokens", model.model.embed_tokens, _plain)
    for number, layer in enumerate(model.model.layers):
        for place in PLACES:
            module = _find(layer, place.name)
            if module is None:
                continue
            key = f"{number}/{place.key}"
            if place.part == "routes":
                _listen_to_routes(told, key, module)
            else:
                _listen(told, key, module, _plain, of_input=place.part == "input")
    _listen(told, "norm", model.model.norm, _plain)
    return told


def _find(layer: Any, path: str) -> Any:
    module = layer
    for name in filter(None, path.split(".")):
        module = getattr(module, name, None)
    return module if isinstance(module, torch.nn.Module) else None


def _listen(
    told: dict[str, Array],
    key: str,
    module: Any,
    take: Callable[[Any], Any],
    *,
    of_input: bool = False,
) -> None:
    def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        value = inputs[0] if of_input else output
        if isinstance(value, tuple) and take is not _routes:
            value = value[0]
        taken = take(value).detach().float()
        # A copy: some modules add to their input in place.
        told[key] = taken.reshape(-1, taken.shape[-1]).numpy().copy()

    module.register_forward_hook(hook)


def _listen_to_routes(told: dict[str, Array], key: str, experts: Any) -> None:
    """Take down which experts each token goes to: [tokens, experts], 1 or 0."""

    def hook(_module: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        chosen = inputs[1] if len(inputs) > 1 else named["top_k_index"]
        routes = np.zeros((chosen.shape[0], experts.num_experts), np.float32)
        np.put_along_axis(routes, chosen.numpy(), 1.0, axis=1)
        told[key] = routes

    experts.register_forward_pre_hook(hook, with_kwargs=True)


def _plain(value: Any) -> Any:
    return value


def _sequence_first(value: Any) -> Any:
    return value.transpose(0, 1)


def _routes(value: Any) -> Any:
    return value[1]


def _taker(place: Place, config: Any) -> Callable[[Any], Any]:
    """What turns the output of a module of Megatron into what transformers gives."""
    if place.part == "routes":
        return _routes
    if place.part in ("gate", "up"):
        half = ("gate", "up").index(place.part)
        return lambda value: value.chunk(2, dim=-1)[half]
    interleaved = config.rotary_interleaved and not config.multi_latent_attention
    order = _half_split if interleaved else _plain
    if place.part in ("query", "key", "value"):
        return lambda value: _of_groups(value, place.part, config, order)
    if place.name in ("self_attn.q_norm", "self_attn.k_norm"):
        return order
    return _plain


def _of_groups(value: Any, part: str, config: Any, order: Callable[[Any], Any]) -> Any:
    """Queries, keys or values of a projection's output, [S, 1, rows]."""
    groups = config.num_query_groups or config.num_attention_heads
    heads = value.reshape(value.shape[0], groups, -1, config.kv_channels)
    taken = {"query": heads[:, :, :-2], "key": heads[:, :, -2], "value": heads[:, :, -1]}[part]
    ordered = taken if part == "value" else order(taken)
    return ordered.reshape(value.shape[0], -1)


def _half_split(value: Any) -> Any:
    """The dimensions of interleaved rotary pairs, all first ones before all second ones."""
    return torch.cat((value[..., 0::2], value[..., 1::2]), dim=-1)
