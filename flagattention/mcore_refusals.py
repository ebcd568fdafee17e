"""What piecewise attention in Megatron does not serve, by the name of the option that asks for it.

One table for upstream's arguments and its configurations, whose attributes have the same names.
Imports nothing of megatron.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flagattention.errors import AttentionError

__all__ = ["raise_refusals", "refusals"]

_NOT_SET = "not set"


@dataclass(frozen=True)
class _Rule:
    """A setting, the values it may have, and why others are refused."""

    attribute: str
    allowed: Callable[[Any], bool]
    expected: str
    why: str

    def refusal(self, settings: Any) -> AttentionError | None:
        """The error, if the settings have the attribute and it is none of the allowed values."""
        value = getattr(settings, self.attribute, None)
        if value is None or self.allowed(value):
            return None
        option = "--" + self.attribute.replace("_", "-")
        cure = f"drop {option}" if self.expected == _NOT_SET else f"give {option} {self.expected}"
        return AttentionError(
            f"piecewise attention does not go with {option}: {self.why}",
            where=option,
            expected=self.expected,
            got=getattr(value, "name", value),
            cure=f"{cure}, or do without piecewise attention",
        )


def _off(attribute: str, why: str) -> _Rule:
    return _Rule(attribute, lambda value: not value, _NOT_SET, why)


_RULES = (
    _Rule("context_parallel_size", lambda n: n == 1, "1", "a rank must see its sequences whole"),
    _Rule("attention_dropout", lambda p: p == 0, "0", "its kernels have no dropout"),
    _Rule(
        "position_embedding_type",
        lambda name: name == "rope",
        "rope",
        "the far pair is derived from queries and keys that rope has rotated",
    ),
    _Rule("softmax_type", lambda name: name == "vanilla", "vanilla", "its softmax has no offset"),
    _Rule(
        "attention_backend",
        lambda backend: getattr(backend, "name", backend) != "local",
        "auto",
        "upstream would put its own core attention in place of this one",
    ),
    _Rule(
        "transformer_impl",
        lambda name: name in ("local", "transformer_engine"),
        "local or transformer_engine",
        "its layers answer requests past the core attention",
    ),
    _off("window_size", "every key is seen; the window of the method is another thing"),
    _off("no_rope_freq", "a layer without rope has no far pair"),
    _off("multi_latent_attention", "it rotates a part of each head that is not the last"),
    _off("experimental_attention_variant", "it has no core attention that could be ours"),
    _off("heterogeneous_block_specs", "its layers differ in ways that are not tested"),
    _off("heterogeneous_layers_config_path", "its layers differ in ways that are not tested"),
    _off(
        "heterogeneous_layers_config_encoded_json",
        "its layers differ in ways that are not tested",
    ),
    _off("mtp_num_layers", "upstream builds those layers with its own core attention"),
    _off("qk_clip", "it needs the largest score of each head, which is never stored"),
    _off("log_max_attention_logit", "the largest score of each head is never stored"),
    _off("flash_decode", "it decodes past the core attention"),
    _off("inference_dynamic_batching", "it attends past the core attention"),
    _off("batch_invariant_mode", "what it promises of flash attention is not promised here"),
    _off("use_kitchen_attention", "it is another core attention"),
    _off("fp8_dot_product_attention", "its kernels compute in no fp8"),
    _off("fp8_multi_head_attention", "its kernels compute in no fp8"),
    _off("reset_attention_mask", "masks are not read; --dataloader-inter-document-masking is"),
)


def refusals(settings: Any) -> list[AttentionError]:
    """One error for each setting that cannot be served.

    Args:
        settings: Upstream's parsed arguments, ``GPTModelConfig`` or ``TransformerConfig``. What
            they have no attribute for is not judged.
    """
    found = [rule.refusal(settings) for rule in _RULES]
    return [*filter(None, found), *_without_transformer_engine(settings)]


def raise_refusals(settings: Any) -> None:
    """Raise the first of :func:`refusals`, if there is one.

    Raises:
        AttentionError: A setting cannot be served.
    """
    for error in refusals(settings):
        raise error


def _without_transformer_engine(settings: Any) -> list[AttentionError]:
    asked_for = getattr(settings, "transformer_impl", None) == "transformer_engine"
    if not asked_for or importlib.util.find_spec("transformer_engine") is not None:
        return []
    return [
        AttentionError(
            "layers of Transformer Engine are asked for, which is not installed",
            where="--transformer-impl",
            expected="local",
            got="transformer_engine",
            cure="add --transformer-impl local, or install transformer-engine",
        )
    ]
