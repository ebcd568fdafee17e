"""The quarantine list: spans of documents whose loss is not to count.

One JSON document, one entry a line, made to be read and edited by hand::

    {
     "version": 1,
     "datasets": {
      "corpus/web_text_document": {...}
     },
     "entries": [
      {"dataset": "corpus/web_text_document", "document": 1841, "token_start": 0,
       "token_end": null, "reason": "random bytes", "added": "2026-11-24", "iteration": 10250}
     ]
    }

``datasets`` holds the fingerprint that each ``.idx`` and ``.bin`` had when the list was made, so
that a list of another dataset, or of one that was written again, is refused. ``token_end`` is one
past the last token, ``null`` the document's end. ``iteration``, where the document was found, may
be left out. Whoever writes the file keeps the entries in order, so that two versions compare line
by line; a span that stands twice counts once, and spans that overlap are masked once.
"""

from __future__ import annotations

import datetime
import difflib
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flagscale.data.output import flush_to_disk, writing_to
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.errors import DataError

__all__ = [
    "QuarantineEntry",
    "QuarantineList",
    "SkippedIteration",
    "Spans",
    "iterations_to_skip",
    "read_quarantine",
    "skip_words",
    "spans_by_sequence",
    "write_quarantine",
]

VERSION = 1

_LARGEST = 2**63 - 1
_MAX_BYTES = 2**28
"""A list of a million documents has half of this; what is larger is some other file."""

Fingerprint = Mapping[str, Any]
"""What :meth:`flagscale.data_inspect.indexed.IndexedFile.fingerprint` gives, as JSON has it."""

Spans = Mapping[int, npt.NDArray[np.int64]]
"""By sequence: token ranges [n, 2] within it, one past the last excluded, ascending."""


@dataclass(frozen=True)
class QuarantineEntry:
    """A span of one document.

    Args:
        dataset: Prefix, as ``--data-path`` names it.
        document: Ordinal in the dataset, from 0.
        token_start: First token, counted from the document's first.
        token_end: One past the last; ``None`` is the document's end.
        reason: For people.
        added: ISO date.
        iteration: Where it was found, 1-based; ``None`` if that is not known.

    Raises:
        DataError: A value is of the wrong type or out of range.
    """

    dataset: str
    document: int
    token_start: int
    token_end: int | None
    reason: str
    added: str
    iteration: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be a span."""
        self._require("dataset", _is_path(self.dataset), "a prefix")
        self._require("document", _is_count(self.document, 0), "a whole number from 0")
        self._require("token_start", _is_count(self.token_start, 0), "a whole number from 0")
        self._require(
            "token_end",
            self.token_end is None or _is_count(self.token_end, self.token_start + 1),
            "more than token_start, or null for the document's end",
        )
        self._require("reason", isinstance(self.reason, str), "text")
        self._require("added", _is_date(self.added), "a date, YYYY-MM-DD")
        self._require(
            "iteration",
            self.iteration is None or _is_count(self.iteration, 1),
            "a whole number from 1",
        )

    def _require(self, field: str, holds: bool, expected: str) -> None:
        if not holds:
            raise DataError(
                "a quarantine entry cannot be right",
                where=f"{field} of document {self.document!r} of {self.dataset!r}",
                expected=expected,
                got=repr(getattr(self, field)),
                cure="correct the entry, or take it out",
            )

    @property
    def span(self) -> tuple[str, int, int, int]:
        """What is masked: two entries with the same mask the same. Entries are ordered by it."""
        end = _LARGEST if self.token_end is None else self.token_end
        return self.dataset, self.document, self.token_start, end


def _is_path(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\0" not in value


def _is_count(value: object, lowest: int) -> bool:
    return type(value) is int and lowest <= value <= _LARGEST


def _is_date(value: object) -> bool:
    try:
        return isinstance(value, str) and str(datetime.date.fromisoformat(value)) == value
    except ValueError:
        return False


@dataclass(frozen=True)
class QuarantineList:
    """Entries in their order, each span once, and the fingerprints of their datasets.

    Args:
        fingerprints: By prefix; those of datasets without an entry are dropped.
        entries: In any order; of those with the same span the first is kept.

    Raises:
        DataError: An entry's dataset has no fingerprint.
    """

    fingerprints: Mapping[str, Fingerprint]
    entries: tuple[QuarantineEntry, ...]

    def __post_init__(self) -> None:
        """Put into the one form that a file has."""
        spans: dict[tuple[str, int, int, int], QuarantineEntry] = {}
        for entry in self.entries:
            spans.setdefault(entry.span, entry)
        names = sorted({entry.dataset for entry in spans.values()})
        for name in names:
            if name not in self.fingerprints:
                raise DataError(
                    "a quarantined dataset has no fingerprint",
                    where=name,
                    expected="its entry under datasets",
                    got=", ".join(sorted(self.fingerprints)) or "none",
                    cure="add entries with `python tools/inspect_data.py quarantine`",
                )
        object.__setattr__(self, "entries", tuple(spans[span] for span in sorted(spans)))
        object.__setattr__(self, "fingerprints", {name: self.fingerprints[name] for name in names})

    @property
    def datasets(self) -> tuple[str, ...]:
        """Prefixes of the datasets with an entry, in order."""
        return tuple(self.fingerprints)

    def entries_of(self, dataset: str) -> tuple[QuarantineEntry, ...]:
        """The entries of one dataset, in order."""
        return tuple(entry for entry in self.entries if entry.dataset == dataset)

    def merged(self, other: QuarantineList) -> QuarantineList:
        """This list and another; where both have a span, this one's entry is kept.

        Raises:
            DataError: The two were made of different contents of a dataset.
        """
        for name in sorted(self.fingerprints.keys() & other.fingerprints.keys()):
            if _content(self.fingerprints[name]) != _content(other.fingerprints[name]):
                raise DataError(
                    "the two lists were made of different contents of a dataset",
                    where=name,
                    expected=json.dumps(self.fingerprints[name]),
                    got=json.dumps(other.fingerprints[name]),
                    cure="make the older list again from the dataset as it is now",
                )
        both = {**self.fingerprints, **other.fingerprints}
        return QuarantineList(both, self.entries + other.entries)

    def without(self, removed: Collection[QuarantineEntry]) -> QuarantineList:
        """This list less the spans of some entries.

        Raises:
            DataError: One of them is not on the list.
        """
        spans = {entry.span for entry in removed}
        if missing := spans - {entry.span for entry in self.entries}:
            raise DataError(
                "an entry to be removed is not on the list",
                where="dataset {}, document {}".format(*min(missing)),
                cure="name its document and tokens as the list does",
            )
        kept = tuple(entry for entry in self.entries if entry.span not in spans)
        return QuarantineList(self.fingerprints, kept)

    def text(self) -> str:
        """The file's content."""
        datasets = [f"  {_json(k)}: {_json(v)}" for k, v in self.fingerprints.items()]
        entries = [f"  {_json(_as_mapping(entry))}" for entry in self.entries]
        return (
            f'{{\n "version": {VERSION},\n'
            f' "datasets": {{{_lines(datasets)}}},\n "entries": [{_lines(entries)}]\n}}\n'
        )

    def digest(self) -> str:
        """SHA-256 of the content, in hexadecimal."""
        return hashlib.sha256(self.text().encode()).hexdigest()


def _content(fingerprint: Fingerprint) -> dict[str, Any]:
    """A fingerprint without the times, which a copy does not keep."""
    return {
        ending: {k: v for k, v in file.items() if k != "mtime_ns"} if isinstance(file, dict) else {}
        for ending, file in fingerprint.items()
    }


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _lines(rows: Sequence[str]) -> str:
    return "\n" + ",\n".join(rows) + "\n " if rows else ""


def _as_mapping(entry: QuarantineEntry) -> dict[str, Any]:
    values = {field.name: getattr(entry, field.name) for field in fields(entry)}
    if entry.iteration is None:
        del values["iteration"]
    return values


def read_quarantine(path: str | os.PathLike[str]) -> QuarantineList:
    """Read a list and judge all that can be judged without its datasets.

    Raises:
        DataError: It cannot be read, or is not such a list.
    """
    where = str(path)
    try:
        with open(path, "rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise ValueError(f"more than {_MAX_BYTES} bytes")
        document = json.loads(content.decode("utf-8"), object_pairs_hook=_unique)
        _json(document).encode("utf-8")  # neither half a character nor an infinite number
    except (OSError, ValueError, RecursionError) as error:
        raise _malformed(where, "one JSON document", str(error)) from error
    return _list_of(document, where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError(f"a key stands twice: {', '.join(key for key, _ in pairs)}")
    return values


def _malformed(where: str, expected: str, got: str) -> DataError:
    return DataError(
        "not a quarantine list",
        where=where,
        expected=expected,
        got=got,
        cure="correct it, or make it again with `python tools/inspect_data.py quarantine`",
    )


def _list_of(document: Any, where: str) -> QuarantineList:
    header = _object(document, {"version", "datasets", "entries"}, set(), where)
    if type(header["version"]) is not int or header["version"] != VERSION:
        raise _malformed(f"{where}: version", str(VERSION), repr(header["version"]))
    if not isinstance(header["entries"], list):
        raise _malformed(f"{where}: entries", "a list", type(header["entries"]).__name__)
    datasets = header["datasets"]
    if not isinstance(datasets, dict) or not all(isinstance(v, dict) for v in datasets.values()):
        raise _malformed(f"{where}: datasets", "a fingerprint by prefix", _json(datasets)[:200])
    entries = [_entry(row, f"{where}: entry {i}") for i, row in enumerate(header["entries"], 1)]
    try:
        return QuarantineList(datasets, tuple(entries))
    except DataError as error:
        error.where = f"{where}: {error.where}"
        raise


def _entry(row: Any, where: str) -> QuarantineEntry:
    names = {field.name for field in fields(QuarantineEntry)}
    values = _object(row, names - {"iteration"}, {"iteration"}, where)
    try:
        return QuarantineEntry(**values)
    except DataError as error:
        error.where = f"{where}: {error.where}"
        raise


def _object(value: Any, required: set[str], optional: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _malformed(where, "an object", _json(value)[:200])
    known = required | optional
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise _malformed(where, near[0] if near else ", ".join(sorted(known)), key)
    if missing := sorted(required - value.keys()):
        raise _malformed(where, f"a value for {', '.join(missing)}", "none")
    return value


def write_quarantine(path: str | os.PathLike[str], quarantine: QuarantineList) -> None:
    """Write a list; a reader sees the old one or the new one, whole.

    Raises:
        DataError: The disk refuses.
    """
    final = Path(path)
    staged = final.with_name(f".{final.name}.{os.getpid()}")
    with writing_to(final):
        try:
            staged.write_text(quarantine.text(), encoding="utf-8")
            flush_to_disk(staged)
            staged.replace(final)
        finally:
            staged.unlink(missing_ok=True)


def spans_by_sequence(entries: Iterable[QuarantineEntry], indexed: IndexedFile) -> Spans:
    """Where the quarantined tokens of one dataset lie.

    Args:
        entries: All of this dataset.
        indexed: Its files.

    Returns:
        Disjoint ranges: what overlaps or touches is merged.

    Raises:
        DataError: A document or a token is not in the dataset, or the dataset is damaged.
    """
    found: dict[int, list[tuple[int, int]]] = {}
    for entry in sorted(entries, key=lambda entry: entry.span):
        for sequence, start, end in _in_sequences(entry, indexed):
            ranges = found.setdefault(sequence, [])
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
            else:
                ranges.append((start, end))
    return {sequence: np.array(ranges, dtype=np.int64) for sequence, ranges in found.items()}


def _in_sequences(entry: QuarantineEntry, indexed: IndexedFile) -> list[tuple[int, int, int]]:
    """``(sequence, start, end)`` of an entry, none of them empty."""
    if entry.document >= indexed.num_documents:
        raise _outside(entry, f"document < {indexed.num_documents}", f"{entry.document}")
    first, stop = indexed.sequences_of(entry.document)
    bounds = np.concatenate([[0], indexed.lengths(first, stop).cumsum(dtype=np.int64)])
    tokens = int(bounds[-1])
    end = tokens if entry.token_end is None else entry.token_end
    if not entry.token_start < end <= tokens:
        raise _outside(entry, f"tokens within [0, {tokens})", f"[{entry.token_start}, {end})")
    starts = np.maximum(entry.token_start, bounds[:-1]) - bounds[:-1]
    ends = np.minimum(end, bounds[1:]) - bounds[:-1]
    return [(first + int(i), int(starts[i]), int(ends[i])) for i in np.flatnonzero(starts < ends)]


def _outside(entry: QuarantineEntry, expected: str, got: str) -> DataError:
    return DataError(
        "a quarantined span is not in its dataset",
        where=f"document {entry.document} of {entry.dataset}",
        expected=expected,
        got=got,
        cure="correct the entry, or make it again from this dataset",
    )


@dataclass(frozen=True)
class SkippedIteration:
    """An iteration thrown away as a whole, for people without the dataset plugin.

    Args:
        iteration: 1-based, as ``--iterations-to-skip`` takes it.
        quarantined_samples: Samples of it that read a quarantined document.
        innocent_samples: The others, which are lost with them.
    """

    iteration: int
    quarantined_samples: int
    innocent_samples: int


def iterations_to_skip(
    entries: Iterable[QuarantineEntry],
    visits_of: Callable[[QuarantineEntry], Iterable[tuple[int, int]]],
    batch_size_of: Callable[[int], int],
) -> tuple[SkippedIteration, ...]:
    """Which iterations to leave out where the loss cannot be masked.

    Args:
        entries: What is not to be trained on.
        visits_of: Each reading of an entry's span, past or to come, as ``(iteration, place)``: a
            1-based iteration, and what tells the samples of a global batch apart.
        batch_size_of: Samples of an iteration.

    Returns:
        By iteration, each once.
    """
    visits: dict[int, set[int]] = {}
    for entry in entries:
        for iteration, place in visits_of(entry):
            visits.setdefault(iteration, set()).add(place)
    return tuple(
        SkippedIteration(iteration, len(places), batch_size_of(iteration) - len(places))
        for iteration, places in sorted(visits.items())
    )


def skip_words(skipped: Iterable[SkippedIteration]) -> list[str]:
    """The command-line words that skip them; none for none."""
    iterations = [str(one.iteration) for one in skipped]
    return ["--iterations-to-skip", *iterations] if iterations else []
