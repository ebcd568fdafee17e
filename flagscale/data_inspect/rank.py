"""Documents and samples by what they cost the model, from the hardest to the easiest.

A bad document need not make any step stand out: among a thousand samples it is lost. But it costs
more than its like at every visit. Losses are held against those of their time
(:mod:`flagscale.data_inspect.excess`), divided among documents
(:mod:`flagscale.data_inspect.attribution`) and compared with how far ordinary documents of the same
dataset lie apart. Both ends matter: random bytes and shuffled text are HARD; what is repeated, in
itself or from document to document, is learned by heart and becomes EASY.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.attribution import (
    Effects,
    Equations,
    Parts,
    SpansOf,
    attribute,
    equations_of,
    parts_of,
)
from flagscale.data_inspect.excess import StepExcess, StepLosses, standardise
from flagscale.data_inspect.ranked import (
    BlockPlace,
    Direction,
    RankedDocument,
    RankedSample,
    Ranking,
)
from flagscale.errors import ConfigError

__all__ = ["BlockPlace", "Direction", "RankedDocument", "RankedSample", "Ranking", "rank"]

type Integers = npt.NDArray[np.int64]


def rank(
    steps: Iterable[StepLosses],
    spans_of: SpansOf,
    seq_length: int,
    *,
    iterations: tuple[int, int] | None = None,
    blocks: bool = True,
    limit: int | None = 100,
) -> Ranking:
    """Rank the documents and samples of some steps.

    Args:
        steps: In the order of their iterations; give some hundred before and behind those of
            interest, which tell what was usual then.
        spans_of: The documents of samples: ``TrainingCorpus.documents_of``.
        seq_length: Tokens a sample, the label behind the last not counted.
        iterations: The first and the last to rank, 1-based; ``None`` for all.
        blocks: Whether to look at the losses of blocks, where there are any.
        limit: How many documents and samples of each end to return; ``None`` for all.

    Raises:
        ConfigError: The range is empty, or blocks do not divide a sample.
        DataError: Losses or documents do not fit each other.
    """
    first, last = iterations or (0, np.iinfo(np.int64).max)
    if first > last or (limit is not None and limit < 0):
        raise ConfigError(
            "there is nothing to rank",
            where="iterations, limit",
            expected="first <= last and 0 <= limit",
            got=[first, last, limit],
            cure="give the first and the last iteration, 1-based",
        )
    gathered = [
        _gather(step, spans_of, seq_length)
        for step in standardise(steps, blocks=blocks)
        if first <= step.losses.iteration <= last
    ]
    return _Table(gathered, seq_length).ranking(limit)


@dataclass(frozen=True)
class _Gathered:
    """A step, with its samples' documents."""

    step: StepExcess
    parts: Parts
    tokens: Integers
    equations: Equations
    worst: npt.NDArray[np.int64]
    worst_score: npt.NDArray[np.float32]


def _gather(step: StepExcess, spans_of: SpansOf, seq_length: int) -> _Gathered:
    units = step.unit_excess.shape[1]
    if seq_length % units:
        raise ConfigError(
            "the blocks do not divide a sample",
            where="--seq-length",
            expected=f"a multiple of {units}, the blocks of a sample",
            got=seq_length,
            cure="give the argument of the run",
        )
    losses = step.losses
    parts = parts_of(spans_of, losses.datasets, losses.samples, seq_length)
    overlap = parts.overlap(seq_length, units)
    worst, score = _worst_blocks(step, parts, overlap)
    equations = equations_of(step, parts, overlap)
    return _Gathered(_slim(step), parts, overlap.sum(axis=1), equations, worst, score)


def _slim(step: StepExcess) -> StepExcess:
    """Without what takes most memory and is in the equations now: the blocks."""
    nothing = np.empty((0, step.unit_excess.shape[1]), np.float32)
    losses = replace(step.losses, block_losses=nothing)
    return replace(step, losses=losses, unit_excess=nothing)


def _worst_blocks(
    step: StepExcess, parts: Parts, overlap: Integers
) -> tuple[Integers, npt.NDArray[np.float32]]:
    """[parts, 2] hardest and easiest of the blocks a part has most of; and their excess."""
    excess = step.unit_excess[parts.sample]
    mine = (overlap > 0) & (2 * overlap >= overlap.max(axis=1, initial=0)[:, None])
    mine &= ~np.isnan(excess)
    hard = np.where(mine, excess, -np.inf)
    easy = np.where(mine, excess, np.inf)
    places = np.stack([hard.argmax(axis=1), easy.argmin(axis=1)], axis=1)
    scores = np.stack([hard.max(axis=1), easy.min(axis=1)], axis=1)
    return places, scores.astype(np.float32)


class _Table:
    """All steps together, by part, by document and by sample."""

    def __init__(self, gathered: Sequence[_Gathered], seq_length: int) -> None:
        self._gathered, self._seq_length = gathered, seq_length
        sizes = [len(one.tokens) for one in gathered]
        batches = [len(one.step.excess) for one in gathered]
        self._step_of_part = np.repeat(np.arange(len(gathered)), sizes)
        self._step_of_sample = np.repeat(np.arange(len(gathered)), batches)
        first_sample = np.cumsum(batches, dtype=np.int64) - batches
        self._units = gathered[0].step.unit_excess.shape[1] if gathered else 1
        self._iteration = _ints([[one.step.losses.iteration] for one in gathered])
        self._level = np.array([one.step.level for one in gathered])
        self._scale = np.array([one.step.unit_scale for one in gathered])
        self._dataset = _ints([one.step.losses.datasets for one in gathered])
        self._sample_index = _ints([one.step.losses.samples for one in gathered])
        self._losses = _floats([one.step.losses.losses for one in gathered])
        self._excess = _floats([one.step.excess for one in gathered])
        of_step = first_sample[self._step_of_part] if gathered else _ints([])
        self._sample = _ints([one.parts.sample for one in gathered]) + of_step
        self._tokens = _ints([one.tokens for one in gathered])
        self._counted = np.isfinite(self._excess)[self._sample] & (self._tokens > 0)
        pairs = np.stack(
            [self._dataset[self._sample], _ints([one.parts.document for one in gathered])]
        )
        self._documents, self._document = np.unique(pairs, axis=1, return_inverse=True)
        self._order = np.argsort(self._document, kind="stable")
        self._bounds = np.searchsorted(
            self._document[self._order], np.arange(self._documents.shape[1] + 1)
        )

    def ranking(self, limit: int | None) -> Ranking:
        effects = attribute(self._equations(), self._document, self._documents[0])
        ranked = np.argsort(-effects.score, kind="stable")  # those without a score come last
        known = int(np.isfinite(effects.score).sum())
        hard = ranked[:known][:limit]
        easy = ranked[:known][::-1][:limit]
        samples = np.argsort(-self._excess, kind="stable")
        counted = int(np.isfinite(self._excess).sum())
        return Ranking(
            tuple(self._ranked_document(int(one), effects) for one in hard),
            tuple(self._ranked_document(int(one), effects) for one in easy),
            tuple(map(self._ranked_sample, samples[:counted][:limit].tolist())),
            tuple(map(self._ranked_sample, samples[:counted][::-1][:limit].tolist())),
            known,
            counted,
            int(np.isnan(self._losses).sum()),
            self._seq_length // self._units if self._units > 1 else None,
        )

    def _equations(self) -> Equations:
        """Of all steps, with parts and units counted through."""
        every = [one.equations for one in self._gathered]
        units = np.cumsum([0, *(len(one.excess) for one in every)])
        parts = np.cumsum([0, *(len(one.tokens) for one in self._gathered)])
        return Equations(
            _floats([one.excess for one in every]),
            _floats([one.weight for one in every]),
            _ints([one.unit + before for one, before in zip(every, units[:-1], strict=True)]),
            _ints([one.part + before for one, before in zip(every, parts[:-1], strict=True)]),
            _floats([one.share for one in every]),
        )

    def _ranked_document(self, one: int, effects: Effects) -> RankedDocument:
        parts = self._order[self._bounds[one] : self._bounds[one + 1]]
        every = self._sample[parts]
        counted = parts[self._counted[parts]]
        tokens = self._tokens[counted]
        step = self._step_of_part[counted]
        scale = float(np.average(self._scale[step], weights=tokens))
        level = float(np.average(self._level[step], weights=tokens))
        score = float(effects.score[one])
        samples = self._sample[counted]
        return RankedDocument(
            dataset=int(self._documents[0, one]),
            document=int(self._documents[1, one]),
            direction=_direction(score),
            score=score,
            loss=level + float(effects.effect[one]) * scale,
            excess=float(effects.effect[one] - effects.middle[one]) * scale,
            uncertainty=float(effects.error[one]) * scale,
            visits=len(np.unique(samples)),
            tokens=int(tokens.sum()),
            nan_visits=len(np.unique(every[np.isnan(self._losses[every])])),
            samples=tuple(np.unique(self._sample_index[samples]).tolist()),
            worst=self._worst(counted, _direction(score)),
        )

    def _worst(self, parts: Integers, direction: Direction) -> BlockPlace | None:
        if self._units == 1:
            return None
        side = 0 if direction is Direction.HARD else 1
        scores = [
            self._of_part(part)[0].worst_score[self._of_part(part)[1], side] for part in parts
        ]
        best = int(np.argmax(scores) if side == 0 else np.argmin(scores))
        if not np.isfinite(scores[best]):
            return None
        gathered, at = self._of_part(parts[best])
        block = int(gathered.worst[at, side])
        size = self._seq_length // self._units
        start, end = int(gathered.parts.text_start[at]), int(gathered.parts.text_end[at])
        low, high = max(start, block * size + 1), min(end, (block + 1) * size + 1)
        before = int(gathered.parts.token_start[at]) - start
        sample = self._sample[parts[best]]
        return BlockPlace(
            dataset=int(self._dataset[sample]),
            sample_index=int(self._sample_index[sample]),
            iteration=gathered.step.losses.iteration,
            block=block,
            token_start=low + before,
            token_end=high + before,
            score=float(scores[best]),
        )

    def _of_part(self, part: int) -> tuple[_Gathered, int]:
        """The step of a part, and which of its parts it is."""
        step = int(self._step_of_part[part])
        return self._gathered[step], int(part - np.searchsorted(self._step_of_part, step))

    def _ranked_sample(self, sample: int) -> RankedSample:
        step = self._step_of_sample[sample]
        loss, score = float(self._losses[sample]), float(self._excess[sample])
        return RankedSample(
            iteration=int(self._iteration[step]),
            dataset=int(self._dataset[sample]),
            sample_index=int(self._sample_index[sample]),
            direction=_direction(score),
            score=score,
            loss=loss,
            excess=loss - float(self._level[step]),
        )


def _direction(score: float) -> Direction:
    return Direction.HARD if score >= 0 else Direction.EASY


def _ints(arrays: Sequence[npt.ArrayLike]) -> Integers:
    return np.concatenate([np.empty(0, np.int64), *(np.asarray(one, np.int64) for one in arrays)])


def _floats(arrays: Sequence[npt.ArrayLike]) -> npt.NDArray[np.float32]:
    empty = np.empty(0, np.float32)
    return np.concatenate([empty, *(np.asarray(one, np.float32) for one in arrays)])
