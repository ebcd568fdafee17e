"""A Hugging Face model as a Megatron checkpoint: the plan."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import gcd
from pathlib import Path
from typing import Any

import yaml

from flagscale.ckpt_convert import companions
from flagscale.ckpt_convert.opening import HFModel
from flagscale.ckpt_convert.proof.claim import Claim
from flagscale.ckpt_convert.to_hf import COMPANIONS
from flagscale.ckpt_copy import run as copying
from flagscale.ckpt_copy.run import Copy
from flagscale.ckpt_io.output import OutputFile
from flagscale.errors import ConfigError
from flagscale.launch.options import Option, OptionTable
from flagscale.optim.carry import Request
from flagscale.optim.opening import open_source
from flagscale.optim.source import damage_named
from flagscale.optim.target import CkptFormat, Target, plan_target

__all__ = ["RECIPE", "Import", "model_section", "plan_import"]

RECIPE = f"{COMPANIONS}/recipe.yaml"
"""The model's arguments as a section of a recipe; relative to the directory of the iteration."""


@dataclass(frozen=True)
class Import:
    """What is to be written, all of it, before anything is.

    Args:
        model: The opened Hugging Face model.
        target: The Megatron checkpoint.
        copy: How to fill its files.
        section: The model's arguments, as a recipe has them.
    """

    model: HFModel
    target: Target
    copy: Copy
    section: Mapping[str, Any]

    def claim(self, directory: Path) -> Claim:
        """What is to be proved of a directory that holds the checkpoint."""
        model = self.model
        written = open_source(directory, weights_only=True)
        return Claim(written, model.source.directory, model.tensors, model.shape, None)


def plan_import(
    model: HFModel,
    request: Request,
    options: OptionTable,
    *,
    ckpt_format: CkptFormat = "torch_dist",
    divisible_by: int = 128,
    tokenizer: Path | None = None,
) -> Import:
    """Plan an import and check the plan to the last element; no tensor is read.

    Args:
        model: The opened model.
        request: The layout to write; sizes left out are 1.
        options: Of the training program, for the recipe's section.
        ckpt_format: Upstream's name of the format.
        divisible_by: As ``--make-vocab-size-divisible-by``: with the tensor parallel size it tells
            how far the vocabulary is padded. Pad rows are zero.
        tokenizer: Directory of the tokenizer; ``None``: the model's own, if it has one.

    Raises:
        ConfigError: The model does not fit the layout, or the tokenizer does not fit the model.
    """
    if divisible_by < 1:
        raise ConfigError(
            "a vocabulary cannot be divided like this",
            where="--make-vocab-size-divisible-by",
            expected="at least 1",
            got=divisible_by,
        )
    source = model.source
    args = Namespace(**{**vars(source.args), "make_vocab_size_divisible_by": divisible_by})
    source = replace(source, args=args)
    request = _sized(request, model.shape.vocab_size, divisible_by)
    with damage_named(source.directory):
        target = plan_target(source, request, ckpt_format, "none")
    section = model_section(vars(target.args), model.family.arguments(model.config), options)
    texts = _companions(model, tokenizer, section)
    files = [OutputFile(path, len(data), ((0, data),)) for path, data in sorted(texts.items())]
    copy = copying.prepare(
        source.directory,
        source.pieces,
        (*target.files, *files),
        target.pieces,
        zero_fill=target.zero_fill,
        conversions=copying.conversions(source.pieces, target.pieces),
    )
    return Import(model, target, copy, section)


def _sized(request: Request, vocab_size: int, divisible_by: int) -> Request:
    """The request with every size told, and as many ranks as the experts need."""
    tp, ep = request.tp_size or 1, request.ep_size or 1
    experts = ep * (request.etp_size or tp)
    step = divisible_by * tp
    return replace(
        request,
        dp_size=request.dp_size or experts // gcd(tp, experts),
        padded_vocab_size=-(-vocab_size // step) * step,
        allow_vocab_growth=True,
    )


def _companions(
    model: HFModel, tokenizer: Path | None, section: Mapping[str, Any]
) -> dict[str, bytes]:
    """What the model's directory holds besides weights, for the way back, and the recipe."""
    directory = model.source.directory
    place = tokenizer or directory
    files = companions.companion_files(place)
    if tokenizer is not None or files:
        loaded = companions.load_tokenizer(place)
        companions.verify_tokenizer(loaded, model.shape.vocab_size, str(place))
    for name in (companions.CONFIG, companions.GENERATION_CONFIG):
        if (directory / name).is_file():
            files[name] = (directory / name).read_bytes()
    told = {f"{COMPANIONS}/{name}": data for name, data in files.items()}
    return told | {RECIPE: yaml.safe_dump({"model": dict(section)}, sort_keys=True).encode()}


def model_section(
    args: Mapping[str, Any], model: Mapping[str, Any], options: OptionTable
) -> dict[str, Any]:
    """The arguments of a model as a recipe has them: by option, without ``--``.

    Args:
        args: Of the job that it was written for, by attribute.
        model: Those that its configuration decides, by attribute.
        options: Of the training program.
    """
    wanted = [*model, "padded_vocab_size", "seq_length"]
    section: dict[str, Any] = {}
    for option in options:
        if option.dest in wanted and (value := _value(option, args.get(option.dest))) is not None:
            section.setdefault(option.dest, (option.name.removeprefix("--"), value))
    return dict(section.values())


def _value(option: Option, value: Any) -> Any:
    """What a recipe says; ``None``: nothing, as the option is not needed."""
    if option.nargs == 0:
        return True if value == option.const and value != option.default else None
    if value is None or value == option.default:
        return None
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, list) else value
