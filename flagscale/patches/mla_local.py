"""Multi-latent attention without Transformer Engine: values may have heads of another size."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _accept_head_sizes(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def __init__(
        self: Any,
        *args: Any,
        k_channels: int | None = None,
        v_channels: int | None = None,
        **kwargs: Any,
    ) -> None:
        if k_channels is not None and kwargs.get("softmax_scale") is None:
            # Upstream would take the size of a head from the hidden size.
            kwargs["softmax_scale"] = k_channels**-0.5
        original(self, *args, **kwargs)
        if v_channels is not None:
            # The width of the output, and nothing else: all sizes in between are those of the
            # tensors that come in.
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return __init__


GROUP = PatchGroup(
    name="mla-local",
    patches=(
        Patch(
            target="megatron.core.transformer.dot_product_attention:DotProductAttention.__init__",
            kind=Kind.METHOD,
            replacement=_accept_head_sizes,
            fingerprint="ed3e2ff28c6d11d5",
        ),
    ),
    reason="multi-latent attention does not start on the local spec",
    upstream="megatron-core 0.19.2, core/transformer/dot_product_attention.py:42",
)
