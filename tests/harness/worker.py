"""What a rank does: become the process that ``python -m flagscale.train`` would be."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness import fault, watch

__all__ = ["BLOCKED", "run_rank"]

BLOCKED = "HARNESS_BLOCKED_MODULE"
"""Environment variable of a rank: a module that it cannot import."""


def run_rank(
    argv: Sequence[str],
    environ: Mapping[str, str],
    work_dir: str,
    kill: tuple[int, signal.Signals] | None,
) -> None:
    """Entry of the forked process; never returns."""
    os.setsid()  # so that whatever it starts can be ended with it
    rank = environ["RANK"]
    base = Path(work_dir) / f"rank_{rank}"
    log = os.open(f"{base}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environ)
    os.environ["FLAGSCALE_ERROR_FILE"] = f"{base}.error"
    # As in a process that no server has forked; the loaders' workers cannot be pickled.
    multiprocessing.set_start_method("fork", force=True)
    # A process that upstream spawns must not import the test runner again.
    sys.modules["__main__"] = types.ModuleType("__main__")
    sys.argv = ["flagscale.train", *argv]

    if BLOCKED in os.environ:
        sys.modules[os.environ[BLOCKED]] = None  # type: ignore[assignment]
    if not getattr(sys.modules.get("harness.preload"), "LOADED", False):
        raise RuntimeError("the fork server could not import harness.preload")
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )

    from flagscale.hooks import HOOKS, StepEvent
    from flagscale.train.__main__ import guarded_main

    # The first save of a torch_dist checkpoint makes this queue in a spawned process, which imports
    # torch and megatron for it: seconds of every short run.
    get_write_results_queue("fork")

    steps = open(f"{base}.steps.jsonl", "w")  # noqa: SIM115 - open until the process ends

    def record(event: StepEvent) -> None:
        row: dict[str, Any] = {
            "iteration": event.iteration,
            "losses": {name: float(loss) for name, loss in event.losses.items()},
            "grad_norm": float(event.grad_norm or 0.0),
            "skipped": event.skipped,
        }
        steps.write(json.dumps(row) + "\n")
        steps.flush()
        if kill and event.iteration == kill[0]:
            os.kill(os.getpid(), kill[1])

    HOOKS.on_step_end.append(record)
    watch.attach(HOOKS)
    fault.attach(HOOKS)
    exit_code = guarded_main(argv)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
