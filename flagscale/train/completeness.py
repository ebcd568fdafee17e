"""A start goes on from the newest whole checkpoint, and a save finds an empty place.

The marker of a whole checkpoint is written by :mod:`flagscale.patches.tracker`.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from pathlib import Path

from flagscale.errors import CheckpointError
from flagscale.hooks import Hooks, SaveStart
from flagscale.patches import tracker
from flagscale.patches.apply import active
from flagscale.runs.complete import (
    iteration_directory,
    make_way,
    plan_recovery,
    read_save_directory,
    recover,
)
from flagscale.runs.fence import Fence

__all__ = ["connect", "verify_arguments"]

_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.2

_LINES: list[str] = []
"""What was done to the save directory, until it can be said."""


def verify_arguments(args: Namespace) -> None:
    """Bring the save directory in order before anything is read from it.

    Raises:
        CheckpointError: The disk refuses, or rank 0 does not come.
        SupersededError: Another attempt owns the run.
    """
    if not (args.save and args.load and _is_marked() and _same(args.load, args.save)):
        return
    if os.environ.get("RANK", "0") == "0":
        fence = Fence.from_environment()
        if fence is not None:
            fence.check()
        _LINES[:] = recover(Path(args.save)).lines
    elif args.use_checkpoint_args:
        # All others read nothing before they have met rank 0; these read the tracker now.
        _wait_for_recovery(Path(args.save))


def _is_marked() -> bool:
    """Whether saves of this run are marked: without the patch, none is."""
    return any(patch.group == tracker.GROUP.name for patch in active())


def _same(one: str, other: str) -> bool:
    return Path(one).resolve() == Path(other).resolve()


def _wait_for_recovery(save_dir: Path) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while plan_recovery(read_save_directory(save_dir)).is_needed:
        if time.monotonic() > deadline:
            raise CheckpointError(
                "rank 0 has not put the save directory in order",
                where=str(save_dir),
                cure="see the log of rank 0",
            )
        time.sleep(_POLL_SECONDS)


def connect(hooks: Hooks, args: Namespace) -> None:
    """Say what was done; before each save, set aside what lies where it goes."""
    from megatron.training import print_rank_0

    for line in _LINES:
        print_rank_0(f"{args.save}: {line}")
    if args.save and _is_marked():
        hooks.on_save_start.append(lambda event: _make_way(args, event))


def _make_way(args: Namespace, event: SaveStart) -> None:
    import torch
    from megatron.training import print_rank_0

    if not event.persistent:
        return
    if args.rank == 0:
        aside = make_way(iteration_directory(Path(args.save), event.iteration))
        if aside is not None:
            print_rank_0(f"what lay in the place of iteration {event.iteration} is now {aside}")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # nobody may write there before
