"""How much memory a rank will need, term by term. Pure arithmetic.

A prediction of what torch's allocator hands out at the peak of a step: communication libraries,
the CUDA context (one to two GB) and fragmentation come on top. Experts are taken to be evenly
loaded.

Source: for the activations, what the modules of megatron-core 0.19.2 keep for their backward
passes; Korthikanti et al., "Reducing Activation Recomputation in Large Transformer Models"
(arXiv:2205.05198) for the idea, though its sums are older than grouped queries and SwiGLU.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from math import ceil

from flagscale.layout.parallel import BatchSizes, ModelDims, ParallelLayout
from flagscale.layout.parameters import count_rank, stage_layers

__all__ = ["MemoryTerms", "TrainingMode", "predict_memory"]

_FP32 = 4  # bytes


@dataclass(frozen=True)
class TrainingMode:
    """What decides how many bytes a number takes, and what is kept.

    Args:
        param_bytes: Of a weight and of an activation: 2 for bf16 and fp16, 4 for fp32.
        grad_bytes: Of an element of the gradient buffer.
        distributed_optimizer: Whether optimizer states are divided between replicas.
        fused_norms: Whether a norm keeps its input alone, as Transformer Engine's does. Out of
            torch's operators, RMSNorm keeps it in fp32, and the normalized input as well.
        flash_attention: Whether attention scores are never stored.
        softmax_in_fp32: Whether stored scores are fp32, with a copy in the activations' type.
        fused_loss: Whether the loss is computed without an fp32 copy of the logits beside them.
        recompute: ``None``, ``"selective"`` or ``"full"``.
        recompute_modules: With ``"selective"``: what is recomputed; ``core_attn``, ``layernorm``
            and ``mlp`` are counted.
        recompute_method: With ``"full"``: ``"uniform"`` or ``"block"``.
        recompute_num_layers: With ``"uniform"``, layers between two stored inputs; with
            ``"block"``, how many layers of a stage (or virtual stage) are recomputed.
    """

    param_bytes: int = 2
    grad_bytes: int = 4
    distributed_optimizer: bool = True
    fused_norms: bool = True
    flash_attention: bool = True
    softmax_in_fp32: bool = False
    fused_loss: bool = False
    recompute: str | None = None
    recompute_modules: tuple[str, ...] = ("core_attn",)
    recompute_method: str | None = None
    recompute_num_layers: int = 1


@dataclass(frozen=True)
class MemoryTerms:
    """Bytes at the peak of a step on each rank of a pipeline stage.

    Args:
        weights: In the type they are computed with.
        gradients: The gradient buffer.
        optimizer: This rank's share of main parameters and both moments.
        activations: What the layers keep, for all micro-batches in flight.
        working: What comes and goes at the peak: on the last stage the logits of a micro-batch and
            their fp32 copy; on the others the gradients in one layer, and what is recomputed.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(astuple(self))


def predict_memory(
    dims: ModelDims, layout: ParallelLayout, batch: BatchSizes, mode: TrainingMode, pp_rank: int
) -> MemoryTerms:
    """The memory of a rank of a pipeline stage.

    Args:
        dims: The model; its padded vocabulary must be known.
        layout: How the ranks are divided; layers must lie evenly on the stages.
        batch: The largest of the run.
        mode: Precision, optimizer, attention, recomputation.
        pp_rank: The stage.

    Raises:
        ValueError: The padded vocabulary is not known, or the layers lie unevenly.
    """
    held = count_rank(dims, layout, pp_rank)
    params = held.dense + held.experts
    dense_shards = layout.dp_size * layout.cp_size if mode.distributed_optimizer else 1
    expert_shards = layout.expert_dp_size if mode.distributed_optimizer else 1
    # Both moments; in fp32 training the weight is its own main parameter.
    state_bytes = 2 * _FP32 if mode.param_bytes == _FP32 else 3 * _FP32
    shard = ceil(held.dense / dense_shards) + ceil(held.experts / expert_shards)
    return MemoryTerms(
        weights=params * mode.param_bytes,
        gradients=params * mode.grad_bytes,
        optimizer=shard * state_bytes,
        activations=_activations(dims, layout, batch, mode, pp_rank),
        working=_working(dims, layout, batch, mode, pp_rank),
    )


def _tokens(dims: ModelDims, layout: ParallelLayout, batch: BatchSizes) -> int:
    """Tokens of a micro-batch that a rank's attention heads see."""
    return batch.micro_batch_size * dims.seq_length // layout.cp_size


def _activations(
    dims: ModelDims, layout: ParallelLayout, batch: BatchSizes, mode: TrainingMode, pp_rank: int
) -> int:
    """Bytes kept for the backward passes still to come."""
    layers = stage_layers(dims, layout, pp_rank)
    vpp_size = layout.vpp_size or 1
    kept = [_layer(dims, layout, batch, mode, layer in dims.moe_layers) for layer in layers]
    if mode.recompute == "full":
        residual = _residual(dims, layout, batch, mode)
        places = [i % (len(layers) // vpp_size) for i in range(len(layers))]
        if mode.recompute_method == "uniform":
            # The input of each group of layers.
            first_of_group = [place % mode.recompute_num_layers == 0 for place in places]
            kept = [residual if first else 0 for first in first_of_group]
        else:
            recomputed = [place < mode.recompute_num_layers for place in places]
            kept = [residual if r else k for r, k in zip(recomputed, kept, strict=True)]
    total = ceil(sum(kept) / vpp_size * _chunks_in_flight(layout, batch, pp_rank))
    if pp_rank == layout.pp_size - 1:  # the final norm, and the input of the output layer
        total += _norm(dims, layout, batch, mode) + _residual(dims, layout, batch, mode)
    return total


def _working(
    dims: ModelDims, layout: ParallelLayout, batch: BatchSizes, mode: TrainingMode, pp_rank: int
) -> int:
    """Bytes of what lives for a moment, at the worst of them."""
    layer = stage_layers(dims, layout, pp_rank)[-1]
    is_moe = layer in dims.moe_layers
    backward = _feed_forward(dims, layout, batch, mode, is_moe)  # its gradients
    if mode.recompute == "full":
        group = mode.recompute_num_layers if mode.recompute_method == "uniform" else 1
        backward += group * _layer(dims, layout, batch, mode, is_moe)
    if pp_rank < layout.pp_size - 1:
        return backward
    columns = (dims.padded_vocab_size or 0) // layout.tp_size
    copies = mode.param_bytes < _FP32 and not mode.fused_loss
    width = mode.param_bytes + (_FP32 if copies else 0)
    return max(backward, _tokens(dims, layout, batch) * columns * width)


def _chunks_in_flight(layout: ParallelLayout, batch: BatchSizes, pp_rank: int) -> int:
    """Forward passes (of a virtual stage) a stage has made and not yet taken back, at most.

    Source: the 1F1B schedules of megatron-core 0.19.2, core/pipeline_parallel/schedules.py.
    """
    microbatches = batch.global_batch_size // (batch.micro_batch_size * layout.dp_size)
    after = layout.pp_size - pp_rank - 1
    if layout.vpp_size is None or layout.pp_size == 1:
        return min(microbatches, after + 1)
    group = batch.microbatch_group_size or layout.pp_size
    warm_up = 2 * after + (layout.vpp_size - 1) * group
    return min(microbatches * layout.vpp_size, warm_up + 1)


def _residual(
    dims: ModelDims, layout: ParallelLayout, batch: BatchSizes, mode: TrainingMode
) -> int:
    """Bytes of the residual stream of a micro-batch: a layer's input."""
    parts = layout.tp_size if layout.sequence_parallel else 1
    return _tokens(dims, layout, batch) * dims.hidden_size * mode.param_bytes // parts


def _norm(dims: ModelDims, layout: ParallelLayout, batch: BatchSizes, mode: TrainingMode) -> int:
    """Bytes that a norm keeps."""
    residual = _residual(dims, layout, batch, mode)
    if mode.fused_norms or dims.norm_bias:
        return residual
    return residual // mode.param_bytes * 2 * _FP32


def _layer(
    dims: ModelDims, layout: ParallelLayout, batch: BatchSizes, mode: TrainingMode, is_moe: bool
) -> int:
    """Bytes that one layer keeps of one micro-batch for its backward pass."""
    dropped = mode.recompute_modules if mode.recompute == "selective" else ()
    kept = 2 * _norm(dims, layout, batch, mode)
    kept += _attention(dims, layout, batch, mode, recompute_core="core_attn" in dropped)
    if "layernorm" not in dropped:  # the outputs of the norms, which the projections take
        kept += 2 * _residual(dims, layout, batch, mode)
    if is_moe or "mlp" not in dropped:
        kept += _feed_forward(dims, layout, batch, mode, is_moe)
    return kept


def _attention(
    dims: ModelDims,
    layout: ParallelLayout,
    batch: BatchSizes,
    mode: TrainingMode,
    recompute_core: bool,
) -> int:
    tokens = _tokens(dims, layout, batch)
    heads = dims.num_attention_heads // layout.tp_size
    groups = max(1, dims.num_query_groups // layout.tp_size)
    queries = tokens * heads * dims.head_dim * mode.param_bytes
    keys = tokens * groups * dims.head_dim * mode.param_bytes
    # After rotation; and the context, which is the input of the output projection.
    kept = queries + keys + queries
    repeated = not mode.flash_attention and groups < heads
    if not repeated or recompute_core:
        # The values are a view of the projection's output and keep all of it.
        kept += queries + 2 * keys
    if recompute_core:
        return kept
    if mode.flash_attention:
        return kept + tokens * heads * _FP32  # the logarithm of the sum of exponentials
    if repeated:
        kept += 2 * queries - keys  # keys and values, once a query head, in place of the keys
    copies = mode.softmax_in_fp32 and mode.param_bytes < _FP32
    width = mode.param_bytes + (_FP32 if copies else 0)
    return kept + tokens * heads * dims.seq_length * width


def _feed_forward(
    dims: ModelDims, layout: ParallelLayout, batch: BatchSizes, mode: TrainingMode, is_moe: bool
) -> int:
    """Bytes that a feed-forward network, or a layer of experts, keeps."""
    tokens = _tokens(dims, layout, batch)
    if not is_moe:
        return tokens * _mlp(dims, dims.ffn_hidden_size, layout.tp_size, mode)
    # Between them the ranks that share the experts take every token to its experts.
    routed = tokens * dims.moe_topk // (1 if layout.expert_tp_size > 1 else layout.tp_size)
    rows = dims.moe_ffn_hidden_size or dims.ffn_hidden_size
    a_token = _mlp(dims, rows, layout.expert_tp_size, mode)
    a_token += 2 * dims.hidden_size * mode.param_bytes  # sent to the expert, and returned
    shared = _mlp(dims, dims.shared_expert_ffn_hidden_size or 0, layout.tp_size, mode)
    return routed * a_token + tokens * shared


def _mlp(dims: ModelDims, ffn_hidden_size: int, tp_size: int, mode: TrainingMode) -> int:
    """Bytes a token: what goes into the activation function, and what comes out."""
    return (3 if dims.gated else 2) * ffn_hidden_size // tp_size * mode.param_bytes
