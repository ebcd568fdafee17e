from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.errors import ConfigError
from flagscale.layout.parallel import (
    BatchSizes,
    Coordinates,
    ExpertCoordinates,
    ModelDims,
    ParallelLayout,
    raise_problems,
    verify_evaluation,
    verify_layout,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.parallel_state import RankGenerator
    from megatron.core.transformer import TransformerConfig

LAYOUT = ParallelLayout(world_size=16, tp_size=2, pp_size=2)
DIMS = ModelDims(
    num_layers=8,
    hidden_size=128,
    ffn_hidden_size=352,
    num_attention_heads=8,
    num_query_groups=4,
    seq_length=128,
    padded_vocab_size=6144,
)
BATCH = BatchSizes(micro_batch_size=2, global_batch_size=32)
SIZES = st.sampled_from([1, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> ParallelLayout:
    tp, pp, cp, ep, etp = (draw(SIZES) for _ in range(5))
    return ParallelLayout(
        world_size=draw(st.integers(1, 96)),
        tp_size=tp,
        pp_size=pp,
        cp_size=cp,
        ep_size=ep,
        etp_size=draw(st.sampled_from([None, etp])),
        vpp_size=draw(st.sampled_from([None, 2])),
        sequence_parallel=draw(st.booleans()),
        order=draw(st.sampled_from(["tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp"])),
    )


def index_in_group(generator: RankGenerator, axis: str) -> dict[int, int]:
    return {rank: i for group in generator.get_ranks(axis) for i, rank in enumerate(group)}


@settings(max_examples=150, deadline=None)
@given(layout=layouts())
def test_coordinates_are_those_of_upstreams_rank_generator(layout: ParallelLayout) -> None:
    dims = replace(DIMS, num_layers=24, num_experts=12, hidden_size=96, num_attention_heads=24,
                   num_query_groups=24, ffn_hidden_size=96, seq_length=96)  # fmt: skip
    samples = 2 * layout.pp_size * max(layout.dp_size, 1)
    if verify_layout(layout, dims, BatchSizes(2, samples)):
        return
    common = {"pp": layout.pp_size, "order": layout.order}
    dense = RankGenerator(tp=layout.tp_size, ep=1, dp=layout.dp_size, cp=layout.cp_size, **common)
    expert = RankGenerator(
        tp=layout.expert_tp_size, ep=layout.ep_size, dp=layout.expert_dp_size, cp=1, **common
    )
    assert dense.world_size == expert.world_size == layout.world_size
    axes = {axis: index_in_group(dense, axis) for axis in ("tp", "cp", "dp", "pp")}
    expert_axes = {axis: index_in_group(expert, axis) for axis in ("tp", "ep", "dp", "pp")}
    for rank in range(layout.world_size):
        place = layout.coordinates(rank)
        assert place == Coordinates(*(axes[axis][rank] for axis in axes))
        assert layout.rank_of(place) == rank
        expert_place = layout.expert_coordinates(rank)
        assert expert_place == ExpertCoordinates(*(expert_axes[a][rank] for a in expert_axes))
        assert layout.rank_of(expert_place) == rank


@settings(max_examples=150, deadline=None)
@given(
    tp=st.integers(1, 12),
    pp=SIZES,
    vpp=st.sampled_from([None, 2, 3]),
    heads=st.integers(1, 16),
    groups=st.integers(1, 16),
    layers=st.integers(1, 16),
)
def test_what_is_accepted_makes_an_upstream_config(
    tp: int, pp: int, vpp: int | None, heads: int, groups: int, layers: int
) -> None:
    layout = ParallelLayout(tp * pp, tp, pp, vpp_size=vpp)
    dims = ModelDims(layers, 8 * heads, 5040, heads, groups, seq_length=128)
    if verify_layout(layout, dims, BatchSizes(1, 12)):
        return
    TransformerConfig(
        num_layers=layers,
        hidden_size=8 * heads,
        num_attention_heads=heads,
        num_query_groups=groups,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_dtype="bf16",
        cuda_graph_modules=[],
    )


def test_a_sound_layout_has_no_problems() -> None:
    assert verify_layout(LAYOUT, DIMS, BATCH) == []
    raise_problems([])


BROKEN = {
    "world": (replace(LAYOUT, world_size=14), DIMS, BATCH, "12 or 16"),
    "expert world": (
        replace(LAYOUT, ep_size=3, etp_size=1),
        replace(DIMS, num_experts=6),
        BATCH,
        "12 or 18",
    ),
    "not positive": (replace(LAYOUT, tp_size=0), DIMS, BATCH, "--tensor-model-parallel-size"),
    "heads": (replace(LAYOUT, world_size=32, tp_size=16), DIMS, BATCH, "2, 4 or 8"),
    "groups": (
        replace(LAYOUT, world_size=12, tp_size=6),
        replace(DIMS, num_attention_heads=24, hidden_size=96, ffn_hidden_size=96),
        BatchSizes(1, 12),
        "2, 4 or 8",
    ),
    "head groups": (LAYOUT, replace(DIMS, num_query_groups=6), BATCH, "2, 4 or 8"),
    "head size": (LAYOUT, replace(DIMS, hidden_size=100), BATCH, "96 or 104"),
    "ffn": (LAYOUT, replace(DIMS, ffn_hidden_size=351), BATCH, "-size 1"),
    "vocabulary": (LAYOUT, replace(DIMS, padded_vocab_size=6143), BATCH, "-size 1"),
    "layers": (replace(LAYOUT, vpp_size=4), replace(DIMS, num_layers=12), BATCH, "-size 1 or 3"),
    "virtual without pipeline": (
        replace(LAYOUT, pp_size=1, vpp_size=2),
        DIMS,
        BATCH,
        "leave virtual stages out",
    ),
    "sequence parallel without tp": (
        replace(LAYOUT, tp_size=1, sequence_parallel=True),
        DIMS,
        BATCH,
        "=false",
    ),
    "sequence": (
        replace(LAYOUT, sequence_parallel=True),
        replace(DIMS, seq_length=127),
        BATCH,
        "126 or 128",
    ),
    "context": (replace(LAYOUT, cp_size=2), replace(DIMS, seq_length=126), BATCH, "124 or 128"),
    "experts": (replace(LAYOUT, ep_size=2), replace(DIMS, num_experts=3), BATCH, "1 or 3"),
    "no experts": (replace(LAYOUT, ep_size=2), DIMS, BATCH, "--num-experts"),
    "expert ffn": (
        LAYOUT,
        replace(DIMS, num_experts=2, moe_ffn_hidden_size=9),
        BATCH,
        "--expert-tensor-parallel-size 1",
    ),
    "batch": (LAYOUT, DIMS, BatchSizes(2, 30), "24 or 32"),
    "micro-batches": (
        replace(LAYOUT, vpp_size=2),
        DIMS,
        BatchSizes(2, 24),
        "--global-batch-size 16 or 32",
    ),
}


@pytest.mark.parametrize(("layout", "dims", "batch", "cure"), BROKEN.values(), ids=BROKEN.keys())
def test_each_mistake_is_one_problem_with_its_cure(
    layout: ParallelLayout, dims: ModelDims, batch: BatchSizes, cure: str
) -> None:
    (problem,) = verify_layout(layout, dims, batch)
    assert cure in problem.cure


def test_uneven_pipelines_are_left_to_upstream() -> None:
    layout = replace(LAYOUT, uneven_pipeline=True)
    assert verify_layout(layout, replace(DIMS, num_layers=7), BATCH) == []


@pytest.mark.parametrize(
    ("split", "eval_iters", "sound"),
    [
        ("98,1,1", 2, True),
        ("100,0,0", 0, True),
        ("1", 0, True),
        ("98,1,1", 0, False),
        ("100,0,0", 2, False),
        ("99,1", 2, False),
        ("", 0, False),
        ("0,1,1", 2, False),
    ],
)
def test_evaluation_needs_a_share_of_the_data(split: str, eval_iters: int, sound: bool) -> None:
    assert (verify_evaluation(split, eval_iters) == []) is sound


def test_several_problems_are_raised_together() -> None:
    problems = verify_layout(replace(LAYOUT, world_size=14), replace(DIMS, hidden_size=100), BATCH)
    with pytest.raises(ConfigError, match=r"(?s)2 things.*1\. .*2\. "):
        raise_problems(problems)


def test_places_outside_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        LAYOUT.coordinates(16)
    with pytest.raises(ValueError, match="outside"):
        LAYOUT.rank_of(Coordinates(2, 0, 0, 0))
