"""The rows of a model, against upstream's own model on the meta device, rank by rank."""

from __future__ import annotations

import warnings
from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from harness.upstream_model import build_chunk, one_rank, transformer_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flagscale.errors import CheckpointError, ConfigError
from flagscale.launch.options import known_options
from flagscale.layout.arguments import parallel_layout, verify_arguments
from flagscale.layout.boxes import Box
from flagscale.layout.model import (
    LocalParam,
    canonical_name,
    canonical_shapes,
    canonical_tensors,
    has_weight_decay,
    layer_specs,
    local_params,
    local_weights,
    model_spec,
    stored_name,
)
from flagscale.layout.parallel import ParallelLayout
from flagscale.layout.pipeline import even_pipeline, pipeline_from_arguments

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from megatron.core.optimizer import get_standard_config_overrides
    from megatron.core.optimizer.optimizer_config import OptimizerConfig

WORLD_SIZE = 32
DEFAULTS = known_options().defaults() | {
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 8,
    "ffn_hidden_size": 48,
    "seq_length": 32,
    "max_position_embeddings": 40,
    "padded_vocab_size": 64,
    "micro_batch_size": 1,
    "data_path": ["x"],
    "eval_iters": 0,
    "eval_interval": 1,
    "split": "1",
    "bf16": True,
}


@st.composite
def jobs(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of a model and its layout."""
    experts = draw(st.sampled_from([None, 4]))
    shared = draw(st.sampled_from([None, 24])) if experts else None
    pp_size = draw(st.sampled_from([1, 2, 4]))
    pipeline = draw(
        st.sampled_from(
            [
                {},
                {"num_virtual_stages_per_pipeline_rank": 2, "num_layers": 8},
                {"decoder_first_pipeline_num_layers": 1, "num_layers": 1 + 2 * (pp_size - 1)},
                {"account_for_loss_in_pipeline_split": True, "num_layers": 2 * pp_size - 1},
                {"pipeline_model_parallel_layout": "E" + "|".join(["t"] * pp_size) + "t*2L"},
            ][: 5 if pp_size > 1 else 1]
        )
    )
    num_layers = pipeline.get("num_layers", 4)
    if "pipeline_model_parallel_layout" in pipeline:
        num_layers = pp_size + 2
    pattern = [int(i % 3 == 1) for i in range(num_layers)]
    latent = draw(st.booleans())
    return {
        "multi_latent_attention": latent,
        "q_lora_rank": draw(st.sampled_from([None, 12, 20])),
        "kv_lora_rank": draw(st.sampled_from([10, 24])),
        "qk_head_dim": draw(st.sampled_from([4, 6])),
        "qk_pos_emb_head_dim": draw(st.sampled_from([2, 4])),
        "v_head_dim": draw(st.sampled_from([3, 6])),
        "rope_type": draw(st.sampled_from(["rope", "yarn"])),
        **pipeline,
        "num_layers": num_layers,
        "group_query_attention": not latent and draw(st.booleans()),
        "num_query_groups": draw(st.sampled_from([1, 2, 4])),
        "kv_channels": draw(st.sampled_from([None, 6])),
        "swiglu": draw(st.booleans()),
        "add_bias_linear": shared is None and draw(st.booleans()),
        "add_qkv_bias": draw(st.booleans()),
        "qk_layernorm": draw(st.booleans()),
        "normalization": draw(st.sampled_from(["LayerNorm", "RMSNorm"])),
        "untie_embeddings_and_output_weights": draw(st.booleans()),
        "position_embedding_type": draw(st.sampled_from(["learned_absolute", "rope"])),
        "transformer_impl": draw(st.sampled_from(["local", "transformer_engine"])),
        "num_experts": experts,
        "moe_ffn_hidden_size": draw(st.sampled_from([None, 40])) if experts else None,
        "moe_shared_expert_intermediate_size": shared,
        "moe_shared_expert_gate": bool(shared) and draw(st.booleans()),
        "moe_layer_freq": draw(st.sampled_from([1, 2, pattern])),
        "moe_grouped_gemm": draw(st.booleans()),
        "moe_router_enable_expert_bias": bool(experts) and draw(st.booleans()),
        "moe_router_score_function": "sigmoid",
        "expert_model_parallel_size": draw(st.sampled_from([1, 2])) if experts else 1,
        "expert_tensor_parallel_size": draw(st.sampled_from([None, 1])) if experts else None,
        "tensor_model_parallel_size": draw(st.sampled_from([1, 2, 4])),
        "pipeline_model_parallel_size": pp_size,
    }


@st.composite
def jobs_and_ranks(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    values = DEFAULTS | draw(jobs())
    assume(not verify_arguments(values, WORLD_SIZE))
    if values["num_experts"] and values["add_bias_linear"]:
        # "Bias in Moe is only supported when ETP==1"
        etp_size = values["expert_tensor_parallel_size"] or values["tensor_model_parallel_size"]
        assume(etp_size == 1)
    return values, draw(st.integers(0, WORLD_SIZE - 1))


def weights_of(values: dict[str, Any], rank: int) -> list[tuple[LocalParam, ...]]:
    """Ours: what each chunk of a rank holds."""
    layout = parallel_layout(values, WORLD_SIZE)
    dense, expert = layout.coordinates(rank), layout.expert_coordinates(rank)
    pipeline = pipeline_from_arguments(values)
    model, spec = model_spec(values), layer_specs(values)[0]
    place = (dense.tp_rank, expert.ep_rank, spec, expert.etp_rank)
    weights = [
        local_weights(model, layout, pipeline, dense.pp_rank, chunk, *place)
        for chunk in range(pipeline.num_chunks)
    ]
    assert [
        local_params(model, layout, pipeline, dense.pp_rank, chunk, *place)
        for chunk in range(pipeline.num_chunks)
    ] == [tuple(weight for weight in chunk if weight.trained) for chunk in weights]
    return weights


@settings(max_examples=40, deadline=None)
@given(job=jobs_and_ranks())
def test_a_rank_holds_what_upstream_builds_for_it(job: tuple[dict[str, Any], int]) -> None:
    values, rank = job
    config = transformer_config(values)
    with one_rank(values, rank, WORLD_SIZE):
        for chunk, ours in enumerate(weights_of(values, rank)):
            model = build_chunk(values, config, chunk)
            assert [
                (param.name, param.shape, param.expert_parallel, param.shared_embedding)
                for param in ours
                if param.trained
            ] == [
                (
                    name,
                    tuple(param.shape),
                    not getattr(param, "allreduce", True),
                    getattr(param, "shared_embedding", False),
                )
                for name, param in model.named_parameters()
            ]
            theirs = {
                name: tensor
                for name, tensor in model.state_dict().items()
                if isinstance(tensor, torch.Tensor)
            }
            assert [(param.name, param.shape) for param in ours] == [
                (name, tuple(tensor.shape)) for name, tensor in theirs.items()
            ]
            for param in ours:
                if not param.trained:
                    assert theirs[param.name].dtype == getattr(torch, param.dtype)
                assert param.expert == (".experts." in param.name)
            override = get_standard_config_overrides(OptimizerConfig(lr=1.0))
            (no_decay,) = override
            for name, param in model.named_parameters():
                (mine,) = [one for one in ours if one.name == name]
                assert has_weight_decay(mine) != no_decay.matches(param, name)


def stored_boxes(model: Any, values: dict[str, Any]) -> dict[str, list[tuple[str, Box]]]:
    """Upstream's: key and box of each shard that ``torch_dist`` would hold, by local name."""
    sharded = model.sharded_state_dict()
    found: dict[str, list[tuple[str, Box]]] = {}
    for name, entry in sharded.items():
        tree = {name: entry}
        apply_factories(tree)
        shards = tree[name] if isinstance(tree[name], list) else [tree[name]]
        for shard in shards:
            if isinstance(shard, ShardedTensor):
                ones = (1,) * shard.prepend_axis_num
                box = Box(shard.global_offset, (*ones, *shard.local_shape))
                assert shard.global_shape == stored_shape(values, shard.key)
                found.setdefault(name, []).append((shard.key, box))
    return found


def stored_shape(values: dict[str, Any], key: str) -> tuple[int, ...]:
    """Ours: the shape of what is stored under a key."""
    model, spec = model_spec(values), layer_specs(values)[0]
    names = [name for name in canonical_shapes(model) if stored_name(model, name, spec).key == key]
    shape = canonical_shapes(model)[names[0]]
    stacked = stored_name(model, names[0], spec).layer is not None
    assert len(names) == (values["num_layers"] if stacked else 1)
    return (values["num_layers"], *shape) if stacked else shape


@settings(max_examples=40, deadline=None)
@given(job=jobs_and_ranks())
def test_the_parts_are_the_shards_upstream_stores(job: tuple[dict[str, Any], int]) -> None:
    values, rank = job
    # The stand-ins for grouped linear layers cannot describe their shards.
    values = values | {"moe_grouped_gemm": False}
    spec, model_of_job = layer_specs(values)[0], model_spec(values)
    config = transformer_config(values)
    with one_rank(values, rank, WORLD_SIZE):
        for chunk, ours in enumerate(weights_of(values, rank)):
            model = build_chunk(values, config, chunk)
            theirs = stored_boxes(model, values)
            for param in ours:
                key, layer = stored_name(model_of_job, param.canonical, spec)
                assert canonical_name(key, layer) == param.canonical
                front = () if layer is None else (layer,)
                expected = [
                    (key, Box((*front, *box.offset), (*(1 for _ in front), *box.shape)))
                    for box, _ in param.parts
                ]
                assert theirs.pop(param.name) == expected
            assert not theirs


@settings(max_examples=20, deadline=None)
@given(changes=jobs())
def test_all_ranks_together_hold_each_element_as_often_as_there_are_replicas(
    changes: dict[str, Any],
) -> None:
    values = DEFAULTS | changes
    assume(not verify_arguments(values, WORLD_SIZE))
    model, layout = model_spec(values), parallel_layout(values, WORLD_SIZE)
    held = {name: np.zeros(shape, int) for name, shape in canonical_shapes(model).items()}
    copies = {name: np.zeros(shape, int) for name, shape in canonical_shapes(model).items()}
    sizes = set()
    for rank in range(WORLD_SIZE):
        for chunk in weights_of(values, rank):
            for param in chunk:
                for box, first in param.parts:
                    at = tuple(map(slice, box.offset, box.stop))
                    (copies if param.tied_copy else held)[param.canonical][at] += 1
                    assert 0 <= first < param.numel
                assert sum(box.numel for box, _ in param.parts) == param.numel
                sizes.add((param.canonical, param.dtype, param.trained))
    tensors = canonical_tensors(model)
    assert sizes == {(name, one.dtype, one.trained) for name, one in tensors.items()}
    for name, count in held.items():
        assert count.min() == count.max() > 0
        assert count.min() % (layout.expert_dp_size if ".experts." in name else layout.dp_size) == 0
        tied = values["pipeline_model_parallel_size"] > 1 and model.dims.tied_embeddings
        embedding = name == "embedding.word_embeddings.weight"
        assert copies[name].max() == (count.max() if tied and embedding else 0)
        assert copies[name].min() == copies[name].max()


@settings(max_examples=40, deadline=None)
@given(changes=jobs(), data=st.data())
def test_a_range_of_a_parameter_is_those_elements_of_the_whole(
    changes: dict[str, Any], data: st.DataObject
) -> None:
    values = DEFAULTS | changes
    assume(not verify_arguments(values, WORLD_SIZE))
    rank = data.draw(st.integers(0, WORLD_SIZE - 1))
    params = [param for chunk in weights_of(values, rank) for param in chunk]
    param = data.draw(st.sampled_from(params))
    shape = canonical_shapes(model_spec(values))[param.canonical]
    whole = np.arange(prod(shape)).reshape(shape)
    local = np.full(param.numel, -1)
    for box, first in param.parts:
        values_of_part = whole[tuple(map(slice, box.offset, box.stop))].ravel()
        local[first : first + values_of_part.size] = values_of_part
    assert local.min() >= 0
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, param.numel)] * 2)))
    found = np.full(param.numel, -1)
    for box, first in param.boxes(start, stop):
        piece = whole[tuple(map(slice, box.offset, box.stop))].ravel()
        found[first : first + piece.size] = piece
    assert found[start:stop].tolist() == local[start:stop].tolist()
    assert (found[:start] == -1).all()
    assert (found[stop:] == -1).all()
    assert sum(box.numel for box, _ in param.boxes()) == param.numel


def test_a_tied_copy_is_named_as_what_it_is_on_its_rank() -> None:
    model = model_spec(DEFAULTS)
    layout, pipeline = ParallelLayout(4, 2, 2), even_pipeline(4, 2)
    first = local_params(model, layout, pipeline, 0, 0, 1, 0, "local")[0]
    last = local_params(model, layout, pipeline, 1, 0, 1, 0, "local")[-1]
    assert (first.name, first.tied_copy) == ("embedding.word_embeddings.weight", False)
    assert (last.name, last.tied_copy) == ("output_layer.weight", True)
    assert first.shared_embedding
    assert last.shared_embedding
    assert last.canonical == first.canonical
    assert last.parts == first.parts == ((Box((32, 0), (32, 32)), 0),)
    assert "output_layer.weight" not in canonical_shapes(model)


@pytest.mark.parametrize(
    ("etp_size", "etp_rank", "expected"),
    [(None, None, 3), (1, None, 0), (2, None, 1), (8, 6, 6)],
)
def test_which_part_of_an_expert_a_rank_has(
    etp_size: int | None, etp_rank: int | None, expected: int
) -> None:
    model = model_spec(DEFAULTS | {"num_experts": 4, "ffn_hidden_size": 64})
    layout = ParallelLayout(16, 4, 1, ep_size=2, etp_size=etp_size)
    params = local_params(model, layout, even_pipeline(4, 1), 0, 0, 3, 1, "local", etp_rank)
    (fc2,) = [
        p
        for p in params
        if p.name.endswith("layers.1.mlp.experts.local_experts.0.linear_fc2.weight")
    ]
    part = 64 // layout.expert_tp_size
    assert fc2.parts == ((Box((2, 0, expected * part), (1, 32, part)), 0),)


def test_a_rank_or_a_part_that_is_not_there_is_refused() -> None:
    model = model_spec(DEFAULTS | {"num_experts": 4})
    pipeline = even_pipeline(4, 1)

    def build(layout: ParallelLayout, tp_rank: int = 0, ep_rank: int = 0) -> None:
        local_params(model, layout, pipeline, 0, 0, tp_rank, ep_rank, "local")

    for ranks in ((2, 0), (-1, 0), (0, 2)):
        with pytest.raises(ValueError, match="ranks"):
            build(ParallelLayout(4, 2, 1, ep_size=2), *ranks)
    with pytest.raises(ConfigError, match="does not divide"):
        build(ParallelLayout(3, 3, 1))
    with pytest.raises(ConfigError, match="experts"):
        build(ParallelLayout(3, 1, 1, ep_size=3))
    with pytest.raises(ConfigError, match="does not say which part"):
        build(ParallelLayout(4, 2, 1, etp_size=4))


def test_a_gate_and_an_up_part_are_the_two_halves_of_a_local_tensor() -> None:
    model = model_spec(DEFAULTS | {"swiglu": True, "add_bias_linear": True})
    params = local_params(model, ParallelLayout(4, 4, 1), even_pipeline(4, 1), 0, 0, 1, 0, "local")
    (fc1, bias) = [p for p in params if "layers.3.mlp.linear_fc1" in p.name]
    assert fc1.parts == ((Box((12, 0), (12, 32)), 0), (Box((60, 0), (12, 32)), 12 * 32))
    assert bias.parts == ((Box((12,), (12,)), 0), (Box((60,), (12,)), 12))


@pytest.mark.parametrize(
    ("key", "layer", "name"),
    [
        ("output_layer.weight", None, "output_layer.weight"),
        ("decoder.layers.mlp.linear_fc2.weight", 3, "decoder.layers.3.mlp.linear_fc2.weight"),
        ("decoder.layers.12.mlp.linear_fc2.bias", None, "decoder.layers.12.mlp.linear_fc2.bias"),
        (
            "decoder.layers.pre_mlp_layernorm.bias",
            0,
            "decoder.layers.0.mlp.linear_fc1.layer_norm_bias",
        ),
        (
            "decoder.layers.2.input_layernorm.weight",
            None,
            "decoder.layers.2.self_attention.linear_qkv.layer_norm_weight",
        ),
        *(
            (
                f"decoder.layers.self_attention.{key}weight",
                1,
                f"decoder.layers.1.self_attention.{name}_layernorm.weight",
            )
            for key, name in (
                ("linear_q_proj.layer_norm_", "q"),
                ("linear_q_up_proj.layer_norm_", "q"),
                ("q_layernorm.", "q"),
                ("linear_kv_up_proj.layer_norm_", "kv"),
                ("kv_layernorm.", "kv"),
            )
        ),
    ],
)
def test_a_stored_name_has_one_canonical_name(key: str, layer: int | None, name: str) -> None:
    assert canonical_name(key, layer) == name


@pytest.mark.parametrize(
    ("key", "layer"),
    [("decoder.layers.mlp.linear_fc2.weight", None), ("decoder.layers.1.mlp.router.weight", 1)],
)
def test_a_name_of_no_layer_or_of_two_is_refused(key: str, layer: int | None) -> None:
    with pytest.raises(CheckpointError, match="which layer"):
        canonical_name(key, layer)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"mla_down_proj_fusion": True}, "--mla-down-proj-fusion"),
        ({"multi_latent_attention": True, "v_head_dim": None}, "--num-layers, --hidden-size"),
        ({"multi_latent_attention": True, "q_lora_rank": 0}, "--num-layers, --hidden-size"),
        ({"multi_latent_attention": True, "kv_lora_rank": "low"}, "arguments"),
        ({"mtp_num_layers": 1}, "--mtp-num-layers"),
        ({"hybrid_layer_pattern": "M*-"}, "--hybrid-layer-pattern"),
        ({"heterogeneous_layers_config_path": "x"}, "--heterogeneous-layers-config-path"),
        ({"experimental_attention_variant": "dsa"}, "--experimental-attention-variant"),
        ({"attention_output_gate": True}, "--attention-output-gate"),
        ({"moe_latent_size": 8}, "--moe-latent-size"),
        ({"softmax_type": "learnable"}, "--softmax-type"),
        ({"transformer_impl": "inference_optimized"}, "--transformer-impl"),
        ({"normalization": "BatchNorm"}, "--normalization"),
        ({"gtp_weight_remat_size": 2}, "--gtp-weight-remat-size"),
        ({"fp8_param_gather": True}, "--fp8-param-gather"),
        ({"use_transformer_engine_op_fuser": True}, "--use-transformer-engine-op-fuser"),
        ({"moe_layer_freq": [1, 0]}, "--moe-layer-freq"),
        ({"moe_layer_freq": [1, 0, 2, 0]}, "--moe-layer-freq"),
        ({"moe_layer_freq": "[1]*4"}, "--moe-layer-freq"),
        ({"moe_layer_freq": 0}, "--moe-layer-freq"),
        ({"padded_vocab_size": None}, "--num-layers, --hidden-size"),
        ({"num_layers": None}, "--num-layers, --hidden-size"),
        ({"num_layers": None, "num_experts": 4}, "arguments"),
        ({"hidden_size": "wide"}, "arguments"),
        ({"num_attention_heads": 0}, "--num-layers, --hidden-size"),
        ({"ffn_hidden_size": -4}, "--num-layers, --hidden-size"),
        ({"num_experts": "many", "moe_layer_freq": 2}, "arguments"),
    ],
)
def test_a_model_beyond_the_table_is_refused_by_its_argument(
    change: dict[str, Any], where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        model_spec(DEFAULTS | change)
    assert (caught.value.where or "").startswith(where)


def test_arguments_of_an_older_release_may_lack_some() -> None:
    needed = {
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "seq_length": 8,
        "padded_vocab_size": 32,
        "swiglu": True,
        "ffn_hidden_size": 24,
        "normalization": "RMSNorm",
    }
    shapes = canonical_shapes(model_spec(needed))
    assert shapes["decoder.layers.1.mlp.linear_fc1.weight"] == (48, 16)
    assert model_spec(needed).dtype == "float32"
    assert layer_specs(needed) == ("transformer_engine", "local")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"q_lora_rank": 12, "tensor_model_parallel_size": 4}, None),
        ({"q_lora_rank": 10, "tensor_model_parallel_size": 4}, "divisor of 10"),
        ({"kv_lora_rank": 11, "tensor_model_parallel_size": 2}, "divisor of 15"),
        ({"qk_layernorm": True}, "--q-lora-rank where"),
    ],
)
def test_some_latent_attention_needs_transformer_engine(
    changes: dict[str, Any], problem: str | None
) -> None:
    values = DEFAULTS | {"multi_latent_attention": True, "qk_pos_emb_head_dim": 4} | changes
    for impl in ("local", "transformer_engine"):
        given = values | {"transformer_impl": impl}
        told = problem if impl == "local" else None
        assert [p.expected for p in verify_arguments(given, 8) if told is None] == []
        assert all(told in p.expected for p in verify_arguments(given, 8) if told)
        assert bool(verify_arguments(given, 8)) is bool(told)
        other = "local" if impl == "transformer_engine" else "transformer_engine"
        assert layer_specs(given) == (("transformer_engine",) if problem else (impl, other))


def test_norms_of_queries_and_keys_decay_where_asked_to() -> None:
    norm = LocalParam("decoder.layers.0.self_attention.q_layernorm.weight", "", (4,), ())
    assert not has_weight_decay(norm)
    assert has_weight_decay(norm, qk_norms=True)
    for name in ("decoder.final_layernorm.weight", "decoder.layers.0.mlp.linear_fc1.bias"):
        assert not has_weight_decay(LocalParam(name, "", (4,), ()), qk_norms=True)
