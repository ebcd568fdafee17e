"""Whose loss is it? Losses of samples and blocks divided among the documents that lie in them.

A unit (a sample, or a block of one) that holds parts of several documents costs, in standard units,

    z = sum over documents of (share of the unit's tokens) x (the document's effect) + noise

and a document lies in several units, beside other neighbours each time it is visited. The effects
are estimated together, by least squares with a normal prior on them (ridge), whose two variances,
of the noise and of the effects, are estimated from the same data by medians. So the neighbours of a
bad document are cleared by what they cost elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.answers import DocumentSpan
from flagscale.data_inspect.excess import StepExcess
from flagscale.errors import DataError

__all__ = ["Effects", "Equations", "Parts", "SpansOf", "attribute", "equations_of", "parts_of"]

type Doubles = npt.NDArray[np.float64]
type Floats = npt.NDArray[np.float32]
type Integers = npt.NDArray[np.int64]
type SpansOf = Callable[[Integers, Integers], Sequence[Sequence[DocumentSpan]]]
"""[n] datasets and [n] sample indices to the documents of each sample, in its order."""

_ROUNDS = 4
_ITERATIONS = 40
_MEDIAN_CHI2 = 0.4549
"""Of one degree of freedom."""
_NORMAL_MAD = 1.4826
_NUM_FOR_SPREAD = 20
"""Documents of a dataset that are like enough to be compared among themselves."""


@dataclass(frozen=True)
class Parts:
    """The parts of documents in the samples of a step; all arrays are [m] int64.

    Args:
        sample: Which sample of the step, from 0.
        document: Ordinal, from 0.
        token_start: First token of the part, counted from the document's first.
        text_start: Where in the sample's ``sequence length + 1`` tokens it begins.
        text_end: One past its last.
    """

    sample: Integers
    document: Integers
    token_start: Integers
    text_start: Integers
    text_end: Integers

    def overlap(self, seq_length: int, units: int) -> Integers:
        """[m, units] labels of each part in each unit: the loss at p is that of token p + 1."""
        size = seq_length // units
        begins = np.arange(units) * size
        low = np.maximum(self.text_start[:, None] - 1, begins)
        high = np.minimum(self.text_end[:, None] - 1, begins + size)
        overlap: Integers = np.maximum(high - low, 0)
        return overlap


def parts_of(spans_of: SpansOf, datasets: Integers, samples: Integers, seq_length: int) -> Parts:
    """The parts of documents in some samples.

    Raises:
        DataError: They do not fill the samples.
    """
    rows = [
        (number, s.document, s.token_start, s.sample_start, s.token_end - s.token_start)
        for number, spans in enumerate(spans_of(datasets, samples))
        for s in spans
    ]
    table = np.array(rows, np.int64).reshape(-1, 5)
    sample, document, token_start, text_start, length = table.T
    filled = np.bincount(sample, length, len(samples))
    if (filled != seq_length + 1).any() or (length < 1).any():
        bad = int(np.argmax(filled != seq_length + 1))
        raise DataError(
            "the documents of a sample do not fill it",
            where=f"dataset {datasets[bad]}, sample {samples[bad]}",
            expected=f"{seq_length + 1} tokens",
            got=int(filled[bad]),
            cure="check that --seq-length is that of the run",
        )
    return Parts(sample, document, token_start, text_start, text_start + length)


@dataclass(frozen=True)
class Equations:
    """Units with an excess, and the parts of documents in them.

    Units that lie wholly in one part are merged, which changes no estimate.

    Args:
        excess: [units] in standard units; the mean, where units are merged.
        weight: [units] how many are merged.
        unit: [entries] which unit.
        part: [entries] which part, counted like the parts they were made from.
        share: [entries] of the unit's tokens.
    """

    excess: Floats
    weight: Floats
    unit: Integers
    part: Integers
    share: Floats


def equations_of(step: StepExcess, parts: Parts, overlap: Integers) -> Equations:
    """The equations of a step; units without a loss have none.

    Args:
        step: Its excess.
        parts: Of its samples.
        overlap: [parts, units] labels, from :meth:`Parts.overlap`.
    """
    excess = step.unit_excess[parts.sample]
    # Every sample is filled to its end, so that a unit's labels are those of all parts in it.
    size = overlap.sum() / max(step.unit_excess.size, 1)
    shares = np.where(np.isnan(excess), 0, overlap / max(size, 1)).astype(np.float32)
    whole = shares == 1
    count = whole.sum(axis=1)
    sums = np.where(whole, excess, 0).sum(axis=1)
    some = np.flatnonzero(count)
    part, unit = np.nonzero((shares > 0) & ~whole)
    key = parts.sample[part] * overlap.shape[1] + unit
    mixed, number = np.unique(key, return_inverse=True)
    return Equations(
        np.concatenate([sums[some] / count[some], step.unit_excess.ravel()[mixed]]),
        np.concatenate([count[some], np.ones(len(mixed))]).astype(np.float32),
        np.concatenate([np.arange(len(some)), number + len(some)]),
        np.concatenate([some, part]),
        np.concatenate([np.ones(len(some), np.float32), shares[part, unit]]),
    )


@dataclass(frozen=True)
class Effects:
    """What documents cost beyond their like, in standard units; all arrays are [documents].

    Args:
        effect: Of the document alone, its neighbours' effects taken off; not shrunk.
        error: One standard error of it.
        middle: The median effect of the documents of its dataset.
        spread: Of the true effects of ordinary documents there: what remains if errors are taken
            off.
        score: ``(effect - middle) / sqrt(error² + spread²)``: about normal for ordinary documents.
    """

    effect: Doubles
    error: Doubles
    middle: Doubles
    spread: Doubles
    score: Doubles


def attribute(equations: Equations, document: Integers, dataset: Integers) -> Effects:
    """Estimate the effect of every document.

    Args:
        equations: Of all steps.
        document: [parts] which document each part is of, counted from 0 without gaps.
        dataset: [documents] the dataset of each.
    """
    system = _System(equations, document, len(dataset))
    noise, spread = 1.0, np.ones(len(dataset))
    estimate = middle = np.zeros(len(dataset))
    for _ in range(_ROUNDS):
        shrunk = system.solve(noise / spread**2, middle, estimate)
        estimate = system.unshrunk(shrunk)
        noise = system.noise(shrunk, estimate)
        variance = noise / np.maximum(system.information, 1e-30)
        middle, spread = _ordinary(estimate, variance, dataset)
    known = system.information > 0
    score = np.where(known, (estimate - middle) / np.sqrt(variance + spread**2), np.nan)
    return Effects(estimate, np.sqrt(variance), middle, spread, score)


class _System:
    """The weighted least squares, in sparse form.

    ``information`` is [documents]: the sum of weight x share² over a document's units.
    """

    def __init__(self, equations: Equations, document: Integers, documents: int) -> None:
        self._equations, self._documents = equations, documents
        self._document_of_part = document
        self._document = document[equations.part]
        self._weighted = equations.weight[equations.unit] * equations.share
        self.information = self._per_document(equations.share)

    def _per_document(self, values: npt.NDArray[np.floating]) -> Doubles:
        """Sums of weight x share x values, which are [entries]."""
        sums: Doubles = np.bincount(self._document, self._weighted * values, self._documents)
        return sums

    def _predicted(self, effect: Doubles) -> Doubles:
        terms = self._equations.share * effect[self._document]
        return np.bincount(self._equations.unit, terms, len(self._equations.excess))

    def _residual(self, effect: Doubles) -> Doubles:
        """[entries] what is left of the unit's excess."""
        residual: Doubles = self._equations.excess - self._predicted(effect)
        return residual[self._equations.unit]

    def solve(self, ridge: Doubles, middle: Doubles, start: Doubles) -> Doubles:
        """[documents] effects, drawn towards the middle; by conjugate gradients.

        Args:
            ridge: [documents] variance of the noise over that of the effects.
            middle: [documents] the mean of the prior.
            start: Where to begin.
        """
        effect = start.copy()
        precondition = 1 / (self.information + ridge)
        gradient = self._per_document(self._residual(effect)) - ridge * (effect - middle)
        direction = precondition * gradient
        size = first = float(gradient @ direction)
        for _ in range(_ITERATIONS):
            if size <= 1e-10 * first or size < 1e-20:
                break
            image = self._predicted(direction)[self._equations.unit]
            image = self._per_document(image) + ridge * direction
            step = size / float(direction @ image)
            effect += step * direction
            gradient -= step * image
            conditioned = precondition * gradient
            size, before = float(gradient @ conditioned), size
            direction = conditioned + size / before * direction
        return effect

    def unshrunk(self, effect: Doubles) -> Doubles:
        """[documents] the effect of each alone, those of its neighbours as given."""
        correction = self._per_document(self._residual(effect))
        return effect + correction / np.maximum(self.information, 1e-30)

    def noise(self, shrunk: Doubles, estimate: Doubles) -> float:
        """The variance of a unit, from how the parts of the same document disagree."""
        part, document = self._equations.part, self._document_of_part
        parts = len(document)
        information = np.bincount(part, self._weighted * self._equations.share, parts)
        residual = self._residual(shrunk)
        sums = np.bincount(part, self._weighted * residual, parts)
        share = information / np.maximum(self.information, 1e-30)[document]
        # A part alone, against its document, of whose estimate it is a part itself.
        use = (share > 0) & (share < 0.9)
        if use.sum() < _NUM_FOR_SPREAD:
            return 1.0
        alone = sums[use] / information[use] + shrunk[document[use]]
        difference = (alone - estimate[document[use]]) ** 2
        scaled = difference * information[use] / (1 - share[use])
        return max(float(np.median(scaled)) / _MEDIAN_CHI2, 1e-12)


def _ordinary(estimate: Doubles, variance: Doubles, dataset: Integers) -> tuple[Doubles, Doubles]:
    """[documents] median and spread of true effects in each dataset; of all, where it is small."""
    known = variance < 1e15
    overall = _middle_and_spread(estimate[known], variance[known])
    middle, spread = np.full(len(estimate), overall[0]), np.full(len(estimate), overall[1])
    for one in np.unique(dataset):
        mine = known & (dataset == one)
        if mine.sum() >= _NUM_FOR_SPREAD:
            middle[mine], spread[mine] = _middle_and_spread(estimate[mine], variance[mine])
    return middle, spread


def _middle_and_spread(estimate: Doubles, variance: Doubles) -> tuple[float, float]:
    """The median, and the spread at which the scores of half of all lie within ±0.67."""
    if not len(estimate):
        return 0.0, 1.0
    precise = np.argsort(variance)[: max(len(variance) // 2, 1)]
    middle = float(np.median(estimate[precise]))
    distance = np.abs(estimate - middle)
    low, high = 1e-3, 2 * _NORMAL_MAD * float(np.max(distance)) + 1e-3
    for _ in range(40):
        spread = (low + high) / 2
        within = float(np.median(distance / np.sqrt(variance + spread**2))) * _NORMAL_MAD
        low, high = (spread, high) if within > 1 else (low, spread)
    return middle, (low + high) / 2
