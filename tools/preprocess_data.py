r"""Tokenise JSON lines into the .bin/.idx files that megatron-core trains on, and a sidecar.

Example:
    python tools/preprocess_data.py --input a.jsonl b.jsonl.zst --output-prefix data/web \
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model data/tokenizer \
        --append-eod --workers 8
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flagscale.data.preprocess import PreprocessPlan, dataset_prefix, plan_preprocess, preprocess
from flagscale.data.shards import Counts, PreprocessSettings
from flagscale.data.tokenizer import TOKENIZER_TYPES, TokenizerChoice
from flagscale.errors import FlagScaleError

_NAMED_MALFORMED_LINES = 20


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line; argparse itself exits with 2 on a mistake."""
    parser = argparse.ArgumentParser(
        description="Tokenise JSON lines into .bin/.idx files and a sidecar that leads back.",
        epilog="A run that was killed goes on where it stopped when it is started again.",
    )
    add = parser.add_argument
    add("--input", nargs="+", required=True, type=Path, help="JSONL files; .gz and .zst as well")
    add("--output-prefix", required=True, type=Path, help="writes PREFIX_<key>_document.*")
    add("--tokenizer-type", required=True, choices=TOKENIZER_TYPES, help="as for training")
    add("--tokenizer-model", required=True, help="as for training: a local directory or file")
    add("--json-keys", nargs="+", default=["text"], help="fields to tokenise (default: text)")
    add("--append-eod", action="store_true", help="end each document with the tokenizer's eod")
    add("--workers", type=int, default=1, help="processes; the output does not depend on it")
    add("--skip-malformed", action="store_true", help="leave malformed lines out and name them")
    add("--dry-run", action="store_true", help="check all arguments, say what would be done")
    add(
        "--shard-bytes",
        type=int,
        default=PreprocessSettings.shard_bytes,
        help="text in a unit of work; the output does not depend on it (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    arguments = parse_arguments(argv)
    logging.basicConfig(format="%(message)s")
    try:
        plan = plan_preprocess(
            arguments.input,
            arguments.output_prefix,
            PreprocessSettings(
                TokenizerChoice(arguments.tokenizer_type, arguments.tokenizer_model),
                tuple(arguments.json_keys),
                arguments.append_eod,
                arguments.shard_bytes,
            ),
        )
        if arguments.dry_run:
            describe(plan)
            return 0
        with progress_bar(sum(stamp.size for stamp in plan.inputs)) as on_progress:
            counts = preprocess(
                plan,
                workers=arguments.workers,
                skip_malformed=arguments.skip_malformed,
                on_progress=on_progress,
            )
    except FlagScaleError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    report(plan, counts)
    return 0


def describe(plan: PreprocessPlan) -> None:
    """Say what a run would do."""
    for stamp in plan.inputs:
        print(f"input      {stamp.path} ({stamp.size:,} bytes)")
    choice = plan.settings.tokenizer
    print(f"tokenizer  {choice.type} {choice.model}: {plan.vocab_size} entries, eod {plan.eod}")
    for key in plan.settings.json_keys:
        print(f"output     {dataset_prefix(plan.prefix, key)}.{{bin,idx,source.npy,source.json}}")
    print(f"done       {plan.finished_shards()} shards, by an earlier run")


def report(plan: PreprocessPlan, counts: Counts) -> None:
    """Say what became of the input."""
    for key in plan.settings.json_keys:
        print(
            f"{dataset_prefix(plan.prefix, key)}: {counts.documents[key]:,} documents, "
            f"{counts.tokens[key]:,} tokens; {counts.empty[key]:,} empty documents left out"
        )
    print(f"{counts.lines:,} lines, {counts.blank:,} blank, {len(counts.malformed):,} malformed")
    for file, line, problem in counts.malformed[:_NAMED_MALFORMED_LINES]:
        print(f"  {plan.inputs[file].path}:{line}: {problem}")
    if len(counts.malformed) > _NAMED_MALFORMED_LINES:
        print("  ... all of them are in the .source.json")


@contextmanager
def progress_bar(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda disk_bytes: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("tokenising", total=total_bytes)
        yield lambda disk_bytes: progress.advance(task, disk_bytes)


if __name__ == "__main__":
    raise SystemExit(main())
