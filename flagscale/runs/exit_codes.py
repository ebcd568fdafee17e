"""Exit codes by which a rank tells its launcher what to do next.

0 to 3 are those of :mod:`flagscale.errors`; 128 + N stands for signal N.
"""

from __future__ import annotations

from typing import Final

from flagscale.errors import SupersededError

__all__ = ["HUNG", "SAVED", "SUPERSEDED"]

SAVED: Final = 75
"""Ended early, on a signal or at ``--exit-duration-in-mins``; saved; there is more to do."""

SUPERSEDED: Final = SupersededError.exit_code
"""A later attempt owns the run: this one has stopped, and its end means nothing."""

HUNG: Final = 77
"""No progress for ``--hang-minutes``."""
