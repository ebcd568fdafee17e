"""Runs in which each rank writes down what it drew, what counted, and the gradients it got."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from harness import RunResult, train, worker

__all__ = ["Watched", "train_watched"]

_ORDERS = "QUARANTINE_HARNESS_ORDERS"
_DRAWN = ("tokens", "labels", "loss_mask", "sample_index", "dataset_id")

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Watched:
    """A run, and of each rank its micro batches in the order it saw them.

    Args:
        result: How the job ended.
        drawn: Of each rank: what its loader gave, [micro batch, b, ...]; empty if it draws none.
        losses: Of each rank: ``token_losses``, ``loss_mask`` and ``quarantined`` [micro batch, b,
            s]; empty before the last pipeline stage.
        gradients: Of each rank: by parameter, ``got`` of upstream and ``wanted`` by the weights.
    """

    result: RunResult
    drawn: tuple[Arrays, ...]
    losses: tuple[Arrays, ...]
    gradients: tuple[Mapping[str, Arrays], ...]


def train_watched(
    argv: Sequence[object],
    work_dir: Path,
    nproc: int = 1,
    *,
    weights: Path | None = None,
    other_lists: Mapping[int, Path] | None = None,
) -> Watched:
    """Train as :func:`harness.train` does, which must succeed unless lists differ.

    Args:
        argv: Megatron's arguments.
        work_dir: Of this run alone.
        nproc: World size.
        weights: ``.npy`` of the weight each token's loss has in the first step's gradient,
            [micro batch, b, s]; the gradients of that sum are taken by plain torch. One rank only.
        other_lists: By rank, what it gets for the word after ``--quarantine``.
    """
    orders = {
        "weights": str(weights) if weights else None,
        "other_lists": {str(rank): str(path) for rank, path in (other_lists or {}).items()},
    }
    with mock.patch.object(worker, "run_rank", _run_rank):
        result = train(argv, work_dir, nproc, environ={_ORDERS: json.dumps(orders)})
    if not other_lists:
        result.require_success()
    ranks = range(nproc)
    return Watched(
        result,
        *(tuple(_read(work_dir, rank, kind) for rank in ranks) for kind in ("drawn", "losses")),
        tuple(_read_gradients(work_dir, rank) for rank in ranks),
    )


def _read(work_dir: Path, rank: int, kind: str) -> Arrays:
    path = work_dir / f"rank_{rank}.{kind}.npz"
    if not path.exists():
        return {}
    with np.load(path) as arrays:
        return dict(arrays)


def _read_gradients(work_dir: Path, rank: int) -> dict[str, Arrays]:
    got, wanted = (_read(work_dir, rank, kind) for kind in ("got", "wanted"))
    return {name: {"got": got[name], "wanted": wanted[name]} for name in wanted}


def _run_rank(argv: Sequence[str], environ: Mapping[str, str], work_dir: str, kill: Any) -> None:
    """Entry of the forked process; never returns."""
    from flagscale.hooks import HOOKS

    orders = json.loads(environ[_ORDERS])
    rank = environ["RANK"]
    words = list(argv)
    if rank in orders["other_lists"]:
        words[words.index("--quarantine") + 1] = orders["other_lists"][rank]
    notes = _Notes(f"{work_dir}/rank_{rank}")
    HOOKS.on_batch.append(notes.draw)
    HOOKS.on_forward_loss.append(notes.forward)
    HOOKS.on_exit.append(notes.write)
    if orders["weights"]:
        gradients = _Gradients(np.load(orders["weights"]), notes.base)
        HOOKS.on_train_start.append(gradients.start)
        HOOKS.on_batch.append(gradients.draw)
        HOOKS.on_step_end.append(gradients.step)
    worker.run_rank(words, environ, work_dir, kill)


class _Notes:
    def __init__(self, base: str) -> None:
        self.base = base
        self._drawn: dict[str, list[Any]] = {}
        self._losses: dict[str, list[Any]] = {}

    def draw(self, event: Any) -> None:
        for name in _DRAWN:
            if name in event.batch:
                self._drawn.setdefault(name, []).append(event.batch[name].numpy().copy())

    def forward(self, event: Any) -> None:
        for name in ("token_losses", "loss_mask", "quarantined"):
            if getattr(event, name) is not None:
                values = getattr(event, name).detach().float().numpy().copy()
                self._losses.setdefault(name, []).append(values)

    def write(self, _event: Any) -> None:
        for kind, notes in (("drawn", self._drawn), ("losses", self._losses)):
            if notes:
                path = f"{self.base}.{kind}.npz"
                np.savez(path, **{name: np.stack(values) for name, values in notes.items()})


class _Gradients:
    """Of the first step: upstream's, and those of the sum of token losses under given weights."""

    def __init__(self, weights: np.ndarray[Any, Any], base: str) -> None:
        self._weights = list(weights)
        self._base = base
        self._model: Any = None
        self._params: dict[str, Any] = {}
        self._sums: dict[str, Any] = {}

    def start(self, event: Any) -> None:
        (self._model,) = event.model
        self._params = dict(self._model.named_parameters())

    def draw(self, event: Any) -> None:
        """Run the model on the micro batch a first time, and take plain torch's cross entropy."""
        import torch

        if not self._weights:
            return
        words = {k: event.batch[k] for k in ("position_ids", "attention_mask") if k in event.batch}
        logits = self._model(input_ids=event.batch["tokens"], **words).double()
        labels = event.batch["labels"].flatten()
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="none")
        weighted = losses * torch.from_numpy(self._weights.pop(0)).flatten()
        found = torch.autograd.grad(weighted.sum(), list(self._params.values()))
        for name, gradient in zip(self._params, found, strict=True):
            self._sums[name] = self._sums.get(name, 0) + gradient.double()

    def step(self, event: Any) -> None:
        if event.iteration == 1:
            got = {name: param.main_grad.numpy().copy() for name, param in self._params.items()}
            np.savez(f"{self._base}.got.npz", **got)
            wanted = {name: gradient.numpy() for name, gradient in self._sums.items()}
            np.savez(f"{self._base}.wanted.npz", **wanted)
