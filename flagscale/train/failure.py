"""How a rank that cannot go on says why, and ends without waiting for anyone."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from pathlib import Path

from flagscale.errors import SupersededError
from flagscale.runs.fence import Fence

__all__ = ["ERROR_FILE", "end_children", "record_failure", "superseded"]

ERROR_FILE = "FLAGSCALE_ERROR_FILE"
"""Environment variable of a rank: where the launcher looks for the reason of its end."""


def record_failure(message: str, exit_code: int, **facts: object) -> None:
    """Leave the reason where the launcher looks for it.

    A superseded rank leaves none: its file is that of a rank of the later attempt by now.
    """
    if os.environ.get(ERROR_FILE) and superseded() is None:
        record = {
            "rank": int(os.environ.get("RANK", "0")),
            "time": time.time(),
            "message": message,
            "exit_code": exit_code,
            **facts,
        }
        Path(os.environ[ERROR_FILE]).write_text(json.dumps(record))


def superseded() -> SupersededError | None:
    """Whether another attempt owns the run: then whatever this rank still has to say is void."""
    fence = Fence.from_environment()
    try:
        if fence is not None:
            fence.check()
    except SupersededError as error:
        return error
    return None


def end_children() -> None:
    """End what this process has started: writers of an asynchronous save would live on."""
    for child in multiprocessing.active_children():
        child.kill()
