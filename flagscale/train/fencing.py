"""Ranks of an attempt that has been superseded stop, and publish nothing.

Every rank looks before each save and, at most once in some seconds, at the end of a step; rank 0
looks again before a checkpoint is marked (:mod:`flagscale.patches.tracker`), and whoever ends for
any other reason looks before it writes its last words (:mod:`flagscale.train.__main__`).
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

from flagscale.hooks import Hooks
from flagscale.runs.fence import Fence

__all__ = ["Lookout", "connect"]

_INTERVAL_SECONDS = 5.0
"""Between two looks at the ends of steps: of thousands of ranks, each is a call to a server."""


@dataclass
class Lookout:
    """Looks at the fence.

    Args:
        fence: Of this rank.
        interval: Seconds.
        clock: Seconds, monotonic.
    """

    fence: Fence
    interval: float = _INTERVAL_SECONDS
    clock: Callable[[], float] = time.monotonic
    _last: float = field(init=False)

    def __post_init__(self) -> None:
        """The last look was long ago."""
        self._last = float("-inf")

    def look(self) -> None:
        """Look.

        Raises:
            SupersededError: Another attempt owns the run.
        """
        self._last = self.clock()
        self.fence.check()

    def look_now_and_then(self) -> None:
        """Look, unless the last look was a moment ago.

        Raises:
            SupersededError: Another attempt owns the run.
        """
        if self.clock() - self._last >= self.interval:
            self.look()


def connect(hooks: Hooks, _args: Namespace) -> None:
    """Before all other listeners: what they would write must not be written."""
    fence = Fence.from_environment()
    if fence is None:
        return
    lookout = Lookout(fence)
    hooks.on_train_start.insert(0, lambda _: lookout.look())
    hooks.on_step_end.insert(0, lambda _: lookout.look_now_and_then())
    hooks.on_save_start.insert(0, lambda _: lookout.look())
    hooks.on_save.insert(0, lambda _: lookout.look())
