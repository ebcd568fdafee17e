"""Which samples a step read, and when a document was or will be read; each answer with its label.

An answer is EXACT where the checksums that the job took of its own batches agree with those of what
is computed here: of the samples' ids and of their tokens, rank by rank. A checksum that disagrees
makes an answer UNKNOWN, whatever else speaks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flagscale.data_inspect.answers import DocumentSpan, Label, SampleAnswer, StepAnswer
from flagscale.data_inspect.ledger import StepRows
from flagscale.data_inspect.mapping import Drawn, StartMapping
from flagscale.data_inspect.run import Run, StartRecord
from flagscale.data_inspect.samplers import Read
from flagscale.data_inspect.steps import StepRange, last_iteration
from flagscale.errors import ConfigError, DataError, FlagScaleError

__all__ = ["Reading", "find_readings", "locate", "locate_in"]

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """One time that a sample which holds a document is read.

    Args:
        iteration: 1-based.
        label: How far to trust it.
        reasons: Why.
        attempt: The start that did it, or whose arguments say that it will.
        done: Whether the ledger has it as read; otherwise it will be, or there is no ledger.
        skipped: Whether ``--iterations-to-skip`` passes over it.
        rank: Data-parallel rank.
        micro_batch: Of the step on that rank, from 0.
        position: In the micro batch, from 0.
        dataset: Ordinal in the blend.
        sample_index: The dataset's own index of the sample.
        spans: What the sample holds of the document.
    """

    iteration: int
    label: Label
    reasons: tuple[str, ...]
    attempt: str
    done: bool
    skipped: bool
    rank: int
    micro_batch: int
    position: int
    dataset: int
    sample_index: int
    spans: tuple[DocumentSpan, ...]


def locate(
    run: Run, iteration: int, *, documents: bool = True, progress: Progress | None = None
) -> StepAnswer:
    """The samples of a step.

    Where the ledger disagrees with upstream's cached indices, they are computed anew: a cache can
    be stale.

    Args:
        run: The run.
        iteration: 1-based, as logged.
        documents: Whether to look the documents up, too.
        progress: Told what is about to be done, where it takes long.

    Raises:
        DataError: The ledger is damaged, or nothing says with which arguments the run was made.
    """
    rows = None if run.ledger is None else run.ledger.step(iteration)
    record = run.start_of(iteration)
    failures: list[str] = []
    for use_caches in (True, False):
        try:
            with StartMapping(record, use_caches=use_caches, progress=progress) as mapping:
                answer = locate_in(mapping, iteration, rows, documents=documents)
                changes = mapping.changes if answer.label is Label.UNKNOWN else []
        except (ConfigError, DataError) as error:
            failures.append(_sentence(error))
            continue
        if answer.label is not Label.UNKNOWN:
            noted = (f"upstream's cached indices were not used: {one}" for one in failures)
            return replace(answer, reasons=(*answer.reasons, *noted))
        failures += [*answer.reasons, *map(str, changes)]
        if any(change.kind == "changed" for change in changes):
            break  # what would be computed from other data is another order
    before = None if rows is None else rows.any_row.consumed_before
    reasons = tuple(dict.fromkeys(failures))
    return StepAnswer(iteration, Label.UNKNOWN, reasons, record.name, before, None, False, ())


def locate_in(
    mapping: StartMapping, iteration: int, rows: StepRows | None, *, documents: bool = True
) -> StepAnswer:
    """The samples of a step of a start.

    Args:
        mapping: The start.
        iteration: 1-based.
        rows: What the ledger has of it; ``None`` for nothing.
        documents: Whether to look the documents up, too.

    Raises:
        ConfigError: The arguments make no such step.
        DataError: Data or caches are missing or damaged.
    """
    step = _step(mapping, iteration, rows)
    drawn = mapping.drawn(step.consumed_before, step.micro_batches)
    label, reasons = _label(mapping, step, drawn, rows)
    return StepAnswer(
        iteration=iteration,
        label=label,
        reasons=reasons,
        attempt=mapping.record.name,
        consumed_before=step.consumed_before,
        consumed_after=step.consumed_after,
        skipped=step.skipped,
        samples=()
        if label is Label.UNKNOWN
        else tuple(_samples(mapping, drawn, rows, documents=documents)),
    )


def _step(mapping: StartMapping, iteration: int, rows: StepRows | None) -> StepRange:
    """What the ledger says the step read; without it, what the arguments say."""
    args = mapping.record.args
    if rows is None:
        if iteration > (last := last_iteration(args)):
            raise ConfigError(
                "the run has no such iteration",
                where="--iteration",
                expected=f"1 to {last}",
                got=iteration,
                cure="ask for another iteration",
            )
        return mapping.step_range(iteration)
    row = rows.any_row
    micro_batches = max(one.micro_batches for one in rows.rows.values())
    expected = mapping.step_range(iteration).consumed_before
    if (row.micro_batch_size, row.consumed_before) != (args.micro_batch_size, expected):
        raise DataError(
            "the ledger's rows are not of its segment",
            where=f"attempt {rows.attempt.name}, iteration {iteration}",
            expected=f"micro batches of {args.micro_batch_size}, {expected} consumed before",
            got=f"{row.micro_batch_size}, {row.consumed_before}",
            cure="restore the ledger",
        )
    after = row.consumed_before + micro_batches * args.micro_batch_size * args.dp_size
    return StepRange(iteration, row.consumed_before, after, micro_batches, skipped=False)


def _label(
    mapping: StartMapping, step: StepRange, drawn: Drawn, rows: StepRows | None
) -> tuple[Label, tuple[str, ...]]:
    record = mapping.record
    assumed = (*record.assumptions, *mapping.corpus.assumptions(), *mapping.corpus.problems())
    if rows is None:
        return Label.RECONSTRUCTED, (*_why_no_rows(record, step), *assumed)
    mismatches = [
        str(mismatch)
        for rank, row in rows.rows.items()
        for mismatch in mapping.mismatches(drawn.first(row.micro_batches), rank, row)
    ]
    if mismatches:
        return Label.UNKNOWN, tuple(mismatches)
    ranks = f"{len(rows.rows)} of {rows.attempt.dp_size} data-parallel rank(s)"
    agree = f"ids and tokens of {ranks} agree with the checksums the job took"
    told = (
        *([f"{agree}; of the others the ledger has no row"] if not rows.complete else [agree]),
        *(["a later start went back before this step and has not done it"] * rows.superseded),
        *(["an error ended the run in the midst of this step"] * rows.unfinished),
    )
    # The tokens of another index can be the same, and the documents' bounds in them others.
    changed = [str(change) for change in mapping.changes if change.kind == "changed"]
    if changed or not rows.complete:
        return Label.RECONSTRUCTED, (*told, *changed, *assumed)
    return Label.EXACT, (*told, *mapping.corpus.problems())


def _why_no_rows(record: StartRecord, step: StepRange) -> Iterator[str]:
    if record.attempt is None:
        yield "there is no ledger: no checksum was taken while it trained"
    elif step.skipped:
        yield "--iterations-to-skip: these samples were read and thrown away, nothing was trained"
    elif step.iteration > max(record.attempt.iterations, default=0):
        yield "the step has not been done yet; assumed is that the run goes on as it started"
    else:
        yield "the ledger has no row of this step"


def _samples(
    mapping: StartMapping, drawn: Drawn, rows: StepRows | None, *, documents: bool
) -> Iterator[SampleAnswer]:
    places = list(np.ndindex(*drawn.samples.shape))
    datasets, samples = drawn.datasets.ravel(), drawn.samples.ravel()
    found: list[tuple[DocumentSpan, ...]] = [()] * len(places)
    if documents:
        found = mapping.corpus.documents_of(datasets, samples)
    columns = zip(places, datasets.tolist(), samples.tolist(), found, strict=True)
    for (rank, micro_batch, position), dataset, sample, spans in columns:
        yield SampleAnswer(
            rank=rank,
            micro_batch=micro_batch,
            position=position,
            dataset=dataset,
            prefix=mapping.corpus.prefixes[dataset],
            sample_index=sample,
            documents=spans,
            loss=None if rows is None else rows.sample_loss(rank, micro_batch, position),
        )


def _sentence(error: FlagScaleError) -> str:
    """An error of ours in one line."""
    facts = (("at", error.where), ("expected", error.expected), ("got", error.got))
    parts = [error.what, *(f"{name} {value}" for name, value in facts if value is not None)]
    return ", ".join(parts) + (f" ({error.cure})" if error.cure else "")


def find_readings(
    run: Run,
    dataset: int,
    document: int,
    token_start: int = 0,
    token_end: int | None = None,
    *,
    prove: bool = True,
    progress: Progress | None = None,
) -> Iterator[Reading]:
    """When a document was read, and when it will be: the inverse of :func:`locate`.

    Args:
        run: The run.
        dataset: Ordinal in the blend.
        document: Ordinal in the dataset, from 0.
        token_start: Only of samples that hold one of its tokens from here on,
        token_end: and before here.
        prove: Whether to hold each step that is done against the ledger's checksums; otherwise
            every answer is RECONSTRUCTED.
        progress: Told what is about to be done, where it takes long.

    Yields:
        In the order they are read; what a later start went back over is left out.

    Raises:
        ConfigError: The arguments of a start make no sense.
        DataError: Data, caches or ledger are missing or damaged, or there is no such document.
    """
    starts = _surviving(run.starts)
    for record, following in zip(starts, [*starts[1:], None], strict=True):
        with StartMapping(record, progress=progress) as mapping:
            end = last_iteration(record.args) if following is None else following.start.iteration
            if end <= record.start.iteration:
                continue
            stop = mapping.step_range(end).consumed_after
            samples = mapping.corpus.find(dataset, document, token_start, token_end)
            begin = record.start.consumed
            for read in mapping.reads(dataset, samples, begin, stop):
                rows = None if run.ledger is None else run.ledger.step(mapping.iteration_of(read))
                yield _reading(mapping, read, dataset, document, rows, prove=prove)


def _surviving(starts: Sequence[StartRecord]) -> list[StartRecord]:
    """The starts that no later one went back behind, in order."""
    result: list[StartRecord] = []
    for record in reversed(starts):
        done_nothing = record.attempt is not None and not record.attempt.iterations
        if done_nothing and record is not starts[-1]:
            continue
        if not result or record.start.iteration < result[-1].start.iteration:
            result.append(record)
    return result[::-1]


def _reading(
    mapping: StartMapping,
    read: Read,
    dataset: int,
    document: int,
    rows: StepRows | None,
    *,
    prove: bool,
) -> Reading:
    record = mapping.record
    iteration = mapping.iteration_of(read)
    step = mapping.step_range(iteration)
    label, reasons = Label.RECONSTRUCTED, tuple(mapping.corpus.assumptions())
    if prove:
        answer = locate_in(mapping, iteration, rows, documents=False)
        label, reasons = answer.label, answer.reasons
    _, indices = mapping.corpus.locate([read.index])
    sample = int(indices[0])
    spans = mapping.corpus.documents(dataset, sample)
    return Reading(
        iteration=iteration,
        label=label,
        reasons=reasons,
        attempt=record.name,
        done=rows is not None,
        skipped=step.skipped,
        rank=read.rank,
        micro_batch=(mapping.consumed_of(read) - step.consumed_before)
        // mapping.sampler.slice_size,
        position=read.position,
        dataset=dataset,
        sample_index=sample,
        spans=tuple(span for span in spans if span.document == document),
    )
