"""What a ranking answers with: documents and samples, and by how much they stand out."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["BlockPlace", "Direction", "RankedDocument", "RankedSample", "Ranking"]


class Direction(enum.StrEnum):
    """On which side of its like something lies."""

    HARD = "HARD"
    """It costs more: noise, shuffled text, a wrong encoding, another language."""
    EASY = "EASY"
    """It costs less: repeated, duplicated, boilerplate."""


@dataclass(frozen=True)
class BlockPlace:
    """The block of a document that stands out most.

    Args:
        dataset: Ordinal in the blend.
        sample_index: The dataset's own index of the sample it was read in.
        iteration: 1-based, when.
        block: Of the sample, from 0.
        token_start: First token of the document in it, counted from the document's first.
        token_end: One past the last.
        score: Of the block alone, in standard units.
    """

    dataset: int
    sample_index: int
    iteration: int
    block: int
    token_start: int
    token_end: int
    score: float


@dataclass(frozen=True)
class RankedDocument:
    """A document and what it cost.

    Args:
        dataset: Ordinal in the blend.
        document: Ordinal, from 0.
        direction: The sign of the score.
        score: How far it lies from ordinary documents of its dataset, whose scores are about
            normal with deviation 1; the uncertainty is in it, so that little text seen seldom does
            not stand out by chance.
        loss: Mean over its tokens, as far as it can be told apart from its neighbours.
        excess: That, less what ordinary documents of its dataset cost at the same time.
        uncertainty: One standard error of the excess.
        visits: Samples that it was in and that had a loss, counted each time.
        tokens: Of it that were trained on, counted each time.
        nan_visits: Samples that it was in and whose loss was NaN: they count for nothing here.
        samples: The datasets' own indices of those samples, without repetition, rising.
        worst: The block that stands out most to its side; ``None`` without blocks.
    """

    dataset: int
    document: int
    direction: Direction
    score: float
    loss: float
    excess: float
    uncertainty: float
    visits: int
    tokens: int
    nan_visits: int
    samples: tuple[int, ...]
    worst: BlockPlace | None


@dataclass(frozen=True)
class RankedSample:
    """A sample and what it cost at one visit.

    Args:
        iteration: 1-based, when.
        dataset: Ordinal in the blend.
        sample_index: The dataset's own.
        direction: The sign of the score.
        score: How far it lies from the samples of its time, in standard units; from one look.
        loss: Mean over its counted tokens.
        excess: That, less what samples cost at the same time.
    """

    iteration: int
    dataset: int
    sample_index: int
    direction: Direction
    score: float
    loss: float
    excess: float


@dataclass(frozen=True)
class Ranking:
    """Both ends.

    Args:
        hard: Documents, the hardest first.
        easy: Documents, the easiest first.
        hard_samples: Samples, the hardest first.
        easy_samples: Samples, the easiest first.
        documents: How many were ranked.
        samples: How many samples, counted each time, had a loss.
        nan_samples: How many had none, because it was NaN.
        block_tokens: The size of the blocks that were looked at; ``None`` for whole samples.
    """

    hard: tuple[RankedDocument, ...]
    easy: tuple[RankedDocument, ...]
    hard_samples: tuple[RankedSample, ...]
    easy_samples: tuple[RankedSample, ...]
    documents: int
    samples: int
    nan_samples: int
    block_tokens: int | None
