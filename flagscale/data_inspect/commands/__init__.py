"""The commands of ``tools/inspect_data.py``, a module each; imported only when one is asked for.

A module has ``add_arguments(parser)`` and ``run(args) -> Output``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flagscale.data_inspect.run import Run
from flagscale.errors import ConfigError

__all__ = [
    "COMMANDS",
    "Output",
    "add_document_arguments",
    "add_run_arguments",
    "chosen_document",
    "dataset_ordinal",
    "format_table",
    "ordinal",
    "to_stderr",
]

COMMANDS: Final = {
    "spikes": "steps whose loss rose as it should not have",
    "locate": "the samples and documents of a step; or when a document was or will be read",
    "show": "the text of a step's samples, or of a document",
    "rank": "documents by the loss of their samples over the whole run",
    "replay": "a step's samples once more, from checkpoints: bad data, or a bad state?",
    "quarantine": "a list of documents to mask from now on, and the iterations that read them",
    "verify": "whether what is computed here is what the job read, step by step",
    "drift": "whether new arguments change which samples are read, before a resume",
    "report": "all of it as one HTML file",
}
"""By name, what each is for."""


@dataclass(frozen=True)
class Output:
    """What a command has to say.

    Args:
        text: For people.
        json: The same for programs: what :func:`json.dumps` takes, and infinities and NaN, which
            JSON does not know: they become the texts ``Infinity``, ``-Infinity`` and ``NaN``.
        exit_code: 0 if all is well, 1 if what was asked cannot be vouched for.
    """

    text: str
    json: Any
    exit_code: int = 0

    def json_text(self) -> str:
        """``json``, written out."""
        return json.dumps(_finite(self.json), ensure_ascii=False, indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def ordinal(text: str) -> int:
    """An argument that counts from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """``RUN_DIR`` and ``--arguments``."""
    parser.add_argument(
        "run_dir",
        metavar="RUN_DIR",
        type=Path,
        help="the launcher's run directory, or what --save or --ledger-dir names",
    )
    parser.add_argument(
        "--arguments",
        metavar="FILE",
        type=Path,
        help="without a ledger: a log in which Megatron printed its arguments, or them as JSON",
    )


def add_document_arguments(group: argparse._MutuallyExclusiveGroup) -> None:
    """``--document``."""
    group.add_argument(
        "--document",
        metavar="[DATASET:]N[:START-END]",
        help="a document's ordinal, from 0; its dataset by prefix or ordinal where several are "
        "blended; only tokens START to END (the last not included)",
    )


def chosen_document(run: Run, text: str) -> tuple[int, int, int, int | None]:
    """What ``[DATASET:]N[:START-END]`` means in a run.

    Returns:
        Ordinal of the dataset, of the document, first token, one past the last or ``None``.

    Raises:
        ConfigError: It is no such text, or there is no such dataset.
    """
    match = re.fullmatch(r"(?:(.*):)?(\d+)(?::(\d+)-(\d*))?", text)
    if match is None:
        raise ConfigError(
            "this names no document",
            where="--document",
            expected="N, DATASET:N or DATASET:N:START-END",
            got=text,
            cure="see `locate`, which prints dataset, document and tokens",
        )
    dataset, document, start, end = match.groups()
    ordinal = dataset_ordinal(run, dataset)
    return ordinal, int(document), int(start or 0), int(end) if end else None


def dataset_ordinal(run: Run, name: str | None) -> int:
    """The ordinal in the blend of a dataset, which is named by prefix, its end, or the ordinal.

    Raises:
        ConfigError: There is none, or there are several.
    """
    prefixes = run.starts[-1].args.blend.prefixes
    found = [
        ordinal
        for ordinal, prefix in enumerate(prefixes)
        if name is None or name == str(ordinal) or f"/{prefix}".endswith(f"/{name.lstrip('/')}")
    ]
    if len(found) != 1:
        raise ConfigError(
            "no dataset of the run has this name" if not found else "several datasets fit",
            where="dataset",
            expected=", ".join(f"{i} or {prefix}" for i, prefix in enumerate(prefixes)),
            got=name,
            cure="name one of them",
        )
    return found[0]


def to_stderr(message: str) -> None:
    """What takes long is said while it happens, and never among the results."""
    sys.stderr.write(f"{message}\n")


def format_table(header: tuple[str, ...], rows: list[tuple[object, ...]]) -> str:
    """Columns as wide as what is in them; numbers to the right."""
    cells = [tuple("" if cell is None else str(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
        for i in range(len(header))
    ]
    lines = []
    for row in (header, *cells):
        parts = (
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        )
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
