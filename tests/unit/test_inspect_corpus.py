"""A training split, held against upstream's builder: samples, documents, tokens, and back."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.upstream_data import build_upstream, upstream_spans, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data.sidecar import ROW_DTYPE, write_sidecar
from flagscale.data.sources import SourceStamp
from flagscale.data_inspect.arguments import Blend, DataArguments
from flagscale.data_inspect.corpus import TrainingCorpus, batch_tokens
from flagscale.errors import DataError

DOCUMENTS = st.lists(
    st.lists(st.sampled_from([0, 1, 1, 2, 3, 9, 30]), max_size=3), max_size=15
).map(lambda documents: [*documents, [9], [5], [0, 7], [4]])


def arguments(
    prefixes: list[Path],
    weights: list[float] | None,
    *,
    split: str | None = "100",
    seed: int = 7,
    seq_length: int = 8,
    cache: Path | None = None,
    surplus: float = 0.005,
) -> DataArguments:
    return DataArguments(
        blend=Blend(tuple(map(str, prefixes)), None if weights is None else tuple(weights)),
        split=split,
        seed=seed,
        seq_length=seq_length,
        train_samples=None,
        train_iters=1,
        global_batch_size=1,
        micro_batch_size=1,
        dp_size=1,
        mid_level_dataset_surplus=surplus,
        data_cache_path=None if cache is None else str(cache),
    )


def build(args: DataArguments, num_samples: int) -> Any:
    return build_upstream(
        (
            list(args.blend.prefixes),
            None if args.blend.weights is None else list(args.blend.weights),
        ),
        num_samples,
        split=args.split,
        seed=args.seed,
        seq_length=args.seq_length,
        cache=None if args.data_cache_path is None else Path(args.data_cache_path),
        surplus=args.mid_level_dataset_surplus,
    )


@settings(max_examples=20, deadline=None)
@given(
    corpora=st.lists(DOCUMENTS, min_size=1, max_size=3),
    weights=st.none() | st.lists(st.sampled_from([0.2, 1.0, 2.5, 7.0]), min_size=3, max_size=3),
    split=st.sampled_from(["100", "80,20", None]),
    seq_length=st.sampled_from([2, 5, 8]),
    share=st.floats(0.05, 3.5),
    seed=st.integers(1, 99999),
    shared_cache=st.booleans(),
)
def test_every_sample_is_upstreams(
    corpora: list[list[list[int]]],
    weights: list[float] | None,
    split: str | None,
    seq_length: int,
    share: float,
    seed: int,
    shared_cache: bool,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefixes = [Path(folder) / f"text{number}" for number in range(len(corpora))]
        for number, (prefix, documents) in enumerate(zip(prefixes, corpora, strict=True)):
            write_documents(prefix, documents, seed=number)
        args = arguments(
            prefixes,
            None if weights is None else weights[: len(corpora)],
            split=split,
            seed=seed,
            seq_length=seq_length,
            cache=Path(folder) / "cache" if shared_cache else None,
            surplus=0.5,
        )
        tokens = sum(sum(map(sum, documents)) for documents in corpora)
        wanted = max(len(corpora), int(share * tokens / seq_length))
        try:
            upstream = build(args, wanted)
        except (IndexError, AssertionError):
            # A blend that oversamples, or a dataset without a whole sample.
            return
        for use_caches in (True, False):
            with TrainingCorpus.open(args, wanted, use_caches=use_caches) as corpus:
                _compare(corpus, upstream)
                cached = [text for text in corpus.assumptions() if "from the cache" in text]
                expected = len(corpora) + (shared_cache and hasattr(upstream, "datasets"))
                assert len(cached) == (expected if use_caches else 0)


def _compare(corpus: TrainingCorpus, upstream: Any) -> None:
    assert corpus.size == len(upstream)
    datasets, samples = corpus.locate(np.arange(len(upstream)))
    if hasattr(upstream, "datasets"):
        assert datasets.tolist() == upstream.dataset_index.tolist()
        assert samples.tolist() == upstream.dataset_sample_index.tolist()
    drawn = corpus.tokens_of(datasets, samples)
    spans = corpus.documents_of(datasets, samples)
    tops: dict[tuple[int, int, int], set[int]] = {}
    for top, (ordinal, sample) in enumerate(zip(datasets.tolist(), samples.tolist(), strict=True)):
        mid = upstream.datasets[ordinal] if hasattr(upstream, "datasets") else upstream
        text, parts = upstream_spans(mid, sample)
        assert drawn[top].tolist() == text.tolist()
        batch = upstream[top]
        reached = np.append(batch["tokens"].numpy(), batch["labels"][-1].item())
        assert batch_tokens(drawn[top], mid._pad_token_id).tolist() == reached.tolist()
        assert [(s.sequence, s.token_end - s.token_start) for s in spans[top]] == parts
        _compare_places(mid.dataset, spans[top], drawn[top])
        for span in spans[top]:
            tops.setdefault((ordinal, span.document, span.token_start), set()).add(top)
    for (ordinal, document, token), expected in list(tops.items())[:: max(1, len(tops) // 20)]:
        found = corpus.indices_of(ordinal, corpus.find(ordinal, document, token, token + 1))
        assert expected <= set(found.tolist())
        holding = _holding(spans, datasets, ordinal, document, token)
        assert found.tolist() == holding


def _holding(spans: Any, datasets: Any, ordinal: int, document: int, token: int) -> list[int]:
    return [
        top
        for top, parts in enumerate(spans)
        if datasets[top] == ordinal
        and any(p.document == document and p.token_start <= token < p.token_end for p in parts)
    ]


def _compare_places(low: Any, spans: Any, tokens: np.ndarray) -> None:
    """Document, token and byte of each span, looked up in what upstream has in memory."""
    data = np.fromfile(f"{low.path_prefix}.bin", low.index.dtype)
    for span in spans:
        size = span.token_end - span.token_start
        first = low.document_indices[span.document]
        assert first <= span.sequence < low.document_indices[span.document + 1]
        begin = int(low.sequence_lengths[:first].sum()) + span.token_start
        assert span.byte_offset == begin * data.itemsize
        expected = tokens[span.sample_start : span.sample_start + size]
        assert data[begin : begin + size].tolist() == expected.tolist()


@pytest.fixture
def two(tmp_path: Path) -> DataArguments:
    """Two datasets, blended, with caches."""
    rng = np.random.default_rng(0)
    for name in "ab":
        lengths = [[int(size)] for size in rng.integers(1, 40, 60)]
        write_documents(tmp_path / name, lengths, seed=ord(name))
    args = arguments([tmp_path / "a", tmp_path / "b"], [0.3, 0.7], cache=tmp_path / "cache")
    build(args, 300)
    return args


def test_a_ledger_names_the_caches(two: DataArguments) -> None:
    folder = Path(str(two.data_cache_path))
    names = {
        json.loads(path.read_text())["dataset_path"]: path.name.split("-")[0]
        for path in folder.glob("*-GPTDataset-train-description.txt")
    }
    hashes = [names[prefix] for prefix in two.blend.prefixes]
    (blend,) = (path.name.split("-")[0] for path in folder.glob("*-Blended*-description.txt"))
    for path in folder.glob("*-description.txt"):
        path.unlink()
    with TrainingCorpus.open(two, 300, hashes=hashes, blend_hash=blend) as corpus:
        corpus.tokens_of(*corpus.locate(np.arange(300)))
        assert all("ledger names" in text for text in corpus.assumptions())
        assert len(corpus.assumptions()) == 3
        corpus.verify()


def test_a_cache_of_a_dataset_since_rewritten(two: DataArguments) -> None:
    write_documents(Path(two.blend.prefixes[0]), [[3]] * 61)
    with (
        TrainingCorpus.open(two, 300) as corpus,
        pytest.raises(DataError, match="not of this dataset as it is now"),
    ):
        corpus.dataset(0)


def test_a_cache_of_a_dataset_rewritten_to_the_same_size(two: DataArguments) -> None:
    """Same number of sequences and tokens, other lengths: seen sample by sample, too."""
    prefix = two.blend.prefixes[0]
    lengths = np.diff(np.fromfile(f"{prefix}.idx", "<i8", 61, offset=34 + 12 * 60))
    assert lengths.tolist() == [1] * 60
    tokens = np.fromfile(f"{prefix}.idx", "<i4", 60, offset=34).tolist()
    write_documents(Path(prefix), [[size] for size in reversed(tokens)])
    with TrainingCorpus.open(two, 300) as corpus, pytest.raises(DataError, match="damaged"):
        corpus.dataset(0)


def test_a_large_cache_is_held_against_the_lengths(
    two: DataArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flagscale.data_inspect.dataset.PROVE_BELOW", 0)
    prefix = two.blend.prefixes[0]
    tokens = np.fromfile(f"{prefix}.idx", "<i4", 60, offset=34).tolist()
    write_documents(Path(prefix), [[size] for size in reversed(tokens)])
    with TrainingCorpus.open(two, 300) as corpus:
        with pytest.raises(DataError, match="does not fit its sequences"):
            corpus.dataset(0).tokens(np.arange(corpus.dataset(0).size))
        with pytest.raises(DataError, match="damaged"):
            corpus.verify()


def _retokenized(folder: Path) -> None:
    """A second cache of each dataset, for another tokenizer."""
    import hashlib

    for path in list(folder.glob("*-GPTDataset-train-description.txt")):
        text = path.read_text().replace("StubTokenizer", "Other")
        name = hashlib.md5(text.encode()).hexdigest()
        for part in folder.glob(f"{path.name.split('-')[0]}-*.npy"):
            shutil.copy(part, folder / f"{name}-{part.name.split('-', 1)[1]}")
        (folder / f"{name}-{path.name.split('-', 1)[1]}").write_text(text)


def test_two_caches_that_agree(two: DataArguments) -> None:
    _retokenized(Path(str(two.data_cache_path)))
    with TrainingCorpus.open(two, 300) as corpus:
        assert corpus.dataset(0).tokens([0]).shape == (1, 9)


def test_two_caches_that_differ(two: DataArguments) -> None:
    folder = Path(str(two.data_cache_path))
    _retokenized(folder)
    for path in folder.glob("*-GPTDataset-train-shuffle_index.npy"):
        shuffled = np.load(path)
        shuffled[:2] = shuffled[[1, 0]]
        np.save(path, shuffled)
        break
    with pytest.raises(DataError, match="two caches fit"), TrainingCorpus.open(two, 300) as corpus:
        corpus.tokens_of([0, 1], [0, 0])


def test_other_arguments_find_no_cache(two: DataArguments) -> None:
    from dataclasses import replace

    for changed in (replace(two, seed=8), replace(two, split="99,1"), replace(two, seq_length=9)):
        with TrainingCorpus.open(changed, 300) as corpus:
            corpus.tokens_of([0, 1], [0, 0])
            assert all("computed" in text for text in corpus.assumptions())


def test_a_missing_dataset(two: DataArguments) -> None:
    Path(f"{two.blend.prefixes[1]}.bin").unlink()
    with TrainingCorpus.open(two, 300) as corpus:
        corpus.dataset(0)
        with pytest.raises(DataError, match=r"cannot be opened"):
            corpus.dataset(1)


def test_beyond_the_end(two: DataArguments) -> None:
    with TrainingCorpus.open(two, 300) as corpus:
        for index in (-1, corpus.size):
            with pytest.raises(DataError, match="no such sample"):
                corpus.locate([index])
        for sample in (-1, corpus.dataset(0).size):
            with pytest.raises(DataError, match="no such sample"):
                corpus.documents(0, sample)
        with pytest.raises(DataError, match="no such dataset"):
            corpus.documents(2, 0)


def _write_rows(prefix: Path, documents: int) -> None:
    rows = np.zeros(documents, ROW_DTYPE)
    rows["line"] = np.arange(documents) * 10
    stamp = SourceStamp(str(prefix.parent / "source.jsonl"), 1, 1)
    staged = (Path(f"{prefix}.source.npy"), Path(f"{prefix}.source.json"))
    write_sidecar(staged, prefix, documents, [rows], [stamp], {})


def test_source_lines(two: DataArguments, tmp_path: Path) -> None:
    _write_rows(tmp_path / "a", 60)
    with TrainingCorpus.open(two, 300) as corpus:
        spans = corpus.documents(0, 0)
        for span in spans:
            assert span.source_file == str(tmp_path / "source.jsonl")
            assert span.source_line == 10 * span.document + 1
        assert corpus.documents(1, 0)[0].source_line is None
        assert corpus.problems() == []


def test_a_sidecar_of_another_dataset(two: DataArguments, tmp_path: Path) -> None:
    _write_rows(tmp_path / "a", 59)
    (tmp_path / "b.source.json").write_text("{}")
    with TrainingCorpus.open(two, 300) as corpus:
        assert corpus.documents(0, 0)[0].source_line is None
        assert corpus.documents(1, 0)[0].source_line is None
        assert "59 documents" in corpus.problems()[0]
        assert len(corpus.problems()) == 2


def test_a_sidecar_that_names_no_file(two: DataArguments, tmp_path: Path) -> None:
    _write_rows(tmp_path / "a", 60)
    rows = np.load(tmp_path / "a.source.npy")
    rows["file"] = 3
    np.save(tmp_path / "a.source.npy", rows)
    with TrainingCorpus.open(two, 300) as corpus, pytest.raises(DataError, match="sidecar"):
        corpus.documents(0, 0)


def test_the_datasets_one_document_of_several_sequences(tmp_path: Path) -> None:
    write_documents(tmp_path / "text", [[4, 0, 6, 5], [20]])
    args = arguments([tmp_path / "text"], None, split=None)
    with TrainingCorpus.open(args, 3) as corpus:
        spans = [span for sample in range(3) for span in corpus.documents(0, sample)]
        starts = {span.sequence: span.token_start for span in spans if span.token_start % 5 != 7}
        assert all(0 <= span.token_start < span.token_end <= 20 for span in spans)
        assert {span.sequence for span in spans if span.document == 0} == {0, 2, 3}
        assert starts[3] >= 10


def test_ten_thousand_files_are_not_too_many() -> None:
    import resource

    from flagscale.data_inspect import corpus

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(300, before[1]), before[1]))
        corpus._allow_open_files(500)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        assert soft == min(756, before[1])
        assert hard == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
