"""What the configuration of a transformers model says of a method, and what its positions are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from torch.utils.weak import WeakIdKeyDictionary
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flagattention.errors import AttentionError, BackendError
from flagattention.nlpe import Method, Rotary

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "IMPLEMENTATION", "MODEL_TYPES", "ROPE_TYPE", "Settings", "frequencies", "method_of",
    "refuse_other_attention", "rope_parameters", "settings_of", "validate", "without_method",
]  # fmt: skip

IMPLEMENTATION = "flagattention"
"""The attention, as ``attn_implementation`` names it."""

ROPE_TYPE = "flagattention_nlpe"
"""The ``rope_type`` of a model that this module serves."""

MODEL_TYPES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""Models known to rotate whole heads by halves, and to tell the attention its positions."""

_SCALINGS = ("linear", "llama3", "yarn")
"""Rope types below: their frequencies do not change with the length of the text."""

_BASE = ("rope_theta", "partial_rotary_factor")


def rope_parameters(method: Method, rope: Mapping[str, Any]) -> dict[str, Any]:
    """The ``rope_parameters`` of a model that reads with a method.

    Args:
        method: Where far keys are put.
        rope: The model's parameters without it; "linear", "llama3" and "yarn" are kept below.
    """
    base = {key: rope[key] for key in _BASE if key in rope}
    scaling = {key: value for key, value in rope.items() if key not in _BASE}
    settings = {key: value for key, value in asdict(method).items() if value not in (None, 0)}
    found = {"rope_type": ROPE_TYPE, **base, "method": settings.pop("name"), **settings}
    return (
        found if scaling.get("rope_type", "default") == "default" else found | {"scaling": scaling}
    )


def method_of(rope: Mapping[str, Any]) -> Method:
    """The method that a model's parameters name.

    Raises:
        AttentionError: There is none, or a setting is wrong, unknown or missing.
    """
    settings = {k: v for k, v in rope.items() if k not in ("rope_type", "scaling", *_BASE)}
    settings["name"] = settings.pop("method", None)
    known = {field.name for field in fields(Method)}
    if unknown := sorted(settings.keys() - known):
        raise AttentionError(
            "rope_parameters hold a setting that no method has",
            where=f"rope_parameters, {', '.join(unknown)}",
            expected=", ".join(("method", *sorted(known - {"name"}), "scaling", *_BASE)),
        )
    return Method(**{"window": None, **settings})


def without_method(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The converse of ``rope_parameters``: those of the model without its method.

    Raises:
        AttentionError: They do not go with a method.
    """
    scaling = rope.get("scaling") or {"rope_type": "default"}
    if scaling.get("rope_type") not in ("default", *_SCALINGS):
        raise AttentionError(
            "the rope type below cannot be combined with a method",
            where="rope_parameters, scaling",
            expected=f"one of {', '.join(_SCALINGS)}, or none",
            got=repr(scaling.get("rope_type")),
        )
    return {key: rope[key] for key in _BASE if key in rope} | dict(scaling)


def _plain(config: Any) -> Any:
    """A copy of a configuration, its positions as they would be without a method."""
    plain = copy.copy(config)
    plain.rope_parameters = without_method(config.rope_parameters)
    if plain.rope_parameters["rope_type"] == "default":
        # Which is no rope function, but a method of each model.
        plain.rope_parameters |= {"rope_type": "linear", "factor": 1.0}
    plain.standardize_rope_params()
    return plain


def validate(config: Any, rope: Mapping[str, Any], ignore_keys: object = None) -> None:
    """Checks the settings of a configuration, and has it choose this module's attention."""
    method_of(rope)
    if config.model_type not in MODEL_TYPES:
        raise AttentionError(
            "it is not known how this type of model rotates",
            where="model_type",
            expected=f"one of {', '.join(MODEL_TYPES)}",
            got=repr(config.model_type),
        )
    _plain(config).validate_rope()
    if config._attn_implementation is None:
        config._attn_implementation = IMPLEMENTATION


def frequencies(
    config: Any,
    device: torch.device | None = None,
    seq_len: int | None = None,
    layer_type: str | None = None,
) -> tuple[Tensor, float]:
    """The rope function: those of the rope type below.

    Raises:
        BackendError: The model is built with another attention.
    """
    refuse_other_attention(config)
    plain = _plain(config)
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[plain.rope_parameters["rope_type"]](plain, device)
    return inv_freq, scaling


def refuse_other_attention(config: Any) -> None:
    """Refuses a model with a method whose attention is another one.

    Raises:
        BackendError: It is.
    """
    if config._attn_implementation != IMPLEMENTATION:
        raise BackendError(
            "the model's far keys need an attention of their own",
            where="attn_implementation",
            expected=IMPLEMENTATION,
            got=repr(config._attn_implementation),
            cure="leave attn_implementation out; without a method, take it out of rope_parameters",
        )


@dataclass(frozen=True, eq=False)
class Settings:
    """What a configuration comes to on a device."""

    rope: dict[str, Any]
    method: Method
    rotary: Rotary


_known: Any = WeakIdKeyDictionary()


def settings_of(config: Any, device: torch.device) -> Settings:
    """The settings of a configuration, made once for as long as it does not change.

    Raises:
        AttentionError: It has none.
    """
    found: Settings | None = _known.get(config)
    if (
        found is None
        or found.rope != config.rope_parameters
        or found.rotary.inv_freq.device != device
    ):
        if config.rope_parameters.get("rope_type") != ROPE_TYPE:
            raise AttentionError(
                f"the attention {IMPLEMENTATION} needs settings of a method",
                where="rope_parameters, rope_type",
                expected=ROPE_TYPE,
                got=repr(config.rope_parameters.get("rope_type")),
                cure="flagattention.hf.rope_parameters makes them, for the configuration",
            )
        inv_freq, scaling = frequencies(config, device)
        rope = copy.deepcopy(config.rope_parameters)
        found = Settings(rope, method_of(rope), Rotary(inv_freq.to(device), False, scaling))
        _known[config] = found
    return found
