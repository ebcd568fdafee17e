"""``verify``: whether what is computed here is what the job read, step by step."""

from __future__ import annotations

import argparse
import random
from collections import Counter

from flagscale.data_inspect.answers import Label
from flagscale.data_inspect.commands import Output, add_run_arguments, to_stderr
from flagscale.data_inspect.locate import locate_in
from flagscale.data_inspect.mapping import StartMapping
from flagscale.data_inspect.run import StartRecord, open_run
from flagscale.errors import ConfigError, DataError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR`` and how thorough to be."""
    add_run_arguments(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="only so many, chosen at random")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: %(default)s)")
    parser.add_argument(
        "--caches",
        action="store_true",
        help="hold upstream's cached indices against what is computed anew, whole: slow",
    )


def run(args: argparse.Namespace) -> Output:
    """Verify; exit code 1 if a step is not EXACT.

    Raises:
        ConfigError: The arguments of a start make no sense.
        DataError: There is no ledger, or something is missing or damaged.
    """
    found = open_run(args.run_dir, args.arguments)
    if found.ledger is None:
        raise DataError(
            "there is no ledger to verify against", where=str(args.run_dir), cure="see `locate`"
        )
    if args.steps is not None and args.steps < 1:
        raise ConfigError("nothing would be verified", where="--steps", got=args.steps)
    surviving = [(one, i) for one, iterations in found.ledger.surviving() for i in iterations]
    if args.steps is not None and args.steps < len(surviving):
        chosen = random.Random(args.seed).sample(range(len(surviving)), args.steps)
        surviving = [surviving[i] for i in sorted(chosen)]
    labels: Counter[Label] = Counter()
    wrong: list[str] = []
    torn = {
        str(file.path): file.torn_bytes
        for attempt in found.ledger.attempts
        for file in attempt.files.values()
        if file.torn_bytes
    }
    for attempt in {attempt.name: attempt for attempt, _ in surviving}.values():
        with StartMapping(StartRecord.of_attempt(attempt), progress=to_stderr) as mapping:
            if args.caches:
                mapping.corpus.verify()
            for iteration in [i for one, i in surviving if one is attempt]:
                rows = found.ledger.step(iteration)
                answer = locate_in(mapping, iteration, rows, documents=False)
                labels[answer.label] += 1
                if answer.label is not Label.EXACT:
                    wrong.append(f"iteration {iteration}: {answer.label}: {answer.reasons[0]}")
    counts = ", ".join(f"{labels[label]} {label}" for label in Label if labels[label])
    lines = [f"{len(surviving)} steps: {counts or 'none'}", *wrong[:20]]
    lines += [f"and {len(wrong) - 20} more"] * (len(wrong) > 20)
    lines += [f"{path}: {size} bytes of a row that a kill cut" for path, size in torn.items()]
    json = {"steps": len(surviving), "labels": dict(labels), "wrong": wrong, "torn": torn}
    return Output("\n".join(lines), json, int(bool(wrong) or not surviving))
