"""Torch norms under sequence parallelism, for machines without Transformer Engine and Apex."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _allow_sequence_parallel(original: Callable[..., Any]) -> Callable[..., Any]:
    def new(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return original(cls, config, *args, **kwargs)
        # Upstream asserts instead of doing what its fused norms do: a norm over the hidden
        # dimension is computed locally on a sequence shard, and only its parameters' gradients
        # must be summed over the tensor-parallel group, which this mark asks for
        # (core/distributed/finalize_model_grads.py).
        local_config = copy.copy(config)
        local_config.sequence_parallel = False
        norm = original(cls, local_config, *args, **kwargs)
        for param in norm.parameters():
            param.sequence_parallel = True
        return norm

    return new


GROUP = PatchGroup(
    name="torch-norms",
    patches=(
        Patch(
            target="megatron.core.transformer.torch_norm:WrappedTorchNorm.__new__",
            kind=Kind.METHOD,
            replacement=_allow_sequence_parallel,
            fingerprint="5f94497ada9363de",
        ),
    ),
    reason="torch's LayerNorm and RMSNorm are refused under sequence parallelism",
    upstream="megatron-core 0.19.2, core/transformer/torch_norm.py:57",
)
