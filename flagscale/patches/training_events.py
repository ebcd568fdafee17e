"""Tells :mod:`flagscale.hooks` of starts, steps and saves: upstream has no hook for them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flagscale.hooks import (
    HOOKS,
    EarlyExit,
    ExitReason,
    SaveEvent,
    SaveReason,
    SaveRequest,
    SaveStart,
    StepEvent,
    StepStart,
    TrainStart,
)
from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


@dataclass
class _Loop:
    """Where upstream's loop is, for telling one caller of its save function from another."""

    running: bool = False
    must_save: bool = False
    """At a place from which upstream's save is not to be questioned."""


_LOOP = _Loop()


def _tell_train_start(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train(forward_step_func: Any, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        from megatron.training import get_args

        run = get_args()
        event = TrainStart(run.iteration, run.consumed_train_samples, model, optimizer)
        for listener in HOOKS.on_train_start:
            listener(event)
        _LOOP.running = True
        try:
            return original(forward_step_func, model, optimizer, *args, **kwargs)
        finally:
            _LOOP.running = False

    return train


def _tell_of_step(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def train_step(
        forward_step_func: Any,
        data_iterator: Any,
        model: Any,
        optimizer: Any,
        *args: Any,
        iteration: int,
        **kwargs: Any,
    ) -> Any:
        from megatron.core.num_microbatches_calculator import get_num_microbatches
        from megatron.training import get_args
        from megatron.training.training import get_canonical_lr_for_logging

        begin = StepStart(
            iteration=iteration + 1,  # upstream counts from 0 until the step is done
            consumed_samples=get_args().consumed_train_samples,
            num_micro_batches=get_num_microbatches(),
        )
        for listener in HOOKS.on_step_start:
            listener(begin)
        start = time.perf_counter()
        result = original(
            forward_step_func, data_iterator, model, optimizer, *args, iteration=iteration, **kwargs
        )
        losses, skipped, should_checkpoint, should_exit, _code, grad_norm, *_ = result
        _LOOP.must_save = bool(should_checkpoint)  # upstream's rerun engine wants one, right now
        if not should_exit:  # else upstream left the step before the optimizer ran
            event = StepEvent(
                iteration=iteration + 1,
                losses=losses,
                grad_norm=grad_norm,
                learning_rate=get_canonical_lr_for_logging(optimizer.param_groups),
                skipped=bool(skipped),
                seconds=time.perf_counter() - start,
            )
            for hear_end in HOOKS.on_step_end:
                hear_end(event)
        return result

    return train_step


def _ask_before_saves_and_tell_exit(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def checkpoint_and_decide_exit(
        model: Any, optimizer: Any, scheduler: Any, iteration: int, *args: Any, **kwargs: Any
    ) -> Any:
        from megatron.training import get_args

        run = get_args()
        interval = run.save_interval
        # After the last step upstream relies on this save and makes no other.
        in_question = run.save and interval and iteration % interval == 0
        in_question = in_question and iteration < run.train_iters
        # The interval is all that upstream looks at for a regular save, and nothing that it looks
        # at for a save on a signal, at a time limit or at --exit-interval.
        if in_question and not HOOKS.may_save(SaveRequest(iteration, SaveReason.INTERVAL)):
            run.save_interval = None
        _LOOP.must_save = True
        try:
            leaves = original(model, optimizer, scheduler, iteration, *args, **kwargs)
        finally:
            run.save_interval = interval
            _LOOP.must_save = False
        if leaves:
            event = EarlyExit(iteration, _exit_reason(run, iteration))
            for listener in HOOKS.on_early_exit:
                listener(event)
        return leaves

    return checkpoint_and_decide_exit


def _exit_reason(run: Any, iteration: int) -> ExitReason:
    """Why upstream leaves: it does not say. Called on every rank."""
    from megatron.training import get_signal_handler

    interval, transitions = run.exit_interval, run.phase_transition_iterations
    if (interval and iteration % interval == 0) or (transitions and iteration in transitions):
        return ExitReason.PLANNED  # it would have left here in any case
    # Signals are remembered, so that this finds what upstream's own look, a moment ago, has found.
    if run.exit_signal_handler and any(get_signal_handler().signals_received()):
        return ExitReason.SIGNAL
    return ExitReason.DURATION


def _tell_save(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def save_checkpoint_and_time(iteration: int, *args: Any, **kwargs: Any) -> Any:
        # In the loop, outside both places above, only a change of the batch size saves.
        if (
            _LOOP.running
            and not _LOOP.must_save
            and not HOOKS.may_save(SaveRequest(iteration, SaveReason.BATCH_SIZE_CHANGE))
        ):
            return None
        begin = SaveStart(iteration, persistent=not kwargs.get("non_persistent_ckpt", False))
        for hear_start in HOOKS.on_save_start:
            hear_start(begin)
        start = time.perf_counter()
        result = original(iteration, *args, **kwargs)
        event = SaveEvent(iteration=iteration, seconds=time.perf_counter() - start)
        for listener in HOOKS.on_save:
            listener(event)
        return result

    return save_checkpoint_and_time


_TRAINING = "megatron.training.training"

GROUP = PatchGroup(
    name="training-events",
    patches=(
        Patch(f"{_TRAINING}:train", Kind.FUNCTION, _tell_train_start, "a3161ba6b2fa2454"),
        Patch(f"{_TRAINING}:train_step", Kind.FUNCTION, _tell_of_step, "f910d29e66afc804"),
        Patch(
            f"{_TRAINING}:checkpoint_and_decide_exit",
            Kind.FUNCTION,
            _ask_before_saves_and_tell_exit,
            "01a73a56992753fa",
        ),
        Patch(
            f"{_TRAINING}:save_checkpoint_and_time",
            Kind.FUNCTION,
            _tell_save,
            "5ffe05204a9e2971",
        ),
    ),
    reason="upstream has no hook at a start, around a step or a save, or where it leaves early",
    upstream="megatron-core 0.19.2, training/training.py:2336, 3030, 3230, 3342",
)
