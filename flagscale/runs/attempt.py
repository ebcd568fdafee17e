"""Attempts: each start of a job owns its run directory until the next one takes it over.

``attempt.json`` names the owner; it is what :mod:`flagscale.runs.fence` looks at. The history of
all attempts is appended to ``attempts.jsonl``: one line when an attempt begins, one when it ends.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from flagscale.ckpt_io.raw import disk_errors
from flagscale.runs.records import read_record, write_record

__all__ = [
    "ATTEMPT_VARIABLE",
    "RUN_DIR_VARIABLE",
    "Attempt",
    "AttemptEnd",
    "PastAttempt",
    "begin_attempt",
    "current",
    "end_attempt",
    "history",
]

RUN_DIR_VARIABLE: Final = "FLAGSCALE_RUN_DIR"
"""Environment variable of each rank: the run directory. Unset when no launcher made one."""

ATTEMPT_VARIABLE: Final = "FLAGSCALE_ATTEMPT"
"""Environment variable of each rank: the token of the attempt it belongs to."""

_OWNER: Final = "attempt.json"
_HISTORY: Final = "attempts.jsonl"


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Args:
        number: Counted from 1 over all starts in the run directory.
        token: Names this attempt and no other; hexadecimal.
        job_id: Of the queue, ``None`` without one.
        restart: How often the queue has started this job again.
        hosts: Machines, in order.
        started: Seconds since the epoch.
        layout: Parallel sizes by name, such as ``tp``, ``pp``, ``dp``.
        world_size: Ranks in all.
    """

    number: int
    token: str
    job_id: str | None
    restart: int
    hosts: tuple[str, ...]
    started: float
    layout: Mapping[str, Any]
    world_size: int


@dataclass(frozen=True)
class AttemptEnd:
    """How an attempt ended, as its launcher saw it.

    Args:
        ended: Seconds since the epoch.
        exit_code: Of the job.
        reason: In one line.
        iteration: The last one saved, ``None`` if nothing is known.
    """

    ended: float
    exit_code: int
    reason: str
    iteration: int | None


@dataclass(frozen=True)
class PastAttempt:
    """An attempt, and its end if that was written: a launcher that was killed writes none."""

    attempt: Attempt
    end: AttemptEnd | None


def begin_attempt(
    run_dir: Path,
    *,
    hosts: Sequence[str],
    layout: Mapping[str, Any],
    world_size: int,
    job_id: str | None = None,
    restart: int = 0,
    now: float | None = None,
) -> Attempt:
    """Take the run directory over: from now on, ranks of earlier attempts are superseded.

    Call it on one machine of the job, under the lock of :mod:`flagscale.runs.lock`.

    Raises:
        CheckpointError: The disk refuses.
    """
    numbers = [past.attempt.number for past in history(run_dir)]
    owner = current(run_dir)
    attempt = Attempt(
        number=1 + max([*numbers, owner.number if owner else 0]),
        token=secrets.token_hex(8),
        job_id=job_id,
        restart=restart,
        hosts=tuple(hosts),
        started=time.time() if now is None else now,
        layout=dict(layout),
        world_size=world_size,
    )
    facts = asdict(attempt)
    write_record(run_dir / _OWNER, facts)  # first: what matters is that the others stop
    _append(run_dir / _HISTORY, {"event": "begin", **facts})
    return attempt


def end_attempt(
    run_dir: Path,
    number: int,
    *,
    exit_code: int,
    reason: str,
    iteration: int | None,
    now: float | None = None,
) -> None:
    """Note how an attempt ended; it goes on owning the run until the next one begins.

    Raises:
        CheckpointError: The disk refuses.
    """
    end = AttemptEnd(time.time() if now is None else now, exit_code, reason, iteration)
    _append(run_dir / _HISTORY, {"event": "end", "number": number, **asdict(end)})


def current(run_dir: Path) -> Attempt | None:
    """The attempt that owns the run; ``None`` if there was none yet."""
    facts = read_record(run_dir / _OWNER)
    return None if facts is None else _attempt(facts)


def history(run_dir: Path) -> tuple[PastAttempt, ...]:
    """All attempts, in order; lines torn by a crash are passed over."""
    begun: dict[int, Attempt] = {}
    ends: dict[int, AttemptEnd] = {}
    try:
        lines = (run_dir / _HISTORY).read_bytes().splitlines()
    except FileNotFoundError:
        return ()
    for line in lines:
        try:
            facts = json.loads(line)
            event = facts["event"]
        except (KeyError, RecursionError, TypeError, ValueError):
            continue
        if event == "begin" and (attempt := _attempt(facts)) is not None:
            begun[attempt.number] = attempt
        elif event == "end" and (end := _end(facts)) is not None:
            ends[facts["number"]] = end
    return tuple(PastAttempt(begun[number], ends.get(number)) for number in sorted(begun))


def _attempt(facts: Mapping[str, Any]) -> Attempt | None:
    try:
        return Attempt(
            number=int(facts["number"]),
            token=str(facts["token"]),
            job_id=facts["job_id"],
            restart=int(facts["restart"]),
            hosts=tuple(facts["hosts"]),
            started=float(facts["started"]),
            layout=dict(facts["layout"]),
            world_size=int(facts["world_size"]),
        )
    except (KeyError, TypeError, ValueError):
        return None


def _end(facts: Mapping[str, Any]) -> AttemptEnd | None:
    try:
        facts["number"] + 0
        return AttemptEnd(
            ended=float(facts["ended"]),
            exit_code=int(facts["exit_code"]),
            reason=str(facts["reason"]),
            iteration=facts["iteration"],
        )
    except (KeyError, TypeError, ValueError):
        return None


def _append(path: Path, facts: Mapping[str, Any]) -> None:
    with disk_errors(path), path.open("ab+") as stream:
        # What a crash has torn ends here, or it would take this line with it.
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - 1))
        ends_whole = stream.read(1) in (b"\n", b"")
        stream.write(b"" if ends_whole else b"\n")
        stream.write(json.dumps(facts).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())
