"""What a model family is: a table of tensors, and the two directions of its configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flagscale.ckpt_convert.features import Arguments
from flagscale.ckpt_convert.tensors import Row

__all__ = ["Config", "Family", "as_saved"]

Config = dict[str, Any]
"""Fields of a ``config.json``."""


def as_saved(rows: Iterable[Row]) -> tuple[Row, ...]:
    """Rows in the order in which ``save_pretrained`` splits a model into files.

    Of a model that was loaded, that is the natural order of the names in memory, where a layer's
    experts are one tensor. So a directory of ours is what loading and saving it makes of it.

    Args:
        rows: With the names in memory, but for the number of an expert.

    Source: transformers 5.23, core_model_loading.py (``revert_weight_conversion``).
    """
    return tuple(sorted(rows, key=lambda row: row.hf.split(".")))


@dataclass(frozen=True)
class Family:
    """A model family.

    Args:
        name: As ``--family`` takes it.
        model_type: Hugging Face's name of the configuration.
        architecture: Hugging Face's name of the model class, written as ``architectures``.
        rows: Its tensors, in the order of :func:`as_saved`.
        needs: Features a model of it always has.
        may: Features it may have.
        config: The fields of ``config.json`` that the arguments of a job decide.
        arguments: The arguments, by attribute, that a ``config.json`` decides; the converse.
        fused: Rows that other releases wrote in the place of those of single experts.
        other_architectures: Names that ``--architectures`` may give it, for the same tensors.
    """

    name: str
    model_type: str
    architecture: str
    rows: tuple[Row, ...]
    config: Callable[[Arguments], Config]
    arguments: Callable[[Mapping[str, Any]], dict[str, Any]]
    needs: frozenset[str] = frozenset()
    may: frozenset[str] = frozenset()
    fused: tuple[Row, ...] = ()
    other_architectures: tuple[str, ...] = ()

    def unfit(self, seen: frozenset[str]) -> tuple[frozenset[str], frozenset[str]]:
        """The features of a model that the family lacks, and those it needs and the model lacks."""
        return seen - self.needs - self.may, self.needs - seen
