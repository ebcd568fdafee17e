"""What a report is made from: filled by whoever looked at the run, opened by no one else."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.answers import DocumentSpan, StepAnswer
from flagscale.data_inspect.curve import Curve, surviving
from flagscale.errors import ConfigError

__all__ = [
    "AttemptMark",
    "Command",
    "CurveArrays",
    "DocumentText",
    "Highlight",
    "Limits",
    "Mark",
    "RankedDocument",
    "Report",
    "SpikeStep",
]


class Mark(enum.StrEnum):
    """Why a part of a text is highlighted."""

    SAMPLE = "sample"
    """The sample read it."""
    WORST = "worst"
    """And of what the sample read, its loss is the largest."""


@dataclass(frozen=True)
class Highlight:
    """Characters ``[start, end)`` of a text, counted from 0. WORST wins where two overlap."""

    start: int
    end: int
    mark: Mark = Mark.SAMPLE


@dataclass(frozen=True)
class DocumentText:
    """The decoded text of a document, or of the part around what a sample read.

    Args:
        text: May hold anything, lone surrogates included.
        highlights: In any order; what lies outside the text is ignored.
        before: Characters of the document before ``text`` that were never decoded into it.
        after: And behind it.
        note: What the reader must know, such as that it could not be decoded; may be empty.
        loss: Mean over the blocks of this document in the sample; ``None`` without block losses.
    """

    text: str
    highlights: tuple[Highlight, ...] = ()
    before: int = 0
    after: int = 0
    note: str = ""
    loss: float | None = None


@dataclass(frozen=True)
class Command:
    """Something to type.

    Args:
        title: What it does, in a few words.
        text: As the shell takes it; may have several lines.
    """

    title: str
    text: str


@dataclass(frozen=True)
class AttemptMark:
    """One start of the job.

    Args:
        attempt: Its name in the ledger, or the log it wrote.
        first_iteration: The first it trained, 1-based.
        last_iteration: The last it logged, also where a later attempt went back behind it.
    """

    attempt: str
    first_iteration: int
    last_iteration: int


@dataclass(frozen=True)
class CurveArrays:
    """Every step that was logged, in the order of attempt and iteration; arrays of one length.

    Args:
        iteration: 1-based, int64.
        loss: float64, NaN where it was not logged or is not a number.
        grad_norm: float64, NaN likewise.
        attempt: Index into :attr:`Report.attempts`, an integer type.
        superseded: Whether a later attempt ran the iteration again; bool.
    """

    iteration: npt.NDArray[np.int64]
    loss: npt.NDArray[np.float64]
    grad_norm: npt.NDArray[np.float64]
    attempt: npt.NDArray[np.integer]
    superseded: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, curve: Curve) -> CurveArrays:
        """The points of a curve that was read from a log, event files or a ledger."""
        kept = {id(point) for point in surviving(curve).points}
        return cls(
            iteration=np.array([point.iteration for point in curve.points], np.int64),
            loss=_floats(point.loss for point in curve.points),
            grad_norm=_floats(point.grad_norm for point in curve.points),
            attempt=np.array([point.attempt for point in curve.points], np.int64),
            superseded=np.array([id(point) not in kept for point in curve.points], np.bool_),
        )

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name))
            for name in ("iteration", "loss", "grad_norm", "attempt", "superseded")
        }
        if len(set(lengths.values())) != 1:
            raise ConfigError(
                "the arrays of a curve differ in length", expected="one length", got=lengths
            )


def _floats(values: Iterable[float | None]) -> npt.NDArray[np.float64]:
    return np.array([np.nan if value is None else value for value in values], np.float64)


@dataclass(frozen=True)
class SpikeStep:
    """A spike, and the samples of one step of it.

    Args:
        first_iteration: Of the spike, 1-based.
        last_iteration: Of the spike, included.
        peak: Its largest loss; ``None`` where the loss is NaN or missing.
        baseline: The loss one would have expected.
        score: How far above, in the detector's unit; ``None`` where the loss has no number.
        kind: In a word or two, such as ``loss`` or ``NaN loss``.
        evidence: Further facts, a sentence each.
        step: Its samples; ``None`` if they are not known.
        reason: Why ``step`` is ``None``; else empty.
        texts: By ordinal of the dataset and span, as ``step`` has them. Spans without a text are
            shown with their provenance alone.
        commands: To reproduce it and to quarantine its documents.
        found: Whether it stood out; ``False`` for a step that was asked for.
    """

    first_iteration: int
    last_iteration: int
    peak: float | None
    baseline: float | None
    score: float | None
    kind: str = "loss"
    evidence: tuple[str, ...] = ()
    step: StepAnswer | None = None
    reason: str = ""
    texts: Mapping[tuple[int, DocumentSpan], DocumentText] = field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    found: bool = True

    @property
    def iteration(self) -> int:
        """The one to show: that of the samples, else the first."""
        return self.first_iteration if self.step is None else self.step.iteration


@dataclass(frozen=True)
class RankedDocument:
    """A document by its losses over the whole run, as the ranking puts it.

    Args:
        dataset: Ordinal in the blend, from 0.
        prefix: That dataset, as ``--data-path`` names it.
        document: Ordinal in the dataset, from 0.
        score: Above 0: harder than its like; below 0: easier.
        uncertainty: Of the score, one standard error.
        loss: Mean over its tokens and visits.
        visits: How often it was read.
        tokens: Its length.
        source_file: The file it was preprocessed from.
        source_line: Its line there, from 1.
        text: Its beginning, or its worst part.
    """

    dataset: int
    prefix: str
    document: int
    score: float
    uncertainty: float | None = None
    loss: float | None = None
    visits: int | None = None
    tokens: int | None = None
    source_file: str | None = None
    source_line: int | None = None
    text: DocumentText | None = None


@dataclass(frozen=True)
class Report:
    """All that the page shows.

    Args:
        title: The run's name.
        generated_for: The directory, or the command line, the report was asked for with.
        sources: What was read: logs, TensorBoard, the ledger; a phrase each.
        attempts: In the order they started.
        curve: Every step.
        spikes: By iteration.
        ranking: Best rank first; empty without a ranking.
        commands: For the whole run; those of a spike are its own.
        notes: What else the reader must know, a sentence each.
    """

    title: str
    generated_for: str
    sources: tuple[str, ...]
    attempts: tuple[AttemptMark, ...]
    curve: CurveArrays
    spikes: tuple[SpikeStep, ...] = ()
    ranking: tuple[RankedDocument, ...] = ()
    commands: tuple[Command, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How much one page may hold; what is cut is said in it.

    Args:
        points: Of each curve that is drawn: beyond, only the lowest and highest of each stretch.
        steps: Spikes shown with their samples: those of the largest score.
        documents: Texts of a step: those of the samples with the largest loss.
        characters: Of a text: those around its highlights.
        ranked: Rows of the ranking.
    """

    points: int = 8000
    steps: int = 20
    documents: int = 200
    characters: int = 2000
    ranked: int = 200
