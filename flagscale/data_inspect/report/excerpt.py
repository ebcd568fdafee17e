"""Texts as the page shows them: cut around what matters, and split where the highlighting changes.

A browser counts UTF-16 units where Python counts characters, so the page is never given an offset
into a text, but its pieces.
"""

from __future__ import annotations

import html
import itertools
import re
from dataclasses import dataclass

from flagscale.data_inspect.report.model import DocumentText, Mark

__all__ = ["Excerpt", "escape", "excerpt"]

_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Excerpt:
    """A text that was cut and split.

    Args:
        pieces: Of the text, in order, each with its mark; ``None`` outside of every highlight.
        before: Characters of the document in front of the pieces.
        after: And behind them.
    """

    pieces: tuple[tuple[str, Mark | None], ...]
    before: int
    after: int


def escape(text: str) -> str:
    """A text as HTML shows it: nothing is markup, and what a font has no picture for is named."""
    return html.escape(_UNSEEN.sub(_name, text))


def _name(match: re.Match[str]) -> str:
    return f"[U+{ord(match[0]):04X}]"


def excerpt(text: DocumentText, characters: int) -> Excerpt:
    """The part of a text around its worst highlight, else its first, in at most ``characters``."""
    start, end = _window(text, characters)
    inside = [
        (max(h.start, start), min(h.end, end), h.mark)
        for h in text.highlights
        if max(h.start, start) < min(h.end, end)
    ]
    cuts = sorted({start, end, *(cut for first, last, _ in inside for cut in (first, last))})
    pieces: list[tuple[str, Mark | None]] = []
    for first, last in itertools.pairwise(cuts):
        marks = {mark for low, high, mark in inside if low <= first and last <= high}
        strongest = next((mark for mark in (Mark.WORST, Mark.SAMPLE) if mark in marks), None)
        pieces.append((text.text[first:last], strongest))
    return Excerpt(tuple(pieces), text.before + start, text.after + len(text.text) - end)


def _window(text: DocumentText, characters: int) -> tuple[int, int]:
    """``[start, end)`` of what is shown: a quarter of the room goes to what leads up to it."""
    length = len(text.text)
    if length <= characters:
        return 0, length
    order = sorted(text.highlights, key=lambda h: (h.mark is not Mark.WORST, h.start))
    focus = order[0].start if order else 0
    start = min(max(focus - characters // 4, 0), length - characters)
    return start, start + characters
