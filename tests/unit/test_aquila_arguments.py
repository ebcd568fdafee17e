"""Aquila's arguments, what is refused, and norms by the names that fused layers give them."""

from __future__ import annotations

import argparse
import math
from typing import Any

import pytest
import torch

from flagscale.errors import ConfigError
from flagscale.train.aquila import (
    add_arguments,
    init_norm_weights,
    look_up_in_fp32,
    pre_wrap_hooks,
    verify_arguments,
)


def parse(*argv: str, **upstream: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    defaults = {
        "apply_rope_fusion": False,
        "init_model_with_meta_device": False,
        "layernorm_zero_centered_gamma": False,
    }
    return parser.parse_args(argv, argparse.Namespace(**{**defaults, **upstream}))


def test_nothing_is_done_unless_asked_for() -> None:
    args = parse()
    verify_arguments(args)
    assert pre_wrap_hooks(args) == []


@pytest.mark.parametrize("value", [0.0, -0.3, math.nan, math.inf])
def test_impossible_norm_weights_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="cannot start at this weight"):
        verify_arguments(parse(f"--norm-init-weight={value}"))


@pytest.mark.parametrize(
    ("argv", "upstream", "cure"),
    [
        ("--norm-init-weight=0.3", "layernorm_zero_centered_gamma", "--apply-layernorm-1p"),
        ("--norm-init-weight=0.3", "init_model_with_meta_device", "--init-model-with-meta-device"),
        ("--rotary-in-fp32", "apply_rope_fusion", "--no-rope-fusion"),
    ],
)
def test_what_would_have_no_effect_is_refused(argv: str, upstream: str, cure: str) -> None:
    with pytest.raises(ConfigError) as refused:
        verify_arguments(parse(argv, **{upstream: True}))
    assert cure in str(refused.value)


def module(**children: Any) -> torch.nn.Module:
    """A module with the given modules and parameters."""
    result = torch.nn.Module()
    for name, child in children.items():
        setattr(result, name, child)
    return result


def ones() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))


def fused_layer() -> torch.nn.Module:
    """The names of a layer of Transformer Engine's, with norms fused into linear layers."""
    return module(
        input_layernorm=torch.nn.Identity(),
        self_attention=module(
            linear_qkv=module(weight=ones(), layer_norm_weight=ones()),
            q_layernorm=module(weight=ones()),
            k_layernorm=module(weight=ones()),
        ),
        pre_mlp_layernorm=torch.nn.Identity(),
        mlp=module(linear_fc1=module(weight=ones(), layer_norm_weight=ones())),
    )


def chunk(*layers: torch.nn.Module, final: bool, pre_process: bool = False) -> Any:
    norm = module(weight=ones()) if final else None
    decoder = module(layers=torch.nn.ModuleList(layers), final_layernorm=norm)
    return module(decoder=decoder, pre_process=pre_process)


def test_fused_norms_are_found_and_others_left_alone() -> None:
    chunks = [chunk(fused_layer(), fused_layer(), final=False), chunk(fused_layer(), final=True)]
    assert init_norm_weights(chunks, 0.25) is chunks
    layer = {
        "self_attention.linear_qkv.weight": 1.0,
        "self_attention.linear_qkv.layer_norm_weight": 0.25,
        "self_attention.q_layernorm.weight": 1.0,
        "self_attention.k_layernorm.weight": 1.0,
        "mlp.linear_fc1.weight": 1.0,
        "mlp.linear_fc1.layer_norm_weight": 0.25,
    }
    for decoder in (model.decoder for model in chunks):
        for built in decoder.layers:
            assert {n: p.unique().item() for n, p in built.named_parameters()} == layer
    assert chunks[1].decoder.final_layernorm.weight.tolist() == [0.25] * 4


def test_norms_of_other_names_are_an_error() -> None:
    layer = fused_layer()
    layer.mlp.linear_fc1 = module(norm=module(weight=ones()))
    with pytest.raises(ConfigError, match="norms of other names"):
        init_norm_weights([chunk(layer, final=True)], 0.3)


def test_a_stage_without_layers_has_nothing_to_set() -> None:
    empty = [chunk(final=False)]
    assert init_norm_weights(empty, 0.3) is empty


def test_word_embeddings_are_missed_on_the_first_stage_only() -> None:
    later = [chunk(fused_layer(), final=True)]
    assert look_up_in_fp32(later) is later
    with pytest.raises(ConfigError, match="no word embeddings"):
        look_up_in_fp32([chunk(fused_layer(), final=False, pre_process=True)])
