"""What the ranks of a job on the tests' Slurm do besides training: note steps, and fail as told.

A plugin like anybody's, found by an entry point; :func:`environ_for` makes the ranks load it.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flagscale.plugins import Plugin

__all__ = ["PLUGIN", "Fault", "StepRow", "environ_for", "read_steps"]

_TOLD = "FLAGSCALE_SLURM_TEST"
_HOLD_SECONDS = 180.0


@dataclass(frozen=True)
class Fault:
    """What one rank does at the end of a step, before the step's save.

    Args:
        kind: ``raise``; ``kill``, SIGKILL to itself; ``hang``, for ever; ``hold``, wait until
            ``file`` is gone; ``kill-in-save``, SIGKILL when its next save has begun writing.
        rank: Which.
        iteration: In which.
        restart: Only in this attempt of the job, as Slurm counts them.
        file: For ``hold``. The rank makes it, so that one can wait for it.
    """

    kind: str
    rank: int
    iteration: int
    restart: int = 0
    file: str = ""


@dataclass(frozen=True)
class StepRow:
    """A step as a rank saw it; ``loss`` is ``None`` before the last pipeline stage."""

    iteration: int
    loss: float | None
    grad_norm: float
    restart: int
    token: str
    time: float


def environ_for(
    site: Path, steps: Path, faults: Sequence[Fault] = (), pace: float = 0.0
) -> dict[str, str]:
    """The environment of a job whose ranks do so.

    Args:
        site: A directory for the plugin's entry point; made if missing.
        steps: The directory for what the ranks saw; made if missing.
        faults: What goes wrong.
        pace: Seconds that each step takes longer.
    """
    info = site / "flagscale_slurm_test-1.dist-info"
    if not info.exists():
        info.mkdir(parents=True)
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: flagscale-slurm-test\nVersion: 1\n"
        )
        (info / "entry_points.txt").write_text(
            f"[flagscale.plugins]\nslurm-test = {__name__}:PLUGIN\n"
        )
    steps.mkdir(parents=True, exist_ok=True)
    told = {"steps": str(steps), "pace": pace, "faults": [asdict(fault) for fault in faults]}
    tests = Path(__file__).parents[1]
    paths = [str(site), str(tests)]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        _TOLD: json.dumps(told),
        "FLAGSCALE_PLATFORM": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def read_steps(steps: Path) -> dict[int, list[StepRow]]:
    """What the ranks saw, by rank, in order of time."""
    return {
        int(path.name.split(".")[1]): [
            StepRow(**json.loads(line)) for line in path.read_text().splitlines()
        ]
        for path in sorted(steps.glob("rank.*.jsonl"))
    }


def _connect(hooks: Any, _args: Any) -> None:
    told: Mapping[str, Any] = json.loads(os.environ.get(_TOLD, "{}"))
    if not told:
        return
    rank = int(os.environ["RANK"])
    restart = int(os.environ.get("SLURM_RESTART_COUNT") or 0)
    file = Path(told["steps"]) / f"rank.{rank}.jsonl"
    faults = [Fault(**fault) for fault in told["faults"]]
    own = [fault for fault in faults if (fault.rank, fault.restart) == (rank, restart)]
    doomed = [fault for fault in own if fault.kind == "kill-in-save"]

    def step(event: Any) -> None:
        losses = [float(loss) for loss in event.losses.values()]
        row = StepRow(
            iteration=event.iteration,
            loss=losses[0] if losses else None,
            grad_norm=float(event.grad_norm or 0.0),
            restart=restart,
            token=os.environ.get("FLAGSCALE_ATTEMPT", ""),
            time=time.time(),
        )
        with file.open("a") as rows:
            rows.write(json.dumps(asdict(row)) + "\n")
        time.sleep(told["pace"])
        for fault in own:
            if fault.iteration == event.iteration:
                _act(fault)

    def save(event: Any) -> None:
        if any(fault.iteration == event.iteration for fault in doomed):
            _die_at_the_next_file()

    hooks.on_train_start.append(_spare_a_process)
    hooks.on_step_end.append(step)
    if doomed:
        hooks.on_save_start.append(save)


def _spare_a_process(_event: Any) -> None:
    """Make what upstream makes for the first save in a spawned process, which imports all anew."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import (
        get_write_results_queue,
    )

    get_write_results_queue("fork")


def _act(fault: Fault) -> None:
    if fault.kind == "raise":
        raise RuntimeError(f"told to fail at iteration {fault.iteration}")
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault.kind == "hang":
        while True:
            time.sleep(1)  # the line that is to be named
    if fault.kind == "hold":
        hold = Path(fault.file)
        hold.touch()
        deadline = time.monotonic() + _HOLD_SECONDS
        while hold.exists() and time.monotonic() < deadline:
            time.sleep(0.1)


def _die_at_the_next_file() -> None:
    """In this process or a writer that it forks: half of the save is on the disk."""
    leader = os.getpid()

    def die(_descriptor: int) -> None:
        os.kill(leader, signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    os.fsync = die  # type: ignore[assignment]


PLUGIN = Plugin(name="slurm-test", connect=_connect)
