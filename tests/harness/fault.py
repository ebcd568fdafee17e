"""What goes wrong in a rank at a moment that a test has chosen."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["FAULT", "attach", "fault"]

FAULT = "HARNESS_FAULT"
"""Environment variable of a rank: see :func:`fault`."""


def fault(kind: str, *, rank: int, iteration: int = 0) -> dict[str, str]:
    """The environment that makes one rank misbehave.

    Args:
        kind: ``early-signal``, SIGUSR1 before upstream listens; ``hang``, for ever at the end of a
            step; ``die-in-save``, SIGKILL when a part of its data is on the disk;
            ``die-before-marker``, ``die-before-tracker``, on rank 0; ``superseded``, another
            attempt takes the run over at the end of a step.
        rank: Whose.
        iteration: In which, where there is one.
    """
    return {FAULT: json.dumps({"kind": kind, "rank": rank, "iteration": iteration})}


def attach(hooks: Any) -> None:
    """Prepare it in the rank that is meant."""
    plan = json.loads(os.environ.get(FAULT, "{}"))
    if plan and plan["rank"] == int(os.environ["RANK"]):
        _KINDS[plan["kind"]](hooks, plan["iteration"])


def _die(*_: object, **__: object) -> None:
    os.killpg(os.getpgrp(), signal.SIGKILL)  # each rank leads a group: writers it has forked too


def _early_signal(_hooks: Any, _iteration: int) -> None:
    from flagscale.train import pretraining

    parse = pretraining.parse_and_validate_args  # upstream's, which listens at its end

    def signal_first(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return parse(*args)

    pretraining.parse_and_validate_args = signal_first


def _at_step(hooks: Any, iteration: int, action: Callable[[], None]) -> None:
    hooks.on_step_end.append(lambda event: action() if event.iteration == iteration else None)


def _hang(hooks: Any, iteration: int) -> None:
    def sleep_for_ever() -> None:
        while True:
            time.sleep(1)  # the line that is to be named

    _at_step(hooks, iteration, sleep_for_ever)


def _superseded(hooks: Any, iteration: int) -> None:
    from flagscale.runs.attempt import RUN_DIR_VARIABLE, begin_attempt

    def take_over() -> None:
        run_dir = Path(os.environ[RUN_DIR_VARIABLE])
        begin_attempt(run_dir, hosts=["other"], layout={}, world_size=1)

    _at_step(hooks, iteration, take_over)


def _die_in_save(hooks: Any, iteration: int) -> None:
    import torch

    def begin(event: Any) -> None:
        if event.iteration != iteration:
            return
        save = torch.save

        def die_half_way(content: Any, place: Any, *args: Any, **kwargs: Any) -> None:
            save(content, place, *args, **kwargs)
            if isinstance(place, str | Path):  # legacy, not one of a checkpoint's many items
                os.truncate(place, os.path.getsize(place) // 2)
                _die()

        torch.save = die_half_way
        os.fsync = _die  # type: ignore[assignment]  # torch_dist, when a file is written

    hooks.on_save_start.append(begin)


def _die_before(name: str) -> Callable[[Any, int], None]:
    def attach_to(hooks: Any, iteration: int) -> None:
        from flagscale.patches import tracker

        def begin(event: Any) -> None:
            if event.iteration == iteration:
                setattr(tracker, name, _die)

        hooks.on_save_start.append(begin)

    return attach_to


_KINDS: Mapping[str, Callable[[Any, int], None]] = {
    "early-signal": _early_signal,
    "hang": _hang,
    "superseded": _superseded,
    "die-in-save": _die_in_save,
    "die-before-marker": _die_before("write_marker"),
    "die-before-tracker": _die_before("replace_text"),
}
