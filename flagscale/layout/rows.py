"""The rows of a GPT-style model: every tensor of a layer, in the order of its registration.

A row has the tensor's local name, its canonical name, its whole shape, and the dimension that
tensor parallelism divides. The same functions serve both of upstream's layer specs, which give the
norms other names and register the tensors in another order.

Source: megatron-core 0.19.2, core/models/gpt, core/transformer, core/tensor_parallel; the order
inside Transformer Engine's modules is that of its LayerNormLinear, Linear and GroupedLinear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from flagscale.layout.parallel import LatentDims, ModelDims

__all__ = [
    "EMBEDDING",
    "INPUT_NORM",
    "KV_NORM",
    "KV_UP_NORM",
    "MLP_NORM",
    "OUTPUT",
    "PRE_MLP_NORM",
    "QKV_NORM",
    "Q_NORM",
    "Q_PROJ_NORM",
    "Q_UP_NORM",
    "LayerSpec",
    "ModelSpec",
    "Row",
    "embedding_rows",
    "layer_rows",
    "output_rows",
]

LayerSpec = Literal["local", "transformer_engine"]
"""Upstream's two families of modules, as ``--transformer-impl`` calls them."""

EMBEDDING: Final = "embedding.word_embeddings.weight"
OUTPUT: Final = "output_layer.weight"

# The norms of a layer have two names: that of a module of their own, and that inside the linear
# layer that takes their output. The canonical one is QKV_NORM, MLP_NORM, Q_NORM and KV_NORM,
# whichever attention a model has.
INPUT_NORM: Final = "input_layernorm."
QKV_NORM: Final = "self_attention.linear_qkv.layer_norm_"
PRE_MLP_NORM: Final = "pre_mlp_layernorm."
MLP_NORM: Final = "mlp.linear_fc1.layer_norm_"
Q_NORM: Final = "self_attention.q_layernorm."
Q_PROJ_NORM: Final = "self_attention.linear_q_proj.layer_norm_"
Q_UP_NORM: Final = "self_attention.linear_q_up_proj.layer_norm_"
KV_NORM: Final = "self_attention.kv_layernorm."
KV_UP_NORM: Final = "self_attention.linear_kv_up_proj.layer_norm_"


@dataclass(frozen=True)
class ModelSpec:
    """Everything that names and shapes the parameters of a model.

    Args:
        dims: Its sizes; the padded vocabulary must be known.
        dtype: Torch's name of the parameters' type, without ``torch.``.
        grouped_experts: Whether a layer's experts are one module (grouped GEMM); the local spec
            has no such module, whatever this says.
        expert_bias: Whether routers have a bias that balances the experts: a weight in fp32, but
            no parameter, as it is not trained by gradients.
        stacked_layers: Whether ``torch_dist`` stores each tensor once for all layers, with an axis
            of layers in front; otherwise once a layer, under a name with its number.
    """

    dims: ModelDims
    dtype: str = "bfloat16"
    grouped_experts: bool = False
    expert_bias: bool = False
    stacked_layers: bool = True


@dataclass(frozen=True)
class Row:
    """A tensor of a layer (or of the model): names relative to it, and the whole shape.

    Args:
        name: In the module itself.
        canonical: Relative to the canonical layer.
        shape: Whole, of one expert where ``expert`` says which.
        split: The dimension that tensor parallelism divides; ``None``: every rank holds all of it.
        blocks: Equal blocks of that dimension, each of which is divided on its own: a rank's gate
            rows lie before its up rows.
        expert: Whether it is an expert's; ``index`` among the rank's own.
        trained: Whether it is a parameter.
        dtype: ``None`` means the model's.
    """

    name: str
    canonical: str
    shape: tuple[int, ...]
    split: int | None = None
    blocks: int = 1
    expert: bool = False
    index: int = 0
    trained: bool = True
    dtype: str | None = None


def embedding_rows(dims: ModelDims) -> Iterator[Row]:
    """What a model begins with."""
    yield Row(EMBEDDING, EMBEDDING, (dims.padded_vocab_size or 0, dims.hidden_size), 0)
    if dims.learned_positions:
        name = "embedding.position_embeddings.weight"
        yield Row(name, name, (dims.learned_positions, dims.hidden_size))


def output_rows(dims: ModelDims, *, tied_copy: bool) -> Iterator[Row]:
    """What a model ends with.

    Args:
        dims: The sizes of the model.
        tied_copy: Whether the output layer is a copy of the embedding, which is on another rank.
    """
    yield from _norm_rows(dims, "decoder.final_layernorm.", dims.hidden_size)
    if tied_copy or not dims.tied_embeddings:
        canonical = EMBEDDING if tied_copy else OUTPUT
        yield Row(OUTPUT, canonical, (dims.padded_vocab_size or 0, dims.hidden_size), 0)


def layer_rows(model: ModelSpec, layer: int, spec: LayerSpec, experts: int) -> Iterator[Row]:
    """The rows of a layer in the order in which its modules register them.

    Args:
        model: The model.
        layer: Number in the model, from 0.
        spec: Which modules it is made of.
        experts: Experts on the rank.
    """
    dims = model.dims
    fused, is_moe = spec == "transformer_engine", layer in dims.moe_layers
    if dims.latent is None:
        yield from _attention_rows(dims, fused)
    else:
        yield from _latent_attention_rows(dims, dims.latent, fused)
    name = MLP_NORM if fused and not is_moe else PRE_MLP_NORM
    yield from _norm_rows(dims, name, dims.hidden_size, MLP_NORM)
    if not is_moe:
        yield from _mlp_rows(dims, "mlp.", "mlp.", dims.ffn_hidden_size, dims.linear_bias)
        return
    yield from _router_rows(model)
    grouped = fused and model.grouped_experts
    yield from (_grouped_expert_rows if grouped else _expert_rows)(dims, experts)
    if rows := dims.shared_expert_ffn_hidden_size:
        prefix = "mlp.shared_experts."
        if dims.shared_expert_gate:
            yield Row(f"{prefix}gate_weight", f"{prefix}gate_weight", (1, dims.hidden_size))
        yield from _mlp_rows(dims, prefix, prefix, rows, bias=False)


def _attention_rows(dims: ModelDims, fused: bool) -> Iterator[Row]:
    hidden, head_dim, name = dims.hidden_size, dims.head_dim, "self_attention."
    queries = dims.num_attention_heads * head_dim
    # Rows go group by group: the group's queries, its key, its value. With fewer groups than ranks
    # they are divided evenly all the same, in the middle of a group.
    rows = queries + 2 * dims.num_query_groups * head_dim
    if not fused:
        yield from _norm_rows(dims, INPUT_NORM, hidden, QKV_NORM)
    yield from _linear_rows(f"{name}linear_proj.", (hidden, queries), 1, dims.linear_bias)
    if fused:
        yield from _norm_rows(dims, QKV_NORM, hidden)
    bias = dims.linear_bias or dims.qkv_bias
    yield from _linear_rows(f"{name}linear_qkv.", (rows, hidden), 0, bias)
    if dims.qk_norm:
        yield from _norm_rows(dims, Q_NORM, head_dim)
        yield from _norm_rows(dims, f"{name}k_layernorm.", head_dim)


def _latent_attention_rows(dims: ModelDims, latent: LatentDims, fused: bool) -> Iterator[Row]:
    hidden, heads, name = dims.hidden_size, dims.num_attention_heads, "self_attention."
    queries, kv_rank = heads * latent.query_dim, latent.kv_lora_rank
    values = heads * latent.v_head_dim
    yield from _norm_rows(dims, INPUT_NORM, hidden, QKV_NORM)
    yield from _linear_rows(f"{name}linear_proj.", (hidden, values), 1, dims.linear_bias)
    # Transformer Engine's layers that lead to a low rank are whole on every rank, and its norms
    # are in the layers that lead out of it.
    down_split = None if fused else 0
    q_rank, q_norm, q_name = hidden, Q_PROJ_NORM, f"{name}linear_q_proj.weight"
    if latent.q_lora_rank is not None:
        q_rank, q_norm, q_name = latent.q_lora_rank, Q_UP_NORM, f"{name}linear_q_up_proj.weight"
        down = f"{name}linear_q_down_proj.weight"
        yield Row(down, down, (q_rank, hidden), down_split)
    if fused and dims.qk_norm:
        yield from _norm_rows(dims, q_norm, q_rank, Q_NORM)
    yield Row(q_name, q_name, (queries, q_rank), 0)
    down, up = f"{name}linear_kv_down_proj.weight", f"{name}linear_kv_up_proj.weight"
    yield Row(down, down, (kv_rank + latent.qk_pos_emb_head_dim, hidden), down_split)
    if fused and dims.qk_norm:
        yield from _norm_rows(dims, KV_UP_NORM, kv_rank, KV_NORM)
    # Rows go head by head: the part of its key without a position, its value.
    yield Row(up, up, (heads * latent.qk_head_dim + values, kv_rank), 0)
    if dims.qk_norm and not fused:
        yield from _norm_rows(dims, Q_NORM, q_rank)
        yield from _norm_rows(dims, KV_NORM, kv_rank)


def _router_rows(model: ModelSpec) -> Iterator[Row]:
    dims, name = model.dims, "mlp.router."
    experts = dims.num_experts or 0
    yield Row(f"{name}weight", f"{name}weight", (experts, dims.hidden_size))
    if dims.linear_bias:
        yield Row(f"{name}bias", f"{name}bias", (experts,))
    if model.expert_bias:
        yield Row(
            f"{name}expert_bias", f"{name}expert_bias", (experts,), trained=False, dtype="float32"
        )


def _expert_rows(dims: ModelDims, experts: int) -> Iterator[Row]:
    """Experts one after another, each a feed-forward network of its own."""
    rows = dims.moe_ffn_hidden_size or dims.ffn_hidden_size
    for index in range(experts):
        name, canonical = f"mlp.experts.local_experts.{index}.", "mlp.experts.experts."
        for row in _mlp_rows(dims, name, canonical, rows, dims.linear_bias):
            yield _expert(row, row.name, index)


def _grouped_expert_rows(dims: ModelDims, experts: int) -> Iterator[Row]:
    """All first layers, then all second ones: ``weight0``, ``bias0``, ``weight1``, ..."""
    rows = dims.moe_ffn_hidden_size or dims.ffn_hidden_size
    whole = list(_mlp_rows(dims, "mlp.experts.", "mlp.experts.experts.", rows, dims.linear_bias))
    for layer in ("linear_fc1.", "linear_fc2."):
        for index in range(experts):
            for row in whole:
                if layer in row.name:
                    yield _expert(row, f"{row.name}{index}", index)


def _expert(row: Row, name: str, index: int) -> Row:
    return Row(name, row.canonical, row.shape, row.split, row.blocks, expert=True, index=index)


def _mlp_rows(dims: ModelDims, name: str, canonical: str, rows: int, bias: bool) -> Iterator[Row]:
    blocks = 2 if dims.gated else 1
    for layer, shape, split in (
        ("linear_fc1.", (blocks * rows, dims.hidden_size), 0),
        ("linear_fc2.", (dims.hidden_size, rows), 1),
    ):
        yield from _linear_rows(
            f"{name}{layer}", shape, split, bias, f"{canonical}{layer}", 1 if split else blocks
        )


def _linear_rows(
    name: str,
    shape: tuple[int, int],
    split: int,
    bias: bool,
    canonical: str | None = None,
    blocks: int = 1,
) -> Iterator[Row]:
    canonical = name if canonical is None else canonical
    yield Row(f"{name}weight", f"{canonical}weight", shape, split, blocks)
    if bias:  # of the output: whole where the input is divided
        split_bias = 0 if split == 0 else None
        yield Row(f"{name}bias", f"{canonical}bias", shape[:1], split_bias, blocks)


def _norm_rows(
    dims: ModelDims, name: str, size: int, canonical: str | None = None
) -> Iterator[Row]:
    canonical = name if canonical is None else canonical
    for kind in ("weight", "bias") if dims.norm_bias else ("weight",):
        yield Row(f"{name}{kind}", f"{canonical}{kind}", (size,))
