"""Marks a run as begun, so that no later start takes a lost checkpoint for a fresh run."""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from pathlib import Path

from flagscale.hooks import Hooks, SaveEvent
from flagscale.runs.complete import BEGUN_MARKER, tracked_iteration

__all__ = ["connect"]


def connect(hooks: Hooks, args: Namespace) -> None:
    """Write the marker into the save directory after the first save, on rank 0."""
    if args.rank == 0 and args.save:
        hooks.on_save.append(lambda event: _mark_as_begun(Path(args.save), event))


def _mark_as_begun(directory: Path, event: SaveEvent) -> None:
    marker = directory / BEGUN_MARKER
    if marker.exists() or tracked_iteration(directory) is None:  # it is still being written
        return
    partial = marker.with_suffix(f".partial-{os.getpid()}")
    content = {"first_saved_iteration": event.iteration, "time": time.time()}
    partial.write_text(json.dumps(content) + "\n")
    partial.rename(marker)
