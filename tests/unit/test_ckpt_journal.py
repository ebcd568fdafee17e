"""Journal, claims, staging and publishing: what is recorded is true, and nothing is seen half."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.ckpt_io import publish as publishing
from flagscale.ckpt_io.checksum import combine_crc32
from flagscale.ckpt_io.claims import Claims, Task
from flagscale.ckpt_io.journal import RECEIPT, FileRecord, HolePart, Journal, Staging, UnitRecord
from flagscale.ckpt_io.publish import TRACKER, publish
from flagscale.ckpt_io.raw import SourceStamp, replace_text, require_room
from flagscale.errors import CheckpointError, ConfigError

STAMP = SourceStamp("a.bin", 10, 1)
RECORDS = [
    UnitRecord(0, 0, (HolePart(0, 0, 8, 123), HolePart(1, 4, 8, 2**32 - 1))),
    UnitRecord(0, 1, ()),
    FileRecord(0, "00ff", (1, 2)),
    UnitRecord(3, 7, ()),
]


@given(st.binary(), st.binary())
def test_checksums_combine(first: bytes, second: bytes) -> None:
    whole = zlib.crc32(first + second)
    assert combine_crc32(zlib.crc32(first), zlib.crc32(second), len(second)) == whole


def test_checksums_combine_over_gigabytes() -> None:
    """The CRC of zeros is linear in the state, so 3 GiB of them can be had by doubling."""
    crc, length = zlib.crc32(bytes(1 << 20)), 1 << 20
    while length < 1 << 32:
        crc, length = combine_crc32(crc, crc, length), 2 * length
    parts = zlib.crc32(b"x")
    assert combine_crc32(parts, crc, length) == combine_crc32(
        combine_crc32(parts, zlib.crc32(bytes(5)), 5),
        _crc_of_zeros(length - 5),
        length - 5,
    )


def _crc_of_zeros(length: int) -> int:
    crc = 0
    for bit in reversed(range(length.bit_length())):
        half = length >> (bit + 1)
        crc = combine_crc32(crc, crc, half)
        if length >> bit & 1:
            crc = combine_crc32(crc, zlib.crc32(b"\0"), 1)
    return crc


def test_records_come_back(tmp_path: Path) -> None:
    ours, theirs = Journal(tmp_path), Journal(tmp_path)
    for record in RECORDS[:2]:
        ours.append(record)
    for record in RECORDS[2:]:
        theirs.append(record)
    ours.refresh()
    later = Journal(tmp_path)
    for journal in (ours, later):
        assert journal.units == {0: {0: RECORDS[0], 1: RECORDS[1]}, 3: {7: RECORDS[3]}}
        assert journal.files == {0: RECORDS[2]}
    ours.close()
    theirs.close()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 400), st.binary(max_size=3), st.integers(0, 1 << 30))
def test_a_torn_or_damaged_record_is_passed_over(cut: int, junk: bytes, seed: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        journal = Journal(directory)
        for record in RECORDS:
            journal.append(record)
        journal.close()
        (path,) = directory.glob("*.records")
        text = path.read_bytes()
        whole = text[:cut].count(b"\n")
        path.write_bytes(text[:cut] + junk.replace(b"\n", b""))
        assert sum(map(len, Journal(directory).units.values())) == sum(
            isinstance(record, UnitRecord) for record in RECORDS[:whole]
        )
        at = random.Random(seed).randrange(len(text))
        damaged = text[:at] + bytes([text[at] ^ 1]) + text[at + 1 :]
        path.write_bytes(damaged)
        found = Journal(directory)
        kept = [*found.files.values(), *(u for f in found.units.values() for u in f.values())]
        assert all(record in RECORDS for record in kept)
        assert len(kept) >= len(RECORDS) - 2  # a line end may join two


def test_a_record_is_readable_while_its_writer_goes_on(tmp_path: Path) -> None:
    writer, reader = Journal(tmp_path), Journal(tmp_path)
    for number in range(20):
        writer.append(UnitRecord(0, number, ()))
        reader.refresh()
        assert len(reader.units[0]) == number + 1
    writer.close()


def test_a_line_half_seen_is_read_when_it_is_whole(tmp_path: Path) -> None:
    writer = Journal(tmp_path / "w")
    (tmp_path / "w").mkdir()
    writer.append(RECORDS[0])
    writer.close()
    line = (tmp_path / "w" / "0.records").read_bytes()
    reader = Journal(tmp_path)
    for part in (line[:9], line[9:]):
        assert reader.units == {}
        with (tmp_path / "5.records").open("ab") as stream:
            stream.write(part)
        reader.refresh()
    assert reader.units == {0: {0: RECORDS[0]}}


def staged(tmp_path: Path, fingerprint: str = "f00", **options: object) -> Staging:
    staging = Staging(tmp_path / "out" / "iter_0000010", fingerprint)
    staging.open([STAMP], **options)
    return staging


def test_staging_lies_beside_the_destination_and_goes_on(tmp_path: Path) -> None:
    staging = staged(tmp_path)
    assert staging.root == tmp_path / "out" / ".iter_0000010.partial"
    (staging.data / "x").write_text("kept")
    assert (staged(tmp_path).data / "x").read_text() == "kept"
    assert not (staged(tmp_path, restart=True).data / "x").exists()


@pytest.mark.parametrize(
    ("stamp", "fingerprint", "what"),
    [
        (STAMP, "bad", "another plan"),
        (SourceStamp("a.bin", 10, 2), "f00", "other source files"),
        (SourceStamp("a.bin", 11, 1), "f00", "other source files"),
    ],
)
def test_another_plan_or_source_is_refused(
    tmp_path: Path, stamp: SourceStamp, fingerprint: str, what: str
) -> None:
    staged(tmp_path)
    other = Staging(tmp_path / "out" / "iter_0000010", fingerprint)
    with pytest.raises(CheckpointError, match=what) as error:
        other.open([stamp])
    assert "--restart" in str(error.value)
    other.open([stamp], restart=True)


def test_a_staging_directory_without_sense_is_refused(tmp_path: Path) -> None:
    (staged(tmp_path).root / "plan.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        staged(tmp_path)


def test_several_tasks_do_not_start_afresh(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="afresh"):
        staged(tmp_path, restart=True, task=Task(0, 2))


def test_an_existing_destination_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out" / "iter_0000010").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="exists already"):
        staged(tmp_path)
    assert sorted(os.listdir(tmp_path / "out")) == ["iter_0000010"]


def test_publish_is_one_rename_and_the_tracker_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = staged(tmp_path)
    (staging.data / "a").write_bytes(b"a")
    seen: list[str] = []
    rename, replace = os.rename, Path.replace

    def noted_rename(*names: str | Path) -> None:
        assert not staging.destination.exists()
        assert not (staging.destination.parent / TRACKER).exists()
        seen.append("rename")
        rename(*names)

    def noted_replace(self: Path, target: Path) -> Path:
        assert staging.destination.exists()
        seen.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(os, "rename", noted_rename)
    monkeypatch.setattr(Path, "replace", noted_replace)

    def complete(directory: Path, digests: dict[str, str]) -> None:
        assert sorted(digests) == ["a", "flagscale.json"]
        (directory / "integrity.json").write_text(json.dumps(digests))

    assert publish(staging, 10, {"a": "ca97"}, complete)
    assert seen == ["rename", TRACKER]
    assert (staging.destination.parent / TRACKER).read_text() == "10"
    assert sorted(os.listdir(staging.destination)) == ["a", "flagscale.json", "integrity.json"]
    assert sorted(os.listdir(staging.destination.parent)) == ["iter_0000010", TRACKER]
    assert not publish(staging, 10, {})  # once is enough


@pytest.mark.parametrize("where", ["replace_text", "_make_visible"])
def test_a_publication_cut_off_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    staging = staged(tmp_path)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(publishing, where, stop)
        with pytest.raises(KeyboardInterrupt):
            publish(staging, 10, {})
    again = staged(tmp_path)
    publish(again, 10, {})
    assert sorted(os.listdir(tmp_path / "out")) == ["iter_0000010", TRACKER]


def test_an_output_that_is_no_iteration_gets_no_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the next run that finishes a publication which was cut off write one."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    staging = staged(tmp_path)
    (staging.data / "a").write_bytes(b"a")
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "remove", stop)
        with pytest.raises(KeyboardInterrupt):
            publish(staging, None, {"a": "ca97"})
    assert not publish(staged(tmp_path), None, {"a": "ca97"})
    assert sorted(os.listdir(staging.destination)) == ["a", RECEIPT]
    assert os.listdir(staging.destination.parent) == [staging.destination.name]


@pytest.mark.parametrize("there", ["a directory", "an empty directory", "a file"])
def test_publish_replaces_nothing(tmp_path: Path, there: str) -> None:
    staging = staged(tmp_path)
    (staging.data / "a").write_bytes(b"a")
    if there == "a file":
        staging.destination.write_text("precious")
    else:
        staging.destination.mkdir()
    if there == "a directory":
        (staging.destination / "precious").write_text("")
    with pytest.raises(CheckpointError, match="meanwhile"):
        publish(staging, 10, {})
    assert not (staging.destination / "a").exists()
    assert (staging.data / "a").exists()
    assert not (staging.destination.parent / TRACKER).exists()


def test_of_several_one_publishes(tmp_path: Path) -> None:
    stagings = [staged(tmp_path, task=Task(rank, 6)) for rank in range(6)]
    calls, results = [], []

    def complete(directory: Path, digests: dict[str, str]) -> None:
        calls.append(directory)
        time.sleep(0.05)

    threads = [
        threading.Thread(target=lambda s=each: results.append(publish(s, 10, {}, complete)))
        for each in stagings
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == [False] * 5 + [True]
    assert len(calls) == 1


def test_two_write_the_tracker_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both_written = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(os, "fsync", lambda _: both_written.wait())
    with ThreadPoolExecutor() as pool:
        for done in [pool.submit(replace_text, tmp_path / TRACKER, "10") for _ in range(2)]:
            done.result()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(TRACKER, "10")]


def test_a_task_that_comes_when_all_is_done_finds_it_done(tmp_path: Path) -> None:
    publish(staged(tmp_path), 10, {})
    late = staged(tmp_path, task=Task(1, 2))
    assert late.is_published()
    assert sorted(os.listdir(tmp_path / "out")) == ["iter_0000010", TRACKER]
    with pytest.raises(CheckpointError, match="exists already"):
        staged(tmp_path)
    with pytest.raises(CheckpointError, match="exists already"):
        staged(tmp_path, "other", task=Task(1, 2))


def test_a_claim_is_for_one(tmp_path: Path) -> None:
    with Claims(tmp_path, 60) as ours, Claims(tmp_path, 60) as theirs:
        assert ours.acquire("x")
        assert not ours.acquire("x")
        assert not theirs.acquire("x")
        assert theirs.acquire("y")
        ours.release("x")
        assert theirs.acquire("x")
    assert not list(tmp_path.iterdir())


def test_the_claim_of_a_dead_process_is_taken_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from flagscale.ckpt_io.claims import Claims\n"
        "assert Claims(Path(sys.argv[1]), 60).acquire('x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, timeout=60)
    assert len(list(tmp_path.iterdir())) == 1
    with Claims(tmp_path, 60) as ours, Claims(tmp_path, 60) as theirs:
        assert ours.acquire("x")
        assert not theirs.acquire("x")


@pytest.mark.parametrize("content", ['{"owner": ["elsewhere", 1, "1"]}', "", "{}", "[1]"])
def test_a_claim_of_another_machine_is_taken_when_it_shows_no_life(
    tmp_path: Path, content: str
) -> None:
    path = tmp_path / "x.0.claim"
    path.write_text(content)
    with Claims(tmp_path, 0.3) as claims:
        begin = time.monotonic()
        for _ in range(4):
            assert not claims.acquire("x")
            os.utime(path)
            time.sleep(0.12)
        while not claims.acquire("x"):
            assert time.monotonic() - begin < 20
            time.sleep(0.02)
        assert time.monotonic() - begin > 0.6


def test_a_living_claim_beats(tmp_path: Path) -> None:
    with Claims(tmp_path, 0.2) as claims:
        claims.acquire("x")
        (path,) = tmp_path.iterdir()
        before = path.stat().st_mtime_ns
        begin = time.monotonic()
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() - begin < 20
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("environment", "task"),
    [
        ({}, Task(0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "3"}, Task(1, 3)),
        ({"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}, Task(2, 4)),
        ({"RANK": "1"}, Task(0, 1)),
    ],
)
def test_a_task_knows_its_place(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], task: Task
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Task.of_environment() == task


def test_room_is_asked_for(tmp_path: Path) -> None:
    require_room(tmp_path, 1)
    with pytest.raises(CheckpointError, match="disk is full"):
        require_room(tmp_path, 1 << 60)
