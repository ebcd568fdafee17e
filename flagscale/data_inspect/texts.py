"""The text of documents around what a sample read of them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from flagscale.data_inspect.answers import DocumentSpan
from flagscale.data_inspect.decoder import Decoder
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.report.model import DocumentText, Highlight, Mark

__all__ = ["CONTEXT_TOKENS", "document_text", "worst_of"]

CONTEXT_TOKENS = 64
"""Tokens of the document shown before and behind what is highlighted."""
_COUNTED = 1 << 16
"""Characters are counted up to so many tokens; a document may have millions."""

Range = tuple[int, int]


def document_text(
    index: IndexedFile,
    decoder: Decoder,
    document: int,
    read: Range,
    worst: Range | None = None,
    *,
    context: int = CONTEXT_TOKENS,
    loss: float | None = None,
) -> DocumentText:
    """A part of a document.

    Args:
        index: Its dataset.
        decoder: What its tokens mean.
        document: Its ordinal.
        read: Tokens that a sample read, ``[start, end)`` from the document's first.
        worst: And those of them that cost most.
        context: Tokens shown on either side.
        loss: To be shown with it.

    Raises:
        DataError: There is no such document, or the tokenizer is another.
    """
    first, stop = index.sequences_of(document)
    length = index.tokens_in(first, stop)
    low, high = max(0, read[0] - context), min(length, read[1] + context)
    spans = [(*read, Mark.SAMPLE), *([(*worst, Mark.WORST)] if worst else [])]
    cuts = sorted({low, high, *(min(max(cut, low), high) for span in spans for cut in span[:2])})
    where = f"document {document} of {index.prefix}"
    pieces = [decoder.decode(_tokens(index, document, *cut), where) for cut in pairwise(cuts)]
    begins = {cuts[0]: 0}
    for cut, piece in zip(cuts[1:], pieces, strict=True):
        begins[cut] = max(begins.values()) + len(piece)
    return DocumentText(
        text="".join(pieces),
        highlights=tuple(
            Highlight(begins[min(max(start, low), high)], begins[min(max(end, low), high)], mark)
            for start, end, mark in spans
        ),
        before=_characters(index, decoder, document, (0, low), where),
        after=_characters(index, decoder, document, (high, length), where),
        loss=loss,
    )


def _tokens(index: IndexedFile, document: int, start: int, end: int) -> Sequence[int]:
    """Tokens of a document, which may be several sequences."""
    tokens: list[int] = []
    begin = 0
    for sequence in range(*index.sequences_of(document)):
        length = index.length(sequence)
        low, high = max(start - begin, 0), min(end - begin, length)
        if low < high:
            tokens += index.read(sequence, low, high - low).tolist()
        begin += length
    return tokens


def _characters(
    index: IndexedFile, decoder: Decoder, document: int, part: Range, where: str
) -> int:
    start, end = part
    counted = min(end, start + _COUNTED)
    return len(decoder.decode(_tokens(index, document, start, counted), where))


def worst_of(span: DocumentSpan, block: int, block_tokens: int) -> Range | None:
    """The tokens of a document in one block of a sample; ``None`` if it has none of it.

    Args:
        span: What the sample holds of the document.
        block: Of the sample, from 0.
        block_tokens: Labels in a block; that of a position is the token behind it.
    """
    first = block * block_tokens + 1 - span.sample_start
    start = max(first, 0) + span.token_start
    end = min(first + block_tokens + span.token_start, span.token_end)
    return (start, end) if start < end else None
