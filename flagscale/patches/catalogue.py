"""The patches that come with the layer."""

from __future__ import annotations

import importlib

from flagscale.patches.registry import PatchGroup

__all__ = ["RECORDED_FROM", "builtin_groups"]

RECORDED_FROM = "0.19.2"
"""The megatron-core release whose fingerprints the built-in patches carry."""

_DECLARED = (
    "adam:GROUP",
    "compile_helpers:GROUP",
    "cpu_device:DEVICE_GROUP",
    "cpu_device:INITIALIZE_GROUP",
    "dummy_step:GROUP",
    "fully_reshardable:GROUP",
    "last_batch:GROUP",
    "load_checkpoint:GROUP",
    "log_interval:GROUP",
    "mla_local:GROUP",
    "mla_rope_gradient:GROUP",
    "rampup:GROUP",
    "rotary_fp32:GROUP",
    "torch_norms:GROUP",
    "tracker:GROUP",
    "training_events:GROUP",
)


def builtin_groups() -> tuple[PatchGroup, ...]:
    """Every built-in group; the modules that declare them are imported here, not with this one."""
    declared = (entry.split(":") for entry in _DECLARED)
    return tuple(
        getattr(importlib.import_module(f"{__package__}.{module}"), name)
        for module, name in declared
    )
