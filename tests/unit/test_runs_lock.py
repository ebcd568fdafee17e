"""A second job is refused until there is evidence that the first is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.errors import ConfigError
from flagscale.runs.lock import (
    LOCK,
    Holder,
    LocalHolder,
    Ruling,
    SlurmHolder,
    acquire,
    decide,
    local_alive,
    read_holder,
    this_process,
)

_JOB = SlurmHolder("17", "test", 100.0)
_OTHER = SlurmHolder("18", "test", 200.0)


def refuse_to_say(holder: Holder) -> bool | None:
    raise AssertionError("not to be asked")


_HOLDERS = st.one_of(
    st.builds(SlurmHolder, st.sampled_from("12"), st.sampled_from("ab"), st.just(0.0)),
    st.builds(LocalHolder, st.sampled_from("ab"), st.integers(1, 2), st.just(0), st.just("boot")),
)


@given(_HOLDERS | st.none(), _HOLDERS, st.sampled_from([True, False, None]))
def test_only_evidence_releases(holder: Holder | None, ours: Holder, alive: bool | None) -> None:
    ruling = decide(holder, ours, lambda _: alive)
    if holder is None or holder == ours:
        assert ruling is (Ruling.FREE if holder is None else Ruling.OURS)
    else:
        expected = {True: Ruling.HELD, False: Ruling.GONE, None: Ruling.UNKNOWN}
        assert ruling is expected[alive]
        assert ruling.allows == (alive is False)


def test_a_job_keeps_its_lock_over_restarts(tmp_path: Path) -> None:
    assert acquire(tmp_path, _JOB, refuse_to_say) is Ruling.FREE
    assert acquire(tmp_path, replace(_JOB, submitted=300.0), refuse_to_say) is Ruling.OURS
    assert read_holder(tmp_path) == _JOB


@pytest.mark.parametrize(("alive", "said"), [(True, "wait for its end"), (None, "delete")])
def test_a_second_job_is_refused(tmp_path: Path, alive: bool | None, said: str) -> None:
    acquire(tmp_path, _JOB, refuse_to_say)
    with pytest.raises(ConfigError, match=r"work(s|ed) here") as caught:
        acquire(tmp_path, _OTHER, lambda _: alive)
    assert "Slurm job 17 of cluster test" in str(caught.value)
    assert said in str(caught.value)
    assert read_holder(tmp_path) == _JOB


def test_a_job_that_is_gone_gives_way(tmp_path: Path) -> None:
    acquire(tmp_path, _JOB, refuse_to_say)
    assert acquire(tmp_path, _OTHER, lambda _: False) is Ruling.GONE
    assert read_holder(tmp_path) == _OTHER
    assert os.listdir(tmp_path) == [LOCK]


def test_a_lock_that_cannot_be_read_is_no_evidence(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("")
    with pytest.raises(ConfigError, match="cannot be found out"):
        acquire(tmp_path, _JOB, lambda _: None)
    assert acquire(tmp_path, _JOB, lambda _: None, force=True) is Ruling.UNKNOWN


@pytest.mark.parametrize("_round", range(10))
def test_one_of_many_gets_it(tmp_path: Path, _round: int) -> None:
    acquire(tmp_path, _JOB, refuse_to_say)
    won: list[str] = []
    barrier = threading.Barrier(8)

    def try_it(job: SlurmHolder) -> None:
        barrier.wait()
        try:
            acquire(tmp_path, job, lambda holder: holder != _JOB)
        except ConfigError:
            return
        won.append(job.job_id)

    threads = [
        threading.Thread(target=try_it, args=[replace(_OTHER, job_id=str(i))]) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    holder = read_holder(tmp_path)
    assert isinstance(holder, SlurmHolder)
    assert won == [holder.job_id]
    assert os.listdir(tmp_path) == [LOCK]


def test_local_evidence() -> None:
    me = this_process()
    assert local_alive(me) is True
    assert local_alive(replace(me, start_time=me.start_time + 1)) is False
    assert local_alive(replace(me, boot_id="an earlier start")) is False
    assert local_alive(replace(me, host="elsewhere")) is None
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pid = child.pid
    start = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    holder = replace(me, pid=pid, start_time=int(start))
    assert local_alive(holder) is True
    child.communicate(b"\n")
    assert local_alive(holder) is False
