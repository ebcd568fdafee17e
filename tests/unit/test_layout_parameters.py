"""Parameter counts against upstream's own model, built on the meta device in every layout."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from harness.upstream_model import build_chunk, one_rank, transformer_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flagscale.launch.options import OptionTable, known_options
from flagscale.launch.recipe import argument_values, read_recipe, resolve_recipe
from flagscale.layout.arguments import model_dims, parallel_layout, uncounted, verify_arguments
from flagscale.layout.parallel import Coordinates
from flagscale.layout.parameters import aquila_ffn_hidden_size, count_parameters, count_rank

AQUILA = Path(__file__).parents[2] / "examples" / "aquila"
WORLD_SIZE = 64


@pytest.fixture(scope="module")
def options() -> OptionTable:
    return known_options()


def upstream_counts(values: dict[str, Any]) -> list[tuple[int, int]]:
    """Dense and expert parameters of the model upstream builds for a rank of each stage."""
    stages = range(values["pipeline_model_parallel_size"])
    return [_stage_counts(values, stage) for stage in stages]


def _stage_counts(values: dict[str, Any], stage: int) -> tuple[int, int]:
    local = {**values, "transformer_impl": "local", "num_virtual_stages_per_pipeline_rank": None}
    rank = parallel_layout(local, WORLD_SIZE).rank_of(Coordinates(0, 0, 0, stage))
    with one_rank(local, rank, WORLD_SIZE):
        model = build_chunk(local, transformer_config(local), 0)
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


def test_multi_latent_attention_is_told_to_be_uncounted(options: OptionTable) -> None:
    values = options.defaults() | {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "padded_vocab_size": 64,
        "seq_length": 32, "multi_latent_attention": True,
    }  # fmt: skip
    assert uncounted(values) == "--multi-latent-attention"
    with pytest.raises(ValueError, match="not counted"):
        count_parameters(model_dims(values))


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
