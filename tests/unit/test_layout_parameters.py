"""Parameter counts against upstream's own model, built on the meta device in every layout."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.testing._internal.distributed.fake_pg import FakeStore

from flagscale.launch.options import OptionTable, known_options
from flagscale.launch.recipe import argument_values, read_recipe, resolve_recipe
from flagscale.layout.arguments import model_dims, parallel_layout, uncounted, verify_arguments
from flagscale.layout.parallel import Coordinates
from flagscale.layout.parameters import aquila_ffn_hidden_size, count_parameters, count_rank

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_decoder_block_spec,
        get_gpt_layer_local_spec,
    )
    from megatron.core.transformer import TransformerConfig

AQUILA = Path(__file__).parents[2] / "examples" / "aquila"
WORLD_SIZE = 64


@pytest.fixture(scope="module")
def options() -> OptionTable:
    return known_options()


def upstream_counts(values: dict[str, Any]) -> list[tuple[int, int]]:
    """Dense and expert parameters of the model upstream builds for a rank of each stage."""
    stages = range(values["pipeline_model_parallel_size"])
    return [_stage_counts(values, stage) for stage in stages]


@contextlib.contextmanager
def one_rank(values: dict[str, Any], stage: int) -> Iterator[None]:
    """A rank of a stage, in a job whose other ranks do not exist: enough to build its model."""
    rank = parallel_layout(values, WORLD_SIZE).rank_of(Coordinates(0, 0, 0, stage))
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=WORLD_SIZE
    )
    parallel_state.initialize_model_parallel(
        values["tensor_model_parallel_size"],
        values["pipeline_model_parallel_size"],
        expert_model_parallel_size=values["expert_model_parallel_size"],
        expert_tensor_parallel_size=values["expert_tensor_parallel_size"],
        create_gloo_process_groups=False,  # those need the other ranks
    )
    try:
        # Tied embeddings are moved to the device, and a dispatcher wants a stream; there is none.
        with (
            mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
            mock.patch.object(torch.cuda, "Stream"),
            torch.device("meta"),
        ):
            yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _stage_counts(values: dict[str, Any], stage: int) -> tuple[int, int]:
    tp_size, pp_size = values["tensor_model_parallel_size"], values["pipeline_model_parallel_size"]
    bfloat16 = {"params_dtype": torch.bfloat16, "bf16": True, "pipeline_dtype": torch.bfloat16}
    config = TransformerConfig(
        **bfloat16,
        **{
            name: values[name]
            for name in (
                "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size",
                "kv_channels", "normalization", "add_bias_linear", "add_qkv_bias", "qk_layernorm",
                "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
                "moe_shared_expert_gate", "moe_layer_freq", "expert_model_parallel_size",
                "expert_tensor_parallel_size",
            )
        },
        num_query_groups=values["num_query_groups"] if values["group_query_attention"] else None,
        num_moe_experts=values["num_experts"],
        moe_token_dispatcher_type="alltoall",
        gated_linear_unit=values["swiglu"],
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        use_cpu_initialization=True,
        perform_initialization=False,
        cuda_graph_modules=[],
        gradient_accumulation_fusion=False,
    )  # fmt: skip
    with one_rank(values, stage):
        if config.num_moe_experts:
            spec = get_gpt_decoder_block_spec(
                config, use_transformer_engine=False, normalization=config.normalization
            )
        else:
            spec = get_gpt_layer_local_spec(
                qk_layernorm=config.qk_layernorm, normalization=config.normalization
            )
        model = GPTModel(
            config,
            spec,
            vocab_size=values["padded_vocab_size"],
            max_sequence_length=values["max_position_embeddings"],
            pre_process=stage == 0,
            post_process=stage == pp_size - 1,
            share_embeddings_and_output_weights=not values["untie_embeddings_and_output_weights"],
            position_embedding_type=values["position_embedding_type"],
        )
    sizes = {name: param.numel() for name, param in model.named_parameters()}
    assert all(param.device.type == "meta" for param in model.parameters())
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    return sum(sizes.values()) - experts, experts


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("7b", 7_296_258_048), ("34b", 33_694_636_032), ("70b", 70_096_527_360)],
)
def test_the_recipes_have_as_many_parameters_as_published(
    options: OptionTable, name: str, parameters: int
) -> None:
    recipe = read_recipe(AQUILA / f"{name}.yaml", options)
    values = argument_values(resolve_recipe(recipe, options, [], AQUILA, AQUILA), options)
    assert count_parameters(model_dims(values)) == parameters
    whole = values | {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    assert upstream_counts(whole) == [(parameters, 0)]
    layout = parallel_layout(values, WORLD_SIZE)
    ranks = [count_rank(model_dims(values), layout, stage) for stage in range(layout.pp_size)]
    assert upstream_counts(values) == [(rank.dense, rank.experts) for rank in ranks]


@st.composite
def small_models(draw: st.DrawFn) -> dict[str, Any]:
    tp, pp = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 2]))
    experts = draw(st.sampled_from([None, None, 4]))
    ep = draw(st.sampled_from([1, 2])) if experts else 1
    changes = {
        "num_layers": draw(st.sampled_from([2, 4])),
        "num_attention_heads": draw(st.sampled_from([4, 8])),
        "hidden_size": draw(st.sampled_from([32, 96])),
        "kv_channels": draw(st.sampled_from([None, 16])),
        "group_query_attention": draw(st.booleans()),
        "num_query_groups": draw(st.sampled_from([1, 2, 4])),
        "ffn_hidden_size": draw(st.sampled_from([48, 112])),
        "swiglu": draw(st.booleans()),
        "add_bias_linear": experts is None and draw(st.booleans()),
        "add_qkv_bias": draw(st.booleans()),
        "qk_layernorm": draw(st.booleans()),
        "normalization": draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
        "position_embedding_type": draw(st.sampled_from(["learned_absolute", "rope"])),
        "num_experts": experts,
        "moe_ffn_hidden_size": draw(st.sampled_from([None, 40])) if experts else None,
        "moe_shared_expert_intermediate_size": draw(st.sampled_from([None, 24]))
        if experts
        else None,
        "moe_layer_freq": draw(st.sampled_from([1, 2])),
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": draw(st.sampled_from([None, 1])) if experts else None,
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
    }
    changes["moe_shared_expert_gate"] = bool(
        changes["moe_shared_expert_intermediate_size"] and draw(st.booleans())
    )
    return changes


@settings(max_examples=60, deadline=None)
@given(changes=small_models())
def test_any_model_is_counted_as_upstream_builds_it(
    options: OptionTable, changes: dict[str, Any]
) -> None:
    fixed = {
        "seq_length": 32, "max_position_embeddings": 40, "padded_vocab_size": 64,
        "micro_batch_size": 1, "data_path": ["x"], "eval_iters": 0, "eval_interval": 1,
        "split": "1",
    }  # fmt: skip
    values = options.defaults() | fixed | changes
    assume(not verify_arguments(values, WORLD_SIZE))
    assert uncounted(values) is None
    dims, layout = model_dims(values), parallel_layout(values, WORLD_SIZE)
    ranks = [count_rank(dims, layout, stage) for stage in range(layout.pp_size)]
    assert [(rank.dense, rank.experts) for rank in ranks] == upstream_counts(values)


@pytest.mark.parametrize(
    ("hidden_size", "multiple_of", "multiplier", "rows"),
    [
        (4096, 256, "1", 11008),
        (6144, 4096, "1.3", 24576),
        (8192, 4096, "1.3", 28672),
        (128, 32, "1", 352),
        (96, 256, "1", 256),  # exactly
    ],
)
def test_the_rows_of_the_feed_forward_network(
    hidden_size: int, multiple_of: int, multiplier: str, rows: int
) -> None:
    assert aquila_ffn_hidden_size(hidden_size, multiple_of, Fraction(multiplier)) == rows
