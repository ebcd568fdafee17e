"""Upstream's caches of two eras, and damage done to them."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.upstream_data import build_upstream, write_documents

from flagscale.data_inspect import cache_search, dataset
from flagscale.data_inspect import corpus as corpus_module
from flagscale.data_inspect.arguments import Blend, DataArguments
from flagscale.data_inspect.arrays import DiskArray
from flagscale.data_inspect.caches import CachedBlend, NpyFile
from flagscale.data_inspect.corpus import TrainingCorpus
from flagscale.errors import DataError

WEIGHTS = (0.3, 0.7)
SAMPLES = 120


@pytest.fixture
def run(tmp_path: Path) -> DataArguments:
    """Two blended datasets, one of them read three times, with today's caches."""
    rng = np.random.default_rng(1)
    for name, count in (("a", 40), ("b", 25)):
        write_documents(tmp_path / name, [[int(n)] for n in rng.integers(1, 30, count)])
    args = DataArguments(
        blend=Blend((str(tmp_path / "a"), str(tmp_path / "b")), WEIGHTS),
        split="95,5",
        seed=11,
        seq_length=8,
        train_samples=SAMPLES,
        train_iters=None,
        global_batch_size=4,
        micro_batch_size=1,
        dp_size=1,
        data_cache_path=str(tmp_path / "cache"),
    )
    _build(args)
    return args


def _build(args: DataArguments) -> Any:
    return build_upstream(
        (list(args.blend.prefixes), list(args.blend.weights or ())),
        SAMPLES,
        split=args.split,
        seed=args.seed,
        seq_length=args.seq_length,
        cache=Path(str(args.data_cache_path)),
    )


def _read_all(args: DataArguments) -> tuple[Any, ...]:
    """All that can be asked: places, tokens, documents, and the inverse of some."""
    with TrainingCorpus.open(args, SAMPLES) as corpus:
        datasets, samples = corpus.locate(np.arange(corpus.size))
        found = [corpus.find(which, document).tolist() for which in (0, 1) for document in range(9)]
        tops = [corpus.indices_of(1, [sample]).tolist() for sample in range(0, 80, 7)]
        return (
            datasets.tolist(),
            samples.tolist(),
            corpus.tokens_of(datasets, samples).tolist(),
            corpus.documents_of(datasets, samples),
            found,
            tops,
        )


def _mutate(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(8)
    place = rng.randrange(len(data))
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data + bytes(rng.randrange(1, 20))
    if kind == 2:
        return data[:place] + data[place + rng.randrange(1, 9) :]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 4])):
        changed[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(changed)


def _mutate_each(args: DataArguments, rounds: int, check: Callable[[], None]) -> int:
    """Damage each file of the cache in turn; how many times that was refused."""
    rng, refused = random.Random(5), 0
    for path in sorted(Path(str(args.data_cache_path)).glob("*-train-*")):
        whole = path.read_bytes()
        for _ in range(rounds):
            path.write_bytes(_mutate(rng, whole))
            try:
                check()
            except DataError:
                refused += 1
        path.write_bytes(whole)
    return refused


def test_damage_is_refused_or_does_not_matter(run: DataArguments) -> None:
    expected = _read_all(run)

    def check() -> None:
        assert _read_all(run) == expected

    assert _mutate_each(run, 7, check) > 25


def test_damage_to_a_large_cache_raises_only_our_error(
    run: DataArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "PROVE_BELOW", 0)
    monkeypatch.setattr(corpus_module, "PROVE_BELOW", 0)
    assert _mutate_each(run, 7, lambda: _read_all(run) and None) > 15


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("document_index", 39),  # is in the dataset, but in the validation split
        ("document_index", -1),
        ("document_index", 40),
        ("sample_index", 1 << 20),
        ("sample_index", -1),
        ("shuffle_index", 1 << 20),
    ],
)
def test_a_value_out_of_range_is_named(
    run: DataArguments, monkeypatch: pytest.MonkeyPatch, part: str, change: int
) -> None:
    monkeypatch.setattr(dataset, "PROVE_BELOW", 0)
    for path in Path(str(run.data_cache_path)).glob(f"*-{part}.npy"):
        values = np.load(path)
        values[len(values) // 2] = change
        np.save(path, values)
    with TrainingCorpus.open(run, SAMPLES) as corpus:
        samples = np.arange(corpus.dataset(0).size)
        with pytest.raises(DataError) as raised:
            corpus.tokens_of(np.zeros_like(samples), samples)
    assert raised.value.what.startswith("a cached order is damaged")
    assert part in str(raised.value.where)


def test_a_boundary_that_moved_by_a_token_is_seen(
    run: DataArguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset, "PROVE_BELOW", 0)
    with TrainingCorpus.open(run, SAMPLES) as corpus:
        position, offset = corpus.dataset(0).order.boundaries(np.arange(1, 20))
        piece = 1 + int(np.argmax(offset > 2))
        pieces = corpus.dataset(0).order.unshuffle(np.array([piece - 1, piece]))
    for path in Path(str(run.data_cache_path)).glob("*-sample_index.npy"):
        rows = np.load(path)
        if rows.ndim == 2 and tuple(rows[piece]) == (position[piece - 1], offset[piece - 1]):
            rows[piece, 1] -= 1
            np.save(path, rows)
    with TrainingCorpus.open(run, SAMPLES) as corpus:
        for sample in pieces.tolist():
            with pytest.raises(DataError, match="not as long as the others"):
                corpus.tokens(0, sample)


def test_a_changed_description_names_no_cache(run: DataArguments) -> None:
    for path in Path(str(run.data_cache_path)).glob("*-description.txt"):
        path.write_text(path.read_text().replace('"random_seed": 11', '"random_seed": 12'))
    with TrainingCorpus.open(replace(run, seed=12), SAMPLES) as corpus:
        corpus.tokens_of([0, 1], [0, 0])
        assert all("computed" in text for text in corpus.assumptions())


def test_damage_to_the_index_of_a_dataset(run: DataArguments) -> None:
    """Right tokens or none; where documents begin is said nowhere else."""
    expected = _read_all(run)
    path, rng = Path(f"{run.blend.prefixes[0]}.idx"), random.Random(6)
    whole = path.read_bytes()
    for _ in range(60):
        path.write_bytes(_mutate(rng, whole))
        try:
            found = _read_all(run)
        except DataError:
            continue
        assert found[:3] == expected[:3]


def _aquila_text(prefix: str, num_samples: int, args: DataArguments) -> str:
    return (
        f"GPT Dataset\n\nData prefix {prefix}\nDataset name train\n"
        f"Number of samples {num_samples}\nSequence length {args.seq_length}\n"
        f"Random seed {args.seed}\nSplit {args.split}\n"
    )


def _to_aquila(args: DataArguments, tmp_path: Path) -> Any:
    """Caches as the Aquila era laid them out; the orders are made by today's upstream."""
    plain = replace(
        args, mid_level_dataset_surplus=0.005, data_cache_path=str(tmp_path / "scratch")
    )
    sizes = [math.ceil(SAMPLES * weight * 1.005) for weight in WEIGHTS]
    descriptions = []
    mids = []
    for prefix, size in zip(args.blend.prefixes, sizes, strict=True):
        single = build_upstream(
            ([prefix], None), size, split=plain.split, seed=plain.seed,
            seq_length=plain.seq_length, cache=tmp_path / "scratch",
        )  # fmt: skip
        mids.append(single)
        descriptions.append(text := _aquila_text(prefix, size, args))
        base = Path(prefix).parent / "index-cache" / hashlib.md5(text.encode()).hexdigest()
        base.parent.mkdir(exist_ok=True)
        base.with_suffix(".dsc").write_text(text)
        np.save(f"{base}_doc_idx.npy", single.document_index)
        np.save(f"{base}_sample_idx.npy", single.sample_index)
        np.save(f"{base}_shuffle_idx.npy", single.shuffle_index)
    blend = "Blendable dataset\n\nDatasets:\n" + "".join(f"{text}\n\n" for text in descriptions)
    blend += f"Weights: {np.array(WEIGHTS)}\nSize: {sum(sizes)}\n"
    return mids, sizes, blend


def test_caches_of_the_aquila_era(run: DataArguments, tmp_path: Path) -> None:
    # Nothing of today's was there then.
    for path in Path(str(run.data_cache_path)).iterdir():
        path.unlink()
    mids, sizes, text = _to_aquila(run, tmp_path)
    base = Path(str(run.data_cache_path)) / hashlib.md5(text.encode()).hexdigest()
    order = np.zeros(sum(sizes), np.int16)
    inner = np.zeros(sum(sizes), np.int64)
    from megatron.core.datasets import helpers

    helpers.build_blending_indices(order, inner, list(WEIGHTS), 2, sum(sizes), False)
    np.save(f"{base}_index.npy", order.astype(np.uint8))
    np.save(f"{base}_sample_index.npy", inner)
    with TrainingCorpus.open(run, SAMPLES) as corpus:
        assert corpus.size == sum(sizes)
        datasets, samples = corpus.locate(np.arange(corpus.size))
        assert datasets.tolist() == order.tolist()
        assert samples.tolist() == inner.tolist()
        drawn = corpus.tokens_of(datasets, samples)
        for top in range(corpus.size):
            text, *_ = mids[order[top]]._query_document_sample_shuffle_indices(int(inner[top]))
            assert drawn[top].tolist() == text.tolist()
        assert all("from the cache" in text for text in corpus.assumptions())
        assert "index-cache" in corpus.assumptions()[1]


def test_caches_of_both_eras(run: DataArguments, tmp_path: Path) -> None:
    _to_aquila(run, tmp_path)
    with TrainingCorpus.open(run, SAMPLES) as corpus:
        corpus.tokens_of([0, 1], [0, 0])
        assert "index-cache" not in "".join(corpus.assumptions())
    path = next((tmp_path / "index-cache").glob("*_shuffle_idx.npy"))
    shuffled = np.load(path)
    np.save(path, shuffled[::-1])
    with pytest.raises(DataError, match="two caches fit"):
        TrainingCorpus.open(run, SAMPLES)


@pytest.mark.parametrize(
    ("split", "expected"),
    [("969,30,1", (0, 969)), ("969/30/1", (0, 969)), ("1", (0, 1000)), (None, (0, 1000))],
)
def test_aquila_split(split: str | None, expected: tuple[int, int]) -> None:
    assert cache_search.aquila_split_range(split, 1000) == expected


def test_aquila_split_gives_back_what_rounding_left_over() -> None:
    assert cache_search.aquila_split_range("1,1,1", 5) == (0, 2 - 1)


@pytest.mark.parametrize("shape", [(7,), (7, 2), (0,), (0, 2)])
@pytest.mark.parametrize("dtype", ["<i4", "<i8", "<u4", "<i2", "|u1"])
def test_npy_headers_are_numpys(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    expected = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    np.save(tmp_path / "a.npy", expected)
    file = NpyFile(tmp_path / "a.npy", shape[1] if shape[1:] else None, [dtype])
    assert file.array.read(0, shape[0]).tolist() == expected.tolist()
    file.close()


@pytest.mark.parametrize(
    "array",
    [np.zeros(3), np.zeros((3, 2), np.int32), np.zeros(3, ">i4"), np.zeros(3, np.int16),
     np.zeros((3, 2), np.int32, order="F"), np.array([{}], object)],
)  # fmt: skip
def test_npy_of_another_kind(tmp_path: Path, array: np.ndarray) -> None:
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    with pytest.raises(DataError, match="another kind"):
        NpyFile(tmp_path / "a.npy", None, ["<i4"])


def test_scattered_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    expected = np.random.default_rng(0).integers(0, 1000, (200_000, 2))
    np.save(tmp_path / "a.npy", expected)
    file = NpyFile(tmp_path / "a.npy", 2, ["<i8"])
    array: DiskArray = file.array
    rows = np.random.default_rng(1).integers(0, 200_000, 3000)
    assert np.array_equal(array.take(rows), expected[rows])
    assert np.array_equal(array.take(np.arange(150_000)), expected[:150_000])
    assert array.take([]).shape == (0, 2)
    for row in (-1, 200_000):
        with pytest.raises(DataError, match="outside an array"):
            array.take([5, row])
    file.close()


def test_a_blend_whose_datasets_were_swapped_is_seen(tmp_path: Path) -> None:
    order = np.array([0, 1, 1, 1, 0] * 2000, np.int16)
    inner = np.zeros(len(order), np.int64)
    for which in (0, 1):
        inner[order == which] = np.arange((order == which).sum())
    paths = (tmp_path / "d.npy", tmp_path / "s.npy")
    np.save(paths[0], order)
    np.save(paths[1], inner)
    with CachedBlend(paths, (0.4, 0.6), len(order)) as blend:
        assert blend.locate(np.arange(len(order)))[0].tolist() == order.tolist()
        assert blend.find(1, np.array([0, 7, 5999])).tolist() == [
            np.flatnonzero((order == 1) & (inner == sample)).item() for sample in (0, 7, 5999)
        ]
    order[5000] = 1 - order[5000]
    np.save(paths[0], order)
    with CachedBlend(paths, (0.4, 0.6), len(order)) as blend:
        with pytest.raises(DataError, match="damaged"):
            blend.locate(np.arange(4990, 5010))
        with pytest.raises(DataError, match="damaged"):
            blend.find(1 - order[5000], inner[5000:5001])
