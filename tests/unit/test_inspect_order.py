"""A dataset's order, held against upstream's own."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.upstream_data import build_upstream, upstream_spans, write_documents
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.order import (
    BuiltOrder,
    build_order,
    plan_order,
    samples_of,
    spans_of,
    split_matrix,
    split_range,
)
from flagscale.errors import ConfigError, DataError

LENGTHS = st.sampled_from([0, 0, 1, 1, 2, 3, 5, 17, 40])
DOCUMENTS = st.lists(st.lists(LENGTHS, max_size=3), max_size=30).map(
    # Upstream never ends at a validation split without tokens.
    lambda documents: [*documents, [3], [5], [0, 7], [4]]
)
SPLITS = st.sampled_from(["1", "100", "969,30,1", "80,20", "8,1,1", None])
Owners = dict[tuple[int, int], set[int]]


@settings(max_examples=40, deadline=None)
@given(
    documents=DOCUMENTS,
    split=SPLITS,
    seq_length=st.sampled_from([2, 3, 8, 16]),
    share=st.floats(0.01, 4.5),
    seed=st.integers(1, 2**31),
    dtype=st.sampled_from([np.int32, np.uint16]),
)
def test_order_is_upstreams(
    documents: list[list[int]],
    split: str | None,
    seq_length: int,
    share: float,
    seed: int,
    dtype: type,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "text"
        write_documents(prefix, documents, dtype)
        with IndexedFile(prefix) as index:
            first, last = split_range(split, index.num_sequences)
            lengths = index.lengths(first, last)
            tokens = int(lengths.sum())
            if tokens < 2 or not _others_have_tokens(index, split):
                return
            wanted = max(1, int(share * tokens / seq_length))
            upstream = build_upstream(
                ([str(prefix)], None),
                wanted,
                split=split,
                seed=seed,
                seq_length=seq_length,
                cache=Path(folder) / "cache",
            )
            plan = plan_order(tokens, wanted, seq_length)
            order = build_order(lengths, first, last, plan, seed, seq_length=seq_length)
            np.testing.assert_array_equal(order.document_index, upstream.document_index)
            np.testing.assert_array_equal(order.shuffle_index, upstream.shuffle_index)
            assert order.document_index.dtype == upstream.document_index.dtype
            assert order.shuffle_index.dtype == upstream.shuffle_index.dtype
            owners = _compare_samples(index, order, upstream)
            _compare_inverse(index, order, owners)


def _others_have_tokens(index: IndexedFile, split: str | None) -> bool:
    matrix = split_matrix(split)
    if matrix is None:
        return True
    others = [which for which, share in zip(("valid", "test"), matrix[1:], strict=True) if share]
    return all(index.tokens_in(*split_range(split, index.num_sequences, one)) for one in others)


def _compare_samples(index: IndexedFile, order: BuiltOrder, upstream: Any) -> Owners:
    """Also: which samples hold each token of each sequence."""
    assert order.num_samples == len(upstream)
    spans = spans_of(order, np.arange(len(upstream)), index.extents_of, index.prefix)
    owners: Owners = {}
    for sample in range(len(upstream)):
        mine = spans.sample == sample
        columns = (spans.sequence[mine], spans.offset[mine], spans.length[mine])
        parts = list(zip(*(column.tolist() for column in columns), strict=True))
        text, expected = upstream_spans(upstream, sample)
        assert [(sequence, length) for sequence, _, length in parts] == expected
        assert np.concatenate([index.read(*part) for part in parts]).tolist() == text.tolist()
        assert spans.start[mine].tolist() == np.cumsum([0, *(p[2] for p in parts)])[:-1].tolist()
        for sequence, offset, length in parts:
            for token in range(offset, offset + length):
                owners.setdefault((sequence, token), set()).add(sample)
    return owners


def _compare_inverse(index: IndexedFile, order: BuiltOrder, owners: Owners) -> None:
    for document in range(index.num_documents):
        first, stop = index.sequences_of(document)
        tokens = [(s, t) for s in range(first, stop) for t in range(index.length(s))]
        size = len(tokens)
        for begin, end in {(0, size), (0, 1), (size // 2, size // 2 + 1), (size // 3, size)}:
            expected = set().union(*(owners.get(token, set()) for token in tokens[begin:end]))
            found = samples_of(order, (first, stop), index.lengths_of, (begin, end))
            assert found.tolist() == sorted(expected)


@pytest.mark.parametrize("last_share", [0.79, 0.80, 0.81])
def test_last_epoch_is_separate_below_four_fifths(last_share: float) -> None:
    plan = plan_order(1001, int((2 + last_share) * 100), 10)
    assert plan.num_epochs == 3
    assert plan.separate_final_epoch == (last_share < 0.8)


def test_one_epoch_when_nothing_is_asked_for() -> None:
    assert plan_order(101, None, 10).num_samples_total == 10


def test_without_the_extra_token_a_piece_may_end_with_the_stream() -> None:
    lengths = np.array([4, 0, 4], np.int32)
    plan = plan_order(8, 2, 4, 0)
    order = build_order(lengths, 0, 3, plan, 1, seq_length=4, add_extra=0)
    spans = spans_of(order, [0, 1], lambda which: (lengths[which].astype(np.int64), which), "text")
    assert spans.length.tolist() == [4, 4]
    assert sorted(spans.sequence.tolist()) == [0, 2]


def test_no_tokens() -> None:
    with pytest.raises(DataError, match="no tokens"):
        plan_order(0, 5, 8)


@pytest.mark.parametrize("wanted", [2**32, 2**50])
def test_more_than_is_shuffled_in_memory(wanted: int) -> None:
    with pytest.raises(DataError, match="too large to be made again"):
        build_order(np.full(4, 4, np.int32), 0, 4, plan_order(16, wanted, 5), 1, seq_length=5)


@pytest.mark.parametrize("sample", [-1, 3])
def test_no_such_sample(sample: int) -> None:
    lengths = np.full(4, 4, np.int32)
    order = build_order(lengths, 0, 4, plan_order(16, 3, 5), 1, seq_length=5)
    with pytest.raises(DataError, match="no such sample"):
        spans_of(order, [sample], lambda which: (lengths[which].astype(np.int64), which), "text")


@pytest.mark.parametrize("split", ["", "a,b", "1,1,1,1", "0,0,0", "1..2", "."])
def test_split_that_is_none(split: str) -> None:
    with pytest.raises(ConfigError):
        split_range(split, 10)


def test_split_without_training() -> None:
    with pytest.raises(ConfigError, match="nothing for train"):
        split_range("0,1", 10)


@given(
    shares=st.lists(st.integers(0, 10**6), min_size=1, max_size=3).filter(any),
    number=st.integers(0, 10**10),
)
def test_split_is_upstreams(shares: list[int], number: int) -> None:
    from megatron.core.datasets import blended_megatron_dataset_config as upstream

    text = ",".join(str(share / 1000) for share in shares)
    vector = upstream.parse_and_normalize_split(text)
    expected = upstream.convert_split_vector_to_split_matrix(vector)
    assert split_matrix(text) == expected
    if expected[0] is not None:
        begin, end = (round(share * float(number)) for share in expected[0])
        assert split_range(text, number) == (begin, end)
