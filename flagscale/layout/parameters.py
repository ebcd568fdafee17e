"""How many parameters a GPT-style model has, in all and on one rank. Pure arithmetic.

Counted: dense, grouped-query and mixture-of-experts transformers with learned or no position
embeddings, biases, either normalization, q/k norms and shared experts.

Source: the modules of megatron-core 0.19.2 (core/models/gpt, core/transformer), to which tests
hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from flagscale.layout.parallel import ModelDims, ParallelLayout

__all__ = [
    "RankParameters",
    "aquila_ffn_hidden_size",
    "count_parameters",
    "count_rank",
    "stage_layers",
]


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one rank holds.

    Args:
        dense: Shared by the dense replicas: optimizer states are divided by DP x CP.
        experts: Shared by the expert replicas: optimizer states are divided by expert DP.
    """

    dense: int
    experts: int


def aquila_ffn_hidden_size(
    hidden_size: int, multiple_of: int, multiplier: Fraction = Fraction(1)
) -> int:
    """Aquila's (and LLaMA's) rule for the rows of a gated feed-forward network.

    Two thirds of four times the hidden size, times the multiplier, rounded down after each and
    then up to a multiple.
    """
    rows = int(8 * hidden_size // 3 * multiplier)
    return ceil(Fraction(rows, multiple_of)) * multiple_of


def count_parameters(dims: ModelDims) -> int:
    """Parameters of the whole model, pad rows of the vocabulary included.

    Raises:
        ValueError: The padded vocabulary is not known, or attention is multi-latent.
    """
    alone = count_rank(dims, ParallelLayout(world_size=1, tp_size=1, pp_size=1), 0)
    return alone.dense + alone.experts


def count_rank(dims: ModelDims, layout: ParallelLayout, pp_rank: int) -> RankParameters:
    """Parameters of a rank of a pipeline stage; every rank of the stage holds as many.

    Raises:
        ValueError: The padded vocabulary is not known, the layers lie unevenly on the stages, or
            attention is multi-latent, where the layer spec has a say.
    """
    if dims.padded_vocab_size is None:
        raise ValueError("the padded vocabulary is not known")
    if dims.latent is not None:
        raise ValueError("the parameters of multi-latent attention are not counted")
    tp_size = layout.tp_size
    first, last = pp_rank == 0, pp_rank == layout.pp_size - 1
    vocabulary = dims.padded_vocab_size // tp_size * dims.hidden_size
    dense = experts = 0
    for layer in stage_layers(dims, layout, pp_rank):
        is_moe = layer in dims.moe_layers
        dense += _attention(dims, tp_size) + 2 * _norm(dims, dims.hidden_size)
        if is_moe:
            dense += _router_and_shared_expert(dims, tp_size)
            experts += _experts(dims, layout)
        else:
            dense += _mlp(dims, dims.ffn_hidden_size, tp_size)
    if first:
        dense += vocabulary + (dims.learned_positions or 0) * dims.hidden_size
    if last:
        dense += _norm(dims, dims.hidden_size)
        # With tied embeddings the last stage holds a copy, unless it is the first as well.
        dense += 0 if dims.tied_embeddings and first else vocabulary
    return RankParameters(dense, experts)


def stage_layers(dims: ModelDims, layout: ParallelLayout, pp_rank: int) -> list[int]:
    """The layers (0-based) of a pipeline stage, those of all its virtual stages.

    Raises:
        ValueError: The layers lie unevenly on the stages.
    """
    chunks = layout.pp_size * (layout.vpp_size or 1)
    if layout.uneven_pipeline or dims.num_layers % chunks:
        raise ValueError("the layers lie unevenly on the pipeline stages")
    size = dims.num_layers // chunks
    return [i for i in range(dims.num_layers) if i // size % layout.pp_size == pp_rank]


def _attention(dims: ModelDims, tp_size: int) -> int:
    head_dim = dims.head_dim
    queries = dims.num_attention_heads * head_dim // tp_size
    # Also with fewer groups than ranks: each then holds a part of a group.
    rows = (dims.num_attention_heads + 2 * dims.num_query_groups) * head_dim // tp_size
    count = rows * dims.hidden_size + queries * dims.hidden_size
    count += rows if dims.linear_bias or dims.qkv_bias else 0
    count += dims.hidden_size if dims.linear_bias else 0
    return count + (2 * _norm(dims, head_dim) if dims.qk_norm else 0)


def _norm(dims: ModelDims, size: int) -> int:
    return 2 * size if dims.norm_bias else size


def _mlp(dims: ModelDims, ffn_hidden_size: int, tp_size: int) -> int:
    rows = ffn_hidden_size // tp_size
    inner = 2 * rows if dims.gated else rows
    count = (inner + rows) * dims.hidden_size
    return count + (inner + dims.hidden_size if dims.linear_bias else 0)


def _router_and_shared_expert(dims: ModelDims, tp_size: int) -> int:
    count = (dims.num_experts or 0) * dims.hidden_size
    if dims.shared_expert_ffn_hidden_size:
        count += _mlp(dims, dims.shared_expert_ffn_hidden_size, tp_size)
        count += dims.hidden_size if dims.shared_expert_gate else 0
    return count


def _experts(dims: ModelDims, layout: ParallelLayout) -> int:
    ffn_hidden_size = dims.moe_ffn_hidden_size or dims.ffn_hidden_size
    count = (dims.num_experts or 0) // layout.ep_size
    return count * _mlp(dims, ffn_hidden_size, layout.expert_tp_size)
