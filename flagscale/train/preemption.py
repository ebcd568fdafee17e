"""A signal that means "save and leave": none is lost, and the launcher is told what it led to.

Upstream listens for ``--exit-signal`` once its arguments are parsed, after seconds or minutes of
imports in which the signal would kill the process. This module listens before, and hands on what it
heard. Upstream leaves with exit code 0, as if there were nothing more to do; the code here says
that there is.
"""

from __future__ import annotations

import os
import signal
import threading
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from flagscale.errors import FlagScaleError
from flagscale.hooks import EarlyExit, ExitReason, Hooks, TrainStart
from flagscale.runs.exit_codes import SAVED

__all__ = ["connect", "exit_code", "remember"]


@dataclass
class _Heard:
    """What this process has heard, and what became of it."""

    signum: int | None = None
    """The one listened for."""
    received: bool = False
    exit_code: int = 0
    """Of an orderly end."""


_HEARD = _Heard()


def remember(argv: Sequence[str]) -> None:
    """Listen for ``--exit-signal``, if ``--exit-signal-handler`` is given, until upstream does."""
    signum = _exit_signal(argv)
    if signum is not None and _HEARD.signum is None:
        _HEARD.signum = signum
        signal.signal(signum, _receive)
        _listen(signum)


def _listen(signum: int) -> None:
    """Let the signal in, and keep it from the processes that this one starts.

    Slurm sends it to all processes of a step, and a launcher to the whole group: those that help to
    write a checkpoint would die of it just when one is to be written. They inherit what the main
    thread blocks; so another thread has to be the one that the kernel can deliver it to.
    """
    if signum == signal.SIGTERM:  # by which such processes are ended, in order
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signum})
    listening = threading.Event()
    threading.Thread(
        target=_let_in, args=(signum, listening), name="exit-signal", daemon=True
    ).start()
    listening.wait()


def _let_in(signum: int, listening: threading.Event) -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signum})
    listening.set()
    threading.Event().wait()  # for ever: Python runs handlers in the main thread


def _exit_signal(argv: Sequence[str]) -> int | None:
    # By hand: argparse would cost time that a signal may come in, and upstream's parser is far.
    if "--exit-signal-handler" not in argv:
        return None
    name = "SIGTERM"
    for word, following in zip(argv, [*argv[1:], ""], strict=True):
        if word == "--exit-signal":
            name = following
        elif word.startswith("--exit-signal="):
            name = word.partition("=")[2]
    return getattr(signal.Signals, name, None)  # of one that does not exist upstream complains


def _receive(_signum: int, _frame: FrameType | None) -> None:
    _HEARD.received = True


def exit_code() -> int:
    """What a process ends with that upstream has ended in order."""
    return _HEARD.exit_code


def connect(hooks: Hooks, args: Namespace) -> None:
    """Hand on a signal heard too early; note an end before the last iteration."""
    hooks.on_train_start.append(_hand_on)
    hooks.on_early_exit.append(lambda event: _leave(args, event))


def _hand_on(_event: TrainStart) -> None:
    if _HEARD.signum is not None and _HEARD.received:
        _HEARD.received = False
        os.kill(os.getpid(), _HEARD.signum)  # to upstream's handler


def _leave(args: Namespace, event: EarlyExit) -> None:
    if event.reason is ExitReason.PLANNED or event.iteration >= args.train_iters:
        return
    if args.save:
        _HEARD.exit_code = SAVED
    elif event.reason is ExitReason.SIGNAL:
        raise FlagScaleError(
            "ended by a signal, and nothing was saved",
            where="--exit-signal-handler",
            expected="--save DIRECTORY",
            got=f"no --save; {event.iteration} iterations are lost",
            cure="give --save, or leave --exit-signal-handler out",
        )
