"""The last step of a batch-size schedule, for which too few samples are left."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from flagscale.errors import ConfigError
from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _count_whole_batches(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def update_train_iters(args: Any) -> None:
        from megatron.training import print_rank_0

        if args.train_iters or args.step_batch_size_schedule is None:
            original(args)
            return
        # Upstream counts the steps until no sample is left. With one sample more its last step is
        # never filled by the samples there are, and all before it are.
        one_more = copy.copy(args)
        one_more.train_samples += 1
        original(one_more)
        args.train_iters = one_more.train_iters - 1
        if not args.train_iters:
            raise ConfigError(
                "there are fewer samples than the first step takes",
                where="--train-samples, --step-batch-size-schedule",
                got=args.train_samples,
                cure="train on more samples, or start with a smaller batch",
            )
        print_rank_0(f"setting training iterations to {args.train_iters}: whole batches only")

    return update_train_iters


GROUP = PatchGroup(
    name="last-batch",
    patches=(
        Patch(
            target="megatron.training.training:update_train_iters",
            kind=Kind.FUNCTION,
            replacement=_count_whole_batches,
            fingerprint="0d122b435d0c8dab",
        ),
    ),
    reason="after a batch-size schedule the last step may want more samples than a blend has",
    upstream="megatron-core 0.19.2, training/training.py:1528",
)
