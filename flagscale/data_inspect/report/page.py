"""The page itself: its fixed parts as escaped HTML, all the rest as data that its script draws."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import Any

from flagscale.data_inspect.answers import DocumentSpan, Label, SampleAnswer, StepAnswer
from flagscale.data_inspect.report.curves import curve_figure, import_plotly
from flagscale.data_inspect.report.excerpt import escape, excerpt
from flagscale.data_inspect.report.heat import Grid, step_figure
from flagscale.data_inspect.report.model import (
    Command,
    DocumentText,
    Limits,
    RankedDocument,
    Report,
    SpikeStep,
)

__all__ = ["MARKER", "build_page", "embed", "verdict"]

MARKER = "<!-- flagscale report 1 -->"
"""On the second line of every page, so that one is known as ours."""


def verdict(report: Report) -> tuple[str, str]:
    """What was found, in a headline and a sentence or two."""
    iterations = report.curve.iteration
    if not len(iterations):
        return "No step was read", "Neither a log nor TensorBoard nor a ledger gave a curve."
    covered = f"iterations {iterations.min()}–{iterations.max()}"
    spikes = [spike for spike in report.spikes if spike.found]
    if not spikes:
        return "No spike", f"Nothing stands out in {covered}."
    first, count = spikes[0], len(spikes)
    headline = f"{count} spikes, the first" if count > 1 else "1 spike,"
    headline += f" at iteration {first.iteration}"
    sentences = [_size(first), _knowledge(first)]
    if count > 1:
        labels = Counter(str(spike.step.label if spike.step else Label.UNKNOWN) for spike in spikes)
        known = ", ".join(f"{labels[label]} {label}" for label in Label if labels[label])
        sentences.append(f"Samples of all {count}: {known}.")
    return headline, " ".join(sentences)


def _knowledge(spike: SpikeStep) -> str:
    if spike.step is not None and spike.step.label is not Label.UNKNOWN:
        return f"Its samples are known: {spike.step.label}."
    why = spike.reason if spike.step is None else "; ".join(spike.step.reasons)
    return f"Its samples are {Label.UNKNOWN}{': ' + why if why else ''}".rstrip(".") + "."


def _size(spike: SpikeStep) -> str:
    baseline = "" if spike.baseline is None else f" where {spike.baseline:.3f} was expected"
    if spike.peak is None or not math.isfinite(spike.peak):
        return f"The loss is missing or not a number{baseline}."
    return f"The loss was {spike.peak:.3f}{baseline}."


def build_page(report: Report, limits: Limits) -> str:
    """The whole page.

    Raises:
        ConfigError: plotly is not installed.
    """
    plotly = import_plotly()
    folder = resources.files(__package__)
    style = (folder / "page.css").read_text(encoding="utf-8")
    scripts = [plotly.offline.get_plotlyjs(), (folder / "page.js").read_text(encoding="utf-8")]
    title = escape(report.title)
    parts = [
        "<!DOCTYPE html>",
        MARKER,
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{title} – loss report</title><style>{style}</style></head><body>",
        _head(report, title),
        '<main id="page"><noscript><p class="note">The curves, samples and documents need '
        "JavaScript; nothing is fetched from anywhere.</p></noscript></main>",
        f'<script type="application/json" id="data">{embed(_data(report, limits))}</script>',
        *(f"<script>{script}</script>" for script in scripts),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _policy(scripts: Sequence[str]) -> str:
    """Nothing is fetched, and no script runs but these: not even one that got into the page."""
    digests = (hashlib.sha256(script.encode()).digest() for script in scripts)
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def _head(report: Report, title: str) -> str:
    headline, sentence = verdict(report)
    stands_out = any(spike.found for spike in report.spikes)
    mood = "bad" if stands_out else "good" if len(report.curve.iteration) else "note"
    facts = [
        ("Run", report.generated_for),
        ("Read", " · ".join(report.sources) or "nothing"),
        ("Covers", _coverage(report)),
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts)
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in report.notes)
    return (
        f"<header><h1>{title}</h1>"
        f'<section class="verdict {mood}" aria-label="Verdict"><h2>{escape(headline)}</h2>'
        f"<p>{escape(sentence)}</p></section><dl>{rows}</dl>{notes}</header>"
    )


def _coverage(report: Report) -> str:
    iterations, lost = report.curve.iteration, int(report.curve.superseded.sum())
    if not len(iterations):
        return "no step"
    attempts = f"{len(report.attempts)} attempt{'' if len(report.attempts) == 1 else 's'}"
    rolled_back = f" ({lost} of them rolled back)" if lost else ""
    return (
        f"iterations {iterations.min()}–{iterations.max()} in {attempts}, "
        f"{len(iterations)} logged steps{rolled_back}"
    )


def embed(data: object) -> str:
    """JSON that can stand in a ``<script>`` element, whatever its texts hold.

    ASCII only, so that lone surrogates survive; without ``<``, no text can end the element or open
    a comment in it.
    """
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _data(report: Report, limits: Limits) -> dict[str, Any]:
    detailed = _most_striking(report.spikes, limits.steps)
    return {
        "curves": curve_figure(report, limits) if len(report.curve.iteration) else None,
        "attempts": [
            [mark.attempt, mark.first_iteration, mark.last_iteration] for mark in report.attempts
        ],
        "spikes": [_spike(spike, limits, i in detailed) for i, spike in enumerate(report.spikes)],
        "ranking": [_ranked(document, limits) for document in report.ranking[: limits.ranked]],
        "commands": _commands(report.commands),
        "cut": _cuts(report, limits),
    }


def _most_striking(spikes: Sequence[SpikeStep], count: int) -> set[int]:
    """Ordinals of those shown in full: of the largest score, or without a number at all."""

    def key(ordinal: int) -> float:
        score = _number(spikes[ordinal].score)
        return -math.inf if score is None else -score

    return set(sorted(range(len(spikes)), key=key)[:count])


def _cuts(report: Report, limits: Limits) -> list[str]:
    """What the page leaves out, a sentence each."""
    cuts = [f"A text is shown in at most {limits.characters} characters around what was read."]
    if len(report.curve.iteration) > limits.points:
        cuts.append(
            f"Of {len(report.curve.iteration)} logged steps the curves show the lowest and "
            f"highest of each of {limits.points // 2} stretches."
        )
    if len(report.spikes) > limits.steps:
        cuts.append(
            f"Of {len(report.spikes)} spikes the {limits.steps} with the largest score are shown "
            "with their samples."
        )
    if any(len(spike.texts) > limits.documents for spike in report.spikes):
        cuts.append(
            f"Of a step, the texts of {limits.documents} documents are here: those of the samples "
            "with the largest loss."
        )
    if len(report.ranking) > limits.ranked:
        cuts.append(f"The ranking is cut after {limits.ranked} of {len(report.ranking)} documents.")
    return cuts


def _commands(commands: Sequence[Command]) -> list[dict[str, str]]:
    return [{"title": command.title, "text": command.text} for command in commands]


def _spike(spike: SpikeStep, limits: Limits, in_full: bool) -> dict[str, Any]:
    step, reason = spike.step, spike.reason
    if step is not None and not in_full:
        step, reason = None, "Left out to keep the page small: see the commands."
    return {
        "iteration": spike.iteration,
        "first": spike.first_iteration,
        "last": spike.last_iteration,
        "peak": _number(spike.peak),
        "baseline": _number(spike.baseline),
        "score": _number(spike.score),
        "kind": spike.kind,
        "found": spike.found,
        "evidence": list(spike.evidence),
        "reason": reason,
        "step": None if step is None else _step(step, spike, limits),
        "commands": _commands(spike.commands),
    }


def _step(step: StepAnswer, spike: SpikeStep, limits: Limits) -> dict[str, Any]:
    order = sorted(range(len(step.samples)), key=lambda i: _worst_first(step.samples[i]))
    samples: list[dict[str, Any]] = [{} for _ in order]
    room = limits.documents
    grid = Grid.of(step.samples) if step.samples else None
    for i in order:
        samples[i], used = _sample(step.samples[i], spike, limits, room)
        samples[i]["cell"] = grid and list(grid.places[i])
        room -= used
    return {
        "label": str(step.label),
        "reasons": list(step.reasons),
        "attempt": step.attempt,
        "consumed": [step.consumed_before, step.consumed_after],
        "skipped": step.skipped,
        "figure": grid and step_figure(step.samples, grid),
        "samples": samples,
        "order": order,
    }


def _worst_first(sample: SampleAnswer) -> float:
    loss = _number(sample.loss)
    return math.inf if loss is None else -loss


def _sample(
    sample: SampleAnswer, spike: SpikeStep, limits: Limits, room: int
) -> tuple[dict[str, Any], int]:
    """A sample with its documents, of which ``room`` may have a text; and how many have."""
    documents, used = [], 0
    for span in sample.documents:
        text = spike.texts.get((sample.dataset, span))
        shown = None if text is None or used >= room else text
        used += shown is not None
        documents.append(_document(span, shown, limits, text is not None and shown is None))
    about = {
        "rank": sample.rank,
        "micro_batch": sample.micro_batch,
        "position": sample.position,
        "dataset": sample.dataset,
        "prefix": sample.prefix,
        "sample_index": sample.sample_index,
        "loss": _number(sample.loss),
        "documents": documents,
    }
    return about, used


def _document(
    span: DocumentSpan, text: DocumentText | None, limits: Limits, cut: bool
) -> dict[str, Any]:
    return {
        "document": span.document,
        "sequence": span.sequence,
        "tokens": [span.token_start, span.token_end],
        "sample_start": span.sample_start,
        "byte_offset": span.byte_offset,
        "file": span.source_file,
        "line": span.source_line,
        "text": None if text is None else _text(text, limits),
        "cut": cut,
    }


def _text(text: DocumentText, limits: Limits) -> dict[str, Any]:
    shown = excerpt(text, limits.characters)
    return {
        "pieces": [[piece, mark] for piece, mark in shown.pieces],
        "before": shown.before,
        "after": shown.after,
        "note": text.note,
        "loss": _number(text.loss),
    }


def _ranked(document: RankedDocument, limits: Limits) -> dict[str, Any]:
    return {
        "prefix": document.prefix,
        "document": document.document,
        "score": _number(document.score),
        "uncertainty": _number(document.uncertainty),
        "loss": _number(document.loss),
        "visits": document.visits,
        "tokens": document.tokens,
        "file": document.source_file,
        "line": document.source_line,
        "text": None if document.text is None else _text(document.text, limits),
    }
