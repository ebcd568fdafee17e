"""NLPE in transformers: import this module, then load a model as ever.

The settings lie in a model's ``rope_parameters``, under a ``rope_type`` that only this module
registers. So a stock process refuses to load the model, whatever it is asked for, and this import
is all it takes::

    import flagattention.hf
    model = AutoModelForCausalLM.from_pretrained(directory)

A model with such settings takes this module's attention by itself. Another one (sdpa, eager), be it
asked for at loading or set afterwards, is refused: it would read the text without the far pair.

Registered are a rope function with its validator, an attention and a mask, each where transformers
looks for those it does not know; and the masks that are there already now refuse such a model.

Source: transformers 5.23, ``modeling_rope_utils``, ``masking_utils``, ``AttentionInterface``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin

from flagattention.hf_attention import attention, mask
from flagattention.hf_rope import (
    IMPLEMENTATION,
    MODEL_TYPES,
    ROPE_TYPE,
    frequencies,
    method_of,
    refuse_other_attention,
    rope_parameters,
    validate,
    without_method,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "IMPLEMENTATION", "MODEL_TYPES", "ROPE_TYPE", "attention", "mask", "method_of",
    "rope_parameters", "without_method",
]  # fmt: skip


def _refusing(masked: Callable[..., Any]) -> Callable[..., Any]:
    """A mask of another attention that refuses a model with a method."""

    @wraps(masked)
    def checked(*args: Any, **kwargs: Any) -> Any:
        rope = getattr(kwargs.get("config"), "rope_parameters", None)
        if isinstance(rope, Mapping) and rope.get("rope_type") == ROPE_TYPE:
            refuse_other_attention(kwargs["config"])
        return masked(*args, **kwargs)

    return checked


def _register() -> None:
    ROPE_INIT_FUNCTIONS.update({ROPE_TYPE: frequencies})
    # Where transformers looks for a rope type's validator.
    setattr(RotaryEmbeddingConfigMixin, f"_validate_{ROPE_TYPE}_rope_parameters", validate)
    for name, stock in AttentionMaskInterface().items():
        AttentionMaskInterface.register(name, _refusing(stock))
    AttentionMaskInterface.register(IMPLEMENTATION, mask)
    AttentionInterface.register(IMPLEMENTATION, attention)


_register()
