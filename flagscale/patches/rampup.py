"""``--rampup-batch-size``, which upstream accepts and then ignores without a word."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flagscale.errors import ConfigError
from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _refuse_what_would_be_ignored(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def validate_args(args: Any, *rest: Any, **kwargs: Any) -> Any:
        if getattr(args, "rampup_batch_size", None) is not None:
            raise ConfigError(
                "--rampup-batch-size has no effect in this release of megatron-core",
                where="--rampup-batch-size",
                got=" ".join(str(part) for part in args.rampup_batch_size),
                cure=(
                    "use --step-batch-size-schedule 'tokens:batch tokens:batch ...', whose "
                    "thresholds are tokens (samples x --seq-length), not samples"
                ),
            )
        return original(args, *rest, **kwargs)

    return validate_args


GROUP = PatchGroup(
    name="rampup-batch-size",
    patches=(
        Patch(
            target="megatron.training.arguments:validate_args",
            kind=Kind.FUNCTION,
            replacement=_refuse_what_would_be_ignored,
            fingerprint="b8dcebda6a586964",
        ),
    ),
    reason="a batch ramp asked for the old way silently does not happen",
    upstream="megatron-core 0.18.2-0.19.2, training/config/training_config.py:20",
)
