"""What this package answers with: which samples, which documents, and how far to trust it."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["DocumentSpan", "Label", "SampleAnswer", "StepAnswer"]


class Label(enum.StrEnum):
    """How an answer is known."""

    EXACT = "EXACT"
    """Checksums the training job took of its own batches agree."""
    RECONSTRUCTED = "RECONSTRUCTED"
    """Computed from arguments or caches; what that assumes is said."""
    UNKNOWN = "UNKNOWN"
    """It cannot be computed; what is missing is said."""


@dataclass(frozen=True)
class DocumentSpan:
    """The part of one sequence that a sample holds.

    Args:
        sequence: Ordinal in the ``.idx``, from 0.
        document: Ordinal of the document that the sequence belongs to, from 0.
        token_start: First token, counted from the document's first.
        token_end: One past the last.
        sample_start: Where in the sample its first token lies.
        byte_offset: Of its first token in the ``.bin``.
        source_file: The file it was preprocessed from; ``None`` without a sidecar.
        source_line: Its line there, from 1, as editors count.
    """

    sequence: int
    document: int
    token_start: int
    token_end: int
    sample_start: int
    byte_offset: int
    source_file: str | None = None
    source_line: int | None = None


@dataclass(frozen=True)
class SampleAnswer:
    """One sample of a step.

    Args:
        rank: Data-parallel rank that drew it.
        micro_batch: Which micro batch of the step on that rank, from 0.
        position: Place in the micro batch, from 0.
        dataset: Ordinal in the blend, from 0.
        prefix: That dataset, as ``--data-path`` names it.
        sample_index: The dataset's own index of the sample: of its shuffled order.
        documents: In the order of the sample's tokens; the last may contribute only the label
            behind the last token, which is the sample's ``sequence length + 1``-th.
        loss: Mean over its counted tokens, ``None`` where the ledger has none.
    """

    rank: int
    micro_batch: int
    position: int
    dataset: int
    prefix: str
    sample_index: int
    documents: tuple[DocumentSpan, ...]
    loss: float | None = None


@dataclass(frozen=True)
class StepAnswer:
    """The samples of one step.

    Args:
        iteration: 1-based, as logged.
        label: How far to trust it.
        reasons: For EXACT what agrees, for RECONSTRUCTED what is assumed, for UNKNOWN what is
            missing.
        attempt: The start it ran in; ``None`` without a ledger.
        consumed_before: Samples consumed before it; ``None`` if that is not known.
        consumed_after: And after it.
        skipped: Whether ``--iterations-to-skip`` passed over it.
        samples: By rank, micro batch and position.
    """

    iteration: int
    label: Label
    reasons: tuple[str, ...]
    attempt: str | None
    consumed_before: int | None
    consumed_after: int | None
    skipped: bool
    samples: tuple[SampleAnswer, ...]
