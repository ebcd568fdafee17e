"""Which checkpoints are whole, and what a start does about those that are not."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.ckpt_io.location import TRACKER
from flagscale.errors import CheckpointError
from flagscale.runs.complete import (
    BEGUN_MARKER,
    MARKER,
    SaveDirectory,
    SavedIteration,
    iteration_directory,
    make_way,
    newest_complete,
    plan_recovery,
    problem_of,
    recover,
    write_marker,
)


def save(directory: Path, iteration: int, *, marked: bool = True, track: bool = True) -> Path:
    """What a save leaves; without a marker, one that was killed, or one of older days."""
    at = iteration_directory(directory, iteration)
    (at / "mp_rank_00").mkdir(parents=True)
    (at / ".metadata").write_bytes(b"meta")
    (at / "mp_rank_00" / "model.pt").write_bytes(b"x" * iteration)
    if marked:
        write_marker(at, attempt=3, now=1.0)
    if track:
        (directory / TRACKER).write_text(str(iteration))
    return at


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir() if entry.is_dir())


def test_marker_lists_every_file_with_its_size(tmp_path: Path) -> None:
    at = save(tmp_path, 8)
    (at / f".{MARKER}.draft").touch()
    write_marker(at, attempt=3, now=1.0)
    assert json.loads((at / MARKER).read_text()) == {
        "iteration": 8,
        "files": {".metadata": 4, "mp_rank_00/model.pt": 8},
        "attempt": 3,
        "time": 1.0,
    }
    assert problem_of(at) is None
    (at / "mp_rank_00" / "more.json").write_text("of a later tool")
    assert problem_of(at) is None


def test_a_marker_is_for_an_iteration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not the directory of an iteration"):
        write_marker(tmp_path)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda at: (at / MARKER).unlink(), "it has no COMPLETE.json: the save was not ended"),
        (lambda at: (at / MARKER).write_text("{"), "its COMPLETE.json cannot be read"),
        (lambda at: (at / ".metadata").unlink(), ".metadata is missing"),
        (lambda at: (at / ".metadata").write_bytes(b""), ".metadata has 0 bytes, not 4"),
        (lambda at: at.rename(at.with_name("iter_0000009")), "its COMPLETE.json is of iteration 8"),
    ],
    ids=["no-marker", "torn-marker", "missing", "cut", "renamed"],
)  # fmt: skip
def test_problem_of_names_what_is_wrong(tmp_path: Path, damage: object, problem: str) -> None:
    at = save(tmp_path, 8)
    damage(at)  # type: ignore[operator]
    (found,) = tmp_path.glob("iter_*")
    assert problem_of(found) == problem


def test_half_written_is_set_aside_and_named(tmp_path: Path) -> None:
    save(tmp_path, 8)
    for attempt in (1, 2):
        save(tmp_path, 12, marked=False, track=False)
        recovery = recover(tmp_path)
        assert recovery.lines == (
            "iteration 12 is not whole (it has no COMPLETE.json: the save was not ended): "
            "set aside",
        )
        assert recovery.resume == newest_complete(tmp_path) == 8
        assert f"iter_0000012.incomplete-{attempt}" in names(tmp_path)
    assert "iter_0000012" not in names(tmp_path)
    assert not recover(tmp_path).is_needed


def test_the_first_save_was_killed(tmp_path: Path) -> None:
    save(tmp_path, 4, marked=False, track=False)
    assert recover(tmp_path).resume is None
    assert names(tmp_path) == ["iter_0000004.incomplete-1"]


@pytest.mark.parametrize("tracker", ["", "12", None, "garbage"])
def test_a_bad_tracker_is_written_again(tmp_path: Path, tracker: str | None) -> None:
    save(tmp_path, 8)
    save(tmp_path, 12, marked=False)
    if tracker is None:
        (tmp_path / TRACKER).unlink()
    else:
        (tmp_path / TRACKER).write_text(tracker)
    recovery = recover(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "8"
    assert recovery.resume == 8
    assert "going on from iteration 8" in recovery.lines[-1]


def test_a_crash_between_marker_and_tracker(tmp_path: Path) -> None:
    save(tmp_path, 8)
    os.utime(tmp_path / TRACKER, ns=(1, 1))
    save(tmp_path, 12, track=False)
    assert recover(tmp_path).resume == 12
    assert (tmp_path / TRACKER).read_text() == "12"


def test_a_person_goes_back(tmp_path: Path) -> None:
    save(tmp_path, 8)
    save(tmp_path, 12)
    (tmp_path / TRACKER).write_text("8")
    recovery = recover(tmp_path)
    assert (recovery.resume, recovery.is_needed) == (8, False)
    assert "was set back to 8" in recovery.lines[0]
    assert newest_complete(tmp_path) == 12


def test_a_directory_of_older_days_is_trusted(tmp_path: Path) -> None:
    save(tmp_path, 8, marked=False)
    save(tmp_path, 12, marked=False, track=False)
    assert recover(tmp_path) == recover(tmp_path)
    assert names(tmp_path) == ["iter_0000008", "iter_0000012"]
    assert newest_complete(tmp_path) == 8
    # And still is once markers are written in it.
    save(tmp_path, 16)
    assert recover(tmp_path).lines == ()
    assert names(tmp_path) == ["iter_0000008", "iter_0000012", "iter_0000016"]


def test_nothing_is_guessed_without_a_marker(tmp_path: Path) -> None:
    save(tmp_path, 8, marked=False, track=False)
    (tmp_path / BEGUN_MARKER).touch()
    assert recover(tmp_path) == plan_recovery(SaveDirectory((), None))
    assert names(tmp_path) == ["iter_0000008"]


def test_what_was_saved_is_not_given_up_in_silence(tmp_path: Path) -> None:
    (save(tmp_path, 8) / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"none is whole \(iteration 8: .metadata is missing"):
        recover(tmp_path)
    assert names(tmp_path) == ["iter_0000008"]


def test_there_is_nothing_yet(tmp_path: Path) -> None:
    assert not recover(tmp_path / "missing").is_needed
    assert newest_complete(tmp_path) is None


def test_way_is_made_for_a_save(tmp_path: Path) -> None:
    assert make_way(tmp_path / "iter_0000004") is None
    whole = make_way(save(tmp_path, 4))
    half = make_way(save(tmp_path, 4, marked=False))
    assert whole == tmp_path / "iter_0000004.replaced-1"
    assert half == tmp_path / "iter_0000004.incomplete-1"


_SAVED = st.builds(
    lambda iteration, state: SavedIteration(
        iteration, state != "half", None if state == "whole" else state, iteration
    ),
    st.integers(1, 9),
    st.sampled_from(["whole", "half", "damaged"]),
)
_TRACKERS = st.one_of(st.none(), st.sampled_from(["", "release", "x", *map(str, range(10))]))


@given(
    st.lists(_SAVED, unique_by=lambda saved: saved.iteration),
    _TRACKERS,
    st.integers(0, 10),
    st.booleans(),
)
def test_a_recovery_is_safe_and_enough(
    iterations: Sequence[SavedIteration], tracker: str | None, tracker_time: int, begun: bool
) -> None:
    found = SaveDirectory(
        tuple(sorted(iterations, key=lambda saved: -saved.iteration)), tracker, tracker_time, begun
    )
    recovery = plan_recovery(found)
    whole = {saved.iteration for saved in iterations if saved.problem is None}
    marked = [saved.iteration for saved in iterations if saved.marked]
    assert not whole & set(recovery.set_aside)
    assert len(recovery.lines) >= len(recovery.set_aside)
    assert (recovery.problem is None) or not (whole or recovery.is_needed)
    if recovery.tracker is not None:
        assert int(recovery.tracker) in whole
    if whole:
        assert recovery.resume is not None
        # What is gone on from is whole, or older than all markers.
        assert recovery.resume in whole or recovery.resume < min(marked)
    if not marked and (begun or tracker is not None):
        assert not recovery.is_needed
    left = [saved for saved in found.iterations if saved.iteration not in recovery.set_aside]
    after = SaveDirectory(
        tuple(left), recovery.tracker or tracker, 99 if recovery.tracker else tracker_time, begun
    )
    again = plan_recovery(after)
    assert (again.is_needed, again.resume) == (False, recovery.resume)
