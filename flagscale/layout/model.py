"""The parameters of a GPT-style model: whole, on each rank, and in a checkpoint.

From the rows of a model (:mod:`flagscale.layout.rows`) follows which rank holds what, in which
order, and under which key a ``torch_dist`` checkpoint keeps it.

Source: megatron-core 0.19.2, core/tensor_parallel, core/transformer/transformer_block.py
(``sharded_state_dict``), core/models/common/language_module.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Final, NamedTuple

from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.arguments import OTHER_MODELS, model_dims, whole_number
from flagscale.layout.boxes import Box, flat_boxes
from flagscale.layout.parallel import ModelDims, ParallelLayout, verify_local_attention
from flagscale.layout.pipeline import Pipeline
from flagscale.layout.rows import (
    EMBEDDING,
    INPUT_NORM,
    KV_NORM,
    KV_UP_NORM,
    MLP_NORM,
    OUTPUT,
    PRE_MLP_NORM,
    Q_NORM,
    Q_PROJ_NORM,
    Q_UP_NORM,
    QKV_NORM,
    LayerSpec,
    ModelSpec,
    Row,
    embedding_rows,
    layer_rows,
    output_rows,
)

__all__ = [
    "CanonicalTensor",
    "LayerSpec",
    "LocalParam",
    "ModelSpec",
    "StoredName",
    "canonical_name",
    "canonical_shapes",
    "canonical_tensors",
    "has_weight_decay",
    "layer_specs",
    "local_params",
    "local_weights",
    "model_spec",
    "stored_name",
]

_LAYERS: Final = "decoder.layers."
_CANONICAL_NORMS: Final = {
    INPUT_NORM: QKV_NORM,
    PRE_MLP_NORM: MLP_NORM,
    Q_PROJ_NORM: Q_NORM,
    Q_UP_NORM: Q_NORM,
    KV_UP_NORM: KV_NORM,
}
_LAYER_KEY: Final = re.compile(r"decoder\.layers\.(?:(\d+)\.)?(.+)", re.DOTALL)

_NEEDED: Final = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "padded_vocab_size",
    "kv_lora_rank",
    "qk_head_dim",
    "qk_pos_emb_head_dim",
    "v_head_dim",
)
# What these ask for has other names or other rows than the table below, though as many parameters.
_OTHER_NAMES: Final = (
    "linear_attention_freq",
    "mla_down_proj_fusion",
    "moe_single_grouped_weight",
    "moe_single_grouped_bias",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "moe_use_legacy_grouped_gemm",
    "use_grouped_gemm_for_dense_mlp",
    "use_grouped_gemm_for_shared_expert",
    "use_transformer_engine_op_fuser",
    "fp8_param_gather",
    "fp4_param_gather",
    "use_kitchen",
)
# The values of these that do not; 1: no further division of the weights than tensor parallelism.
_KNOWN: Final[Mapping[str, tuple[Any, ...]]] = {
    "softmax_type": ("vanilla", "off-by-one"),
    "transformer_impl": ("local", "transformer_engine"),
    "normalization": ("LayerNorm", "RMSNorm"),
    "gtp_weight_remat_size": (1,),
    "expert_gtp_weight_remat_size": (1,),
}


class CanonicalTensor(NamedTuple):
    """A whole tensor of one layer, or of none.

    Args:
        shape: Experts have an axis of their own in front.
        dtype: Torch's name of the element type, without ``torch.``.
        trained: Whether it is a parameter, so that the optimizer holds states of it.
    """

    shape: tuple[int, ...]
    dtype: str
    trained: bool


class StoredName(NamedTuple):
    """Where ``torch_dist`` keeps a canonical tensor.

    Args:
        key: Of the stored tensor.
        layer: Index on its leading axis, the axis of the layers; ``None``: it has none.
    """

    key: str
    layer: int | None


@dataclass(frozen=True)
class LocalParam:
    """A tensor of a rank's model chunk.

    Args:
        name: In the chunk's own ``state_dict``; layers are numbered within the chunk.
        canonical: Name of the canonical tensor it is a part of.
        shape: On this rank.
        parts: The boxes of the canonical tensor that it consists of, each with the first element
            of the local tensor, in row-major order, that belongs to it. The elements of a part lie
            densely one after another, in the order of its box.
        dtype: Torch's name of the element type, without ``torch.``.
        trained: Whether it is a parameter; otherwise a persistent buffer.
        expert: Whether it belongs to a routed expert, and so is divided by expert tensor and
            expert parallelism.
        expert_parallel: Whether its gradients are reduced in the expert grid, and so its
            optimizer states live in buffers of their own. Not so for experts whose grid is that of
            the dense layers.
        shared_embedding: Whether upstream gives it a bucket of its own, as one of two copies of
            tied embeddings on different pipeline ranks.
        tied_copy: Whether it is the second of them, the last stage's.
    """

    name: str
    canonical: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Box, int], ...]
    dtype: str = "bfloat16"
    trained: bool = True
    expert: bool = False
    expert_parallel: bool = False
    shared_embedding: bool = False
    tied_copy: bool = False

    @property
    def numel(self) -> int:
        """Elements in all."""
        return prod(self.shape)

    def boxes(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[Box, int]]:
        """What a range of the local tensor's elements is in the canonical tensor.

        Args:
            start: First element of the range, in row-major order.
            stop: First element past it; ``None`` means the last.

        Yields:
            Boxes of the canonical tensor, each with the first local element that belongs to it;
            the elements of each lie densely one after another.
        """
        stop = self.numel if stop is None else stop
        for whole, first in self.parts:
            begin, end = max(start, first), min(stop, first + whole.numel)
            if begin < end:
                for box in flat_boxes(whole.shape, begin - first, end - first):
                    yield box.shifted(whole.offset), begin
                    begin += box.numel


def model_spec(args: Mapping[str, Any]) -> ModelSpec:
    """The model that the arguments of a job describe.

    Args:
        args: By attribute, as a checkpoint holds them; what an older release did not know may be
            missing. ``params_dtype`` may be torch's type or its name.

    Raises:
        ConfigError: An argument asks for a model that is not known here, or they make no sense.
    """
    values = _Arguments(args)
    _verify_known(values)
    try:
        dims = model_dims(values)
        sizes = {**vars(dims), **(vars(dims.latent) if dims.latent else {})}
        for not_a_size in ("moe_layers", "latent"):
            del sizes[not_a_size]
        complete = all(size is None or size is False or size > 0 for size in sizes.values())
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "the arguments do not describe a model", where="arguments", got=repr(error)
        ) from error
    needed = {dest: values[dest] for dest in _NEEDED[: None if dims.latent else 4]}
    needed["padded_vocab_size"] = dims.padded_vocab_size
    if not complete or None in needed.values():
        raise ConfigError(
            "the size of the model is not known",
            where=", ".join(f"--{dest.replace('_', '-')}" for dest in needed),
            expected="a value for each, and no size below 1",
            got=tuple(needed.values()) if complete else dims,
        )
    return ModelSpec(
        dims=dims,
        dtype="bfloat16" if values["bf16"] else "float16" if values["fp16"] else "float32",
        grouped_experts=bool(values["moe_grouped_gemm"]),
        expert_bias=bool(values["moe_router_enable_expert_bias"]),
        # Upstream looks at the frequency alone, also where there are no experts.
        stacked_layers=values["moe_layer_freq"] in (None, 1),
    )


def layer_specs(args: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
    """The specs that can make the model, the one that the arguments name first.

    A custom ``--spec`` may register the parameters in any order: this is where to start a proof.
    """
    if args.get("multi_latent_attention"):
        tp_size = whole_number(args, "tensor_model_parallel_size") or 1
        if any(verify_local_attention(model_dims(_Arguments(args)), tp_size)):
            return ("transformer_engine",)
    if args.get("transformer_impl") == "local":
        return "local", "transformer_engine"
    return "transformer_engine", "local"


def canonical_tensors(model: ModelSpec) -> dict[str, CanonicalTensor]:
    """All tensors of a model by canonical name, in the order of its layers."""
    dims = model.dims
    return {
        f"{prefix}{row.canonical}": CanonicalTensor(
            (dims.num_experts or 0, *row.shape) if row.expert else row.shape,
            row.dtype or model.dtype,
            row.trained,
        )
        for prefix, rows in (
            ("", embedding_rows(dims)),
            *(
                (f"{_LAYERS}{layer}.", layer_rows(model, layer, "local", 1))
                for layer in range(dims.num_layers)
            ),
            ("", output_rows(dims, tied_copy=False)),
        )
        for row in rows
    }


def canonical_shapes(model: ModelSpec) -> dict[str, tuple[int, ...]]:
    """The whole shape of every tensor of a model, by canonical name."""
    return {name: tensor.shape for name, tensor in canonical_tensors(model).items()}


def local_params(
    model: ModelSpec,
    layout: ParallelLayout,
    pipeline: Pipeline,
    pp_rank: int,
    chunk: int,
    tp_rank: int,
    ep_rank: int,
    spec: LayerSpec,
    etp_rank: int | None = None,
) -> tuple[LocalParam, ...]:
    """The parameters of a rank's model chunk, as ``named_parameters`` lists them.

    Args:
        model: The model.
        layout: The sizes of the grid.
        pipeline: Which layers lie where.
        pp_rank: Pipeline rank.
        chunk: Model chunk of the pipeline rank; 0 without a virtual pipeline.
        tp_rank: Tensor parallel rank.
        ep_rank: Expert parallel rank.
        spec: Which modules the layers are made of.
        etp_rank: Expert tensor parallel rank; ``None`` where ``tp_rank`` decides it.

    Raises:
        ConfigError: A tensor does not divide between the ranks.
        ValueError: There is no such place in the grid.
    """
    weights = local_weights(
        model, layout, pipeline, pp_rank, chunk, tp_rank, ep_rank, spec, etp_rank
    )
    return tuple(param for param in weights if param.trained)


def local_weights(
    model: ModelSpec,
    layout: ParallelLayout,
    pipeline: Pipeline,
    pp_rank: int,
    chunk: int,
    tp_rank: int,
    ep_rank: int,
    spec: LayerSpec,
    etp_rank: int | None = None,
) -> tuple[LocalParam, ...]:
    """What the ``state_dict`` of a rank's model chunk holds, in its order, untrained included.

    Arguments and errors are those of :func:`local_params`.
    """
    dims, stage = model.dims, pipeline.stage(pp_rank, chunk)
    place = _Place(model, layout, tp_rank, ep_rank, _expert_tp_rank(layout, tp_rank, etp_rank))
    tied_copy = dims.tied_embeddings and not stage.first
    weights: list[LocalParam] = []
    if stage.first:
        weights += place.params(embedding_rows(dims), "", "")
    for index, layer in enumerate(stage.layers):
        rows = layer_rows(model, layer, spec, place.local_experts)
        weights += place.params(rows, f"{_LAYERS}{index}.", f"{_LAYERS}{layer}.")
    if stage.last:
        weights += place.params(output_rows(dims, tied_copy=tied_copy), "", "")
    if not dims.tied_embeddings or pipeline.pp_size == 1:
        return tuple(weights)
    return tuple(
        replace(param, shared_embedding=True, tied_copy=param.name == OUTPUT)
        if param.canonical == EMBEDDING
        else param
        for param in weights
    )


def stored_name(model: ModelSpec, name: str, spec: LayerSpec) -> StoredName:
    """Where a job with these modules keeps a canonical tensor in ``torch_dist``.

    Only names of norms depend on ``spec``. Upstream stores each under the name it has in its
    module, but for the local spec's norms of usual attention, which it stores as if they were fused
    into linear layers.
    """
    if not (match := _LAYER_KEY.fullmatch(name)):
        return StoredName(name, None)
    layer, rest = int(match[1]), match[2]
    for norm, stored in _stored_norms(model.dims, layer, spec).items():
        rest = rest.replace(norm, stored)
    if model.stacked_layers:
        return StoredName(f"{_LAYERS}{rest}", layer)
    return StoredName(f"{_LAYERS}{layer}.{rest}", None)


def canonical_name(key: str, layer: int | None = None) -> str:
    """The canonical name of what ``torch_dist`` stores under a key, whichever spec wrote it.

    Args:
        key: Of a tensor of the model.
        layer: Index on its leading axis, where that is the axis of the layers.

    Raises:
        CheckpointError: The key names a layer and there is an index as well, or neither.
    """
    if not (match := _LAYER_KEY.fullmatch(key)):
        return key
    number, rest = match.groups()
    if (number is None) == (layer is None):
        raise CheckpointError(
            "it is not clear which layer a tensor belongs to",
            where=key,
            expected="a layer number in its name, or an axis of layers",
            got=f"index {layer}",
        )
    for stored, norm in _CANONICAL_NORMS.items():
        if rest.startswith(stored):
            rest = norm + rest.removeprefix(stored)
    return f"{_LAYERS}{layer if number is None else int(number)}.{rest}"


def _stored_norms(dims: ModelDims, layer: int, spec: LayerSpec) -> dict[str, str]:
    """What the norms of a layer are called in a checkpoint, where that is not canonical."""
    fused, is_moe = spec == "transformer_engine", layer in dims.moe_layers
    if dims.latent is None:
        return {MLP_NORM: PRE_MLP_NORM} if fused and is_moe else {}
    names = {QKV_NORM: INPUT_NORM}
    if is_moe or not fused:
        names[MLP_NORM] = PRE_MLP_NORM
    if fused:
        names[Q_NORM] = Q_PROJ_NORM if dims.latent.q_lora_rank is None else Q_UP_NORM
        names[KV_NORM] = KV_UP_NORM
    return names


def has_weight_decay(param: LocalParam, *, qk_norms: bool = False) -> bool:
    """Whether the optimizer lets a parameter decay, which decides its parameter group.

    Args:
        param: The parameter.
        qk_norms: Whether the norms of queries and keys do (``--apply-wd-to-qk-layernorm``).
    """
    if qk_norms and re.search(r"[qk]_layernorm\.", param.name):
        return True
    return len(param.shape) > 1 and not param.name.endswith(".bias")


class _Arguments(dict[str, Any]):
    """Arguments in which one that is missing was not given."""

    def __missing__(self, dest: str) -> None:
        return None


def _verify_known(values: Mapping[str, Any]) -> None:
    for dest in (*OTHER_MODELS, *_OTHER_NAMES):
        if values[dest]:
            raise ConfigError(
                "the parameters of such a model are not known here",
                where=f"--{dest.replace('_', '-')}",
                expected="not given",
                got=values[dest],
            )
    for dest, known in _KNOWN.items():
        if values[dest] is not None and values[dest] not in known:
            raise ConfigError(
                "the parameters of such a model are not known here",
                where=f"--{dest.replace('_', '-')}",
                expected=" or ".join(map(str, known)),
                got=values[dest],
            )
    frequency, layers = values["moe_layer_freq"], values["num_layers"]
    if isinstance(frequency, list) and (
        len(frequency) != layers or any(item not in (0, 1) for item in frequency)
    ):
        raise ConfigError(
            "the pattern of layers with experts does not fit the model",
            where="--moe-layer-freq",
            expected=f"0 or 1 for each of {layers} layers",
            got=frequency,
        )
    if not isinstance(frequency, list | int | None) or frequency in (0, []):
        raise ConfigError(
            "the pattern of layers with experts cannot be read",
            where="--moe-layer-freq",
            expected="a number, or a list as upstream parses it",
            got=repr(frequency),
        )


@dataclass(frozen=True)
class _Place:
    """A rank of the grid, and what rows become on it."""

    model: ModelSpec
    layout: ParallelLayout
    tp_rank: int
    ep_rank: int
    etp_rank: int

    def __post_init__(self) -> None:
        sizes = (self.layout.tp_size, self.layout.ep_size, self.layout.expert_tp_size)
        ranks = (self.tp_rank, self.ep_rank, self.etp_rank)
        if not all(0 <= rank < size for rank, size in zip(ranks, sizes, strict=True)):
            raise ValueError(f"ranks {ranks} of tensor, expert, expert tensor sizes {sizes}")

    @property
    def local_experts(self) -> int:
        """Experts of a layer on this rank."""
        experts, ep_size = self.model.dims.num_experts or 0, self.layout.ep_size
        if experts % ep_size:
            raise _does_not_divide("the experts", experts, "--expert-model-parallel-size", ep_size)
        return experts // ep_size

    def params(self, rows: Iterable[Row], name: str, canonical: str) -> Iterator[LocalParam]:
        """The rows as this rank holds them, with a prefix for each kind of name."""
        layout = self.layout
        # So upstream decides it, for local modules and those of Transformer Engine.
        own_grid = layout.ep_size > 1 or layout.expert_tp_size != layout.tp_size
        for row in rows:
            shape, parts = self._parts(row)
            yield LocalParam(
                f"{name}{row.name}",
                f"{canonical}{row.canonical}",
                shape,
                parts,
                dtype=row.dtype or self.model.dtype,
                trained=row.trained,
                expert=row.expert,
                expert_parallel=row.expert and own_grid,
            )

    def _parts(self, row: Row) -> tuple[tuple[int, ...], tuple[tuple[Box, int], ...]]:
        layout = self.layout
        expert_tp = (layout.expert_tp_size, self.etp_rank, "--expert-tensor-parallel-size")
        dense_tp = (layout.tp_size, self.tp_rank, "--tensor-model-parallel-size")
        size, rank, flag = expert_tp if row.expert else dense_tp
        if row.split is None:
            shapes, boxes = row.shape, [Box.whole(row.shape)]
        else:
            dim, whole = row.split, row.shape[row.split]
            if whole % (row.blocks * size):
                raise _does_not_divide(row.canonical, whole // row.blocks, flag, size)
            block, part = whole // row.blocks, whole // row.blocks // size
            shapes = (*row.shape[:dim], row.blocks * part, *row.shape[dim + 1 :])
            boxes = [
                Box(
                    tuple((k * block + rank * part) * (i == dim) for i in range(len(row.shape))),
                    (*row.shape[:dim], part, *row.shape[dim + 1 :]),
                )
                for k in range(row.blocks)
            ]
        if row.expert:
            expert = self.ep_rank * self.local_experts + row.index
            boxes = [Box((expert, *box.offset), (1, *box.shape)) for box in boxes]
        return shapes, tuple((box, k * box.numel) for k, box in enumerate(boxes))


def _expert_tp_rank(layout: ParallelLayout, tp_rank: int, etp_rank: int | None) -> int:
    if etp_rank is not None:
        return etp_rank
    # In both grids this axis changes fastest from rank to rank.
    if layout.tp_size % layout.expert_tp_size:
        raise ConfigError(
            "the tensor parallel rank does not say which part of the experts a rank holds",
            where="--expert-tensor-parallel-size",
            expected=f"a divisor of TP {layout.tp_size}, or an expert tensor parallel rank",
            got=layout.expert_tp_size,
        )
    return tp_rank % layout.expert_tp_size


def _does_not_divide(what: str, number: int, flag: str, size: int) -> ConfigError:
    return ConfigError(
        f"a tensor does not divide between the ranks: {what}",
        where=flag,
        expected=f"a divisor of {number}",
        got=size,
        cure=f"another {flag}",
    )
