"""``--hang-minutes``: a job that makes no progress ends itself, and says which rank is to blame.

When one rank stops, the others soon wait for it in a collective, for as long as the communication
library lets them. Each rank therefore watches itself. One that hangs prints the stacks of its
threads, notes whether it was waiting for others, and ends; those that do wait let the others go
first, so that the first record of the job is that of a rank that did not.
"""

from __future__ import annotations

import faulthandler
import linecache
import os
import re
import sys
import threading
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

from flagscale.errors import ConfigError
from flagscale.hooks import ExitEvent, Hooks, StepEvent
from flagscale.runs.exit_codes import HUNG
from flagscale.train.failure import end_children, record_failure

__all__ = ["Watch", "add_arguments", "connect", "is_waiting", "verify_arguments", "where_is"]


def add_arguments(parser: ArgumentParser) -> None:
    """``--hang-minutes``."""
    parser.add_argument_group(title="FlagScale: hangs").add_argument(
        "--hang-minutes",
        type=float,
        default=None,
        metavar="M",
        help="End the job with exit code 77 when a rank has made no progress (a micro batch, a "
        "step, the begin or end of a save) for this long after the first step. It must be longer "
        "than the longest save. Off by default.",
    )


def verify_arguments(args: Namespace) -> None:
    """Refuse what is no time.

    Raises:
        ConfigError: It is not positive.
    """
    if args.hang_minutes is not None and not args.hang_minutes > 0:
        raise ConfigError(
            "a hang cannot be told in no time",
            where="--hang-minutes",
            expected="minutes, longer than the longest save",
            got=args.hang_minutes,
            cure="leave it out to watch for no hangs",
        )


@dataclass
class Watch:
    """Tells progress from its absence.

    Args:
        patience: Seconds without progress that are a hang.
        clock: Seconds, monotonic.
    """

    patience: float
    clock: Callable[[], float] = time.monotonic
    _armed: bool = field(default=False, init=False)
    _count: int = field(default=0, init=False)
    _since: float = field(default=0.0, init=False)

    @property
    def poll(self) -> float:
        """Seconds between two looks."""
        return min(self.patience / 20, 5.0)

    @property
    def linger(self) -> float:
        """Seconds for which a rank that hangs lets the others print their stacks."""
        return min(self.patience / 5, 10.0)

    def arm(self) -> None:
        """Begin to watch: from now on progress is expected."""
        self._armed = True
        self.note_progress()

    def disarm(self) -> None:
        """Watch no longer."""
        self._armed = False

    def note_progress(self) -> None:
        """Something was done."""
        self._count += 1
        self._since = self.clock()

    def stalled(self) -> bool:
        """Whether nothing was done for too long."""
        return self._armed and self.clock() - self._since > self.patience

    def progress(self) -> int:
        """A number that changes with each progress."""
        return self._count


def connect(hooks: Hooks, args: Namespace) -> None:
    """Watch from the end of the first step on."""
    if args.hang_minutes is None:
        return
    watch = Watch(args.hang_minutes * 60)

    def end_step(_event: StepEvent) -> None:
        watch.arm()

    def note(_event: Any) -> None:
        watch.note_progress()

    def finish(_event: ExitEvent) -> None:
        watch.disarm()
        faulthandler.cancel_dump_traceback_later()

    hooks.on_step_end.append(end_step)
    for events in (hooks.on_forward, hooks.on_forward_loss, hooks.on_save_start, hooks.on_save):
        events.append(note)
    hooks.on_exit.append(finish)
    main_thread = threading.get_ident()
    threading.Thread(
        target=_keep_watch, args=(watch, main_thread), name="hang watch", daemon=True
    ).start()


def _keep_watch(watch: Watch, main_thread: int) -> None:
    while True:
        time.sleep(watch.poll)
        # For a thread that never lets this one run: then the interpreter's own timer prints the
        # stacks and ends the process, with exit code 1 and no record.
        faulthandler.dump_traceback_later(watch.patience + 2 * watch.linger, exit=True)
        if watch.stalled():
            _settle(watch, main_thread)


def _settle(watch: Watch, main_thread: int) -> None:
    """Print the stacks; end the process unless it goes on after all."""
    before = watch.progress()
    faulthandler.dump_traceback(file=2, all_threads=True)
    others = sys._current_frames()
    others.pop(threading.get_ident())
    frame = others.pop(main_thread)
    waiting, place = is_waiting(frame, list(others.values())), where_is(frame)
    del frame, others
    time.sleep(watch.linger * (3 if waiting else 1))
    if watch.progress() == before:
        _end(watch.patience, waiting, place)


def _end(patience: float, waiting: bool, place: str) -> NoReturn:
    doing = "waiting for other ranks" if waiting else "not waiting for other ranks"
    message = f"no progress for {patience / 60:g} minutes; {doing}, in {place}"
    record_failure(message, HUNG, waiting=waiting, line=place)
    os.write(2, f"{message}\n".encode())
    end_children()
    os._exit(HUNG)


_WAITS = re.compile(r"(wait|barrier|synchronize|\.item|\.tolist|\.cpu)\(")
"""On the innermost line: calls that return when other ranks, or the device, have done something."""


def is_waiting(frame: FrameType, others: Sequence[FrameType] = ()) -> bool:
    """Whether a thread waits for other ranks: in a collective, or for one to end.

    A device that waits for other devices is itself waited for: by ``item()``, ``synchronize()``...

    Args:
        frame: The innermost one of the thread.
        others: Those of the process's other threads: in a backward pass one of them may wait for
            it.
    """
    path = frame.f_code.co_filename
    if "/torch/autograd/" in path:
        return any(is_waiting(other) for other in others)
    if "/torch/distributed/" in path:
        return "/checkpoint/" not in path  # which waits for files
    if any(one.f_code.co_filename.endswith(_FUNCTIONAL) for one in _outwards(frame)):
        return True
    return bool(_WAITS.search(linecache.getline(path, frame.f_lineno)))


_FUNCTIONAL = "/torch/distributed/_functional_collectives.py"


def where_is(frame: FrameType) -> str:
    """The innermost line outside torch and Python's own library, as ``file:line, name: text``."""
    ours = next((one for one in _outwards(frame) if not _is_library(one)), frame)
    path, line = ours.f_code.co_filename, ours.f_lineno
    return f"{path}:{line}, {ours.f_code.co_name}: {linecache.getline(path, line).strip()}"


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


_STANDARD_LIBRARY = os.path.dirname(os.__file__) + os.sep


def _is_library(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    is_standard = path.startswith(_STANDARD_LIBRARY) and "site-packages" not in path
    return is_standard or "/torch/" in path or path.startswith("<")
