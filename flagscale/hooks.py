"""What happens in a training run, told to whoever asks: a list of callables for each event.

Upstream has no hook for the end of a step or of a save. :mod:`flagscale.patches.training_events`
tells this module, and the training entry (throughput, the run's begun-marker) listens. Nothing here
imports torch or megatron. A listener that raises ends the run: an error swallowed in a hook is a
silent fallback.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["HOOKS", "Hooks", "SaveEvent", "StepEvent"]


@dataclass(frozen=True)
class StepEvent:
    """One optimizer step, as this rank saw it.

    Args:
        iteration: 1-based, as upstream logs it.
        losses: Name to scalar tensor; empty on every rank but those of the last pipeline stage.
        grad_norm: Global gradient norm before clipping, ``None`` where upstream has none.
        skipped: Whether the optimizer refused the step (fp16 overflow, NaN).
        seconds: Wall time of the step on this rank.
    """

    iteration: int
    losses: Mapping[str, Any]
    grad_norm: float | None
    skipped: bool
    seconds: float


@dataclass(frozen=True)
class SaveEvent:
    """One checkpoint save that upstream has returned from (an asynchronous one may still write).

    Args:
        iteration: 1-based iteration the checkpoint holds.
        seconds: Wall time of the save on this rank.
    """

    iteration: int
    seconds: float


@dataclass
class Hooks:
    """The listeners of this process."""

    on_step_end: list[Callable[[StepEvent], None]] = field(default_factory=list)
    on_save: list[Callable[[SaveEvent], None]] = field(default_factory=list)


HOOKS = Hooks()
