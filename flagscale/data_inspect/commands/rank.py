"""``rank``: documents by the loss of their samples over the whole run."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from typing import Any

from flagscale.data_inspect.commands import (
    Output,
    add_run_arguments,
    format_table,
    ordinal,
    to_stderr,
)
from flagscale.data_inspect.losses import Losses, open_losses
from flagscale.data_inspect.rank import RankedDocument, Ranking, rank
from flagscale.data_inspect.run import open_run

__all__ = ["AROUND", "add_arguments", "rank_losses", "run"]

AROUND = 200
"""Steps before and behind those of interest, which tell what was usual then."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR``, which iterations, and how many documents."""
    add_run_arguments(parser)
    add_range_arguments(parser)
    parser.add_argument("--top", type=int, default=20, help="of each end (default: %(default)s)")


def add_range_arguments(parser: argparse.ArgumentParser) -> None:
    """``--first-iteration``, ``--last-iteration`` and ``--no-blocks``."""
    parser.add_argument("--first-iteration", type=ordinal, metavar="N", help="default: the first")
    parser.add_argument("--last-iteration", type=ordinal, metavar="N", help="default: the last")
    parser.add_argument(
        "--no-blocks", action="store_true", help="go by whole samples, also where there are blocks"
    )


def run(args: argparse.Namespace) -> Output:
    """Rank.

    Raises:
        ConfigError: The range is empty.
        DataError: There is no ledger, or what is needed is missing or damaged.
    """
    with open_losses(open_run(args.run_dir, args.arguments), to_stderr) as losses:
        first = args.first_iteration or losses.first_iteration
        last = args.last_iteration or losses.last_iteration
        ranking = rank_losses(losses, first, last, blocks=not args.no_blocks, limit=args.top)
        prefixes = losses.mapping.corpus.prefixes
        sources = [_source(losses, one) for one in (*ranking.hard, *ranking.easy)]
    unit = f"blocks of {ranking.block_tokens} tokens" if ranking.block_tokens else "whole samples"
    head = (
        f"{ranking.documents} documents in {ranking.samples} samples of iterations {first} to "
        f"{last}, by {unit}; a score is about normal with deviation 1 for ordinary documents"
    )
    half = len(ranking.hard)
    parts = [
        head,
        *([f"{ranking.nan_samples} samples had a NaN loss"] if ranking.nan_samples else []),
        "hard:",
        _table(ranking.hard, prefixes, sources[:half]),
        "easy (repeated, or learned by heart; seldom a cause of spikes):",
        _table(ranking.easy, prefixes, sources[half:]),
    ]
    return Output("\n".join(parts), _json(ranking, prefixes))


def rank_losses(
    losses: Losses, first: int, last: int, *, blocks: bool, limit: int | None
) -> Ranking:
    """Rank the documents of some iterations by what was usual around them.

    Raises:
        ConfigError: The range is empty.
        DataError: Ledger, data or caches are damaged.
    """
    begin = max(losses.first_iteration, first - AROUND)
    steps = losses.steps(begin, last + AROUND)
    mapping = losses.mapping
    return rank(
        steps,
        mapping.corpus.documents_of,
        mapping.record.args.seq_length,
        iterations=(first, last),
        blocks=blocks,
        limit=limit,
    )


def _source(losses: Losses, document: RankedDocument) -> str:
    sample = int(document.samples[0])
    for span in losses.mapping.corpus.documents(document.dataset, sample):
        if span.document == document.document and span.source_file is not None:
            return f"{span.source_file}:{span.source_line}"
    return ""


def _table(
    documents: tuple[RankedDocument, ...], prefixes: tuple[str, ...], sources: list[str]
) -> str:
    rows: list[tuple[object, ...]] = [
        (
            round(one.score, 2),
            one.document,
            prefixes[one.dataset],
            round(one.loss, 4),
            f"{one.excess:+.4f} ± {one.uncertainty:.4f}",
            one.visits,
            one.tokens,
            source,
        )
        for one, source in zip(documents, sources, strict=True)
    ]
    header = ("score", "document", "dataset", "loss", "excess", "visits", "tokens", "source")
    return format_table(header, rows)


def _json(ranking: Ranking, prefixes: tuple[str, ...]) -> dict[str, Any]:
    values = asdict(ranking)
    for end in ("hard", "easy"):
        for document in values[end]:
            document["prefix"] = prefixes[document["dataset"]]
            document["samples"] = [int(sample) for sample in document["samples"]]
    return values
