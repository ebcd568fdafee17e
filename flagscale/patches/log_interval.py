"""The second loss line after a start, which upstream averages over two steps."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _reset_where_an_interval_ends(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def training_log(*args: Any, is_first_iteration: bool = False, **kwargs: Any) -> Any:
        from megatron.training import get_args

        # args: loss_dict, total_loss_dict, learning_rate, iteration, ...
        iteration = kwargs["iteration"] if "iteration" in kwargs else args[3]
        # Upstream logs the first step out of turn and therefore leaves its sums alone. Where the
        # first step also ends an interval it is not out of turn, and the sums must go.
        out_of_turn = is_first_iteration and iteration % get_args().log_interval != 0
        return original(*args, is_first_iteration=out_of_turn, **kwargs)

    return training_log


GROUP = PatchGroup(
    name="log-interval",
    patches=(
        Patch(
            target="megatron.training.training:training_log",
            kind=Kind.FUNCTION,
            replacement=_reset_where_an_interval_ends,
            fingerprint="be872d52f5dd5136",
        ),
    ),
    reason="the second logged loss after each start is the mean of two iterations",
    upstream="megatron-core 0.19.2, training/training.py:2594",
)
