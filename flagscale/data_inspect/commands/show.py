"""``show``: the text of a step's samples, or of a document."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.data_inspect.answers import Label, SampleAnswer, StepAnswer
from flagscale.data_inspect.commands import (
    Output,
    add_document_arguments,
    add_run_arguments,
    chosen_document,
    ordinal,
    to_stderr,
)
from flagscale.data_inspect.decoder import Decoder, open_decoder
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.locate import locate
from flagscale.data_inspect.report.excerpt import excerpt
from flagscale.data_inspect.report.model import DocumentText, Mark
from flagscale.data_inspect.run import Run, open_run
from flagscale.data_inspect.texts import document_text, worst_of

__all__ = [
    "add_arguments",
    "add_tokenizer_argument",
    "decoder_of",
    "run",
    "texts_of",
    "worst_first",
]

_BRACKETS = {None: ("", ""), Mark.SAMPLE: ("⟦", "⟧"), Mark.WORST: ("⟪", "⟫")}
_COLOURS = {
    None: ("", ""),
    Mark.SAMPLE: ("\x1b[7m", "\x1b[0m"),
    Mark.WORST: ("\x1b[41m", "\x1b[0m"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, a step or a document, and how much of it."""
    add_run_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iteration", type=ordinal, help="1-based, as logged")
    add_document_arguments(what)
    parser.add_argument(
        "--worst", type=int, default=3, metavar="N", help="samples of the largest loss (default: 3)"
    )
    parser.add_argument(
        "--characters", type=int, default=2000, help="of each text (default: %(default)s)"
    )
    add_tokenizer_argument(parser)


def add_tokenizer_argument(parser: argparse.ArgumentParser) -> None:
    """``--tokenizer``."""
    parser.add_argument(
        "--tokenizer", type=Path, help="instead of the run's: a directory, or the model's file"
    )


def run(args: argparse.Namespace) -> Output:
    """Read and decode.

    Raises:
        ConfigError: The tokenizer cannot be loaded, or there is no such dataset.
        DataError: What is needed is missing or damaged.
    """
    found = open_run(args.run_dir, args.arguments)
    decoder = decoder_of(found, args.tokenizer)
    if args.iteration is None:
        return _document(found, decoder, args)
    answer = locate(found, args.iteration, progress=to_stderr)
    texts: list[str] = []
    rows: list[dict[str, Any]] = []
    for sample in worst_first(answer)[: args.worst]:
        loss = "none" if sample.loss is None else f"{sample.loss:.4f}"
        texts.append(
            f"== rank {sample.rank}, micro batch {sample.micro_batch}, position {sample.position}: "
            f"sample {sample.sample_index} of {sample.prefix}, loss {loss}"
        )
        for span, text in texts_of(found, answer, sample, decoder):
            source = None if span.source_file is None else f"{span.source_file}:{span.source_line}"
            texts.append(_titled(f"document {span.document}", source, text, args))
            rows.append({"sample": sample.sample_index, **asdict(span), **_json(text)})
    head = [f"iteration {answer.iteration}: {answer.label}", *(f"  {r}" for r in answer.reasons)]
    return Output(
        "\n".join([*head, *texts]),
        {"label": answer.label, "reasons": answer.reasons, "texts": rows},
        int(answer.label is Label.UNKNOWN),
    )


def _document(found: Run, decoder: Decoder, args: argparse.Namespace) -> Output:
    dataset, document, start, end = chosen_document(found, args.document)
    prefix = found.starts[-1].args.blend.prefixes[dataset]
    with IndexedFile(prefix) as index:
        length = index.tokens_in(*index.sequences_of(document))
        text = document_text(index, decoder, document, (start, end or length))
    return Output(_titled(f"document {document} of {prefix}", None, text, args), _json(text))


def decoder_of(found: Run, tokenizer: Path | None) -> Decoder:
    """The run's tokenizer, or the one that is given.

    Raises:
        ConfigError: It cannot be loaded.
    """
    attempt = found.starts[-1].attempt
    return open_decoder({} if attempt is None else attempt.segment["args"], tokenizer)


def worst_first(answer: StepAnswer) -> list[SampleAnswer]:
    """Its samples, a NaN before all, those without a loss last."""

    def key(sample: SampleAnswer) -> float:
        if sample.loss is None:
            return np.inf
        return -np.inf if isnan(sample.loss) else -sample.loss

    return sorted(answer.samples, key=key)


def texts_of(
    found: Run, answer: StepAnswer, sample: SampleAnswer, decoder: Decoder
) -> Iterator[tuple[Any, DocumentText]]:
    """The texts of a sample's documents, with what the sample read highlighted.

    Yields:
        The :class:`~flagscale.data_inspect.answers.DocumentSpan`, and its text.

    Raises:
        DataError: A dataset is missing or damaged, or the tokenizer is another.
    """
    blocks = _block_losses(found, answer, sample)
    seq_length = found.start_of(answer.iteration).args.seq_length
    with IndexedFile(sample.prefix) as index:
        for span in sample.documents:
            worst, loss = None, None
            if blocks is not None:
                size = seq_length // len(blocks)
                mine = [b for b in range(len(blocks)) if worst_of(span, b, size) is not None]
                if mine and blocks[mine].max() >= 0:
                    loss = float(blocks[mine].max())
                    worst = worst_of(span, mine[int(blocks[mine].argmax())], size)
            read = (span.token_start, span.token_end)
            yield span, document_text(index, decoder, span.document, read, worst, loss=loss)


def _block_losses(found: Run, answer: StepAnswer, sample: SampleAnswer) -> Any:
    """[blocks] of a sample, or ``None``; those that are NaN count as the worst of all."""
    step = None if found.ledger is None else found.ledger.step(answer.iteration)
    row = None if step is None else step.rows.get(sample.rank)
    if row is None or not row.block_losses.size or sample.micro_batch >= row.micro_batches:
        return None
    losses = row.block_losses[sample.micro_batch * row.micro_batch_size + sample.position]
    return np.where(np.isnan(losses), np.inf, losses)


def _titled(title: str, source: str | None, text: DocumentText, args: argparse.Namespace) -> str:
    marks = _COLOURS if sys.stdout.isatty() else _BRACKETS
    cut = excerpt(text, args.characters)
    shown = "".join(marks[mark][0] + piece + marks[mark][1] for piece, mark in cut.pieces)
    before = f"[{cut.before} characters] " if cut.before else ""
    after = f" [{cut.after} characters]" if cut.after else ""
    return f"-- {title}{f' ({source})' if source else ''}\n{before}{shown}{after}"


def _json(text: DocumentText) -> dict[str, Any]:
    return {"text": text.text, "highlights": [asdict(one) for one in text.highlights]}
