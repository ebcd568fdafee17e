"""Fencing: ranks of an attempt that is no longer the run's owner must publish nothing.

After the failure of a node its ranks may live on, for a minute and more, even when their job has
been ended; meanwhile the next attempt trains. No process can be relied on to end them: they have to
look for themselves.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from flagscale.errors import SupersededError
from flagscale.runs.attempt import ATTEMPT_VARIABLE, RUN_DIR_VARIABLE, Attempt, current

__all__ = ["Fence"]


@dataclass(frozen=True)
class Fence:
    """Where a rank looks, and whom it expects there.

    Args:
        run_dir: The run directory.
        token: Of this rank's attempt.
    """

    run_dir: Path
    token: str

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Self | None:
        """That of this process; ``None`` where no launcher has given it an attempt."""
        run_dir, token = environ.get(RUN_DIR_VARIABLE), environ.get(ATTEMPT_VARIABLE)
        return cls(Path(run_dir), token) if run_dir and token else None

    def owner(self) -> Attempt | None:
        """The other attempt that owns the run; ``None`` as long as none is known to.

        A file that is not there, or cannot be read, is no evidence of another attempt. The file is
        opened anew each time, which is when a network file system asks its server.
        """
        owner = current(self.run_dir)
        return None if owner is None or owner.token == self.token else owner

    def check(self) -> None:
        """Look.

        Raises:
            SupersededError: Another attempt owns the run.
        """
        owner = self.owner()
        if owner is not None:
            raise SupersededError(
                f"attempt {owner.number} owns this run now: this one stops, and saves nothing",
                where=str(self.run_dir),
                expected=f"attempt {self.token}",
                got=f"attempt {owner.token} on {', '.join(owner.hosts)}",
                cure="nothing to do: the later attempt goes on",
            )

    def number(self) -> int | None:
        """The number of this rank's attempt; ``None`` if it is not the owner."""
        owner = current(self.run_dir)
        return owner.number if owner is not None and owner.token == self.token else None
