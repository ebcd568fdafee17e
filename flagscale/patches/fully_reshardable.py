"""``fully_reshardable`` optimizer checkpoints whose buffers have padding between their buckets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _pad_between_buckets(compact: Any, buffer: Any) -> Any:
    """Move a gathered buffer from compact to padded coordinates.

    Args:
        compact: [buffer.numel_unpadded] tensor: the buckets' unpadded contents, end to end.
        buffer: Upstream's ``_ParamAndGradBuffer``: ``numel`` elements, buckets at ``offset``.

    Returns:
        [buffer.numel] tensor in which ``buffer.param_index_map`` points at the right elements.
    """
    padded = compact.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        end = start + bucket.numel_unpadded
        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = compact[start:end]
        start = end
    return padded


def _gather_in_padded_coordinates(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The callee answers in compact coordinates (right for its other caller, the legacy
        # format); this caller slices the answer with padded ones. Only for the length of this
        # call, the callee answers in the coordinates this caller means.
        gather = self.get_parameter_state_dp_zero

        def get_parameter_state_dp_zero(*gather_args: Any, **gather_kwargs: Any) -> Any:
            state = gather(*gather_args, **gather_kwargs)
            if state is None:
                return None
            for gbuf_idx, buffer in enumerate(self.buffers):
                for world_tensors in state[gbuf_idx].values():
                    for key, value in world_tensors.items():
                        if key != "numel_unpadded":
                            world_tensors[key] = _pad_between_buckets(value, buffer)
            return state

        self.get_parameter_state_dp_zero = get_parameter_state_dp_zero
        try:
            return original(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return sharded_param_state_fully_reshardable


GROUP = PatchGroup(
    name="fully-reshardable",
    patches=(
        Patch(
            target=(
                "megatron.core.optimizer.distrib_optimizer:"
                "DistributedOptimizer.sharded_param_state_fully_reshardable"
            ),
            kind=Kind.METHOD,
            replacement=_gather_in_padded_coordinates,
            fingerprint="e75b8f5a5b876aee",
        ),
    ),
    reason="--dist-ckpt-optim-fully-reshardable saves wrong optimizer states behind a warning",
    upstream="megatron-core 0.16.1-0.19.2, fixed on main by NVIDIA/Megatron-LM PR 5077",
)
