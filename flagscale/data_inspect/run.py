"""What there is of a run: ledger, logs, event files, checkpoints; and how each start began."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flagscale.data_inspect.arguments import DataArguments
from flagscale.data_inspect.curve import Curve
from flagscale.data_inspect.ledger import Attempt, Ledger
from flagscale.data_inspect.ledger_curve import curve_of
from flagscale.data_inspect.logs import is_log_name, read_log
from flagscale.data_inspect.steps import FRESH, Start, plan_schedule
from flagscale.errors import DataError

__all__ = ["Run", "StartRecord", "open_run", "read_printed_arguments"]

_BEGINNING = re.compile(r"-{10,} arguments -{10,}")
_END = re.compile(r"-{10,} end of arguments -{10,}")
_ARGUMENT = re.compile(r"\s{2}(\w+) \.* ?(.*)")
_LOADED = re.compile(r"successfully loaded checkpoint from .* at iteration (\d+)")
_TEXTS = (
    *("split", "step_batch_size_schedule", "dataloader_type", "data_cache_path"),
    *("data_args_path", "per_split_data_args_path"),
)


@dataclass(frozen=True)
class StartRecord:
    """One start of the job: what it ran with, and from where.

    Args:
        name: The ledger's attempt, or where a log tells of it.
        args: What decides the order of its data.
        start: Iterations done and samples consumed before it.
        pad_token_id: Replaced by 0 in batches if not negative; ``None`` if not known.
        attempt: The ledger's, ``None`` without one.
        assumptions: What was not recorded but taken for granted.
    """

    name: str
    args: DataArguments
    start: Start
    pad_token_id: int | None = None
    attempt: Attempt | None = None
    assumptions: tuple[str, ...] = ()

    @classmethod
    def of_attempt(cls, attempt: Attempt) -> StartRecord:
        """What the ledger's segment says.

        Raises:
            DataError: Its arguments do not decide an order.
        """
        args = DataArguments.read(attempt.segment["args"])
        if args.dp_size != attempt.dp_size:
            raise DataError(
                "the segment of a ledger does not agree with itself",
                where=f"attempt {attempt.name}",
                expected=f"{attempt.dp_size} data-parallel ranks",
                got=args.dp_size,
                cure="restore the ledger",
            )
        return cls(
            name=attempt.name,
            args=args,
            start=Start(attempt.start_iteration, attempt.start_consumed),
            pad_token_id=int(attempt.segment["pad_token_id"]),
            attempt=attempt,
        )


@dataclass(frozen=True)
class Run:
    """The parts of a run directory that are there.

    Args:
        directory: As given.
        ledger_directory: ``None`` without a ledger.
        logs: The logs of its ranks.
        events: The directory of TensorBoard's event files.
        checkpoints: The directory that holds ``latest_checkpointed_iteration.txt``.
        arguments_file: JSON or a log to take arguments from where there is no ledger.
    """

    directory: Path
    ledger_directory: Path | None
    logs: tuple[Path, ...]
    events: Path | None
    checkpoints: Path | None
    arguments_file: Path | None = None

    @cached_property
    def ledger(self) -> Ledger | None:
        """The ledger, opened.

        Raises:
            DataError: It is damaged.
        """
        return None if self.ledger_directory is None else Ledger(self.ledger_directory)

    @cached_property
    def starts(self) -> tuple[StartRecord, ...]:
        """Every start, in order: by the ledger, or by the arguments that logs print.

        Raises:
            DataError: Nothing says with which arguments the run was made.
        """
        if self.ledger is not None:
            return tuple(StartRecord.of_attempt(attempt) for attempt in self.ledger.attempts)
        sources = self.logs if self.arguments_file is None else (self.arguments_file,)
        for path in sources:  # only rank 0 prints them
            starts = tuple(_starts_of(path))
            if starts:
                return starts
        raise DataError(
            "nothing says with which arguments the run was made",
            where=str(self.directory),
            expected="a ledger, or a log in which Megatron has printed its arguments",
            got=", ".join(str(path) for path in sources) or "neither",
            cure="give --arguments FILE: such a log, or the arguments as JSON",
        )

    def curve(self) -> tuple[Curve, str]:
        """The loss of every step, and what it was read from: the best there is.

        Raises:
            DataError: There is none, or it is damaged.
        """
        if self.ledger is not None:
            return curve_of(self.ledger), f"the ledger in {self.ledger_directory}"
        if self.events is not None:
            from flagscale.data_inspect.events import read_events

            return read_events(self.events), f"the event files in {self.events}"
        return read_log(*self.logs), f"the logs {', '.join(map(str, self.logs))}"

    def start_of(self, iteration: int) -> StartRecord:
        """The start that did an iteration, or that would have.

        Raises:
            DataError: Nothing says with which arguments the run was made.
        """
        if self.ledger is not None:
            return StartRecord.of_attempt(self.ledger.attempt_at(iteration))
        before = [one for one in self.starts if one.start.iteration < iteration]
        return (before or list(self.starts))[-1]


def open_run(directory: Path, arguments_file: Path | None = None) -> Run:
    """Find the parts of a run.

    Args:
        directory: The launcher's run directory, or its checkpoints, or its ledger.
        arguments_file: See :class:`Run`.

    Raises:
        DataError: It is no directory, or there is nothing of a run in it.
    """
    if not directory.is_dir():
        raise DataError(
            "there is no such directory", where=str(directory), cure="give the run's directory"
        )
    places = (directory, directory / "checkpoints")
    ledgers = [place / "ledger" for place in places]
    run = Run(
        directory=directory,
        ledger_directory=next(filter(_holds_ledger, [*ledgers, directory]), None),
        logs=tuple(_logs(directory)),
        events=next(filter(_holds_events, [directory / "tensorboard", directory]), None),
        checkpoints=next(filter(_holds_checkpoints, places), None),
        arguments_file=arguments_file,
    )
    if not (run.ledger_directory or run.logs or run.events or arguments_file):
        raise DataError(
            "there is nothing of a training run here",
            where=str(directory),
            expected="ledger/, logs/rank_*.log, *.log, or tensorboard/",
            cure="give the directory that the launcher wrote, or that --save names",
        )
    return run


def _holds_ledger(directory: Path) -> bool:
    return any(directory.glob("*/dp*.ledger"))


def _holds_events(directory: Path) -> bool:
    return any(directory.glob("events.out.tfevents.*"))


def _holds_checkpoints(directory: Path) -> bool:
    return (directory / "latest_checkpointed_iteration.txt").is_file()


def _logs(directory: Path) -> Iterator[Path]:
    for place in (directory / "logs", directory):
        found = [path for path in place.glob("*") if path.is_file() and is_log_name(path.name)]
        if found:
            yield from sorted(found, key=lambda path: (len(path.name), path.name))
            return


def read_printed_arguments(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The arguments that Megatron prints at each start, and the iteration it then loaded.

    Args:
        path: A log.

    Yields:
        Arguments by name, and the iterations done before that start: 0 where none was loaded.

    Raises:
        DataError: The log cannot be read.
    """
    arguments: dict[str, Any] | None = None
    inside = False
    iteration = 0
    for line in _lines(path):
        if _BEGINNING.search(line):
            if arguments:
                yield arguments, iteration
            arguments, inside, iteration = {}, True, 0
        elif _END.search(line):
            inside = False
        elif inside and arguments is not None and (match := _ARGUMENT.search(line)):
            arguments[match[1]] = _value(match[1], match[2])
        elif arguments is not None and (match := _LOADED.search(line)):
            iteration = int(match[1])
    if arguments:
        yield arguments, iteration


def _lines(path: Path) -> Iterator[str]:
    import gzip

    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8", errors="replace") as packed:
                yield from packed
        else:
            with path.open(encoding="utf-8", errors="replace") as plain:
                yield from plain
    except (OSError, EOFError) as error:
        raise DataError(
            "a log cannot be read", where=str(path), got=str(error), cure="restore it"
        ) from error


def _value(name: str, text: str) -> Any:
    """What was printed as a value; text stays text, also where it looks like something else."""
    if name in _TEXTS:
        return None if text == "None" else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _starts_of(path: Path) -> Iterator[StartRecord]:
    for number, (values, iteration) in enumerate(_argument_sets(path), start=1):
        args = DataArguments.read(values)
        yield StartRecord(
            name=f"{path.name}, start {number}",
            args=args,
            start=_start_at(args, iteration),
            assumptions=(
                f"the arguments printed in {path}",
                *(
                    (f"the same batch sizes before iteration {iteration} as after it",)
                    if iteration
                    else ()
                ),
            ),
        )


def _start_at(args: DataArguments, iteration: int) -> Start:
    if not iteration:
        return FRESH
    return Start(iteration, plan_schedule(args).step_range(FRESH, iteration).consumed_after)


def _argument_sets(path: Path) -> Iterator[tuple[Mapping[str, Any], int]]:
    if path.suffix != ".json":
        yield from read_printed_arguments(path)
        return
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            "the arguments cannot be read", where=str(path), got=str(error), cure="mend the JSON"
        ) from error
    if not isinstance(values, dict):
        raise DataError(
            "the arguments are no JSON object", where=str(path), got=type(values).__name__,
            cure="give Megatron's arguments by name, as vars(args) has them",
        )  # fmt: skip
    yield values, int(values.get("iteration") or 0)
