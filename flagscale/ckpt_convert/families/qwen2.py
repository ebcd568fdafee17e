"""Qwen2: Llama with a bias of queries, keys and values, and windows in some layers if any.

Source: transformers 5.23, models/qwen2; megatron-core 0.19.2, core/transformer/utils.py
(``is_layer_window_attention``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families.family import Config, Family, as_saved
from flagscale.ckpt_convert.families.llama import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    MAY,
    MLP,
    NORMS,
    llama_arguments,
    llama_config,
)
from flagscale.ckpt_convert.families.mistral import sliding_window, window_size
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.tensors import Row
from flagscale.errors import CheckpointError

__all__ = ["FAMILY", "QWEN_MAY", "qwen_arguments", "qwen_config"]

QWEN_MAY: Final = MAY | {"window", "window_attn_skip_freq"}
_FULL, _SLIDING = "full_attention", "sliding_attention"


def _bias(row: Row) -> Row:
    return row._replace(
        hf=row.hf.replace(".weight", ".bias"), canonical=row.canonical.replace(".weight", ".bias")
    )


_QKV: Final = tuple(both for row in ATTENTION[:3] for both in (row, _bias(row)))


def qwen_config(args: Arguments) -> Config:
    """What Qwen2 and Qwen3 have in common."""
    fields, window = llama_config(args), sliding_window(args)
    skipped = args["window_attn_skip_freq"]
    types = [
        _SLIDING if window is not None and _has_window(skipped, layer) else _FULL
        for layer in range(fields["num_hidden_layers"])
    ]
    windows: Config = {"layer_types": types, "sliding_window": None, "use_sliding_window": False}
    if _SLIDING in types:
        windows |= {"sliding_window": window, "use_sliding_window": True}
        windows["max_window_layers"] = types.index(_SLIDING)
    return fields | windows


def _has_window(skipped: int | list[int] | None, layer: int) -> bool:
    """Whether a layer, from 0, has one by the frequency of those without."""
    if isinstance(skipped, list):
        return bool(skipped[layer])
    return skipped is None or (layer + 1) % skipped != 0


def qwen_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The converse of :func:`qwen_config`."""
    types, window = config["layer_types"], config["sliding_window"]
    if {*types} - {_FULL, _SLIDING} or (window is None and _SLIDING in types):
        raise CheckpointError(
            "the layers attend in ways that Megatron does not have",
            where="config.json, layer_types, sliding_window",
            expected=f"{_FULL}, or {_SLIDING} and a window",
            got=f"{', '.join(sorted({*types}))}, {window}",
        )
    found = llama_arguments(config)
    if _SLIDING not in types:
        return found | {"window_size": None, "window_attn_skip_freq": None}
    pattern = [int(kind == _SLIDING) for kind in types]
    return found | {
        "window_size": window_size(window),
        "window_attn_skip_freq": None if all(pattern) else pattern,
    }


def _config(args: Arguments) -> Config:
    fields = qwen_config(args)
    # The class has no such field, but the model goes by it where it is there.
    if fields["head_dim"] * fields["num_attention_heads"] == fields["hidden_size"]:
        del fields["head_dim"]
    return fields


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return qwen_arguments(config) | {"add_qkv_bias": True}


FAMILY: Final = Family(
    name="qwen2",
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    rows=as_saved((*EMBEDDING, *_QKV, ATTENTION[3], *MLP, *NORMS, *HEAD)),
    config=_config,
    arguments=_arguments,
    needs=frozenset({"qkv_bias"}),
    may=QWEN_MAY | {"rotary_interleaved"},
)
