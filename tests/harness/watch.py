"""What each rank of a real run was given to read, and what it lost on it, step by step.

Nothing here knows the ledger or the mapping: batches are written down as the loader gave them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["WATCH", "Drawn", "attach", "read_watched"]

WATCH = "HARNESS_WATCH"
"""Environment variable of a rank: the directory to write to."""

type Drawn = Mapping[str, np.ndarray[Any, Any]]
"""Of one step on one rank, by micro batch: ``tokens`` [m, b, s + 1] with the last label,
``dataset`` and ``index`` [m, b], ``mask`` [m, b, s] as drawn; ``losses`` and ``counted`` [m, b, s]
on the last pipeline stage only."""


def attach(hooks: Any) -> None:
    """Listen on a rank, if it is asked to."""
    if WATCH not in os.environ:
        return
    rank = int(os.environ["RANK"])
    rows: dict[str, list[Any]] = {}
    watching = False

    def begin(_event: Any) -> None:
        nonlocal watching
        watching = True
        rows.clear()

    def see_batch(event: Any) -> None:
        if not watching:
            return
        batch = event.batch
        tokens = [batch["tokens"].numpy(), batch["labels"][:, -1:].numpy()]
        rows.setdefault("tokens", []).append(np.concatenate(tokens, axis=1))
        indices = batch["sample_index"].numpy()
        datasets = batch["dataset_id"].numpy() if "dataset_id" in batch else 0 * indices
        rows.setdefault("index", []).append(indices)
        rows.setdefault("dataset", []).append(datasets)
        rows.setdefault("mask", []).append(batch["loss_mask"].numpy())

    def see_losses(event: Any) -> None:
        if watching:
            rows.setdefault("losses", []).append(event.token_losses.detach().float().numpy())
            rows.setdefault("counted", []).append(event.loss_mask.float().numpy())

    def end(event: Any) -> None:
        nonlocal watching
        watching = False
        directory = Path(os.environ[WATCH])
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {name: np.stack(values) for name, values in rows.items()}
        np.savez(directory / f"{event.iteration:06d}.{rank}.npz", **arrays)

    hooks.on_step_start.append(begin)
    hooks.on_batch.append(see_batch)
    hooks.on_forward_loss.append(see_losses)
    hooks.on_step_end.append(end)


def read_watched(directory: Path) -> dict[int, dict[int, Drawn]]:
    """By iteration and global rank; ranks that draw nothing have no ``tokens``."""
    result: dict[int, dict[int, Drawn]] = {}
    for path in sorted(directory.glob("*.npz")):
        iteration, rank, _ = path.name.split(".")
        with np.load(path) as arrays:
            result.setdefault(int(iteration), {})[int(rank)] = dict(arrays)
    return result
