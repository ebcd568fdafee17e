"""Which checkpoints of a save directory are whole, and how to go on after a crash in mid-save.

``COMPLETE.json`` in an iteration's directory is written when the data of all ranks are there, and
before the tracker file points to it. Upstream has no such marker: what a crash has left looks like
a checkpoint, later saves of the iteration write over it, and files of another layout stay in it.

A directory without a marker may be of older days, or of another tool. It is taken for half-written
only where that is certain enough: in a directory in which markers are written, behind the first of
them; or where nothing was ever saved to the end.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flagscale.ckpt_io.location import TRACKER
from flagscale.ckpt_io.raw import disk_errors, flush_directory, replace_text
from flagscale.errors import CheckpointError
from flagscale.runs.records import read_record, write_record

__all__ = [
    "BEGUN_MARKER",
    "MARKER",
    "Recovery",
    "SaveDirectory",
    "SavedIteration",
    "execute_recovery",
    "iteration_directory",
    "make_way",
    "newest_complete",
    "plan_recovery",
    "problem_of",
    "read_save_directory",
    "recover",
    "tracked_iteration",
    "write_marker",
]

MARKER: Final = "COMPLETE.json"

BEGUN_MARKER: Final = "flagscale-begun.json"
"""In a save directory in which a save has been completed: a start must find a checkpoint there."""

_ITERATION: Final = re.compile(r"iter_(\d{7,18})")


def iteration_directory(save_dir: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration is."""
    return save_dir / f"iter_{iteration:07d}"


def write_marker(directory: Path, *, attempt: int | None = None, now: float | None = None) -> None:
    """Say that a checkpoint is whole: all that lies in its directory now belongs to it.

    Args:
        directory: Of an iteration; the ranks have written all.
        attempt: Number of the attempt that saved it.
        now: Seconds since the epoch.

    Raises:
        CheckpointError: It is not an iteration's directory, or the disk refuses.
    """
    iteration = _iteration_of(directory)
    if iteration is None:
        raise CheckpointError(
            "this is not the directory of an iteration",
            where=str(directory),
            expected="a name like iter_0001000",
        )
    with disk_errors(directory):
        files = _files(directory)
        for path in files:
            # What this machine wrote may still be in its memory only.
            with (directory / path).open("rb") as stream:
                os.fsync(stream.fileno())
        flush_directory(directory)
    content = {
        "iteration": iteration,
        "files": files,
        "attempt": attempt,
        "time": time.time() if now is None else now,
    }
    write_record(directory / MARKER, content)


def _files(directory: Path) -> dict[str, int]:
    """Bytes of each file below, but of the marker and of drafts of it."""
    return {
        str(path.relative_to(directory)): path.stat().st_size
        for path in sorted(directory.rglob("*"))
        if path.is_file() and MARKER not in path.name
    }


def _iteration_of(directory: Path) -> int | None:
    match = _ITERATION.fullmatch(directory.name)
    return None if match is None else int(match[1])


def problem_of(directory: Path) -> str | None:
    """What keeps a checkpoint from being whole, by its marker; ``None`` if nothing does.

    Contents are not looked at: checksums have their own readers.
    """
    if not directory.is_dir():
        return "it is not there"
    if not (directory / MARKER).exists():
        return f"it has no {MARKER}: the save was not ended"
    content = read_record(directory / MARKER) or {}
    files = content.get("files")
    if not isinstance(files, dict):
        return f"its {MARKER} cannot be read"
    if content.get("iteration") != _iteration_of(directory):
        return f"its {MARKER} is of iteration {content.get('iteration')}"
    for name, size in sorted(files.items()):
        try:
            found = (directory / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found} bytes, not {size}"
    return None


@dataclass(frozen=True)
class SavedIteration:
    """The directory of an iteration.

    Args:
        iteration: Counted from 1.
        marked: Whether it has a marker.
        problem: Of one that is marked, or is behind the newest whole one; ``None`` if it is whole,
            or was not looked at because a newer one is whole.
        marker_time: When the marker was written, by the file system's clock in nanoseconds; 0
            without one.
    """

    iteration: int
    marked: bool
    problem: str | None
    marker_time: int = 0


@dataclass(frozen=True)
class SaveDirectory:
    """What lies in a save directory.

    Args:
        iterations: Newest first.
        tracker: Content of the tracker file, stripped; ``None`` if there is none.
        tracker_time: As ``marker_time``; 0 without one.
        begun: Whether a save has been completed in it, whatever else it says.
        has_release: Whether there is a checkpoint that is not of an iteration.
    """

    iterations: tuple[SavedIteration, ...]
    tracker: str | None
    tracker_time: int = 0
    begun: bool = False
    has_release: bool = False


@dataclass(frozen=True)
class Recovery:
    """What has to be done before upstream may load.

    Args:
        set_aside: Iterations whose directories are renamed.
        tracker: What the tracker file is to hold; ``None`` leaves it as it is.
        resume: The iteration upstream will load then; 0 for a release; ``None`` if there is
            nothing, or nothing that can be trusted.
        lines: All that is done, and what is only noted, in one line each.
        problem: Why there is nothing to go on from although there should be; nothing is done then.
    """

    set_aside: tuple[int, ...] = ()
    tracker: str | None = None
    resume: int | None = None
    lines: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.set_aside) or self.tracker is not None


def read_save_directory(save_dir: Path) -> SaveDirectory:
    """Look at a save directory; of marked iterations only as far down as the newest whole one.

    Raises:
        CheckpointError: It cannot be read.
    """
    with disk_errors(save_dir):
        if not save_dir.is_dir():
            return SaveDirectory((), None)
        found = {
            iteration: entry
            for entry in save_dir.iterdir()
            if (iteration := _iteration_of(entry)) is not None and entry.is_dir()
        }
        iterations: list[SavedIteration] = []
        whole_found = False
        for iteration, directory in sorted(found.items(), reverse=True):
            marker_time = _mtime(directory / MARKER)
            marked = marker_time > 0
            problem = None if marked and whole_found else problem_of(directory)
            whole_found |= problem is None
            iterations.append(SavedIteration(iteration, marked, problem, marker_time))
        tracker = save_dir / TRACKER
        try:
            text = tracker.read_bytes()[:100].decode("ascii", "replace").strip()
        except FileNotFoundError:
            text = None
        return SaveDirectory(
            iterations=tuple(iterations),
            tracker=text,
            tracker_time=_mtime(tracker),
            begun=(save_dir / BEGUN_MARKER).exists(),
            has_release=(save_dir / "release").is_dir(),
        )


def _mtime(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def plan_recovery(found: SaveDirectory) -> Recovery:
    """Decide what to do with a save directory.

    A checkpoint that is whole and newer than the tracker says was left by a crash between the
    marker and the tracker, and is gone on from; unless the tracker was written after it, by a
    person who wants to go back.
    """
    first_marked = min((s.iteration for s in found.iterations if s.marked), default=None)
    if first_marked is None and (found.begun or found.tracker is not None):
        return Recovery(resume=_sound(found, [s.iteration for s in found.iterations]))

    half_written = [s for s in found.iterations if s.problem and s.iteration >= (first_marked or 0)]
    lines = [
        f"iteration {saved.iteration} is not whole ({saved.problem}): set aside"
        for saved in half_written
    ]
    aside = tuple(saved.iteration for saved in half_written)
    left = [s for s in found.iterations if s.iteration not in aside]
    newest = next((s for s in left if s.marked), None)
    resume = _sound(found, [s.iteration for s in left])
    tracker = None
    if newest is None and resume is None and first_marked is not None:
        why = ", ".join(f"{saved.iteration}: {saved.problem}" for saved in half_written)
        return Recovery(problem=f"of the checkpoints saved before, none is whole (iteration {why})")
    if newest is None:
        return Recovery(aside, None, resume, tuple(lines))
    if resume is None:
        was = {None: "there was no tracker", "": "the tracker was empty"}.get(
            found.tracker, f"the tracker said {found.tracker!r}"
        )
        lines.append(f"{was}: going on from iteration {newest.iteration}")
        tracker, resume = str(newest.iteration), newest.iteration
    elif newest.iteration > resume:
        if newest.marker_time > found.tracker_time:
            lines.append(
                f"iteration {newest.iteration} is whole, and the tracker still said "
                f"{found.tracker}: going on from {newest.iteration}"
            )
            tracker, resume = str(newest.iteration), newest.iteration
        else:
            lines.append(
                f"the tracker was set back to {found.tracker} although iteration "
                f"{newest.iteration} is whole: going on from {found.tracker}"
            )
    return Recovery(aside, tracker, resume, tuple(lines))


def _sound(found: SaveDirectory, present: Sequence[int]) -> int | None:
    """What the tracker names, if that is there; 0 for a release."""
    if found.tracker == "release":
        return 0 if found.has_release else None
    if found.tracker is None or not re.fullmatch(r"\d{1,18}", found.tracker):
        return None
    return int(found.tracker) if int(found.tracker) in present else None


def execute_recovery(save_dir: Path, recovery: Recovery) -> None:
    """Do it; after a crash in the middle, plan and execute again.

    Raises:
        CheckpointError: The disk refuses.
    """
    # The tracker first: it must name no directory that is about to be renamed.
    if recovery.tracker is not None:
        replace_text(save_dir / TRACKER, recovery.tracker)
    for iteration in recovery.set_aside:
        _rename(iteration_directory(save_dir, iteration), "incomplete")


def recover(save_dir: Path) -> Recovery:
    """Bring a save directory into a state that can be loaded; nothing is deleted.

    Call it on one process of the job, before any loads. Done again, it does nothing.

    Returns:
        What was done.

    Raises:
        CheckpointError: The disk refuses, or there are checkpoints and none is whole.
    """
    recovery = plan_recovery(read_save_directory(save_dir))
    if recovery.problem is not None:
        raise CheckpointError(
            recovery.problem,
            where=str(save_dir),
            cure=f"bring back what is missing, or delete a {MARKER} to load what there is; use "
            "another directory to begin anew",
        )
    execute_recovery(save_dir, recovery)
    return recovery


def _rename(directory: Path, why: str) -> Path:
    with disk_errors(directory):
        number = 1
        while (target := directory.with_name(f"{directory.name}.{why}-{number}")).exists():
            number += 1
        directory.rename(target)
        flush_directory(directory.parent)
    return target


def make_way(directory: Path) -> Path | None:
    """Set aside what lies where a checkpoint is about to be saved.

    Saving over it would leave files of another layout in it, and a marker that tells of old files.

    Returns:
        Where it is now; ``None`` if nothing was there.

    Raises:
        CheckpointError: The disk refuses.
    """
    if not directory.is_dir():
        return None
    return _rename(directory, "replaced" if problem_of(directory) is None else "incomplete")


def newest_complete(save_dir: Path) -> int | None:
    """The newest checkpoint that is whole; ``None`` if there is none.

    In a directory in which markers are not written, the one that a sound tracker names. The one
    that a start will go on from is :attr:`Recovery.resume`, which heeds a tracker set back.
    """
    found = read_save_directory(save_dir)
    whole = [s.iteration for s in found.iterations if s.marked and s.problem is None]
    return max(whole) if whole else plan_recovery(found).resume or None


def tracked_iteration(save_dir: Path) -> tuple[int, float] | None:
    """The iteration that the tracker names, and when it was written; ``None`` if it names none."""
    try:
        text = (save_dir / TRACKER).read_text().strip()
        return int(text), _mtime(save_dir / TRACKER) / 1e9
    except (OSError, ValueError):
        return None
