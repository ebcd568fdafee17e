"""Flat buffers, against upstream's own functions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from harness.upstream_model import build_chunk, one_rank, transformer_config
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flagscale.errors import CheckpointError, ConfigError
from flagscale.launch.options import known_options
from flagscale.layout.arguments import parallel_layout
from flagscale.layout.buffers import (
    Bucket,
    BufferKey,
    BufferLayout,
    BufferRules,
    bucket_size,
    buffer_rules,
    chained_optimizers,
    group_index,
    group_params,
    plan_buffers,
    stored_buffer,
)
from flagscale.layout.model import layer_specs, local_params, model_spec
from flagscale.layout.parallel import ParallelLayout
from flagscale.layout.pipeline import pipeline_from_arguments

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training.training import resolve_ddp_bucket_size

DP_SIZES = st.sampled_from([1, 2, 3, 5, 6, 8, 20, 40])


@dataclass(frozen=True)
class Param:
    numel: int
    dtype: str = "bfloat16"
    expert_parallel: bool = False
    shared_embedding: bool = False


PARAMS = st.lists(
    st.builds(
        Param,
        numel=st.integers(1, 700) | st.sampled_from([64, 128, 640, 65_536, 70_000]),
        dtype=st.sampled_from(["bfloat16", "bfloat16", "float32"]),
        expert_parallel=st.booleans(),
        shared_embedding=st.sampled_from([False, False, False, True]),
    ),
    min_size=1,
    max_size=14,
)
RULES = st.builds(
    BufferRules,
    dp_size=DP_SIZES,
    expert_dp_size=DP_SIZES,
    grads_in_fp32=st.booleans(),
    pad_high_busbw=st.booleans(),
)
BUCKET_SIZES = st.none() | st.integers(0, 3000) | st.sampled_from([65_536, 100_000])


def upstream_param(param: Param) -> torch.nn.Parameter:
    tensor = torch.empty(param.numel, dtype=getattr(torch, param.dtype), device="meta")
    theirs = torch.nn.Parameter(tensor)
    theirs.allreduce = not param.expert_parallel
    theirs.shared_embedding = param.shared_embedding
    return theirs


def upstream_buffers(
    params: list[torch.nn.Parameter], rules: BufferRules, size: int | None
) -> list[tuple[Any, ...]]:
    """Upstream's buffers: key, places by index of the parameter, buckets, unpadded sizes."""
    layout = DistributedOptimizer.compute_full_param_layout(
        params,
        size,
        rules.dp_size,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=rules.grads_in_fp32,
            pad_buckets_for_high_nccl_busbw=rules.pad_high_busbw,
        ),
        expert_data_parallel_world_size=rules.expert_dp_size,
    )
    index = {param: i for i, param in enumerate(params)}
    return [
        (
            (
                str(key.param_dtype).removeprefix("torch."),
                str(key.grad_dtype).removeprefix("torch."),
                key.is_expert_parallel,
            ),
            [(index[param], *place) for param, place in one.param_index_map.items()],
            one.bucket_indices,
            one.per_bucket_numel_unpadded,
        )
        for key, one in layout.layouts.items()
    ]


def described(buffers: tuple[BufferLayout, ...]) -> list[tuple[Any, ...]]:
    """Ours, in the same form."""
    return [
        (
            (buffer.key.param_dtype, buffer.key.grad_dtype, buffer.key.expert),
            [(slot.param, slot.start, slot.end, slot.bucket) for slot in buffer.slots],
            [(bucket.start, bucket.end) for bucket in buffer.buckets],
            [bucket.numel_unpadded for bucket in buffer.buckets],
        )
        for buffer in buffers
    ]


@settings(max_examples=200, deadline=None)
@given(params=PARAMS, rules=RULES, size=BUCKET_SIZES)
def test_buffers_are_laid_out_as_upstream_does(
    params: list[Param], rules: BufferRules, size: int | None
) -> None:
    theirs = upstream_buffers([upstream_param(param) for param in params], rules, size)
    assert described(plan_buffers(params, rules, size)) == theirs


@settings(max_examples=200, deadline=None)
@given(params=PARAMS, rules=RULES, size=BUCKET_SIZES)
def test_stored_bucket_sizes_give_the_same_layout(
    params: list[Param], rules: BufferRules, size: int | None
) -> None:
    groups = group_params(params, rules.grads_in_fp32)
    for buffer in plan_buffers(params, rules, size):
        unpadded = [bucket.numel_unpadded for bucket in buffer.buckets]
        padded = [bucket.end - bucket.start for bucket in buffer.buckets]
        indices = groups[buffer.key]
        assert stored_buffer(buffer.key, params, indices, unpadded, padded) == buffer
        guessed = stored_buffer(buffer.key, params, indices, unpadded)
        for mine, planned in zip(guessed.slots, buffer.slots, strict=True):
            assert guessed.in_bucket(mine) == buffer.in_bucket(planned)
            assert guessed.compact(mine) == buffer.compact(planned)


@settings(deadline=None)
@given(params=PARAMS, rules=RULES, size=BUCKET_SIZES, data=st.data())
def test_other_bucket_sizes_are_refused(
    params: list[Param], rules: BufferRules, size: int | None, data: st.DataObject
) -> None:
    buffer = plan_buffers(params, rules, size)[0]
    indices = group_params(params, rules.grads_in_fp32)[buffer.key]
    unpadded = [bucket.numel_unpadded for bucket in buffer.buckets]
    at = data.draw(st.integers(0, len(unpadded) - 1))
    change = data.draw(st.integers(-63, 63).filter(bool))
    # Where a shared embedding follows, a bucket may end with or without its alignment.
    assume(not any(params[index].shared_embedding for index in indices))
    for wrong in (
        [n + change * (i == at) for i, n in enumerate(unpadded)],
        unpadded[:-1],
        [*unpadded, 64],
        [*unpadded, 0],
    ):
        with pytest.raises(CheckpointError, match="do not fill the buckets"):
            stored_buffer(buffer.key, params, indices, wrong)
    padded = [bucket.end - bucket.start for bucket in buffer.buckets]
    for sizes in (padded[:-1], [*padded, 128], [n - 1 for n in unpadded]):
        with pytest.raises(CheckpointError, match="do not fill the buckets"):
            stored_buffer(buffer.key, params, indices, unpadded, sizes)


@settings(deadline=None)
@given(params=PARAMS, rules=RULES, size=BUCKET_SIZES)
def test_compact_positions_are_what_is_left_without_the_padding_at_bucket_ends(
    params: list[Param], rules: BufferRules, size: int | None
) -> None:
    for buffer in plan_buffers(params, rules, size):
        world = np.arange(buffer.numel)
        # As a legacy checkpoint is written: bucket after bucket, cut to its unpadded size.
        saved = np.concatenate([world[b.start :][: b.numel_unpadded] for b in buffer.buckets])
        assert saved.size == buffer.numel_unpadded
        for slot in buffer.slots:
            start, end = buffer.compact(slot)
            assert saved[start:end].tolist() == list(range(slot.start, slot.end))
            start, end = buffer.in_bucket(slot)
            bucket = buffer.buckets[slot.bucket]
            assert end <= bucket.numel_unpadded
            inside = world[bucket.start : bucket.end][start:end]
            assert inside.tolist() == list(range(slot.start, slot.end))


@settings(deadline=None)
@given(params=PARAMS, rules=RULES, size=BUCKET_SIZES)
def test_the_ranks_of_a_group_own_each_bucket_in_equal_parts(
    params: list[Param], rules: BufferRules, size: int | None
) -> None:
    for buffer in plan_buffers(params, rules, size):
        dp_size = rules.expert_dp_size if buffer.key.expert else rules.dp_size
        for bucket in buffer.buckets:
            shards = [bucket.shard(rank, dp_size) for rank in range(dp_size)]
            assert len({end - start for start, end in shards}) == 1
            ends = [bucket.start, *(end for _, end in shards)]
            assert [start for start, _ in shards] == ends[:-1]
            assert ends[-1] == bucket.end


@pytest.mark.parametrize(("rank", "size"), [(0, 3), (2, 2), (-1, 2)])
def test_a_part_that_is_not_there_is_refused(rank: int, size: int) -> None:
    with pytest.raises(ValueError, match="of Bucket"):
        Bucket(0, 128, 100).shard(rank, size)


BASE = known_options().defaults() | {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "ffn_hidden_size": 72,
    "kv_channels": 6,
    "add_bias_linear": False,
    "padded_vocab_size": 64,
    "max_position_embeddings": 40,
    "seq_length": 32,
    "position_embedding_type": "rope",
    "bf16": True,
    "accumulate_allreduce_grads_in_fp32": True,
    "transformer_impl": "local",
    "overlap_grad_reduce": True,
    "ddp_bucket_size": 3000,
}
VPP = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
MOE = {"num_experts": 4, "moe_layer_freq": 2, "expert_model_parallel_size": 2}
LATENT = {
    "rope_type": "rope",
    "multi_latent_attention": True,
    "kv_lora_rank": 20,
    "qk_head_dim": 6,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 5,
}


@pytest.mark.parametrize("impl", ["local", "transformer_engine"])
@pytest.mark.parametrize(
    ("changes", "world_size"),
    [
        ({}, 3),
        ({"tensor_model_parallel_size": 2, "swiglu": True}, 4),
        ({"pipeline_model_parallel_size": 2}, 6),
        (VPP, 10),
        (MOE, 6),
        (MOE | VPP | {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1}, 8),
        ({"num_experts": 4, "ddp_num_buckets": 3, "ddp_bucket_size": None}, 2),
        ({"overlap_grad_reduce": False, "pipeline_model_parallel_size": 2}, 6),
        (LATENT | {"q_lora_rank": 24, "qk_layernorm": True, "tensor_model_parallel_size": 2}, 4),
        (LATENT | MOE | {"moe_layer_freq": [0, 1] * 2, "pipeline_model_parallel_size": 2}, 4),
    ],
)
def test_the_buffers_of_a_real_model(impl: str, changes: dict[str, Any], world_size: int) -> None:
    values = BASE | changes | {"transformer_impl": impl}
    layout, pipeline = parallel_layout(values, world_size), pipeline_from_arguments(values)
    rules = buffer_rules(values, layout)
    for rank in range(world_size):
        dense, expert = layout.coordinates(rank), layout.expert_coordinates(rank)
        ours = [
            local_params(
                model_spec(values),
                layout,
                pipeline,
                dense.pp_rank,
                chunk,
                dense.tp_rank,
                expert.ep_rank,
                layer_specs(values)[0],
                expert.etp_rank,
            )
            for chunk in range(pipeline.num_chunks)
        ]
        with one_rank(values, rank, world_size):
            groups = ProcessGroupCollection.use_mpu_process_groups()
            assert group_index(layout, dense) == groups.mp.rank()
            assert group_index(layout, expert) == groups.tp_ep_pp.rank()
            config = transformer_config(values)
            theirs = [
                list(build_chunk(values, config, chunk).bfloat16().parameters())
                for chunk in range(pipeline.num_chunks)
            ]
        total = sum(param.numel() for chunk in theirs for param in chunk)
        for chunk in range(pipeline.num_chunks):
            size = bucket_size(values, layout, dense.pp_rank, chunk, total)
            planned = plan_buffers(ours[chunk], rules, size)
            assert described(planned) == upstream_buffers(theirs[chunk], rules, size)
            bucketed = changes.get("overlap_grad_reduce", True) and not dense.pp_rank and not chunk
            assert (size is not None) == bucketed
            assert not bucketed or len(planned[0].buckets) > 1


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(("num_buckets", "size"), [(None, None), (7, None), (None, 12_345)])
@pytest.mark.parametrize("dp_cp_size", [1, 40, 64])
def test_buckets_are_as_large_as_upstream_resolves(
    overlap: bool, num_buckets: int | None, size: int | None, dp_cp_size: int
) -> None:
    args = {
        "overlap_grad_reduce": overlap,
        "ddp_num_buckets": num_buckets,
        "ddp_bucket_size": size,
    }
    config = DistributedDataParallelConfig(
        num_buckets=num_buckets, bucket_size=size, overlap_grad_reduce=overlap
    )
    group = SimpleNamespace(size=lambda: dp_cp_size)
    cp_size = 2 if dp_cp_size > 1 else 1
    layout = ParallelLayout(dp_cp_size * 4, 2, 2, cp_size=cp_size)
    with mock.patch.object(torch.distributed, "is_initialized", return_value=True):
        theirs = resolve_ddp_bucket_size(config, group, overlap, 1_000_001)
    assert bucket_size(args, layout, 0, 0, 1_000_001) == theirs
    for place in ((1, 0), (0, 1)):
        assert bucket_size(args, layout, *place, 1_000_001) is None
    early = args | {"overlap_param_gather_with_optimizer_step": True}
    assert bucket_size(early, layout, 0, 0, 1_000_001) is None


def test_what_the_arguments_say_of_the_groups() -> None:
    layout = ParallelLayout(48, 2, 2, cp_size=2, ep_size=3)
    args = {"accumulate_allreduce_grads_in_fp32": False}
    assert buffer_rules(args, layout) == BufferRules(12, 4, grads_in_fp32=False)
    args = {
        "accumulate_allreduce_grads_in_fp32": True,
        "num_distributed_optimizer_instances": 2,
        "ddp_pad_buckets_for_high_nccl_busbw": True,
    }
    assert buffer_rules(args, layout) == BufferRules(6, 2, True, True)
    with pytest.raises(ConfigError, match="do not divide between the instances"):
        buffer_rules({"num_distributed_optimizer_instances": 3}, layout)
    with pytest.raises(ConfigError, match="whole number"):
        buffer_rules({"num_distributed_optimizer_instances": "two"}, layout)
    overlap = {"overlap_grad_reduce": True}
    with pytest.raises(ConfigError, match="depends on the parameters"):
        bucket_size(overlap | {"ddp_num_buckets": 2}, layout, 0, 0)
    with pytest.raises(ConfigError, match="whole number"):
        bucket_size(overlap | {"ddp_bucket_size": -1}, layout, 0, 0)


def test_dense_and_expert_parameters_have_optimizers_of_their_own() -> None:
    dense, expert = Param(64), Param(64, expert_parallel=True)
    rules = BufferRules(1, 1)
    chunks = [plan_buffers(params, rules, None) for params in ([expert, dense], [dense], [dense])]
    keys = [BufferKey("bfloat16", "float32", one) for one in (False, True)]

    def places(**others: bool) -> list[tuple[bool, list[tuple[int, BufferKey]]]]:
        return [
            (one.expert, [(chunk, buffer.key) for chunk, buffer in one.buffers])
            for one in chained_optimizers(chunks, **others)
        ]

    all_dense = [(0, keys[0]), (1, keys[0]), (2, keys[0])]
    assert places(expert_parallel=True) == [(False, all_dense), (True, [(0, keys[1])])]
    assert places(expert_parallel=True, split_first_chunk=True) == [
        (False, all_dense[:1]),
        (False, all_dense[1:]),
        (True, [(0, keys[1])]),
    ]
    chunks = [plan_buffers([replace(expert, expert_parallel=False), dense], rules, None)]
    assert places(expert_parallel=False) == [(False, all_dense[:1])]


def test_a_chunk_without_parameters_has_no_buffers() -> None:
    assert plan_buffers([], BufferRules(1, 1), None) == ()
    assert BufferLayout(BufferKey("bfloat16", "float32", False), (), ()).numel == 0
