"""How an attempt of a job ended, and what follows from it. Pure.

srun's exit code is the largest of its tasks', and the tasks it ends itself have the largest. Why an
attempt failed is therefore put together from what srun said of the first task to end, from what
ranks recorded of their own failures, and from the code.
"""

from __future__ import annotations

import enum
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from flagscale.runs.exit_codes import HUNG, SAVED, SUPERSEDED

__all__ = [
    "FRUITLESS_LIMIT",
    "Action",
    "Cause",
    "Decision",
    "Ending",
    "TaskEnd",
    "cause_of",
    "decide",
    "read_srun_line",
]

FRUITLESS_LIMIT: Final = 3
"""Attempts in a row that died before they logged a step or saved: another would do the same."""

_TASK_LINE: Final = re.compile(
    r"srun: error: (?P<host>[^\s:]+): tasks? (?P<tasks>[\d,\-\[\]]+): "
    r"(?:Exited with exit code (?P<code>\d+)|(?P<signal>\w[\w /]*?))(?: \(core dumped\))?\s*$"
)
_NODE_LINE: Final = re.compile(
    r"(?:srun|slurmstepd): error: .*(?:Node failure on (?P<node>[^\s,]+)|NODE FAILURE|"
    r"DUE TO NODE FAILURE|node.* (?:failed|not responding))",
    re.IGNORECASE,
)
_SIGNALS: Final = {
    "Killed": signal.SIGKILL,
    "Terminated": signal.SIGTERM,
    "Aborted": signal.SIGABRT,
    "Segmentation fault": signal.SIGSEGV,
    "Bus error": signal.SIGBUS,
    "Illegal instruction": signal.SIGILL,
    "Floating point exception": signal.SIGFPE,
    "Out Of Memory": signal.SIGKILL,
}
_OF_A_PEER: Final = re.compile(
    r"connection (?:closed|reset|refused)|broken pipe|connect(?:ion)? .*timed out|socket|"
    r"gloo|nccl|DistBackendError|DistNetworkError|DistStoreError|TCPStore|"
    r"watchdog caught collective",
    re.IGNORECASE,
)
"""What a rank says when another is gone."""
_OF_THE_DEVICE: Final = re.compile(
    r"uncorrectable|ECC error|CUDA error: (?:unspecified launch failure|unknown error|"
    r"system not yet initialized|no CUDA-capable device|device is busy or unavailable)|NVLink|"
    r"fallen off the bus|Xid",
    re.IGNORECASE,
)


class Cause(enum.Enum):
    """What ended an attempt."""

    DONE = "done"
    STOPPED = "stopped"  # by an argument such as --exit-interval
    SAVED = "saved"  # after a signal, or a time that was set
    SUPERSEDED = "superseded"
    HUNG = "hung"
    LOST = "lost"  # a rank, its machine or its device; not the program's fault
    ENDED = "ended"  # from outside
    FAILED = "failed"  # the same would happen again


class Action(enum.Enum):
    """What the job does after an attempt."""

    END = "end"
    AGAIN = "again"


@dataclass(frozen=True)
class TaskEnd:
    """What srun said of tasks that ended badly, or of a machine.

    Args:
        where: The machine.
        tasks: Their numbers as srun writes them; empty for a machine.
        exit_code: As a shell has it, 128 + N for signal N.
    """

    where: str
    tasks: str
    exit_code: int


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Args:
        cause: What ended it.
        exit_code: Of the attempt.
        reason: For people, in one line.
        detail: More of it: a rank's own message.
    """

    cause: Cause
    exit_code: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Decision:
    """What follows from an attempt's end.

    Args:
        action: Whether the job is queued again.
        exit_code: Of the job, if it ends.
        reason: In one line.
    """

    action: Action
    exit_code: int
    reason: str


def read_srun_line(line: str) -> TaskEnd | None:
    """What a line of srun's says of a task's end; ``None`` if it says nothing of one."""
    line = line.rstrip()
    if match := _NODE_LINE.search(line):
        return TaskEnd(match["node"] or "", "", 128 + signal.SIGKILL)
    match = _TASK_LINE.match(line)
    if match is None:
        return None
    if match["code"] is not None:
        return TaskEnd(match["host"], match["tasks"], int(match["code"]))
    signum = _SIGNALS.get(match["signal"])
    return None if signum is None else TaskEnd(match["host"], match["tasks"], 128 + signum)


def cause_of(
    code: int,
    finished: bool,
    ends: Sequence[TaskEnd] = (),
    records: Sequence[Mapping[str, Any]] = (),
    received: int | None = None,
) -> Ending:
    """Why an attempt ended.

    Args:
        code: srun's exit code, or that of the launcher of one machine.
        finished: Whether the run's last iteration is done and saved.
        ends: Tasks that ended badly, in the order in which srun saw it.
        records: What ranks left about their failures.
        received: A signal that the launcher was sent, if it was.
    """
    if code == 0:
        if finished:
            return Ending(Cause.DONE, 0, "the last iteration is done and saved")
        return Ending(Cause.STOPPED, 0, "training ended by itself before the last iteration")
    records = sorted(records, key=lambda record: float(record.get("time", 0)))
    codes = {code, *(end.exit_code for end in ends[:1])}
    codes |= {int(record.get("exit_code", 1)) for record in records}
    if SUPERSEDED in codes:
        return Ending(Cause.SUPERSEDED, SUPERSEDED, "another attempt has taken this run over")
    if HUNG in codes:
        return _hung(records)
    first = ends[0] if ends else None
    # Ranks that srun ends because another has saved and left are no failures.
    if SAVED in (code if first is None else first.exit_code, code) and not _own_failures(records):
        return Ending(Cause.SAVED, SAVED, "saved and ended early, with more to do")
    lost = [end.where for end in ends if not end.tasks]
    if received == signal.SIGTERM:
        # Slurm ends the job: its ranks' ends follow from that.
        return _stopped_by(received, code, lost)
    if lost and not _own_failures(records):
        where = ", ".join(filter(None, lost)) or "of the job"
        return Ending(Cause.LOST, code, f"machine {where} was lost")
    abrupt = first is not None and first.exit_code > 128
    # An abort is a communication library's answer to a lost peer, if anybody says more than that.
    if (
        first is not None
        and abrupt
        and not (first.exit_code == 128 + signal.SIGABRT and _own_failures(records))
        and not _recorded(first, records)
    ):
        name = _signal_name(first.exit_code - 128)
        reason = f"rank {first.tasks} on {first.where} ended by {name}"
        return Ending(Cause.LOST, first.exit_code, reason)
    if own := _own_failures(records):
        return _failed(own[0], code)
    if records:
        record = records[0]
        message = str(record.get("message", "")).split("\n")[0]
        reason = f"rank {record.get('rank')} lost its peers: {message}"
        return Ending(Cause.LOST, code, reason, str(record.get("message", "")))
    if code > 128:
        return Ending(Cause.LOST, code, f"a rank ended by {_signal_name(code - 128)}")
    where = f" (rank {first.tasks} on {first.where})" if first else ""
    return Ending(Cause.FAILED, code, f"exit code {code}{where}, and no rank said why")


def decide(
    ending: Ending, *, restarts: int, max_restarts: int, fruitless: int, can_requeue: bool = True
) -> Decision:
    """What the job does after an attempt.

    Args:
        ending: How the attempt ended.
        restarts: How often the job has been queued again so far.
        max_restarts: How often it may be.
        fruitless: Attempts in a row, this one included, that died or hung before they logged a step
            or completed a checkpoint.
        can_requeue: Whether there is a queue.
    """
    reason, code = ending.reason, ending.exit_code
    if ending.cause not in (Cause.SAVED, Cause.HUNG, Cause.LOST):
        return Decision(Action.END, code, reason)
    if not can_requeue:
        return Decision(Action.END, code, f"{reason}; start it again to go on")
    if restarts >= max_restarts:
        return Decision(
            Action.END,
            code,
            f"{reason}; not queued again after restart {restarts}: max-restarts is {max_restarts}",
        )
    # What was told to make way has saved: a storm of that is for the cap alone.
    if ending.cause is not Cause.SAVED and fruitless >= FRUITLESS_LIMIT:
        return Decision(
            Action.END,
            code,
            f"{reason}; not queued again: {fruitless} attempts in a row ended so before a step was "
            "logged or a checkpoint completed",
        )
    return Decision(Action.AGAIN, code, f"{reason}; restart {restarts + 1} of {max_restarts}")


def _hung(records: Sequence[Mapping[str, Any]]) -> Ending:
    hung = [record for record in records if int(record.get("exit_code", 1)) == HUNG]
    # Who waits for others is not the cause.
    culprits = [record for record in hung if not record.get("waiting", True)]
    detail = str((culprits or hung or [{}])[0].get("message", ""))
    if culprits:
        ranks = ", ".join(str(record.get("rank")) for record in culprits)
        at = culprits[0].get("line") or culprits[0].get("at")
        reason = f"rank {ranks} hung{f' at {at}' if at else ''} while the others waited"
    else:
        reason = "all ranks hung, each waiting for the others"
    return Ending(Cause.HUNG, HUNG, reason, detail)


def _failed(record: Mapping[str, Any], code: int) -> Ending:
    message = str(record.get("message", ""))
    exit_code = int(record.get("exit_code", code))
    reason = f"rank {record.get('rank')} failed: {message.split(chr(10))[0]}"
    cause = Cause.LOST if exit_code == 1 and _OF_THE_DEVICE.search(message) else Cause.FAILED
    return Ending(cause, exit_code, reason, message)


def _own_failures(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Failures that are not about a peer; bad input never is."""
    return [
        record
        for record in records
        if int(record.get("exit_code", 1)) != 1
        or not _OF_A_PEER.search(str(record.get("message", "")))
    ]


def _recorded(end: TaskEnd, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of these tasks has said itself why it failed."""
    return any(record.get("rank") in _numbers(end.tasks) for record in records)


def _numbers(tasks: str) -> set[int]:
    """The numbers in srun's list of tasks, such as ``0-2,5``."""
    numbers: set[int] = set()
    for part in tasks.strip("[]").split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            numbers |= set(range(int(first), int(last or first) + 1))
    return numbers


def _stopped_by(signum: int, code: int, lost: Sequence[str]) -> Ending:
    why = "cancelled, out of time, or a machine was lost"
    if lost:
        why = f"machine {', '.join(filter(None, lost)) or 'of the job'} was lost"
    return Ending(Cause.ENDED, code, f"Slurm ended the job ({why}): {_signal_name(signum)}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
