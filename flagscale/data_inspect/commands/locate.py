"""``locate``: the samples and documents of a step; or when a document was or will be read."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from flagscale.data_inspect.answers import DocumentSpan, Label, SampleAnswer, StepAnswer
from flagscale.data_inspect.commands import (
    Output,
    add_document_arguments,
    add_run_arguments,
    chosen_document,
    format_table,
    ordinal,
    to_stderr,
)
from flagscale.data_inspect.locate import Reading, find_readings, locate
from flagscale.data_inspect.run import Run, open_run

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, and a step or a document."""
    add_run_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--iteration", type=ordinal, help="1-based, as logged")
    add_document_arguments(what)


def run(args: argparse.Namespace) -> Output:
    """Look it up.

    Raises:
        ConfigError: There is no such dataset.
        DataError: What is needed is missing or damaged.
    """
    found = open_run(args.run_dir, args.arguments)
    if args.iteration is None:
        return _readings(found, args)
    answer = locate(found, args.iteration, progress=to_stderr)
    return Output(_step_text(answer), asdict(answer), int(answer.label is Label.UNKNOWN))


def _readings(found: Run, args: argparse.Namespace) -> Output:
    document = chosen_document(found, args.document)
    readings = list(find_readings(found, *document, progress=to_stderr))
    unknown = any(reading.label is Label.UNKNOWN for reading in readings)
    what = f"document {document[1]} of dataset {document[0]}"
    text = f"{what} is read {len(readings)} time(s)"
    if readings:
        text += "\n" + _readings_table(readings)
    return Output(text, {"readings": [asdict(one) for one in readings]}, int(unknown))


def _readings_table(readings: list[Reading]) -> str:
    rows: list[tuple[object, ...]] = [
        (
            one.iteration,
            one.label.value,
            "skipped" if one.skipped else "done" if one.done else "not recorded as done",
            one.rank,
            one.micro_batch,
            one.position,
            one.sample_index,
            ", ".join(f"{span.token_start}-{span.token_end}" for span in one.spans),
        )
        for one in readings
    ]
    header = ("iteration", "label", "", "rank", "micro batch", "position", "sample", "tokens")
    return format_table(header, rows)


def _step_text(answer: StepAnswer) -> str:
    skipped = ", skipped" if answer.skipped else ""
    lines = [f"iteration {answer.iteration}{skipped}: {answer.label}"]
    lines += [f"  {reason}" for reason in answer.reasons]
    lines.append(
        f"  start {answer.attempt}; consumed samples {_or_unknown(answer.consumed_before)} to "
        f"{_or_unknown(answer.consumed_after)}"
    )
    return "\n".join([*lines, *([_samples_table(answer)] if answer.samples else [])])


def _or_unknown(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _samples_table(answer: StepAnswer) -> str:
    rows: list[tuple[object, ...]] = []
    for sample in answer.samples:
        for span in sample.documents:
            place = (sample.rank, sample.micro_batch, sample.position)
            rows.append((*place, sample.dataset, sample.sample_index, *_span_cells(sample, span)))
    header = ("rank", "micro batch", "position", "dataset", "sample", "loss")
    return format_table((*header, "document", "sequence", "tokens", "byte", "source"), rows)


def _span_cells(sample: SampleAnswer, span: DocumentSpan) -> tuple[object, ...]:
    source = "" if span.source_file is None else f"{span.source_file}:{span.source_line}"
    return (
        None if sample.loss is None else round(sample.loss, 4),
        span.document,
        span.sequence,
        f"{span.token_start}-{span.token_end}",
        span.byte_offset,
        source,
    )
