"""Multi-latent attention under tensor parallelism: the gradient of what all key heads share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _sum_over_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _qkv_down_projection(self: Any, *args: Any, **kwargs: Any) -> Any:
        import torch
        from megatron.core.tensor_parallel import mappings

        queries, latent = original(self, *args, **kwargs)
        config, group = self.config, self.tp_group
        if group.size() == 1:
            return queries, latent
        sizes = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        if latent.size(-1) != sum(sizes):
            latent = mappings.gather_from_tensor_model_parallel_region(latent, group=group)
            if config.sequence_parallel:
                latent = mappings.scatter_to_sequence_parallel_region(latent, group=group)
        if config.sequence_parallel:
            # [s / TP, b, all]: as Transformer Engine's layers return it. Upstream then gathers the
            # shared part along the sequence, which sums its gradient.
            return queries, latent
        # Each rank's heads give the shared part a gradient; upstream keeps the rank's own alone.
        own, shared = latent.split(sizes, dim=-1)
        shared = mappings.copy_to_tensor_model_parallel_region(shared, group=group)
        return queries, torch.cat([own, shared], dim=-1)

    return _qkv_down_projection


GROUP = PatchGroup(
    name="mla-rope-gradient",
    patches=(
        Patch(
            target=(
                "megatron.core.transformer.multi_latent_attention:"
                "MLASelfAttention._qkv_down_projection"
            ),
            kind=Kind.METHOD,
            replacement=_sum_over_heads,
            fingerprint="10d6c2cbb2ef47c4",
        ),
    ),
    reason="with tensor parallelism a part of the keys is trained on a part of its gradient",
    upstream=(
        "megatron-core 0.19.2, core/transformer/multi_latent_attention.py:637; "
        "NVIDIA/Megatron-LM issue 1699, PR 6839"
    ),
)
