"""What happens in a training run, told to whoever asks: a list of callables for each event.

Upstream has no hook for the end of a step, a save, or the decision to save.
:mod:`flagscale.patches.training_events` and the pretraining entry tell this module of them, and
plugins listen. Nothing here imports torch or megatron. A listener that raises ends the run: an
error swallowed in a hook is a silent fallback.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = [
    "HOOKS",
    "BatchDrawn",
    "DatasetsBuilt",
    "EarlyExit",
    "ExitEvent",
    "ExitReason",
    "ForwardLoss",
    "ForwardStart",
    "Hooks",
    "SaveEvent",
    "SaveReason",
    "SaveRequest",
    "SaveStart",
    "StepEvent",
    "StepStart",
    "TrainStart",
]


@dataclass(frozen=True)
class DatasetsBuilt:
    """The datasets are there; the loaders that read them come next.

    Args:
        train: The training dataset, ``None`` on a rank that reads no data.
    """

    train: Any


@dataclass(frozen=True)
class TrainStart:
    """Model, optimizer and data are there, a checkpoint is loaded; the first step comes next.

    Args:
        iteration: Iterations done so far; 0 in a fresh run.
        consumed_samples: Samples the whole job has consumed so far.
        model: This rank's model chunks, wrapped.
        optimizer: Upstream's.
    """

    iteration: int
    consumed_samples: int
    model: Sequence[Any]
    optimizer: Any


@dataclass(frozen=True)
class StepStart:
    """A step that trains is about to draw its first micro batch.

    Args:
        iteration: 1-based, as upstream will log it.
        consumed_samples: Samples the whole job has consumed before it.
        num_micro_batches: How many each data-parallel rank will draw; all of them once more if
            upstream's rerun engine repeats the step.
    """

    iteration: int
    consumed_samples: int
    num_micro_batches: int


@dataclass(frozen=True)
class BatchDrawn:
    """A micro batch as the loader gave it, on a rank that reads data; also in evaluation.

    Args:
        batch: By name, whole sequences on the host: ``tokens`` and ``labels`` [b, s] int64, and
            what else the dataset gives. Not to be changed.
    """

    batch: Mapping[str, Any]


@dataclass(frozen=True)
class ForwardStart:
    """A micro batch is about to pass this rank's stage; also in evaluation."""


@dataclass(frozen=True)
class ForwardLoss:
    """The losses of one micro batch, on a rank of the last pipeline stage; also in evaluation.

    The tensors are the device's own, part of the graph: read them without synchronising.

    Args:
        token_losses: [b, s] cross entropies; [b, s / cp] under context parallelism.
        loss_mask: [b, s] float32, 1 where a token counts; the mean over row ``i`` under it is the
            loss of the micro batch's sample ``i``. A row may have none.
        quarantined: [b, s] bool, true where a token would count if it were not quarantined; in
            ``loss_mask`` it is 0. ``None`` where no quarantine list is in force.
    """

    token_losses: Any
    loss_mask: Any
    quarantined: Any


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step, as this rank saw it.

    Args:
        iteration: 1-based, as upstream logs it.
        losses: Name to scalar tensor; empty on every rank but those of the last pipeline stage.
        grad_norm: Global gradient norm before clipping, ``None`` where upstream has none.
        learning_rate: As upstream logs it for this step, ``None`` on a rank without parameters.
        skipped: Whether the optimizer refused the step (fp16 overflow, NaN).
        seconds: Wall time of the step on this rank.
    """

    iteration: int
    losses: Mapping[str, Any]
    grad_norm: float | None
    learning_rate: float | None
    skipped: bool
    seconds: float


class SaveReason(enum.Enum):
    """Why upstream is about to save. Saves on a signal or at an exit are never asked about."""

    INTERVAL = "interval"
    BATCH_SIZE_CHANGE = "batch-size change"


@dataclass(frozen=True)
class SaveRequest:
    """A save that may be refused. Every rank is asked, and every rank must answer alike."""

    iteration: int
    reason: SaveReason


@dataclass(frozen=True)
class SaveStart:
    """A save is about to begin; nothing of it is written yet.

    Args:
        iteration: 1-based iteration the checkpoint will hold.
        persistent: Whether it goes to ``--save``; else it is one of
            ``--non-persistent-save-interval``.
    """

    iteration: int
    persistent: bool


@dataclass(frozen=True)
class SaveEvent:
    """One checkpoint save that upstream has returned from (an asynchronous one may still write).

    Args:
        iteration: 1-based iteration the checkpoint holds.
        seconds: Wall time of the save on this rank.
    """

    iteration: int
    seconds: float


class ExitReason(enum.Enum):
    """Why upstream leaves its loop, having saved if it was told where."""

    SIGNAL = "signal"
    DURATION = "duration"
    """``--exit-duration-in-mins`` is over."""
    PLANNED = "planned"
    """``--exit-interval``, or a transition between phases."""


@dataclass(frozen=True)
class EarlyExit:
    """Upstream is about to leave its loop; the same on every rank.

    Args:
        iteration: The last one done, counted from 1.
        reason: Why.
    """

    iteration: int
    reason: ExitReason


@dataclass(frozen=True)
class ExitEvent:
    """The run is over on this rank.

    Args:
        exit_code: What the process will end with.
        error: What ended it, ``None`` if it was not an error.
    """

    exit_code: int
    error: BaseException | None


@dataclass
class Hooks:
    """The listeners of this process, in the order they are called."""

    on_datasets: list[Callable[[DatasetsBuilt], None]] = field(default_factory=list)
    on_train_start: list[Callable[[TrainStart], None]] = field(default_factory=list)
    on_step_start: list[Callable[[StepStart], None]] = field(default_factory=list)
    on_batch: list[Callable[[BatchDrawn], None]] = field(default_factory=list)
    on_forward: list[Callable[[ForwardStart], None]] = field(default_factory=list)
    on_forward_loss: list[Callable[[ForwardLoss], None]] = field(default_factory=list)
    on_step_end: list[Callable[[StepEvent], None]] = field(default_factory=list)
    should_save: list[Callable[[SaveRequest], bool]] = field(default_factory=list)
    on_save_start: list[Callable[[SaveStart], None]] = field(default_factory=list)
    on_save: list[Callable[[SaveEvent], None]] = field(default_factory=list)
    on_early_exit: list[Callable[[EarlyExit], None]] = field(default_factory=list)
    on_exit: list[Callable[[ExitEvent], None]] = field(default_factory=list)

    def may_save(self, request: SaveRequest) -> bool:
        """Whether no listener refuses the save."""
        return all(listener(request) for listener in self.should_save)


HOOKS = Hooks()
