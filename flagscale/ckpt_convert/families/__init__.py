"""The model families that can be converted, one module each.

A new family is one module with a :class:`~flagscale.ckpt_convert.families.family.Family`, a line
here, and its test.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families import (
    aquila,
    deepseek,
    llama,
    mistral,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from flagscale.ckpt_convert.families.family import Family
from flagscale.ckpt_convert.features import features
from flagscale.errors import CheckpointError, ConfigError

__all__ = ["FAMILIES", "Family", "family_of_arguments", "family_of_config", "named_family"]

FAMILIES: Final[tuple[Family, ...]] = (
    llama.FAMILY,
    aquila.FAMILY,
    qwen2.FAMILY,
    qwen3.FAMILY,
    mistral.FAMILY,
    mixtral.FAMILY,
    qwen3_moe.FAMILY,
    deepseek.V2,
    deepseek.V3,
)
"""In the order in which they are tried: the first that has all the features of a model takes it."""


def named_family(name: str) -> Family:
    """The family of a name.

    Raises:
        ConfigError: There is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ConfigError(
        "there is no such model family",
        where="--family",
        expected=", ".join(family.name for family in FAMILIES),
        got=name,
    )


def family_of_arguments(args: Mapping[str, Any], name: str = "auto") -> Family:
    """The family that a job's model is of.

    Args:
        args: Arguments of the job, by attribute.
        name: The family that was asked for; ``"auto"``: whichever has the model's features.

    Raises:
        CheckpointError: The model has a feature that the family, or every family, lacks.
    """
    seen = features(args)
    asked = FAMILIES if name == "auto" else (named_family(name),)
    unfit = {family: family.unfit(frozenset(seen)) for family in asked}
    for family, (lacks, needs) in unfit.items():
        if not lacks and not needs:
            return family

    def distance(family: Family) -> tuple[int, int, int]:
        lacks, needs = unfit[family]
        return len(lacks) + len(needs), len(needs), -len(family.needs)

    nearest = min(unfit, key=distance)
    lacks, needs = unfit[nearest]
    raise CheckpointError(
        "the model is of no family that can be converted",
        where=", ".join(sorted(seen.get(feature, feature) for feature in lacks)) or nearest.name,
        expected=f"{nearest.name}, the nearest, "
        + " and ".join(
            [f"does not have {', '.join(sorted(lacks))}"] * bool(lacks)
            + [f"needs {', '.join(sorted(needs))}"] * bool(needs)
        ),
        got="a model with " + (", ".join(sorted(seen)) or "no special features"),
        cure="docs/convert.md tells how to add a family",
    )


def family_of_config(config: Mapping[str, Any]) -> Family:
    """The family of a Hugging Face model.

    Args:
        config: Content of its ``config.json``.

    Raises:
        CheckpointError: Its ``model_type`` is none of a family here.
    """
    wanted = (config.get("model_type"), (config.get("architectures") or [None])[0])
    for exact in (True, False):
        for family in FAMILIES:
            names = (family.architecture, *family.other_architectures)
            if family.model_type == wanted[0] and (not exact or wanted[1] in names):
                return family
    raise CheckpointError(
        "the model is of no family that can be converted",
        where="config.json, model_type",
        expected=", ".join(sorted({family.model_type for family in FAMILIES})),
        got=repr(wanted[0]),
        cure="docs/convert.md tells how to add a family",
    )
