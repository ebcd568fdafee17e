"""Tells the run directory where the run is, and when there is nothing left to do."""

from __future__ import annotations

import math
import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flagscale.hooks import ExitEvent, Hooks, StepEvent, StepStart, TrainStart
from flagscale.runs.attempt import RUN_DIR_VARIABLE
from flagscale.runs.complete import tracked_iteration
from flagscale.runs.fence import Fence
from flagscale.runs.finished import write_finished
from flagscale.runs.status import Status, write_status

__all__ = ["connect"]


def connect(hooks: Hooks, args: Namespace) -> None:
    """On the last rank, which knows the loss, write the status; on rank 0, the end."""
    run_dir = os.environ.get(RUN_DIR_VARIABLE)
    if not run_dir:
        return
    reporter = _Reporter(args, Path(run_dir))
    hooks.on_train_start.append(reporter.start)
    hooks.on_step_start.append(reporter.begin_step)
    hooks.on_step_end.append(reporter.end_step)
    hooks.on_exit.append(reporter.finish)


class _Reporter:
    """Of one rank."""

    def __init__(
        self, args: Namespace, run_dir: Path, clock: Callable[[], float] = time.time
    ) -> None:
        self._args = args
        self._run_dir = run_dir
        self._clock = clock
        self._iteration = 0
        self._samples = 0
        self._batch = 0
        self._last: tuple[float, int] = (0.0, 0)  # when a status was written, after which samples

    def start(self, event: TrainStart) -> None:
        self._iteration, self._samples = event.iteration, event.consumed_samples
        self._last = self._clock(), self._samples

    def begin_step(self, event: StepStart) -> None:
        from megatron.core.num_microbatches_calculator import get_current_global_batch_size

        self._batch = get_current_global_batch_size()
        self._samples = event.consumed_samples + self._batch

    def end_step(self, event: StepEvent) -> None:
        self._iteration = event.iteration
        is_last = self._args.rank == self._args.world_size - 1
        if is_last and event.iteration % self._args.log_interval == 0:
            write_status(self._run_dir, self._status(event.losses.get("lm loss")))

    def _status(self, loss: Any) -> Status:
        args = self._args
        now, (then, samples_then) = self._clock(), self._last
        self._last = now, self._samples
        fence = Fence.from_environment()
        saved = tracked_iteration(Path(args.save)) if args.save else None
        value = math.nan if loss is None else float(loss)
        left = (args.train_iters - self._iteration) * self._batch
        in_all = args.train_samples or self._samples + left
        tokens_since = (self._samples - samples_then) * args.seq_length
        return Status(
            attempt=None if fence is None else fence.number(),
            iteration=self._iteration,
            train_iters=args.train_iters,
            consumed_samples=self._samples,
            tokens=self._samples * args.seq_length,
            train_tokens=in_all * args.seq_length,
            tokens_per_second=tokens_since / (now - then) if now > then else 0.0,
            loss=value if math.isfinite(value) else None,
            last_checkpoint=saved[0] if saved else None,
            last_checkpoint_time=saved[1] if saved else None,
            time=now,
        )

    def finish(self, event: ExitEvent) -> None:
        args = self._args
        if args.rank or event.exit_code or event.error is not None or not args.save:
            return
        saved = tracked_iteration(Path(args.save))
        if self._iteration >= args.train_iters and saved and saved[0] == self._iteration:
            write_finished(
                self._run_dir,
                iteration=self._iteration,
                train_iters=args.train_iters,
                consumed_samples=self._samples,
            )
