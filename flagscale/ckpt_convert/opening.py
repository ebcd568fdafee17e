"""Opens a Hugging Face model as a source like any other: pieces of Megatron's canonical tensors."""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flagscale.ckpt_convert import companions
from flagscale.ckpt_convert.families import Family, family_of_config
from flagscale.ckpt_convert.families.family import as_saved
from flagscale.ckpt_convert.tensors import HFTensor, Shape, hf_tensors, pieces_in
from flagscale.ckpt_io import safetensors_files
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.values import StoredTensor
from flagscale.errors import CheckpointError
from flagscale.layout.pieces import TensorKey
from flagscale.layout.rows import LayerSpec
from flagscale.optim.extra_state import expected_states
from flagscale.optim.job import Job
from flagscale.optim.source import Source, damage_named

__all__ = ["HFModel", "open_hf"]

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_TYPES: Final = ("float32", "bfloat16", "float16")
_BLOCK: Final = 8 << 20  # bytes compared at once


@dataclass(frozen=True)
class HFModel:
    """An opened Hugging Face model.

    Args:
        source: Its weights in Megatron's coordinates, and the arguments of a job that fits them.
        family: Of the model.
        config: Its configuration, with every field.
        shape: What decides how tensors are cut.
        tensors: Its tensors.
    """

    source: Source
    family: Family
    config: Mapping[str, Any]
    shape: Shape
    tensors: tuple[HFTensor, ...]


def open_hf(
    directory: Path, dtype: str | None = None, spec: LayerSpec = "transformer_engine"
) -> HFModel:
    """Open a model as ``save_pretrained`` writes it; no tensor is loaded.

    Args:
        directory: Holds ``config.json`` and safetensors.
        dtype: Torch's name of the type that Megatron shall have; ``None``: that of the tensors.
        spec: Which modules the layers of the job are made of. ``torch_dist`` serves either.

    Raises:
        CheckpointError: It is damaged, of no known family, or its tensors are not those that its
            configuration describes.
    """
    config = companions.read_json(directory / companions.CONFIG)
    family = family_of_config(config)
    stored = safetensors_files.read(directory)
    config = companions.completed_config(config)
    with damage_named(directory / companions.CONFIG):
        args = _arguments(family, config, dtype or _element_type(stored.tensors, directory))
        args.transformer_impl = spec
        job = Job.saved(args, str(directory))
        shape = Shape.of(vars(args), job.model, int(config["vocab_size"]))
        tensors = _tensors(family, shape, stored.tensors)
        _verify_stored(directory, tensors, stored.tensors)
    places = {name: (one.file, one.offset, one.dtype) for name, one in stored.tensors.items()}
    source = Source(
        directory=directory,
        iteration=0,
        ckpt_format="safetensors",
        optim_format="none",
        args=args,
        job=job,
        tensors={
            TensorKey("weight", name): (tensor.shape, tensor.dtype)
            for name, tensor in job.tensors.items()
        },
        pieces=tuple(pieces_in(tensors, places)),
        common={"checkpoint_version": 3.0, "iteration": 0},
        optimizers=(),
        rng={},
        extra_states=expected_states(job.tensors),
        spec=spec,
    )
    return HFModel(source, family, config, shape, tensors)


def _element_type(tensors: Mapping[str, StoredTensor], directory: Path) -> str:
    counts = Counter(tensor.dtype for tensor in tensors.values())
    dtype = counts.most_common(1)[0][0] if counts else "none"
    if dtype not in _TYPES:
        raise CheckpointError(
            "the weights are of a type that is not trained in",
            where=str(directory),
            expected=", ".join(_TYPES),
            got=dtype,
            cure="a model that is not quantized",
        )
    return dtype


def _arguments(family: Family, config: Mapping[str, Any], dtype: str) -> Namespace:
    """The arguments of a job of one rank with this model, as a checkpoint would hold them."""
    import torch

    model = family.arguments(config)
    length = model["max_position_embeddings"]
    return Namespace(
        **{
            "context_parallel_size": 1,
            "data_parallel_size": 1,
            "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": 1,
            "expert_tensor_parallel_num_weight_shards": 1,
            "pipeline_model_parallel_size": 1,
            "tensor_model_parallel_size": 1,
            "tensor_parallel_num_weight_shards": 1,
            "transformer_pipeline_model_parallel_size": 1,
            "virtual_pipeline_model_parallel_size": None,
            "world_size": 1,
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
            "params_dtype": getattr(torch, dtype),
            "consumed_train_samples": 0,
            "consumed_valid_samples": 0,
            "skipped_train_samples": 0,
            "encoder_seq_length": length,
            "seq_length": length,
            "make_vocab_size_divisible_by": 1,
            "no_save_optim": True,
            "no_save_rng": True,
            "num_experts": None,
            "moe_layer_freq": 1,
            "moe_router_topk": 2,
            "padded_vocab_size": config["vocab_size"],
            "vocab_size": config["vocab_size"],
            "use_distributed_optimizer": True,
        }
        | model
    )


def _tensors(
    family: Family, shape: Shape, stored: Mapping[str, StoredTensor]
) -> tuple[HFTensor, ...]:
    """The tensors as the files have them: experts one by one, or fused."""
    tensors = tuple(hf_tensors(family.rows, shape))
    if family.fused:
        elsewhere = {row.canonical for row in family.fused}
        others = [row for row in family.rows if row.canonical not in elsewhere]
        fused = tuple(hf_tensors(as_saved([*others, *family.fused]), shape))
        if len(stored.keys() & {one.name for one in fused}) > len(
            stored.keys() & {one.name for one in tensors}
        ):
            return fused
    return tensors


def _verify_stored(
    directory: Path, tensors: Iterable[HFTensor], stored: Mapping[str, StoredTensor]
) -> None:
    """Hold what is stored to what the configuration says of the model."""
    expected = {tensor.name: tensor.shape for tensor in tensors}
    found = {name: tensor.shape for name, tensor in stored.items()}
    if found.keys() - expected.keys() == {_HEAD} and _are_tied(directory, stored):
        del found[_HEAD]
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                "the configuration does not agree with the tensors",
                where=f"{directory}, {name}",
                expected=_told(expected.get(name)),
                got=_told(found.get(name)),
                cure="a model of another family, or damaged",
            )


def _are_tied(directory: Path, stored: Mapping[str, StoredTensor]) -> bool:
    """Whether the head is stored beside the embedding that it is, to the bit."""
    head, embedding = stored[_HEAD], stored.get(_EMBEDDING)
    if embedding is None or (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    with Sources(directory) as sources:
        for start in range(0, head.nbytes, _BLOCK):
            size = min(_BLOCK, head.nbytes - start)
            one = sources.read(head.file, head.offset + start, size)
            if one != sources.read(embedding.file, embedding.offset + start, size):
                return False
    return True


def _told(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(shape)
