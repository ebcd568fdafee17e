"""Attempts, their history, and the fence around the run."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.errors import SupersededError
from flagscale.runs import exit_codes
from flagscale.runs.attempt import (
    ATTEMPT_VARIABLE,
    RUN_DIR_VARIABLE,
    Attempt,
    begin_attempt,
    current,
    end_attempt,
    history,
)
from flagscale.runs.fence import Fence
from flagscale.runs.finished import Finished, read_finished, write_finished
from flagscale.runs.status import Status, read_status, render_status, write_status


def begin(run_dir: Path) -> Attempt:
    return begin_attempt(
        run_dir,
        hosts=["n1", "n2"],
        layout={"tp": 2, "pp": 1, "dp": 4},
        world_size=8,
        job_id="17",
        restart=1,
        now=100.0,
    )


def test_each_attempt_has_a_number_and_a_token_of_its_own(tmp_path: Path) -> None:
    assert current(tmp_path) is None
    assert history(tmp_path) == ()
    first = begin(tmp_path)
    end_attempt(tmp_path, 1, exit_code=75, reason="saved on SIGUSR1", iteration=40, now=200.0)
    second = begin(tmp_path)
    assert (first.number, second.number) == (1, 2)
    assert first.token != second.token
    assert current(tmp_path) == second
    past = history(tmp_path)
    assert [p.attempt for p in past] == [first, second]
    assert past[0].end is not None
    assert (past[0].end.exit_code, past[0].end.iteration) == (75, 40)
    assert past[1].end is None


@settings(max_examples=20, deadline=None)  # each waits for the disk
@given(st.integers(0, 400), st.integers(0, 400))
def test_history_survives_torn_lines(cut: int, cut_again: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        run_dir, file = Path(name), Path(name, "attempts.jsonl")
        for lost in (cut, cut_again):
            begin(run_dir)
            file.write_bytes(file.read_bytes()[: max(0, file.stat().st_size - lost)])
        last = begin(run_dir)
        assert last.number == 3  # even where the history has forgotten
        assert history(run_dir)[-1].attempt == last


def test_lines_of_others_are_passed_over(tmp_path: Path) -> None:
    first = begin(tmp_path)
    with (tmp_path / "attempts.jsonl").open("a") as stream:
        stream.write('[]\n{"event": "end", "number": "x"}\n{"event": "begin", "number": 2}\n')
    assert [p.attempt for p in history(tmp_path)] == [first]


def test_fence(tmp_path: Path) -> None:
    assert Fence.from_environment({}) is None
    first = begin(tmp_path)
    environ = {RUN_DIR_VARIABLE: str(tmp_path), ATTEMPT_VARIABLE: first.token}
    fence = Fence.from_environment(environ)
    assert fence is not None
    fence.check()
    assert fence.number() == 1
    begin(tmp_path)
    assert fence.number() is None
    with pytest.raises(SupersededError, match="attempt 2 owns this run now") as caught:
        fence.check()
    assert caught.value.exit_code == exit_codes.SUPERSEDED == 76
    # A file that cannot be read is no evidence.
    (tmp_path / "attempt.json").write_text("")
    fence.check()
    (tmp_path / "attempt.json").unlink()
    fence.check()


def test_finished(tmp_path: Path) -> None:
    assert read_finished(tmp_path) is None
    write_finished(tmp_path, iteration=8, train_iters=8, consumed_samples=64, now=5.0)
    assert read_finished(tmp_path) == Finished(8, 8, 64, 5.0)
    (tmp_path / "finished.json").write_text('{"of": "another version"}')
    assert read_finished(tmp_path) is None


def test_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    status = Status(
        attempt=2, iteration=50, train_iters=200, consumed_samples=400, tokens=40_000,
        train_tokens=160_000, tokens_per_second=2.0, loss=1.5, last_checkpoint=40,
        last_checkpoint_time=940.0, time=1000.0,
    )  # fmt: skip
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert render_status(status, now=1030.0) == (
        "iteration        50 of 200 (25.0 %), 30 s ago",
        "loss             1.5000",
        "tokens           40,000 of 160,000, 2 a second",
        "last checkpoint  iteration 40, 2 min ago",
        "time to the end  16 h 40 min, about 1970-01-01 16:56 UTC",
    )
    *_, left = render_status(status, now=1030.0, running=False)
    assert left == "time to the end  16 h 40 min, of training"
    *_, left = render_status(replace(status, tokens=160_000), now=1030.0)
    assert left == "time to the end  none is left"
