"""The quarantine list: its file, its checks, and which tokens and iterations it means."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import struct
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect import quarantine
from flagscale.data_inspect.indexed import IndexedFile
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
from flagscale.errors import DataError
from flagscale.train.quarantine import quarantined_spans

FINGERPRINTS = {
    name: {
        "idx": {"size": 90, "mtime_ns": 5, "crc": 3},
        "bin": {"size": 40, "mtime_ns": 6, "crc": 4},
    }
    for name in ("web", "数据/书")
}


def entry(document: int = 3, start: int = 0, end: int | None = None, **more: Any) -> Any:
    values = {"dataset": "web", "reason": "noise", "added": "2026-11-24", **more}
    return QuarantineEntry(document=document, token_start=start, token_end=end, **values)


entries = st.builds(
    lambda dataset, document, start, length, reason, added, iteration: QuarantineEntry(
        dataset, document, start, None if length is None else start + length, reason, added,
        iteration,
    ),
    st.sampled_from(sorted(FINGERPRINTS)),
    st.integers(0, 5),
    st.integers(0, 8),
    st.none() | st.integers(1, 8),
    st.text(st.characters(codec="utf-8"), max_size=9),
    st.dates().map(str),
    st.none() | st.integers(1, 2**40),
)  # fmt: skip


@settings(deadline=None, max_examples=40)  # each waits for the disk
@given(st.lists(entries, max_size=12), st.randoms())
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, some: list[QuarantineEntry], rng: random.Random
) -> None:
    path = tmp_path_factory.mktemp("list") / "quarantine.json"
    written = QuarantineList(FINGERPRINTS, tuple(some))
    write_quarantine(path, written)
    assert read_quarantine(path) == written
    assert path.read_text("utf-8") == written.text()
    assert json.loads(path.read_text("utf-8"))["version"] == 1

    assert {one.span for one in written.entries} == {one.span for one in some}
    assert len({one.span for one in written.entries}) == len(written.entries)
    assert list(written.entries) == sorted(written.entries, key=lambda one: one.span)
    assert set(written.datasets) == {one.dataset for one in some}
    shuffled = list(written.entries)
    rng.shuffle(shuffled)
    assert QuarantineList(FINGERPRINTS, tuple(shuffled)) == written
    assert sum('"document"' in line for line in written.text().splitlines()) == len(written.entries)


@given(st.lists(entries, max_size=8), st.lists(entries, max_size=8))
def test_lists_are_merged_and_taken_apart(
    some: list[QuarantineEntry], others: list[QuarantineEntry]
) -> None:
    one, other = (QuarantineList(FINGERPRINTS, tuple(rows)) for rows in (some, others))
    both = one.merged(other)
    assert set(both.entries) >= set(one.entries)
    spans = {row.span for row in one.entries}
    rest = [row for row in other.entries if row.span not in spans]
    assert both.without(one.entries).entries == tuple(rest)
    assert both.merged(one) == both
    assert both.without(both.entries).text() == QuarantineList({}, ()).text()


def test_lists_of_different_contents_are_not_merged() -> None:
    one = QuarantineList(FINGERPRINTS, (entry(),))
    file = FINGERPRINTS["web"]["bin"]
    touched = {"web": {**FINGERPRINTS["web"], "bin": {**file, "mtime_ns": 0}}}
    assert one.merged(QuarantineList(touched, (entry(4),))).entries == (entry(), entry(4))
    changed = {"web": {**FINGERPRINTS["web"], "bin": {**file, "crc": 0}}}
    with pytest.raises(DataError, match="web"):
        one.merged(QuarantineList(changed, (entry(4),)))
    with pytest.raises(DataError, match="document 9"):
        one.without([entry(9)])
    with pytest.raises(DataError, match="no fingerprint"):
        QuarantineList({}, (entry(),))


GOOD = json.loads(QuarantineList(FINGERPRINTS, (entry(1, 2, 5, iteration=7), entry(2))).text())
DROP = object()


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        ((), [], "an object"),
        (("version",), 2, "version"),
        (("version",), True, "version"),
        (("version",), DROP, "version"),
        (("entriez",), [], "entries"),
        (("entries",), {}, "entries"),
        (("datasets",), [], "datasets"),
        (("datasets",), {"web": 3}, "datasets"),
        (("datasets",), {}, "no fingerprint"),
        (("entries", 0), 3, "entry 1"),
        (("entries", 1, "tokenstart"), 0, "entry 2"),
        (("entries", 1, "reason"), DROP, "reason"),
        (("entries", 1, "reason"), 3, "reason"),
        (("entries", 1, "dataset"), "", "dataset"),
        (("entries", 1, "dataset"), "a\0b", "dataset"),
        (("entries", 0, "document"), -1, "document"),
        (("entries", 0, "document"), 1.0, "document"),
        (("entries", 0, "document"), True, "document"),
        (("entries", 0, "document"), 2**63, "document"),
        (("entries", 0, "token_start"), -1, "token_start"),
        (("entries", 0, "token_start"), None, "token_start"),
        (("entries", 0, "token_end"), 2, "token_end"),
        (("entries", 0, "token_end"), -1, "token_end"),
        (("entries", 0, "token_end"), DROP, "token_end"),
        (("entries", 0, "added"), "24.11.2026", "added"),
        (("entries", 0, "added"), "20261124", "added"),
        (("entries", 0, "added"), "2026-11-31", "added"),
        (("entries", 0, "iteration"), 0, "iteration"),
    ],
)
def test_a_wrong_value_is_named(
    tmp_path: Path, place: Sequence[Any], value: Any, named: str
) -> None:
    document: Any = json.loads(json.dumps(GOOD))
    target = document
    for step in place[:-1]:
        target = target[step]
    if not place:
        document = value
    elif value is DROP:
        del target[place[-1]]
    else:
        target[place[-1]] = value
    path = tmp_path / "list.json"
    path.write_text(json.dumps(document))
    with pytest.raises(DataError, match=named) as caught:
        read_quarantine(path)
    assert str(path) in str(caught.value)
    assert caught.value.cure


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\xff", b"{", b"[" * 100_000, b"9" * 5000,
        json.dumps(GOOD).replace('"entries"', '"version": 1, "entries"').encode(),
        json.dumps(GOOD).replace("noise", "\\ud800").encode(),
        json.dumps(GOOD).replace('"crc": 3', '"crc": 1e999').encode(),
        json.dumps(GOOD).replace('"crc": 3', '"crc": NaN').encode(),
    ],
)  # fmt: skip
def test_what_is_no_such_list(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"list\.json"):
        read_quarantine(path)


def test_no_file_and_too_large_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(DataError, match=str(path)):
            read_quarantine(path)
    path = tmp_path / "list.json"
    write_quarantine(path, QuarantineList(FINGERPRINTS, (entry(),)))
    monkeypatch.setattr(quarantine, "_MAX_BYTES", path.stat().st_size - 1)
    with pytest.raises(DataError, match="more than"):
        read_quarantine(path)
    monkeypatch.setattr(quarantine, "_MAX_BYTES", path.stat().st_size)
    read_quarantine(path)


def test_a_mutated_file_is_refused_or_a_list(tmp_path: Path) -> None:
    path, rng = tmp_path / "list.json", random.Random(5)
    good = json.dumps(GOOD, ensure_ascii=False).encode()
    refusals = []
    for _ in range(3000):
        content = bytearray(good)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(content))
            match rng.randrange(3):
                case 0:
                    content[at] = rng.randrange(256)
                case 1:
                    del content[at : at + rng.randrange(1, 30)]
                case 2:
                    content[at:at] = content[rng.randrange(len(content)) :][:20]
        path.write_bytes(content)
        try:
            read = read_quarantine(path)
        except DataError as error:
            refusals.append(str(error))
        else:
            path.write_text(read.text(), "utf-8")
            assert read_quarantine(path) == read
    assert all(str(path) in refusal for refusal in refusals)
    assert 1500 < len(refusals) < 3000


def test_a_write_that_fails_leaves_the_old_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "list.json"
    write_quarantine(path, QuarantineList(FINGERPRINTS, (entry(),)))
    before = path.read_bytes()

    def no_room(_path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quarantine, "flush_to_disk", no_room)
    with pytest.raises(DataError, match="No space left"):
        write_quarantine(path, QuarantineList(FINGERPRINTS, ()))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["list.json"]


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]]) -> Path:
    """Documents of sequences of so many tokens; the tokens are counted through."""
    lengths = [length for document in documents for length in document]
    pointers = list(itertools.accumulate((2 * length for length in lengths), initial=0))[:-1]
    bounds = list(itertools.accumulate(map(len, documents), initial=0))
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, 8, len(lengths), len(bounds))
    body = np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(head + body + np.array(bounds, "<i8").tobytes())
    Path(f"{prefix}.bin").write_bytes(np.arange(sum(lengths), dtype="<u2").tobytes())
    return prefix


documents_of_sequences = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), max_size=5)


@settings(deadline=None)
@given(documents_of_sequences.filter(bool), st.data())
def test_spans_are_the_tokens_meant(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], data: st.DataObject
) -> None:
    prefix = write_dataset(tmp_path_factory.mktemp("data") / "web", documents)
    some, meant = [], set()
    for _ in range(data.draw(st.integers(0, 5))):
        document = data.draw(st.integers(0, len(documents) - 1))
        tokens = sum(documents[document])
        start = data.draw(st.integers(0, tokens - 1))
        end = data.draw(st.none() | st.integers(start + 1, tokens))
        some.append(entry(document, start, end))
        first = sum(map(sum, documents[:document]))
        meant |= set(range(first + start, first + (tokens if end is None else end)))

    with IndexedFile(prefix) as indexed:
        spans = spans_by_sequence(some, indexed)
        # The tokens are counted through, so that each says where it lies.
        found = [
            int(token)
            for sequence, ranges in spans.items()
            for start, end in ranges
            for token in indexed.read(sequence, int(start), int(end - start))
        ]
    assert len(found) == len(set(found)), "spans of a sequence are disjoint"
    assert set(found) == meant
    for ranges in spans.values():
        assert ranges.dtype == np.int64
        assert (ranges[:, 0] < ranges[:, 1]).all()
        assert (ranges[1:, 0] > ranges[:-1, 1]).all()


@pytest.mark.parametrize(
    "wrong", [entry(2), entry(1, 9), entry(1, 8, 10), entry(0, 5, 7), entry(0, 2**62)]
)
def test_a_span_outside_the_dataset_is_named(tmp_path: Path, wrong: QuarantineEntry) -> None:
    prefix = write_dataset(tmp_path / "web", [[6], [4, 5]])
    with IndexedFile(prefix) as indexed:
        spans_by_sequence([entry(1, 8, 9), entry(1, 8), entry(0, 5, 6)], indexed)
        with pytest.raises(DataError, match=f"document {wrong.document} of web"):
            spans_by_sequence([wrong], indexed)


def test_another_content_is_refused_and_a_copy_is_not(tmp_path: Path) -> None:
    prefix = str(write_dataset(tmp_path / "web", [[6], [4, 5]]))
    with IndexedFile(prefix) as indexed:
        fingerprints = {prefix: indexed.fingerprint()}
    some = (dataclasses.replace(entry(1, 3, 6), dataset=prefix),)
    for name in ("one", "two"):
        write_quarantine(tmp_path / name, QuarantineList(fingerprints, some))
    assert quarantined_spans(Namespace(quarantine=None)) == {}

    os.utime(f"{prefix}.bin", (1, 1))
    spans = quarantined_spans(Namespace(quarantine=str(tmp_path / "one")))[prefix]
    assert {k: v.tolist() for k, v in spans.items()} == {1: [[3, 4]], 2: [[0, 2]]}

    Path(f"{prefix}.bin").write_bytes(b"\1" * 30)
    with pytest.raises(DataError, match=f"{prefix}.bin"):
        quarantined_spans(Namespace(quarantine=str(tmp_path / "two")))


def test_iterations_to_skip() -> None:
    visits = {1: [(5, 0), (9, 3)], 2: [(5, 0), (5, 1)], 3: []}
    skipped = iterations_to_skip(
        [entry(1), entry(2), entry(3)],
        visits_of=lambda one: visits[one.document],
        batch_size_of=lambda iteration: 10 * iteration,
    )
    assert skipped == (SkippedIteration(5, 2, 48), SkippedIteration(9, 1, 89))
    assert skip_words(skipped) == ["--iterations-to-skip", "5", "9"]
    assert skip_words(()) == []
