"""Publishing: a reader sees a whole checkpoint or none.

Everything is on the disk before the one rename that makes it visible, and the pointer to the latest
iteration, if there is one, is written after it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from flagscale.ckpt_io.claims import Claims
from flagscale.ckpt_io.journal import RECEIPT, Staging
from flagscale.ckpt_io.location import TRACKER
from flagscale.ckpt_io.raw import disk_errors, flush_directory, replace_text
from flagscale.errors import CheckpointError

__all__ = ["TRACKER", "publish"]

_POLL_SECONDS: Final = 0.2


def publish(
    staging: Staging,
    tracker: int | str | None,
    digests: dict[str, str],
    complete: Callable[[Path, dict[str, str]], None] | None = None,
    *,
    stale_after: float = 60.0,
) -> bool:
    """Make a finished output visible; of several tasks one does it and the others wait for it.

    Args:
        staging: Its files are all finished.
        tracker: Written to the file that names the last checkpoint: an iteration, or "release";
            None writes none, where the destination is no checkpoint's.
        digests: SHA-256 of each file by its path, in hexadecimal.
        complete: Called with the staged directory and the digests, the receipt's included, to add
            what needs them, such as a manifest. May be called again after a crash.
        stale_after: Seconds after which a task on another machine counts as dead.

    Returns:
        Whether this task did it.

    Raises:
        CheckpointError: The destination exists, or the disk refuses.
    """
    ours = False
    try:
        ours = _take_turns(staging, digests, complete, stale_after)
    except CheckpointError:
        if not staging.is_published():  # by another task, whose work was taken from under us
            raise
    if not staging.is_published():
        raise CheckpointError(
            "the staging directory is gone", where=str(staging.root), cure="run again"
        )
    if ours or staging.root.exists():
        if tracker is not None:
            replace_text(staging.destination.parent / TRACKER, str(tracker))
        staging.remove()
    return ours


def _take_turns(
    staging: Staging,
    digests: dict[str, str],
    complete: Callable[[Path, dict[str, str]], None] | None,
    stale_after: float,
) -> bool:
    if staging.is_published() or not staging.journal.is_dir():
        return False
    with Claims(staging.journal, stale_after) as claims:
        while not staging.is_published():
            if claims.acquire("publish"):
                _make_visible(staging, dict(digests), complete)
                return True
            time.sleep(_POLL_SECONDS)
    return False


def _make_visible(
    staging: Staging,
    digests: dict[str, str],
    complete: Callable[[Path, dict[str, str]], None] | None,
) -> None:
    with disk_errors(staging.destination):
        receipt = json.dumps({"plan": staging.fingerprint}).encode()
        (staging.data / RECEIPT).write_bytes(receipt)
        digests[RECEIPT] = hashlib.sha256(receipt).hexdigest()
        if complete is not None:
            complete(staging.data, digests)
        for directory, _, names in os.walk(staging.data):
            for name in names:
                with open(os.path.join(directory, name), "rb") as stream:
                    os.fsync(stream.fileno())
            flush_directory(Path(directory))
        try:
            # Replaces nothing: another file of that name is in the way, and so is a directory
            # unless it is empty.
            if os.path.lexists(staging.destination):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            os.rename(staging.data, staging.destination)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise CheckpointError(
                "the destination has come into being meanwhile",
                where=str(staging.destination),
                cure=f"remove it and run again: {staging.root} is complete",
            ) from error
        flush_directory(staging.destination.parent)
