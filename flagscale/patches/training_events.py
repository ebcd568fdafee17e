"""Tells :mod:`flagscale.hooks` of each step and save: upstream has no hook for either."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from flagscale.hooks import HOOKS, SaveEvent, StepEvent
from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _tell_step_end(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(*args, iteration=iteration, **kwargs)
        losses, skipped, _save, should_exit, _code, grad_norm, *_ = result
        if not should_exit:  # else upstream left the step before the optimizer ran
            event = StepEvent(
                iteration=iteration + 1,  # upstream counts from 0 until the step is done
                losses=losses,
                grad_norm=grad_norm,
                skipped=bool(skipped),
                seconds=time.perf_counter() - start,
            )
            for listener in HOOKS.on_step_end:
                listener(event)
        return result

    return train_step


def _tell_save(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = original(iteration, *args, **kwargs)
        event = SaveEvent(iteration=iteration, seconds=time.perf_counter() - start)
        for listener in HOOKS.on_save:
            listener(event)
        return result

    return save_checkpoint_and_time


GROUP = PatchGroup(
    name="training-events",
    patches=(
        Patch(
            target="megatron.training.training:train_step",
            kind=Kind.FUNCTION,
            replacement=_tell_step_end,
            fingerprint="f910d29e66afc804",
        ),
        Patch(
            target="megatron.training.training:save_checkpoint_and_time",
            kind=Kind.FUNCTION,
            replacement=_tell_save,
            fingerprint="5ffe05204a9e2971",
        ),
    ),
    reason="there is no hook at the end of a step or of a save; throughput and restarts need both",
    upstream="megatron-core 0.19.2, training/training.py:2336, 3030",
)
