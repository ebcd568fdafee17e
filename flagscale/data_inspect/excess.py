"""How far losses stand out from those of their time: in standard units, whatever the level.

The loss falls while a model trains, its spread changes, and a sample's first block of tokens, which
has less text before it, costs more than the others. So each loss is held against the median of the
steps around it and of its place in the sample, and divided by the spread there. Medians, because
bad documents must not hide themselves by raising what they are compared with.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flagscale.errors import DataError

__all__ = ["LIMIT", "StepExcess", "StepLosses", "standardise"]

type Floats = npt.NDArray[np.float32]
type Integers = npt.NDArray[np.int64]

LIMIT = 12.0
"""No loss counts as further out than this, in standard units: an infinite one, say."""
_NORMAL_MAD = 1.4826
_LEVEL_STEPS, _LEVEL_SAMPLES = 4, 64
"""Before and behind a step, the steps and at least the samples that its level is taken from."""
_CHUNK_STEPS, _CHUNK_SAMPLES = 32, 1024
"""At least so many share what a place in the sample costs, and the spread."""


@dataclass(frozen=True)
class StepLosses:
    """What the ledger has of the samples of one step, of any number of its ranks.

    Args:
        iteration: 1-based.
        datasets: [n] ordinals in the blend.
        samples: [n] the datasets' own indices.
        losses: [n] means over counted tokens; NaN where it was NaN, -1 where none counted.
        block_losses: [n, blocks], the same; no column without ``--ledger-blocks``.
    """

    iteration: int
    datasets: Integers
    samples: Integers
    losses: Floats
    block_losses: Floats


@dataclass(frozen=True)
class StepExcess:
    """The same, held against its time; units are whole samples, or blocks where there are any.

    Args:
        losses: Of the step.
        excess: [n] of the samples' means in standard units; NaN where there is no loss.
        unit_excess: [n, units] of units; NaN where there is no loss.
        level: What the mean of a sample cost at that time.
        unit_scale: The spread of units, in the unit of the loss.
    """

    losses: StepLosses
    excess: Floats
    unit_excess: Floats
    level: float
    unit_scale: float


def standardise(steps: Iterable[StepLosses], *, blocks: bool = True) -> Iterator[StepExcess]:
    """Each step held against those around it, in one pass that remembers a few hundred steps.

    Args:
        steps: In the order of their iterations.
        blocks: Whether to look at the losses of blocks, where there are any.

    Raises:
        DataError: The number of blocks changes, or arrays of a step do not fit each other.
    """
    held: list[StepLosses] = []
    done = 0
    for step in steps:
        _verify(step, held)
        held.append(step)
        margin = _steps_for(_LEVEL_STEPS, _LEVEL_SAMPLES, len(step.losses))
        chunk = _steps_for(_CHUNK_STEPS, _CHUNK_SAMPLES, len(step.losses))
        if len(held) >= done + chunk + 2 * margin:
            end = len(held) - margin
            yield from _standardise_chunk(held, done, end, blocks)
            held, done = held[max(0, end - margin) :], min(margin, end)
    if held:
        yield from _standardise_chunk(held, done, len(held), blocks)


def _steps_for(steps: int, samples: int, batch: int) -> int:
    return max(steps, -(-samples // max(batch, 1)))


def _verify(step: StepLosses, before: list[StepLosses]) -> None:
    n = len(step.losses)
    width = before[-1].block_losses.shape[1] if before else step.block_losses.shape[-1]
    if not (len(step.datasets) == len(step.samples) == n) or step.block_losses.shape != (n, width):
        raise DataError(
            "the losses of a step do not fit each other, or those of the step before",
            where=f"iteration {step.iteration}",
            expected=f"{n} samples of {width} blocks",
            got=f"{len(step.samples)} samples, losses of blocks {step.block_losses.shape}",
            cure="rank runs with other --ledger-blocks one by one (restrict the iterations)",
        )


def _standardise_chunk(
    held: list[StepLosses], begin: int, end: int, blocks: bool
) -> Iterator[StepExcess]:
    """Steps ``[begin, end)``; those around them help to find their level."""
    means = [_counted(step.losses) for step in held]
    levels = _levels(means)
    chunk = held[begin:end]
    of_step = np.repeat(np.arange(begin, end), [len(step.losses) for step in chunk])
    excess = np.concatenate(means[begin:end]) - levels[of_step]
    centred, scale = _centred(excess[:, None])
    units, unit_scale = centred, scale
    if blocks and chunk and chunk[0].block_losses.shape[1]:
        losses = _counted(np.concatenate([step.block_losses for step in chunk]))
        units, unit_scale = _centred(losses - levels[of_step][:, None])
    for number, step in enumerate(chunk, begin):
        mine = of_step == number
        yield StepExcess(
            step, centred[mine, 0], units[mine], float(levels[number]), float(unit_scale)
        )


def _counted(losses: Floats) -> Floats:
    """NaN where no token counted."""
    result: Floats = np.where(losses < 0, np.float32(np.nan), losses)
    return result


def _levels(means: list[Floats]) -> Floats:
    """[steps] the median of the samples around each step.

    The loss falls fastest at the beginning of training, so that a window there must reach no
    further ahead than it can reach back.
    """
    sizes = [len(losses) for losses in means]
    ends = np.cumsum(sizes)
    every = np.concatenate(means)
    result = np.empty(len(means), np.float32)
    for number, size in enumerate(sizes):
        reach = _steps_for(_LEVEL_STEPS, _LEVEL_SAMPLES, size)
        low, high = max(0, number - reach), min(len(means), number + min(reach, number) + 1)
        result[number] = _median(every[ends[low] - sizes[low] : ends[high - 1]])
    return result


def _median(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else 0.0


def _centred(excess: Floats) -> tuple[Floats, float]:
    """Less the median of each column, over the spread of all; and that spread."""
    middle = np.array([_median(np.clip(column, -1e30, 1e30)) for column in excess.T], np.float32)
    residual = excess - middle
    scale = _NORMAL_MAD * _median(np.abs(residual))
    if not 0 < scale < np.inf:
        scale = 1.0
    clipped: Floats = np.clip(residual / np.float32(scale), -LIMIT, LIMIT)
    return clipped, scale
