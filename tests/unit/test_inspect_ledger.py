"""The ledger's format: what is written is read, and what is not whole is never taken for it."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from flagscale.data_inspect.ledger import (
    FORMAT,
    Ledger,
    RankFile,
    Row,
    encode_row,
    encode_segment,
    file_name,
)
from flagscale.errors import DataError

FEW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FINITE = st.floats(-(2.0**99), 2.0**99, width=32)
COUNT = st.integers(0, 2**32 - 1)
HALF = st.floats(0, 60000, width=16) | st.sampled_from([float("nan"), float("inf"), -1.0])


def segment(attempt: str = "a", **facts: Any) -> dict[str, Any]:
    plain = {
        "format": FORMAT,
        "attempt": attempt,
        "started": "2026-01-01T00:00:00+00:00",
        "dp_rank": 0,
        "dp_size": 1,
        "iteration": 0,
        "consumed_samples": 0,
        "pad_token_id": -1,
        "args": {},
        "argv": [],
        "versions": {},
        "datasets": [{"prefix": "data"}],
    }
    return {**plain, **facts}


def plain_row(iteration: int, samples: int = 4, loss: float | None = 2.5) -> Row:
    return Row(
        iteration=iteration,
        consumed_before=(iteration - 1) * samples,
        micro_batches=samples // 2,
        micro_batch_size=2,
        loss=loss,
        grad_norm=1.0,
        learning_rate=0.5,
        ids_crc=iteration,
        tokens_crc=2 * iteration,
        counted_tokens=64,
        quarantined_tokens=0,
        sample_losses=np.arange(samples, dtype=np.float32),
        block_losses=np.empty((samples, 0), np.float32),
    )


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """A file's rows: rising iterations, any sizes."""
    result = []
    for iteration in sorted(draw(st.sets(st.integers(1, 2**32 - 1), max_size=6))):
        micro_batches, size = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        samples, blocks = micro_batches * size, draw(st.integers(0, 3))
        losses = draw(st.lists(HALF, min_size=samples, max_size=samples))
        of_blocks = draw(st.lists(HALF, min_size=samples * blocks, max_size=samples * blocks))
        result.append(
            Row(
                iteration=iteration,
                consumed_before=draw(st.integers(0, 2**64 - 1)),
                micro_batches=micro_batches,
                micro_batch_size=size,
                loss=draw(st.none() | FINITE),
                grad_norm=draw(st.none() | FINITE),
                learning_rate=draw(st.none() | FINITE),
                ids_crc=draw(COUNT),
                tokens_crc=draw(COUNT),
                counted_tokens=draw(COUNT),
                quarantined_tokens=draw(COUNT),
                sample_losses=np.array(losses, np.float32),
                block_losses=np.array(of_blocks, np.float32).reshape(samples, blocks),
                skipped=draw(st.booleans()),
                nan=draw(st.booleans()),
                rerun=draw(st.booleans()),
            )
        )
    return result


def assert_same(left: Row, right: Row) -> None:
    for name, value in vars(left).items():
        np.testing.assert_array_equal(value, getattr(right, name), err_msg=name)


@FEW
@given(rows())
def test_what_is_written_is_read(tmp_path: Path, written: list[Row]) -> None:
    path = tmp_path / "file"
    path.write_bytes(encode_segment(segment()) + b"".join(map(encode_row, written)))
    file = RankFile(path)
    assert file.segment == segment()
    assert file.iterations == [row.iteration for row in written]
    assert file.torn_bytes == 0
    for expected, got in zip(written, file.rows(), strict=True):
        assert_same(expected, got)


def test_a_row_costs_2_kilobytes_at_1024_samples() -> None:
    row = encode_row(plain_row(1, samples=1024))
    assert len(row) == 56 + 2 * 1024


@FEW
@given(cut=st.integers(1, 5 * 64 - 1))
@example(cut=1)
def test_a_file_cut_anywhere_keeps_its_whole_rows(tmp_path: Path, cut: int) -> None:
    whole = [encode_row(plain_row(i)) for i in range(1, 6)]
    assert {len(record) for record in whole} == {64}
    path = tmp_path / "file"
    path.write_bytes((encode_segment(segment()) + b"".join(whole))[:-cut])
    file = RankFile(path)
    assert file.iterations == list(range(1, 6 - -(-cut // 64)))
    assert file.torn_bytes == -cut % 64
    assert [row.iteration for row in file.rows()] == file.iterations


def test_blocks_that_were_never_written_end_a_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(encode_segment(segment()) + encode_row(plain_row(1)) + bytes(4096))
    assert RankFile(path).iterations == [1]


def test_any_flipped_bit_is_our_error_or_loses_a_last_row(tmp_path: Path) -> None:
    written = [plain_row(i) for i in range(1, 4)]
    content = bytearray(encode_segment(segment()) + b"".join(map(encode_row, written)))
    path = tmp_path / "file"
    refused = 0
    for bit in range(8 * len(content)):
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        content[bit // 8] ^= 1 << bit % 8
        try:
            got = list(RankFile(path).rows())
        except DataError:
            refused += 1
            continue
        # Rows are as long as they say: only the last can look as if a kill had cut it.
        assert len(got) == 2
        for expected, row in zip(written, got, strict=False):
            assert_same(expected, row)
    assert refused > 8 * len(content) - 100


@pytest.mark.parametrize(
    "facts",
    [
        {"format": FORMAT + 1},
        {"attempt": 3},
        {"dp_rank": 1},
        {"args": None},
        {"iteration": -1},
        {"datasets": [{}]},
        {"pad_token_id": True},
    ],
)
def test_a_segment_that_makes_no_sense_is_refused(tmp_path: Path, facts: dict[str, Any]) -> None:
    path = tmp_path / "file"
    path.write_bytes(encode_segment(segment(**facts)))
    with pytest.raises(DataError, match="makes no sense"):
        RankFile(path)


def test_another_file_is_no_ledger(tmp_path: Path) -> None:
    for content in (b"{}", b"FSLEDGR1", b"FSLEDGR1" + struct.pack("<II", 5, zlib.crc32(b""))):
        path = tmp_path / "file"
        path.write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            RankFile(path)


def test_a_file_that_was_opened_and_not_written_is_passed_over(tmp_path: Path) -> None:
    write_attempt(tmp_path, "a", 0, range(1, 5), dp_size=2)
    (tmp_path / "a" / file_name(1)).write_bytes(b"")
    (attempt,) = Ledger(tmp_path).attempts
    assert set(attempt.files) == {0}


# --- attempts -------------------------------------------------------------------------------------


def write_attempt(
    ledger: Path, name: str, start: int, iterations: range, dp_size: int = 1, **facts: Any
) -> None:
    for rank in range(dp_size):
        path = ledger / name / file_name(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        begin = segment(name, dp_rank=rank, dp_size=dp_size, iteration=start, **facts)
        records = [encode_row(plain_row(i)) for i in iterations]
        path.write_bytes(encode_segment(begin) + b"".join(records))


def test_a_later_start_takes_the_place_of_what_it_went_back_over(tmp_path: Path) -> None:
    write_attempt(tmp_path, "a", 0, range(1, 101), dp_size=2)
    write_attempt(tmp_path, "b", 80, range(81, 91))
    ledger = Ledger(tmp_path)
    assert [(one.name, ii[0], ii[-1]) for one, ii in ledger.surviving()] == [
        ("a", 1, 80),
        ("b", 81, 90),
    ]
    assert [step.rows[0].iteration for step in ledger.steps()] == list(range(1, 91))
    step = ledger.step(85)
    assert step is not None
    assert (step.attempt.name, step.superseded, step.complete) == ("b", False, True)
    # Done once, thrown away, and not done again: it can still be looked at.
    step = ledger.step(95)
    assert step is not None
    assert (step.attempt.name, step.superseded, set(step.rows)) == ("a", True, {0, 1})
    assert ledger.step(101) is None


def test_a_start_that_did_nothing_takes_no_place(tmp_path: Path) -> None:
    write_attempt(tmp_path, "a", 0, range(1, 101))
    write_attempt(tmp_path, "b", 80, range(0))
    ledger = Ledger(tmp_path)
    step = ledger.step(95)
    assert step is not None
    assert not step.superseded
    assert len(list(ledger.steps())) == 100


def test_a_rank_that_was_killed_first_is_missed(tmp_path: Path) -> None:
    write_attempt(tmp_path, "a", 0, range(1, 5), dp_size=2)
    path = tmp_path / "a" / file_name(1)
    path.write_bytes(path.read_bytes()[:-1])
    step = Ledger(tmp_path).step(4)
    assert step is not None
    assert set(step.rows) == {0}
    assert not step.complete


def test_a_file_of_another_attempt_is_named(tmp_path: Path) -> None:
    write_attempt(tmp_path, "a", 0, range(1, 5))
    (tmp_path / "a").rename(tmp_path / "b")
    with pytest.raises(DataError, match="another attempt"):
        Ledger(tmp_path)


def test_files_of_one_start_that_disagree_are_named(tmp_path: Path) -> None:
    write_attempt(tmp_path, "a", 0, range(1, 5), dp_size=2)
    other = encode_segment(segment("a", dp_rank=2, dp_size=4)) + encode_row(plain_row(1))
    (tmp_path / "a" / file_name(2)).write_bytes(other)
    with pytest.raises(DataError, match="disagree"):
        Ledger(tmp_path)


def test_a_row_from_before_the_start_is_damage(tmp_path: Path) -> None:
    write_attempt(tmp_path, "a", 10, range(10, 15))
    with pytest.raises(DataError, match="iteration 10 follows 10"):
        Ledger(tmp_path).step(12)


def test_no_ledger_is_our_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no ledger"):
        Ledger(tmp_path / "missing")
    with pytest.raises(DataError, match="no attempt"):
        Ledger(tmp_path)
