"""A report with everything in it, made up: three attempts, three spikes, and hostile texts."""

from __future__ import annotations

import numpy as np

from flagscale.data_inspect.answers import DocumentSpan, Label, SampleAnswer, StepAnswer
from flagscale.data_inspect.report import (
    AttemptMark,
    Command,
    CurveArrays,
    DocumentText,
    Highlight,
    Mark,
    RankedDocument,
    Report,
    SpikeStep,
)

__all__ = ["HOSTILE", "make_curve", "make_report", "make_spike"]

HOSTILE = (
    "</script><script>window.hacked = true</script>",
    "<img src=x onerror='window.hacked = true'> &lt;b&gt; <!-- --> ]]>",
    "a bell \x07, an escape \x1b[31m, a NUL \x00, a lone surrogate \ud800 and \udfff, DEL \x7f",
    "right to left: שלום עולם, مرحبا, and an override: \u202eevil\u202c",
    "line \u2028 and paragraph \u2029 separators, a byte order mark \ufeff, ${x} `tick` \\u003c \\",
)
"""Texts that break pages which are not careful."""

_WORDS = "the model reads one more line of the corpus and then another one follows "


def make_curve(iterations: int = 900, seed: int = 0) -> tuple[CurveArrays, tuple[AttemptMark, ...]]:
    """Three attempts that overlap: the second goes back 60 iterations, the third 20."""
    marks = (
        AttemptMark("20261124-062034-a1", 1, 400),
        AttemptMark("20261124-091512-b7", 341, 700),
        AttemptMark("20261125-013340-c2", 681, iterations),
    )
    noise = np.random.default_rng(seed)
    parts = []
    for number, mark in enumerate(marks):
        iteration = np.arange(mark.first_iteration, mark.last_iteration + 1)
        loss = 1.9 + 8.5 * np.exp(-iteration / 110) + noise.normal(0, 0.03, len(iteration))
        norm = 0.6 + 3 * np.exp(-iteration / 80) + noise.exponential(0.08, len(iteration))
        later = marks[number + 1].first_iteration if number + 1 < len(marks) else iterations + 1
        old = iteration >= later
        parts.append((iteration, loss, norm, np.full(len(iteration), number), old))
    arrays = [np.concatenate(columns) for columns in zip(*parts, strict=True)]
    return CurveArrays(*arrays), marks


def make_spike(iteration: int, loss: float | None, *, ranks: int = 4, seed: int = 0) -> SpikeStep:
    """A step of ``ranks`` x 4 micro batches x 4 samples, the samples of rank 1, batch 2 being bad.

    Each sample has two documents, and the bad ones hold the texts of HOSTILE.
    """
    noise = np.random.default_rng(seed + iteration)
    samples, texts = [], {}
    for place in range(ranks * 16):
        rank, micro_batch, position = place // 16, place // 4 % 4, place % 4
        bad = (rank, micro_batch) == (1, 2)
        spans = tuple(
            DocumentSpan(
                sequence=7 * place + half,
                document=7 * place + half,
                token_start=0 if half else 120,
                token_end=144 if half else 233,
                sample_start=113 * half,
                byte_offset=4096 * place + 226 * half,
                source_file=f"/corpus/books/part-{place % 5:04}.jsonl",
                source_line=100 + place,
            )
            for half in (0, 1)
        )
        for half, span in enumerate(spans):
            text = HOSTILE[(position + half) % len(HOSTILE)] if bad else _WORDS * 3
            whole = _WORDS * 2 + text + " " + _WORDS * 4
            start = len(_WORDS * 2)
            marks = [Highlight(start - 40, start + len(text) + 90)]
            if bad:
                marks.append(Highlight(start, start + len(text), Mark.WORST))
            texts[place % 2, span] = DocumentText(whole, tuple(marks), before=1200 * (1 - half))
        value = float(noise.normal(1.95, 0.12) + (5.5 + position / 4 if bad else 0))
        samples.append(
            SampleAnswer(
                rank=rank,
                micro_batch=micro_batch,
                position=position,
                dataset=place % 2,
                prefix=("/data/books_text_document", "/data/web<b>_text_document")[place % 2],
                sample_index=int(noise.integers(0, 40000)),
                documents=spans,
                loss=None if place == 5 else value,
            )
        )
    before = (iteration - 1) * ranks * 16
    step = StepAnswer(
        iteration=iteration,
        label=Label.EXACT,
        reasons=("the checksums of ids and tokens agree on all ranks", "attempt c2 is the last"),
        attempt="20261125-013340-c2",
        consumed_before=before,
        consumed_after=before + ranks * 16,
        skipped=False,
        samples=tuple(samples),
    )
    run = "outputs/aquila-7b"
    tool = "python tools/inspect_data.py"
    commands = (
        Command("Show these documents", f"{tool} show {run} --iteration {iteration}"),
        Command("Run this step again", f"{tool} replay {run} --iteration {iteration}"),
        Command(
            "Go on without them", f"{tool} quarantine {run} --iteration {iteration} \\\n  --top 4"
        ),
    )
    return SpikeStep(
        first_iteration=iteration,
        last_iteration=iteration + 1,
        peak=loss,
        baseline=1.98,
        score=None if loss is None else 23.4,
        kind="loss" if loss is not None else "NaN loss",
        evidence=("the gradient norm is 4.1, where 0.7 is usual",),
        step=step,
        texts=texts,
        commands=commands,
    )


def make_report() -> Report:
    """All of it; the second spike is the one to look at."""
    curve, attempts = make_curve()
    for iteration, loss in ((250, 3.9), (612, 3.68), (820, np.nan)):
        curve.loss[(curve.iteration == iteration) & ~curve.superseded] = loss
        curve.grad_norm[(curve.iteration == iteration) & ~curve.superseded] = 4.1
    unknown = SpikeStep(
        250, 250, 3.9, 2.6, 11.2, reason="The dataset /data/gone_text_document.idx is missing."
    )
    ranking = tuple(
        RankedDocument(
            dataset=0,
            prefix="/data/books_text_document",
            document=417 + number,
            score=9.5 - 2.6 * number,
            uncertainty=0.4,
            loss=7.1 - number,
            visits=2,
            tokens=381,
            source_file="/corpus/books/part-0002.jsonl",
            source_line=418 + number,
            text=DocumentText(HOSTILE[number], (Highlight(0, 9),)),
        )
        for number in range(5)
    )
    return Report(
        title="aquila-7b-books <final>",
        generated_for="outputs/aquila-7b-books",
        sources=("ledger (3 attempts, 4 ranks)", "12 logs", "TensorBoard"),
        attempts=attempts,
        curve=curve,
        spikes=(unknown, make_spike(612, 3.68), make_spike(820, None)),
        ranking=ranking,
        commands=(
            Command(
                "Before resuming: do new flags change the order?",
                "python tools/inspect_data.py drift 'outputs/not\u200bseen' --micro-batch-size 2",
            ),
        ),
    )
