"""``quarantine``: a list of documents to mask from now on, and the iterations that read them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from flagscale.data_inspect.commands import (
    Output,
    add_run_arguments,
    chosen_document,
    format_table,
    ordinal,
    to_stderr,
)
from flagscale.data_inspect.commands.rank import AROUND, rank_losses
from flagscale.data_inspect.indexed import Fingerprint, IndexedFile
from flagscale.data_inspect.locate import Reading, find_readings
from flagscale.data_inspect.losses import Losses, open_losses
from flagscale.data_inspect.quarantine import (
    QuarantineEntry,
    QuarantineList,
    SkippedIteration,
    iterations_to_skip,
    read_quarantine,
    skip_words,
    spans_by_sequence,
    write_quarantine,
)
from flagscale.data_inspect.rank import Direction, RankedDocument
from flagscale.data_inspect.run import Run, open_run
from flagscale.data_inspect.steps import plan_schedule
from flagscale.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, what to add or take out, and the list's file."""
    add_run_arguments(parser)
    parser.add_argument(
        "--output",
        type=Path,
        metavar="LIST",
        help="the list's file: made, or added to; without it the list is only printed",
    )
    what = parser.add_argument_group("what to quarantine")
    what.add_argument(
        "--add",
        nargs="+",
        default=[],
        metavar="[DATASET:]N[:START-END]",
        help="documents, or parts",
    )
    what.add_argument(
        "--iteration", type=ordinal, help="the documents of this step whose score is --min-score"
    )
    what.add_argument(
        "--top", type=int, default=0, metavar="N", help="the N hardest documents of the whole run"
    )
    what.add_argument(
        "--min-score",
        type=float,
        default=5.0,
        help="of --iteration and --top: what scores less is left alone (default: %(default)s)",
    )
    what.add_argument(
        "--remove", nargs="+", default=[], metavar="[DATASET:]N", help="take them out"
    )
    parser.add_argument("--reason", default="", help="why, for whoever reads the list")
    parser.add_argument(
        "--no-iterations", action="store_true", help="do not look up which iterations read them"
    )


def run(args: argparse.Namespace) -> Output:
    """Make the list, or add to it.

    Raises:
        ConfigError: Nothing is asked for, or there is no such dataset.
        DataError: What is needed is missing or damaged, or the list is of other data.
    """
    found = open_run(args.run_dir, args.arguments)
    old = QuarantineList({}, ())
    if args.output is not None and args.output.exists():
        old = read_quarantine(args.output)
    chosen = [*_named(found, args), *_ranked(found, args)]
    if not chosen and not args.remove and not old.entries:
        raise ConfigError(
            "nothing is to be quarantined",
            where="--add, --iteration, --top",
            expected="a document, or a step with one that stands out",
            cure="see `rank` and `show`, or a lower --min-score",
        )
    new = old.merged(QuarantineList(_fingerprints(chosen), tuple(chosen)))
    removed = {chosen_document(found, text)[:2] for text in args.remove}
    prefixes = found.starts[-1].args.blend.prefixes
    gone = [e for e in new.entries if (prefixes.index(e.dataset), e.document) in removed]
    new = new.without(gone)
    _verify(new)
    if args.output is not None:
        write_quarantine(args.output, new)
    skipped = () if args.no_iterations else _skipped(found, new)
    return Output(
        _text(args.output, new, skipped),
        {
            "entries": [asdict(entry) for entry in new.entries],
            "added": len(new.entries) - len(old.entries) + len(gone),
            "removed": len(gone),
            "iterations_to_skip": [asdict(one) for one in skipped],
        },
    )


def _named(found: Run, args: argparse.Namespace) -> Iterator[QuarantineEntry]:
    for text in args.add:
        dataset, document, start, end = chosen_document(found, text)
        yield _entry(found, dataset, document, args.reason, start, end)


def _entry(
    found: Run,
    dataset: int,
    document: int,
    reason: str,
    start: int = 0,
    end: int | None = None,
    iteration: int | None = None,
) -> QuarantineEntry:
    prefix = found.starts[-1].args.blend.prefixes[dataset]
    today = datetime.now(UTC).date().isoformat()
    return QuarantineEntry(prefix, document, start, end, reason, today, iteration)


def _ranked(found: Run, args: argparse.Namespace) -> Iterator[QuarantineEntry]:
    if args.iteration is None and not args.top:
        return
    with open_losses(found, to_stderr) as losses:
        if args.iteration is not None:
            # By the documents of the steps around it: those of a bad step alone say nothing of
            # what is ordinary.
            around = (max(1, args.iteration - AROUND), args.iteration + AROUND)
            ranking = rank_losses(losses, *around, blocks=True, limit=None)
            inside = _documents_of(losses, args.iteration)
            hard = tuple(one for one in ranking.hard if (one.dataset, one.document) in inside)
            yield from _standing_out(found, args, hard, args.iteration)
        if args.top:
            everything = (losses.first_iteration, losses.last_iteration)
            ranking = rank_losses(losses, *everything, blocks=True, limit=args.top)
            yield from _standing_out(found, args, ranking.hard, None)


def _documents_of(losses: Losses, iteration: int) -> set[tuple[int, int]]:
    """``(dataset, document)`` of all that a step read."""
    return {
        (int(dataset), span.document)
        for step in losses.steps(iteration, iteration)
        for dataset, spans in zip(
            step.datasets,
            losses.mapping.corpus.documents_of(step.datasets, step.samples),
            strict=True,
        )
        for span in spans
    }


def _standing_out(
    found: Run,
    args: argparse.Namespace,
    ranked: tuple[RankedDocument, ...],
    iteration: int | None,
) -> Iterator[QuarantineEntry]:
    for one in ranked:
        if one.direction is Direction.HARD and one.score >= args.min_score:
            reason = args.reason or f"score {one.score:.1f}, loss {one.loss:.2f}"
            yield _entry(found, one.dataset, one.document, reason, iteration=iteration)


def _fingerprints(entries: list[QuarantineEntry]) -> dict[str, Fingerprint]:
    result: dict[str, Fingerprint] = {}
    for prefix in {entry.dataset for entry in entries}:
        with IndexedFile(prefix) as index:
            result[prefix] = index.fingerprint()
    return result


def _verify(quarantine: QuarantineList) -> None:
    """Refuse now what the training job would refuse later."""
    for prefix in quarantine.datasets:
        with IndexedFile(prefix) as index:
            spans_by_sequence(quarantine.entries_of(prefix), index)


def _skipped(found: Run, quarantine: QuarantineList) -> tuple[SkippedIteration, ...]:
    prefixes = found.starts[-1].args.blend.prefixes

    def visits_of(entry: QuarantineEntry) -> Iterator[tuple[int, int]]:
        dataset = prefixes.index(entry.dataset)
        tokens = (entry.token_start, entry.token_end)
        for one in find_readings(found, dataset, entry.document, *tokens, prove=False):
            yield one.iteration, _place(one)

    def batch_size_of(iteration: int) -> int:
        record = found.start_of(iteration)
        step = plan_schedule(record.args).step_range(record.start, iteration)
        return step.consumed_after - step.consumed_before

    return iterations_to_skip(quarantine.entries, visits_of, batch_size_of)


def _place(reading: Reading) -> int:
    """What tells the samples of a global batch apart."""
    return reading.rank << 40 | reading.micro_batch << 20 | reading.position


def _text(
    output: Path | None,
    quarantine: QuarantineList,
    skipped: tuple[SkippedIteration, ...],
) -> str:
    rows: list[tuple[object, ...]] = [
        (e.document, e.dataset, f"{e.token_start}-{'' if e.token_end is None else e.token_end}",
         e.iteration, e.reason)
        for e in quarantine.entries
    ]  # fmt: skip
    where = "not written: give --output" if output is None else str(output)
    count = len(quarantine.entries)
    lines = [f"{count} {'entry' if count == 1 else 'entries'} ({where})"]
    if rows:
        lines.append(format_table(("document", "dataset", "tokens", "found at", "reason"), rows))
    if output is not None:
        lines.append(f"resume with: --quarantine {output}")
    if skipped:
        innocent = sum(one.innocent_samples for one in skipped)
        lines.append(
            f"without this layer, {len(skipped)} steps, and with them {innocent} innocent samples:"
        )
        lines.append(" ".join(skip_words(skipped)))
    return "\n".join(lines)
