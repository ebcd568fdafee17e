"""A sound Adam where neither Transformer Engine nor Apex is installed."""

from __future__ import annotations

import importlib.util
from typing import Any

from flagscale.patches.registry import Condition, Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _fused_adam(_original: type) -> type:
    from flagscale.patches.fused_adam import FusedAdam

    return FusedAdam


def _set_false(_original: bool) -> bool:
    return False


def _set_true(_original: bool) -> bool:
    return True


def _neither_te_nor_apex() -> bool:
    return not any(importlib.util.find_spec(name) for name in ("transformer_engine", "apex"))


def _value(target: str, replacement: Any, fingerprint: str) -> Patch:
    return Patch(target, Kind.VALUE, replacement, fingerprint)


_FACTORY = "megatron.core.optimizer"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer"

# Upstream chooses its Adam, and what it believes of the state that Adam keeps, by these five module
# variables. They only make sense together; "using Apex" is how upstream spells "the step is counted
# in the parameter group".
GROUP = PatchGroup(
    name="adam",
    patches=(
        _value(f"{_FACTORY}:Adam", _fused_adam, "6f119beaba9df04a"),
        _value(f"{_FACTORY}:USING_PYTORCH_OPTIMIZER", _set_false, "6f119beaba9df04a"),
        _value(f"{_DISTRIBUTED}:Adam", _fused_adam, "49dc143f37c5bd03"),
        _value(f"{_DISTRIBUTED}:HAVE_APEX_OR_TE", _set_true, "a60d32e2e1cecf89"),
        _value(f"{_DISTRIBUTED}:USING_APEX_OPTIMIZER", _set_true, "671f7f1262cbc816"),
    ),
    reason=(
        "with torch's AdamW a torch_dist load asserts, a legacy load raises, and after a load all "
        "parameters share one step counter"
    ),
    upstream="megatron-core 0.19.2, core/optimizer/distrib_optimizer.py:839, 869, 1025",
    enabled_if=Condition(
        _neither_te_nor_apex,
        when_true="neither Transformer Engine nor Apex is installed",
        when_false="Transformer Engine or Apex is installed and brings its own Adam",
    ),
)
