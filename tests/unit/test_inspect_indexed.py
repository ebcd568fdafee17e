"""The reader of .idx and .bin, held against upstream's, and against damage."""

from __future__ import annotations

import json
import os
import random
import tempfile
from pathlib import Path

import numpy as np
import pytest
from harness.upstream_data import write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect import indexed
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.errors import DataError

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=40)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_documents(tmp_path / "text", [[5], [2, 0, 3], [], [7], [1, 1]])
    return tmp_path / "text"


@settings(max_examples=40, deadline=None)
@given(DOCUMENTS, st.sampled_from([np.uint8, np.int16, np.int32, np.int64, np.uint16]))
def test_reads_what_upstream_reads(documents: list[list[int]], dtype: type) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    if not sum(map(sum, documents)):
        return
    with tempfile.TemporaryDirectory() as folder:
        write_documents(Path(folder) / "text", documents, dtype)
        upstream = IndexedDataset(f"{folder}/text", mmap=False)
        bounds = upstream.document_indices
        with IndexedFile(f"{folder}/text") as index:
            assert (index.num_sequences, index.num_documents) == (len(upstream), len(bounds) - 1)
            assert index.lengths().tolist() == upstream.sequence_lengths.tolist()
            numbers = np.arange(len(upstream))
            assert index.lengths_of(numbers).tolist() == upstream.sequence_lengths.tolist()
            owners = np.searchsorted(bounds, numbers, "right") - 1
            assert index.documents_of(numbers).tolist() == owners.tolist()
            for sequence in numbers.tolist():
                tokens = index.read(sequence)
                assert tokens.dtype == upstream.index.dtype
                assert tokens.tolist() == upstream.get(sequence).tolist()
                half = len(tokens) // 2
                assert index.read(sequence, half).tolist() == tokens[half:].tolist()
                assert index.read(sequence, 0, half).tolist() == tokens[:half].tolist()
                place = index.byte_offset(sequence, half)
                data = Path(f"{folder}/text.bin").read_bytes()[place:]
                assert np.frombuffer(data, tokens.dtype)[: len(tokens) - half].tolist() == (
                    tokens[half:].tolist()
                )
            for document in range(index.num_documents):
                assert index.sequences_of(document) == tuple(bounds[document : document + 2])


@pytest.mark.parametrize("shape", ["one", "many", "few", "bent"])
def test_documents_among_many(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Small pages, so that the search has to close in.
    monkeypatch.setattr(indexed, "SEARCH_ROWS", 8)
    rng = random.Random(3)
    sizes = {
        "one": [1] * 3000,
        "many": [rng.choice([0, 1, 1, 2, 30]) for _ in range(3000)],
        "few": [1000, 0, 0, 1, 900],
        "bent": [0] * 1000 + [1] * 1000 + [0] * 1000 + [40] * 50,
    }[shape]
    write_documents(tmp_path / "text", [[1] * size for size in sizes])
    with IndexedFile(tmp_path / "text") as index:
        expected = np.repeat(np.arange(len(sizes)), sizes)
        numbers = np.arange(index.num_sequences)
        np.random.default_rng(0).shuffle(numbers)
        assert index.documents_of(numbers).tolist() == expected[numbers].tolist()


@pytest.mark.parametrize(("offset", "length"), [(0, 6), (6, 0), (-1, 1), (2, -1), (3, 3)])
def test_beyond_a_sequence(prefix: Path, offset: int, length: int) -> None:
    with IndexedFile(prefix) as index, pytest.raises(DataError, match="shorter than what"):
        index.read(0, offset, length)


def test_no_such_things(prefix: Path) -> None:
    with IndexedFile(prefix) as index:
        for sequence in (-1, 7):
            for look in (index.length, index.document_of, index.read):
                with pytest.raises(DataError):
                    look(sequence)
        for document in (-1, 5):
            with pytest.raises(DataError):
                index.sequences_of(document)


@pytest.mark.parametrize("ending", ["idx", "bin"])
def test_missing(prefix: Path, ending: str) -> None:
    os.remove(f"{prefix}.{ending}")
    with pytest.raises(DataError, match="cannot be opened"):
        IndexedFile(prefix)


@pytest.mark.parametrize("ending", ["idx", "bin"])
def test_cut_short(prefix: Path, ending: str) -> None:
    whole = Path(f"{prefix}.{ending}").read_bytes()
    for size in range(len(whole)):
        Path(f"{prefix}.{ending}").write_bytes(whole[:size])
        with pytest.raises(DataError):
            IndexedFile(prefix)


def test_cut_while_open(prefix: Path) -> None:
    with IndexedFile(prefix) as index:
        os.truncate(f"{prefix}.bin", 4)
        with pytest.raises(DataError, match="ends too early"):
            index.read(5)


@pytest.mark.parametrize("code", [0, 6, 7, 9, 255])
def test_token_type_that_is_none(prefix: Path, code: int) -> None:
    data = bytearray(Path(f"{prefix}.idx").read_bytes())
    data[17] = code
    Path(f"{prefix}.idx").write_bytes(data)
    with pytest.raises(DataError, match="not whole numbers"):
        IndexedFile(prefix)


def test_every_changed_byte_is_seen_or_does_not_matter(prefix: Path) -> None:
    """Up to the document bounds: those say where documents begin, and nothing else does."""
    path = Path(f"{prefix}.idx")
    whole = path.read_bytes()
    with IndexedFile(prefix) as index:
        numbers = np.arange(index.num_sequences)
        expected = [index.read(sequence).tolist() for sequence in numbers]
        bounds = 34 + 12 * index.num_sequences
    for place in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            try:
                with IndexedFile(prefix) as index:
                    lengths = index.lengths()
                    found = [index.read(sequence).tolist() for sequence in numbers]
                    assert (
                        index.documents_of(numbers).max() < index.num_documents or place >= bounds
                    )
            except DataError:
                continue
            assert found == expected
            assert lengths.tolist() == list(map(len, expected))


def test_three_thousand_damaged_indices_raise_only_our_error(prefix: Path) -> None:
    path, rng = Path(f"{prefix}.idx"), random.Random(1)
    whole = path.read_bytes()
    for _ in range(3000):
        place, end = sorted(rng.choices(range(len(whole) + 1), k=2))
        filling = rng.randbytes(rng.choice([0, 1, end - place, end - place]))
        path.write_bytes(
            whole[:place] + filling + whole[min(end, place + rng.choice([1, 8, 99])) :]
        )
        try:
            with IndexedFile(prefix) as index:
                numbers = np.arange(index.num_sequences)
                index.documents_of(numbers)
                index.lengths()
                for number in numbers.tolist():
                    index.read(number)
                for document in range(index.num_documents):
                    index.sequences_of(document)
        except DataError:
            pass


def test_bytes_behind_the_last_sequence_are_named_when_read(prefix: Path) -> None:
    with Path(f"{prefix}.bin").open("ab") as stream:
        stream.write(b"1234")
    with IndexedFile(prefix) as index:
        assert index.read(0).size == 5
        with pytest.raises(DataError, match="does not fit its tokens"):
            index.read(6)


def test_fingerprint_of_a_large_file_is_sampled(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [[4000]] * 40)
    with IndexedFile(tmp_path / "text") as index:
        recorded = json.loads(json.dumps(index.fingerprint()))
        assert index.verify_fingerprint(recorded) == []
        for place in (0, 320_000 - 1, 320_000 // 2):
            _flip(tmp_path / "text.bin", min(place, 4000 * 40 * 2 - 1))
            (change,) = index.verify_fingerprint(recorded)
            assert change.kind == "changed" or place == 320_000 // 2
            _flip(tmp_path / "text.bin", min(place, 4000 * 40 * 2 - 1))


def _flip(path: Path, place: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 1]))


def test_rewritten_and_touched_files_are_told_apart(prefix: Path) -> None:
    with IndexedFile(prefix) as index:
        recorded = index.fingerprint()
    os.utime(f"{prefix}.idx", ns=(1, 1))
    write_documents(prefix.with_name("other"), [[5], [2, 0, 3], [], [7], [1, 1]], seed=9)
    os.replace(f"{prefix.with_name('other')}.bin", f"{prefix}.bin")
    with IndexedFile(prefix) as index:
        changes = index.verify_fingerprint(recorded)
    assert [(Path(change.path).suffix, change.kind) for change in changes] == [
        (".idx", "touched"),
        (".bin", "changed"),
    ]
    assert "another time" in str(changes[0])
    assert "other content" in str(changes[1])


@pytest.mark.parametrize("record", [{}, {"idx": {}}, {"idx": 3, "bin": 4}, [], "x"])
def test_fingerprint_that_is_none(prefix: Path, record: object) -> None:
    with IndexedFile(prefix) as index, pytest.raises(DataError, match="malformed"):
        index.verify_fingerprint(record)  # type: ignore[arg-type]
