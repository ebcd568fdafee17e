"""One dataset of a training split: samples to documents, tokens and source lines, and back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flagscale.data.sidecar import SourceLocation, SourceMap
from flagscale.data_inspect.answers import DocumentSpan
from flagscale.data_inspect.arrays import Indices
from flagscale.data_inspect.cache_search import DatasetKey
from flagscale.data_inspect.caches import CachedOrder
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.order import (
    BuiltOrder,
    OrderPlan,
    Spans,
    build_order,
    plan_order,
    samples_of,
    spans_of,
)
from flagscale.errors import DataError

__all__ = ["TrainingDataset"]

Progress = Callable[[str], None]
PROVE_BELOW = 1 << 18
"""A cache this small is held against the order computed anew: it takes a few milliseconds."""


class TrainingDataset:
    """One dataset of a training split.

    Args:
        key: What decides its order.
        sequences: ``(first, one past the last)`` that the split chose.
        index: The dataset itself; closed with this.
        cache: Document, sample and shuffle index; ``None`` to compute the order.
        progress: Told what is about to be done, where it takes long.

    Raises:
        DataError: The cache is damaged or of another dataset, or there are no tokens.
    """

    def __init__(
        self,
        key: DatasetKey,
        sequences: tuple[int, int],
        index: IndexedFile,
        cache: tuple[Path, Path, Path] | None,
        progress: Progress | None = None,
    ) -> None:
        self.key, self.index, self.sequences = key, index, sequences
        self.problems: list[str] = []
        self._progress = progress
        self._built: BuiltOrder | None = None
        self._cached: CachedOrder | None = None
        self._stack = ExitStack()
        self._stack.callback(index.close)
        try:
            tokens = index.tokens_in(*sequences)
            self.plan: OrderPlan = plan_order(tokens, key.num_samples, key.seq_length)
            if cache is not None:
                self._cached = CachedOrder(cache, sequences, self.plan, key.seq_length)
                self._stack.callback(self._cached.close)
                if self._cached.num_positions + self.plan.num_samples_total < PROVE_BELOW:
                    self._cached.verify(self._build())
            self._source = self._open_source()
        except BaseException:
            self.close()
            raise

    def _open_source(self) -> SourceMap | None:
        if not Path(f"{self.key.prefix}.source.json").exists():
            return None
        try:
            source = SourceMap(self.key.prefix)
        except (DataError, KeyError, TypeError, ValueError) as error:
            what = error.what if isinstance(error, DataError) else "its description is damaged"
            self.problems.append(f"{self.key.prefix}: no source lines: {what}")
            return None
        self._stack.callback(source.close)
        if len(source) == self.index.num_documents:
            return source
        self.problems.append(
            f"{self.key.prefix}: no source lines: its sidecar is of a dataset of {len(source)} "
            f"documents, this one has {self.index.num_documents}"
        )
        return None

    def close(self) -> None:
        """Close all files."""
        self._stack.close()

    @property
    def size(self) -> int:
        """The number of samples."""
        return self.plan.num_samples_total

    @property
    def order(self) -> CachedOrder | BuiltOrder:
        """The order; computed when first asked for, if it is not cached."""
        return self._cached or self._build()

    def _build(self) -> BuiltOrder:
        if self._built is None:
            self._built = build_order(
                self.index.lengths(*self.sequences),
                *self.sequences,
                self.plan,
                self.key.seed,
                seq_length=self.key.seq_length,
                progress=self._progress,
            )
        return self._built

    def verify(self) -> None:
        """Hold a cached order against the order computed anew, whole.

        Raises:
            DataError: They differ.
        """
        if self._cached is not None:
            self._cached.verify(self._build())

    def spans(self, samples: npt.ArrayLike) -> Spans:
        """The parts of sequences that samples are made of.

        Raises:
            DataError: There is no such sample, or order and dataset do not fit.
        """
        return spans_of(self.order, samples, self.index.extents_of, self.key.prefix)

    def tokens(self, samples: npt.ArrayLike) -> Indices:
        """[n, seq_length + 1] int64: each sample's tokens and the label behind the last.

        Raises:
            DataError: There is no such sample, or order and dataset do not fit.
        """
        spans = self.spans(samples)
        first = spans.place + spans.offset * self.index.dtype.itemsize
        tokens = self.index.read_parts(first, spans.length).astype(np.int64)
        return tokens.reshape(-1, self.key.seq_length + 1)

    def documents(self, samples: npt.ArrayLike) -> list[tuple[DocumentSpan, ...]]:
        """For each sample the parts of documents it is made of, in its order.

        Raises:
            DataError: There is no such sample, or order, dataset and sidecar do not fit.
        """
        spans = self.spans(samples)
        documents = self.index.documents_of(spans.sequence)
        width = self.index.dtype.itemsize
        starts = self._tokens_before(spans, documents) + spans.offset
        columns = (
            *(spans.sample, spans.sequence, documents, starts, starts + spans.length),
            *(spans.start, spans.place + spans.offset * width),
        )
        answers: list[list[DocumentSpan]] = [[] for _ in range(np.size(samples))]
        for sample, sequence, document, start, end, at, byte in zip(
            *(column.tolist() for column in columns), strict=True
        ):
            source = self._locate_source(document)
            answers[sample].append(
                DocumentSpan(
                    *(sequence, document, start, end, at, byte),
                    None if source is None else str(source.path),
                    None if source is None else source.line + 1,
                )
            )
        return [tuple(answer) for answer in answers]

    def _tokens_before(self, spans: Spans, documents: Indices) -> Indices:
        """[m] tokens between a document's beginning and that of the sequence."""
        first = self.index.first_sequences_of(documents)
        before = np.zeros(len(first), np.int64)
        later = first != spans.sequence
        begins = self.index.byte_offsets_of(first[later])
        before[later] = (spans.place[later] - begins) // self.index.dtype.itemsize
        return before

    def _locate_source(self, document: int) -> SourceLocation | None:
        if self._source is None:
            return None
        try:
            return self._source.locate(document)
        except IndexError as error:
            raise DataError(
                "the sidecar of a dataset is damaged",
                where=f"{self.key.prefix}.source.npy, document {document}",
                expected=f"one of {len(self._source.files)} files",
                cure="restore it, or move it aside to go without source lines",
            ) from error

    def find(self, document: int, token_start: int = 0, token_end: int | None = None) -> Indices:
        """Every sample that holds one of some tokens of a document, in every epoch, rising.

        Args:
            document: Ordinal, from 0.
            token_start: First token, counted from the document's first.
            token_end: One past the last; ``None`` for all that follow.

        Returns:
            Empty for a document that is not in the training split.

        Raises:
            DataError: There is no such document, or order and dataset do not fit.
        """
        first, stop = self.index.sequences_of(document)
        end = self.index.tokens_in(first, stop) if token_end is None else token_end
        return samples_of(self.order, (first, stop), self.index.lengths_of, (token_start, end))
