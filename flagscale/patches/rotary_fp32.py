"""Rotary position embeddings computed in fp32, where upstream computes in the type of its input."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from flagscale.patches.registry import Condition, Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _rotate_in_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _apply_rotary_pos_emb_bshd(t: Any, *args: Any, **kwargs: Any) -> Any:
        return original(t.float(), *args, **kwargs).to(t.dtype)

    return _apply_rotary_pos_emb_bshd


GROUP = PatchGroup(
    name="rotary-fp32",
    patches=(
        # Packed sequences (thd) come through this function too.
        Patch(
            target=("megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd"),
            kind=Kind.FUNCTION,
            replacement=_rotate_in_fp32,
            fingerprint="0569b2ec40ec1b48",
        ),
    ),
    reason="sines, cosines and products are rounded to bf16 one by one",
    upstream="megatron-core 0.19.2, core/models/common/embeddings/rope_utils.py:92",
    # Patches go in before upstream's parser exists; this is a flag, and is never abbreviated.
    enabled_if=Condition(
        lambda: "--rotary-in-fp32" in sys.argv,
        when_true="--rotary-in-fp32 is given",
        when_false="--rotary-in-fp32 is not given",
    ),
)
