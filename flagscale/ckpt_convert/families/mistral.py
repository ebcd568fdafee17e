"""Mistral: Llama's tensors, and attention to a window of tokens.

Hugging Face counts the tokens that one sees, itself among them; Megatron how far it sees to the
left and to the right. Without a window it is Llama by another name.

Source: transformers 5.23, models/mistral, masking_utils.py; megatron-core 0.19.2,
core/transformer/utils.py (``get_sliding_window_causal_mask``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.ckpt_convert.families.family import Config, Family
from flagscale.ckpt_convert.families.llama import BODY, MAY, llama_arguments, llama_config
from flagscale.ckpt_convert.features import Arguments
from flagscale.errors import CheckpointError

__all__ = ["FAMILY", "sliding_window", "window_size"]


def sliding_window(args: Arguments) -> int | None:
    """Tokens that a token sees, itself among them; ``None``: all before it.

    Raises:
        CheckpointError: The window looks ahead, or has no end.
    """
    window = args["window_size"]
    if not window:
        return None
    left, *right = window
    if left < 0 or right != [0]:
        # With -1, which is no limit, upstream's two layer specs mask differently.
        raise CheckpointError(
            "a window of attention cannot be told to Hugging Face",
            where="--window-size",
            expected="(tokens to the left, 0)",
            got=window,
        )
    return int(left) + 1


def window_size(tokens: int | None) -> tuple[int, int] | None:
    """The converse of :func:`sliding_window`, for ``window_size``.

    Raises:
        CheckpointError: There is no such window.
    """
    if tokens is None:
        return None
    if tokens < 1:
        raise CheckpointError(
            "a window of attention holds no token",
            where="config.json, sliding_window",
            expected="null, or at least 1",
            got=tokens,
        )
    return tokens - 1, 0


def _config(args: Arguments) -> Config:
    return llama_config(args) | {"sliding_window": sliding_window(args)}


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    return llama_arguments(config) | {"window_size": window_size(config["sliding_window"])}


FAMILY: Final = Family(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=BODY,
    config=_config,
    arguments=_arguments,
    may=MAY | {"rotary_interleaved", "window"},
)
