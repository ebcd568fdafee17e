"""Pipelines, against upstream's own functions and its own validation."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.errors import ConfigError
from flagscale.layout.pipeline import (
    Pipeline,
    even_pipeline,
    parse_layout,
    pipeline_from_arguments,
    pipeline_from_layout,
    uneven_pipeline,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset


def upstream_layers(
    num_layers: int, pp_size: int, num_chunks: int, **others: Any
) -> list[list[range]] | None:
    """The layers of each stage as upstream computes them; ``None`` where it refuses."""
    vp_size = num_chunks if num_chunks > 1 else None
    stages = []
    try:
        config = TransformerConfig(
            num_layers=num_layers,
            hidden_size=8,
            num_attention_heads=1,
            pipeline_model_parallel_size=pp_size,
            virtual_pipeline_model_parallel_size=vp_size,
            pipeline_dtype="float32",
            cuda_graph_modules=[],
            gradient_accumulation_fusion=False,
            **others,
        )
        for pp_rank in range(pp_size):
            stages.append([])
            for chunk in range(num_chunks):
                vp_stage = None if vp_size is None else chunk
                # The functions for layouts look at the state, whatever rank they are given.
                with (
                    mock.patch.object(
                        parallel_state,
                        "get_pipeline_model_parallel_rank",
                        return_value=pp_rank,
                    ),
                    mock.patch.object(
                        parallel_state,
                        "get_virtual_pipeline_model_parallel_world_size",
                        return_value=vp_size,
                    ),
                ):
                    start = get_transformer_layer_offset(config, vp_stage, pp_rank)
                    size = get_num_layers_to_build(config, vp_stage, pp_rank)
                assert size >= 0  # upstream does not look
                stages[-1].append(range(start, start + size))
    except (AssertionError, ValueError, ZeroDivisionError):
        return None
    return stages


def layers(pipeline: Pipeline) -> list[list[range]]:
    return [[stage.layers for stage in chunks] for chunks in pipeline.stages]


def same(ours: list[list[range]] | None, theirs: list[list[range]] | None) -> bool:
    def lists(stages: list[list[range]] | None) -> list[list[list[int]]] | None:
        return stages and [[list(stage) for stage in chunks] for chunks in stages]

    return lists(ours) == lists(theirs)


SIZES = {
    "num_layers": st.integers(1, 24),
    "pp_size": st.integers(1, 5),
    "num_chunks": st.integers(1, 3),
}


@settings(max_examples=100, deadline=None)
@given(**SIZES, count_embedding=st.booleans(), count_loss=st.booleans())
def test_even_stages_are_upstreams(
    num_layers: int, pp_size: int, num_chunks: int, count_embedding: bool, count_loss: bool
) -> None:
    ours = None
    with contextlib.suppress(ConfigError):
        ours = layers(
            even_pipeline(
                num_layers,
                pp_size,
                num_chunks,
                count_embedding=count_embedding,
                count_loss=count_loss,
            )
        )
    theirs = upstream_layers(
        num_layers,
        pp_size,
        num_chunks,
        account_for_embedding_in_pipeline_split=count_embedding,
        account_for_loss_in_pipeline_split=count_loss,
    )
    if pp_size > 1 or num_chunks == 1:  # on one rank upstream does not interleave at all
        assert same(ours, theirs), (ours, theirs)


@settings(max_examples=100, deadline=None)
@given(
    **SIZES,
    first=st.none() | st.integers(-1, 9),
    last=st.none() | st.integers(-1, 9),
)
def test_uneven_stages_are_upstreams(
    num_layers: int, pp_size: int, num_chunks: int, first: int | None, last: int | None
) -> None:
    ours = None
    with contextlib.suppress(ConfigError):
        ours = layers(uneven_pipeline(num_layers, pp_size, num_chunks, first=first, last=last))
    theirs = upstream_layers(
        num_layers,
        pp_size,
        num_chunks,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    if pp_size > 1:  # upstream lets a single rank be the first and the last with sizes that differ
        assert same(ours, theirs), (ours, theirs)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, int, int]:
    """A layout, its layers, and a pipeline size that divides its stages."""
    pp_size = draw(st.integers(1, 4))
    num_chunks = draw(st.integers(1, 3)) if pp_size > 1 else 1
    stages = [
        draw(st.sampled_from(["", "t", "tt", "t*3", "(t)*2", "(tt,t)*2"]))
        for _ in range(pp_size * num_chunks)
    ]
    text = f"E{'|'.join(stages)}L"
    unrolled = parse_layout(text)
    return text, sum(stage.count("decoder") for stage in unrolled), pp_size


@settings(deadline=None)
@given(layout=layouts())
def test_a_layout_gives_the_stages_upstream_gives(layout: tuple[str, int, int]) -> None:
    text, num_layers, pp_size = layout
    if not num_layers:
        with pytest.raises(ConfigError):
            pipeline_from_layout(text, num_layers, pp_size)
        return
    pipeline = pipeline_from_layout(text, num_layers, pp_size)
    theirs = upstream_layers(
        num_layers, pp_size, pipeline.num_chunks, pipeline_model_parallel_layout=text
    )
    assert same(layers(pipeline), theirs)
    parsed = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert pipeline_from_layout(parsed, num_layers, pp_size) == pipeline
    names = [[kind.name for kind in stage] for stage in parsed]
    assert pipeline_from_layout(names, num_layers, pp_size) == pipeline
    args = {"num_layers": num_layers, "pipeline_model_parallel_size": pp_size}
    for value in (text, PipelineParallelLayerLayout(text, pp_size)):
        args_with_layout = args | {"pipeline_model_parallel_layout": value}
        assert pipeline_from_arguments(args_with_layout) == pipeline


@settings(deadline=None)
@given(text=st.text("Etm|L(),*123 ", max_size=14))
def test_any_text_is_read_as_upstream_reads_it(text: str) -> None:
    theirs = None
    with contextlib.suppress(AssertionError):
        theirs = tuple(
            tuple(kind.name for kind in stage)
            for stage in PipelineParallelLayerLayout.parse_str_to_list(text)
        )
    ours = None
    with contextlib.suppress(ConfigError):
        ours = parse_layout(text)
    # Upstream reads some texts in two passes as nobody means them; those we refuse.
    assert ours in (theirs, None)
    if ours is None and theirs is not None:
        assert "(" in text
        assert "*" in text


@pytest.mark.parametrize(
    "text",
    ["Ex|L", "E(tt|L", "Et*|L", "E|t*99999999|L", "E|(t*9999)*9999|L", "E|t*9999999999999|L"],
)
def test_a_layout_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_layout(text)


@pytest.mark.parametrize(
    ("layout", "num_layers", "pp_size", "message"),
    [
        ("Ett|ttL", 4, 3, "does not fit the model"),
        ("Ett|ttL", 5, 2, "does not fit the model"),
        ("tt|ttL", 4, 2, "does not fit the model"),
        ("Ett|ttL", 4, 1, "does not fit the model"),
        ("Ett|tt", 4, 2, "does not fit the model"),
        ("EtE|tL", 2, 2, "does not fit the model"),
        ("Ett|mL", 2, 2, "multi-token prediction"),
        ([["embedding", "encoder"], ["loss"]], 1, 2, "cannot be read"),
        ([1], 1, 1, "cannot be read"),
        (7, 1, 1, "cannot be read"),
        ("E|L", 0, 2, "not positive"),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(
    layout: Any, num_layers: int, pp_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline_from_layout(layout, num_layers, pp_size)


def test_the_ends_of_the_model_and_the_place_of_a_layer() -> None:
    pipeline = even_pipeline(8, 2, 2)
    assert layers(pipeline) == [[range(2), range(4, 6)], [range(2, 4), range(6, 8)]]
    first = [stage.first for chunks in pipeline.stages for stage in chunks]
    last = [stage.last for chunks in pipeline.stages for stage in chunks]
    assert first == [True, False, False, False]
    assert last == [False, False, False, True]
    assert (pipeline.pp_size, pipeline.num_chunks, pipeline.num_layers) == (2, 2, 8)
    assert [pipeline.locate(layer) for layer in (1, 2, 4, 7)] == [
        (0, 0, 1),
        (1, 0, 0),
        (0, 1, 0),
        (1, 1, 1),
    ]
    for layer in (-1, 8):
        with pytest.raises(ValueError, match="no layer"):
            pipeline.locate(layer)
    for place in ((2, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match="no chunk"):
            pipeline.stage(*place)
    alone = even_pipeline(3, 1).stage(0)
    assert alone.first
    assert alone.last


BASE = {"num_layers": 12, "pipeline_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({}, even_pipeline(12, 2)),
        ({"virtual_pipeline_model_parallel_size": 3}, even_pipeline(12, 2, 3)),
        ({"num_virtual_stages_per_pipeline_rank": 3}, even_pipeline(12, 2, 3)),
        ({"num_layers_per_virtual_pipeline_stage": 2}, even_pipeline(12, 2, 3)),
        (
            {
                "num_layers": 11,
                "account_for_loss_in_pipeline_split": True,
                "num_layers_per_virtual_pipeline_stage": 2,
            },
            even_pipeline(11, 2, 3, count_loss=True),
        ),
        (
            {"num_layers": 11, "account_for_embedding_in_pipeline_split": True},
            even_pipeline(11, 2, count_embedding=True),
        ),
        (
            {
                "decoder_first_pipeline_num_layers": 4,
                "num_virtual_stages_per_pipeline_rank": 2,
            },
            uneven_pipeline(12, 2, 2, first=4),
        ),
        ({"decoder_last_pipeline_num_layers": 5}, uneven_pipeline(12, 2, last=5)),
        (
            {"pipeline_model_parallel_size": 1, "num_virtual_stages_per_pipeline_rank": 2},
            even_pipeline(12, 1),
        ),
    ],
)
def test_arguments_are_read(args: dict[str, Any], expected: Pipeline) -> None:
    assert pipeline_from_arguments(BASE | args) == expected


@pytest.mark.parametrize(
    "args",
    [
        {"num_layers": 13},
        {"num_layers": None},
        {"num_layers": "twelve"},
        {"num_layers": -12},
        {"num_layers_per_virtual_pipeline_stage": 5},
        {"decoder_first_pipeline_num_layers": 12},
        {"decoder_first_pipeline_num_layers": 4, "account_for_loss_in_pipeline_split": True},
        {"decoder_first_pipeline_num_layers": 5, "num_virtual_stages_per_pipeline_rank": 2},
        {
            "pipeline_model_parallel_layout": "Et*6|t*6L",
            "virtual_pipeline_model_parallel_size": 2,
        },
        {"pipeline_model_parallel_layout": object()},
    ],
)
def test_arguments_that_do_not_fit_are_refused(args: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        pipeline_from_arguments(BASE | args)
