"""Why an attempt ended, and what follows from it: tables."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.launch.ending import (
    FRUITLESS_LIMIT,
    Action,
    Cause,
    Ending,
    TaskEnd,
    cause_of,
    decide,
    read_srun_line,
)
from flagscale.runs.exit_codes import HUNG, SAVED, SUPERSEDED

KILLED = TaskEnd("b", "1", 137)
GONE = TaskEnd("b", "", 137)


def record(rank: int, message: str, exit_code: int = 1, time: float = 1, **more: Any) -> Any:
    return {"rank": rank, "message": message, "exit_code": exit_code, "time": time, **more}


LOST_PEER = record(0, "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:3", time=0)
NCCL = record(3, "DistBackendError: NCCL error in: x.cpp, remote process exited", time=0)
BUG = record(2, "ValueError: no", time=5)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("srun: error: b: task 1: Killed", KILLED),
        ("srun: error: gpu-7: task 12: Exited with exit code 75", TaskEnd("gpu-7", "12", 75)),
        ("srun: error: b: tasks 0-3: Terminated\n", TaskEnd("b", "0-3", 143)),
        ("srun: error: b: task 0: Segmentation fault (core dumped)", TaskEnd("b", "0", 139)),
        ("srun: error: b: task 0: Out Of Memory", TaskEnd("b", "0", 137)),
        ("srun: error: Node failure on b", GONE),
        ("srun: error: Node failure on b, c", GONE),
        ("srun: Force Terminated StepId=7.2", None),
        ("srun: launch/slurm: _step_signal: Terminating StepId=7.2", None),
        ("srun: cluster configuration lacks support for cpu binding", None),
    ],
)
def test_what_srun_says_of_a_task(line: str, expected: TaskEnd | None) -> None:
    assert read_srun_line(line) == expected


@pytest.mark.parametrize(
    ("code", "finished", "ends", "records", "cause", "exit_code", "words"),
    [
        (0, True, [], [], Cause.DONE, 0, "last iteration"),
        (0, False, [], [], Cause.STOPPED, 0, "by itself"),
        (75, False, [TaskEnd("a", "0", 75)], [], Cause.SAVED, SAVED, "more to do"),
        # The others are ended because one has left.
        (143, False, [TaskEnd("a", "0", 75), TaskEnd("b", "1", 143)], [], Cause.SAVED, SAVED, ""),
        (76, False, [], [], Cause.SUPERSEDED, SUPERSEDED, "another attempt"),
        (137, False, [TaskEnd("a", "0", 76)], [], Cause.SUPERSEDED, SUPERSEDED, ""),
        (137, False, [KILLED], [], Cause.LOST, 137, "rank 1 on b ended by SIGKILL"),
        # Its peers' records are a consequence.
        (137, False, [KILLED], [LOST_PEER], Cause.LOST, 137, "rank 1 on b"),
        (143, False, [TaskEnd("a", "0", 1)], [LOST_PEER], Cause.LOST, 143, "rank 0 lost its peers"),
        (1, False, [], [NCCL, LOST_PEER], Cause.LOST, 1, "lost its peers"),
        (137, False, [GONE], [LOST_PEER], Cause.LOST, 137, "machine b was lost"),
        # One that says why is to blame, whoever was quicker.
        (143, False, [TaskEnd("a", "0", 1)], [LOST_PEER, BUG], Cause.FAILED, 1, "rank 2 failed"),
        (134, False, [TaskEnd("a", "0", 134)], [BUG], Cause.FAILED, 1, "rank 2 failed"),
        (134, False, [TaskEnd("a", "0", 134)], [LOST_PEER], Cause.LOST, 134, "lost its"),
        (143, False, [], [record(1, "no such file", 2)], Cause.FAILED, 2, "no such file"),
        (3, False, [], [record(0, "a checkpoint", 3)], Cause.FAILED, 3, "rank 0"),
        (1, False, [], [record(4, "CUDA: uncorrectable ECC error")], Cause.LOST, 1, "rank 4"),
        (1, False, [TaskEnd("a", "5", 1)], [], Cause.FAILED, 1, "no rank said why"),
        (139, False, [], [], Cause.LOST, 139, "SIGSEGV"),
    ],
)
def test_why_an_attempt_ended(
    code: int,
    finished: bool,
    ends: list[TaskEnd],
    records: list[Any],
    cause: Cause,
    exit_code: int,
    words: str,
) -> None:
    ending = cause_of(code, finished, ends, records)
    assert (ending.cause, ending.exit_code) == (cause, exit_code)
    assert words in ending.reason
    assert "\n" not in ending.reason


def test_the_rank_that_did_not_wait_hung() -> None:
    records = [
        record(0, "no progress", HUNG, waiting=True),
        record(3, "no progress: asleep", HUNG, time=9, waiting=False, line="data.py:7"),
    ]
    ending = cause_of(137, False, [TaskEnd("a", "0", 77)], records)
    assert (ending.cause, ending.exit_code) == (Cause.HUNG, HUNG)
    assert ending.reason == "rank 3 hung at data.py:7 while the others waited"
    assert ending.detail == "no progress: asleep"
    assert "each waiting" in cause_of(77, False, [], records[:1]).reason


@pytest.mark.parametrize("ends", [[], [KILLED], [TaskEnd("b", "1", 143)], [GONE]])
def test_a_job_that_slurm_ends_is_not_lost(ends: list[TaskEnd]) -> None:
    ending = cause_of(137, False, ends, [LOST_PEER], received=signal.SIGTERM)
    assert ending.cause is Cause.ENDED
    assert ("machine b was lost" in ending.reason) == (ends == [GONE])


@pytest.mark.parametrize(
    ("cause", "restarts", "fruitless", "action", "words"),
    [
        (Cause.DONE, 0, 0, Action.END, ""),
        (Cause.STOPPED, 0, 0, Action.END, ""),
        (Cause.FAILED, 0, 1, Action.END, ""),
        (Cause.ENDED, 0, 1, Action.END, ""),
        (Cause.SUPERSEDED, 0, 0, Action.END, ""),
        (Cause.SAVED, 0, 0, Action.AGAIN, "restart 1 of 10"),
        (Cause.LOST, 9, 1, Action.AGAIN, "restart 10 of 10"),
        (Cause.HUNG, 3, 2, Action.AGAIN, ""),
        (Cause.SAVED, 10, 0, Action.END, "max-restarts is 10"),
        (Cause.LOST, 10, 0, Action.END, "max-restarts is 10"),
        (Cause.LOST, 4, 3, Action.END, "3 attempts in a row"),
        (Cause.HUNG, 4, 3, Action.END, "3 attempts in a row"),
        # A storm of pre-emption is not a broken job.
        (Cause.SAVED, 4, 9, Action.AGAIN, ""),
    ],
)
def test_what_follows(
    cause: Cause, restarts: int, fruitless: int, action: Action, words: str
) -> None:
    ending = Ending(cause, 5, "why")
    decision = decide(ending, restarts=restarts, max_restarts=10, fruitless=fruitless)
    assert decision.action is action
    assert decision.exit_code == 5
    assert decision.reason.startswith("why")
    assert words in decision.reason


def test_without_a_queue_a_person_has_to_start_it_again() -> None:
    decision = decide(
        Ending(Cause.SAVED, SAVED, "why"),
        restarts=0,
        max_restarts=10,
        fruitless=0,
        can_requeue=False,
    )
    assert (decision.action, decision.exit_code) == (Action.END, SAVED)


@given(
    cause=st.sampled_from(Cause),
    restarts=st.integers(0, 100),
    max_restarts=st.integers(0, 100),
    fruitless=st.integers(0, 10),
)
def test_the_cap_holds_whatever_happens(
    cause: Cause, restarts: int, max_restarts: int, fruitless: int
) -> None:
    decision = decide(
        Ending(cause, 1, "why"), restarts=restarts, max_restarts=max_restarts, fruitless=fruitless
    )
    if decision.action is Action.AGAIN:
        assert restarts < max_restarts
        assert cause in (Cause.SAVED, Cause.LOST, Cause.HUNG)
        assert cause is Cause.SAVED or fruitless < FRUITLESS_LIMIT
