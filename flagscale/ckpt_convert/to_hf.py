"""A Megatron checkpoint as a Hugging Face model: the plan, its execution, its proof."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from flagscale.ckpt_convert import companions
from flagscale.ckpt_convert.card import model_card
from flagscale.ckpt_convert.families import Family, family_of_arguments, family_of_config
from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.proof.claim import Claim
from flagscale.ckpt_convert.tensors import HFTensor, Shape, hf_tensors, pieces_in
from flagscale.ckpt_copy import run as copying
from flagscale.ckpt_copy.run import Copy
from flagscale.ckpt_io.output import OutputFile
from flagscale.ckpt_io.safetensors_plan import PlannedTensor, plan_files
from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.pieces import OPTIMIZER_KINDS, Piece
from flagscale.optim.source import Source, damage_named

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["COMPANIONS", "OPTIMIZER", "Dtype", "Export", "plan_export"]

COMPANIONS: Final = "hf"
"""In the directory of an iteration: the configuration and tokenizer of the Hugging Face model that
it was converted from."""

OPTIMIZER: Final = "optimizer"
"""In a Hugging Face directory: the states of the optimizer, where they were asked for."""

Dtype = Literal["bf16", "fp16", "fp32", "as-saved"]

_DTYPES: Final = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Export:
    """What is to be written, all of it, before anything is.

    Args:
        source: The opened checkpoint.
        family: Of the model.
        shape: What decides how tensors are cut.
        tensors: Of the Hugging Face model.
        dtype: Torch's name of their element type, but for those that have one of their own.
        files: Those of the weights; then the others.
        copy: How to fill them.
        notes: What whoever uses the model must know.
    """

    source: Source
    family: Family
    shape: Shape
    tensors: tuple[HFTensor, ...]
    dtype: str
    files: tuple[OutputFile, ...]
    copy: Copy
    notes: tuple[str, ...]

    def claim(self, hf_dir: Path) -> Claim:
        """What is to be proved of a directory that holds the model."""
        return Claim(self.source, hf_dir, self.tensors, self.shape, self.dtype)

    def state_claims(self, hf_dir: Path) -> Iterator[Claim]:
        """The same of the states of the optimizer, if they were asked for."""
        trained = tuple(
            one for one in self.tensors if self.source.job.tensors[one.canonical].trained
        )
        kinds = {piece.tensor.kind for piece in self.copy.plan.targets} - {"weight"}
        for kind in sorted(kinds):
            place = hf_dir / OPTIMIZER / kind
            yield Claim(self.source, place, trained, self.shape, "float32", kind)


def plan_export(
    source: Source,
    *,
    family: str = "auto",
    dtype: Dtype = "as-saved",
    max_shard_size: int | str = "5GB",
    tokenizer: Path | None = None,
    like: Path | None = None,
    architectures: str | None = None,
    with_optimizer: bool = False,
) -> Export:
    """Plan an export and check the plan to the last element; no tensor is read.

    Args:
        source: The opened checkpoint; its weights are enough, but for ``with_optimizer``.
        family: Name of the model family; ``"auto"``: whichever has the model's features.
        dtype: Of the tensors.
        max_shard_size: Of a file, in bytes or in words (``"5GB"`` is 5 x 1000^3).
        tokenizer: Directory of the tokenizer; ``None``: the one the checkpoint came with, or was
            trained with.
        like: Directory of a Hugging Face model, for what a checkpoint does not know: fields of its
            configuration, settings of generation, the tokenizer.
        architectures: Another name for the model class.
        with_optimizer: Whether the states of the optimizer are written as well, each as safetensors
            of its own with the weights' names, in ``optimizer/``.

    Raises:
        ConfigError: An argument is wrong, or the tokenizer does not fit.
        CheckpointError: The model is of no family, or has tensors that its family does not.
    """
    args = Arguments(vars(source.args))
    like = like or _companions(source)
    if family == "auto" and like is not None:  # tells apart what the tensors alone do not
        family = family_of_config(companions.read_json(like / companions.CONFIG)).name
    chosen = family_of_arguments(args, family)
    place = tokenizer or _tokenizer_of(args, like)
    reader = companions.load_tokenizer(place) if place else None
    vocab_size = _vocab_size(source, args, reader, place)
    shape = Shape.of(args, source.job.model, vocab_size)
    tensors = tuple(hf_tensors(chosen.rows, shape))
    _verify_complete(source, tensors, shape)
    element = _DTYPES.get(dtype, source.job.model.dtype)
    with damage_named(source.directory):
        decided = chosen.config(args)
    fields = {
        **decided,
        "architectures": [_architecture(chosen, architectures)],
        "dtype": element,
        "vocab_size": vocab_size,
    }
    weights = _plan_tensors(source, "weight", tensors, element, max_shard_size)
    states = [
        _plan_tensors(source, kind, tensors, "float32", max_shard_size)
        for kind in (OPTIMIZER_KINDS if with_optimizer else ())
    ]
    ids = companions.special_ids(reader) if reader else {}
    texts = _texts(source, chosen, fields, like, place, ids)
    if with_optimizer:
        texts[f"{OPTIMIZER}/state.json"] = _optimizer_state(source)
    files = (
        *(file for planned, _ in (weights, *states) for file in planned),
        *(_text_file(path, data) for path, data in sorted(texts.items())),
    )
    targets = tuple(piece for _, pieces in (weights, *states) for piece in pieces)
    copy = copying.prepare(
        source.directory,
        source.pieces,
        files,
        targets,
        conversions=copying.conversions(source.pieces, targets),
    )
    return Export(source, chosen, shape, tensors, element, files, copy, _notes(texts, reader))


def _plan_tensors(
    source: Source,
    kind: str,
    tensors: Iterable[HFTensor],
    dtype: str,
    max_shard_size: int | str,
) -> tuple[tuple[OutputFile, ...], tuple[Piece, ...]]:
    """The files of the weights, or of a state of the optimizer, and what their holes hold."""
    held = [one for one in tensors if kind == "weight" or source.job.tensors[one.canonical].trained]
    plan = plan_files(
        [
            PlannedTensor(
                one.name,
                dtype if kind != "weight" else one.dtype or dtype,
                one.shape,
                one.block,
                source.job.tensors[one.canonical].trained,
            )
            for one in held
        ],
        max_shard_size,
    )
    place = "" if kind == "weight" else f"{OPTIMIZER}/{kind}/"
    places = {
        name: (f"{place}{path}", hole.offset, hole.dtype)
        for name, (path, hole) in plan.holes.items()
    }
    files = tuple(replace(file, path=f"{place}{file.path}") for file in plan.files)
    return files, tuple(pieces_in(held, places, kind))


def _optimizer_state(source: Source) -> bytes:
    """What the optimizer and its scheduler keep besides tensors, as JSON."""
    kept = {
        "iteration": source.iteration,
        "optimizers": list(source.optimizers),
        "opt_param_scheduler": source.common.get("opt_param_scheduler"),
        "consumed_train_samples": vars(source.args).get("consumed_train_samples"),
    }
    return json.dumps(kept, indent=2, sort_keys=True, default=str).encode() + b"\n"


def _companions(source: Source) -> Path | None:
    place = source.directory / COMPANIONS
    return place if (place / companions.CONFIG).is_file() else None


def _tokenizer_of(args: Arguments, like: Path | None) -> Path | None:
    """The directory of the tokenizer that the model was trained with, as far as it is there."""
    trained = Path(str(args["tokenizer_model"] or "/dev/null"))
    for place in (like, trained):
        if place is not None and place.is_dir() and companions.companion_files(place):
            return place
    return None


def _vocab_size(
    source: Source, args: Arguments, reader: PreTrainedTokenizerBase | None, place: Path | None
) -> int:
    """The number of real tokens, which the tokenizer must fit."""
    padded = source.job.model.dims.padded_vocab_size or 0
    if reader is None:
        return int(args["vocab_size"] or padded)
    vocab_size = int(args["vocab_size"] or len(reader))
    if not 0 < vocab_size <= padded:
        raise ConfigError(
            "the vocabulary does not fit the model",
            where=str(place),
            expected=f"at most {padded} tokens",
            got=vocab_size,
            cure="give the tokenizer that the model was trained with",
        )
    companions.verify_tokenizer(reader, vocab_size, str(place))
    return vocab_size


def _notes(texts: Mapping[str, bytes], reader: PreTrainedTokenizerBase | None) -> tuple[str, ...]:
    if reader is None:
        return ("no tokenizer was found, so none is written: --tokenizer DIR",)
    if companions.is_read_alike(texts, reader):
        return ()
    return (
        "AutoTokenizer takes another class for this type of model and splits text otherwise: load "
        "the tokenizer with PreTrainedTokenizerFast.from_pretrained",
    )


def _architecture(family: Family, asked: str | None) -> str:
    known = (family.architecture, *family.other_architectures)
    if asked is not None and asked not in known:
        raise ConfigError(
            "the family has no such model class",
            where="--architectures",
            expected=" or ".join(known),
            got=asked,
        )
    return asked or family.architecture


def _texts(
    source: Source,
    family: Family,
    fields: Mapping[str, Any],
    like: Path | None,
    tokenizer: Path | None,
    ids: Mapping[str, int | None],
) -> dict[str, bytes]:
    """The files beside the weights, by path."""
    config: dict[str, Any] = {}
    generation: dict[str, Any] | None = None
    if like is not None:
        config = companions.read_json(like / companions.CONFIG)
        if config.get("model_type") != family.model_type:
            raise ConfigError(
                "the model that the export is to be like is of another kind",
                where=str(like / companions.CONFIG),
                expected=f"model_type {family.model_type}",
                got=config.get("model_type"),
                cure="another --like, or --family",
            )
        config, ids = companions.completed_config(config), {}  # that model's own
        if _says_the_same(family, config, vars(source.args)):
            fields = {key: fields[key] for key in ("architectures", "dtype", "vocab_size")}
        if (like / companions.GENERATION_CONFIG).is_file():
            generation = companions.read_json(like / companions.GENERATION_CONFIG)
    files = companions.config_files(family.model_type, fields, config, generation, ids)
    if tokenizer is not None:
        files |= companions.companion_files(tokenizer)
    return files | {"README.md": model_card(source, family, fields).encode()}


def _says_the_same(family: Family, config: Mapping[str, Any], args: Mapping[str, Any]) -> bool:
    """Whether a configuration describes the model, and so can be kept word for word."""
    with damage_named(Path(companions.CONFIG)):
        return all(args.get(key) == value for key, value in family.arguments(config).items())


def _text_file(path: str, data: bytes) -> OutputFile:
    return OutputFile(path, len(data), ((0, data),) if data else ())


def _verify_complete(source: Source, tensors: Iterable[HFTensor], shape: Shape) -> None:
    """Every element of the source's weights, pad rows aside, is in exactly one tensor.

    Parts of a tensor never overlap, and neither do those of different rows of a table, which a test
    holds for every family; so it is enough to count.
    """
    used: dict[str, int] = {}
    for tensor in tensors:
        used[tensor.canonical] = used.get(tensor.canonical, 0) + prod(tensor.shape)
    vocabulary = {tensor.canonical for tensor in tensors if tensor.take == "vocab"}
    padded = shape.model.dims.padded_vocab_size or 1
    for name, canonical in source.job.tensors.items():
        expected = prod(canonical.shape)
        if name in vocabulary:
            expected = expected // padded * shape.vocab_size
        if used.get(name, 0) != expected:
            raise CheckpointError(
                "the model has a tensor that its family does not",
                where=f"{source.directory}, {name}",
                expected=f"{expected:,} elements used",
                got=f"{used.get(name, 0):,}",
                cure="another --family, or a row for it: docs/convert.md",
            )
