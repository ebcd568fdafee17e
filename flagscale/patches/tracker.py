"""The file that names the last checkpoint: written whole, and after the checkpoint's own marker.

Upstream opens it for writing in its place: a crash in that moment leaves it empty, and an empty one
ends the next start with exit code 0.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flagscale.ckpt_io.location import TRACKER
from flagscale.ckpt_io.raw import replace_text
from flagscale.patches.registry import Kind, Patch, PatchGroup
from flagscale.runs.complete import iteration_directory, write_marker
from flagscale.runs.fence import Fence

__all__ = ["GROUP", "publish_checkpoint"]


def publish_checkpoint(tracker: Path, content: str) -> None:
    """Mark a checkpoint as whole, then point to it. Called when all ranks have written theirs.

    Args:
        tracker: The file.
        content: An iteration, or ``release``.

    Raises:
        SupersededError: Another attempt owns the run.
        CheckpointError: The disk refuses.
    """
    fence = Fence.from_environment()
    if fence is not None:
        fence.check()
    if content.isdecimal():
        directory = iteration_directory(tracker.parent, int(content))
        write_marker(directory, attempt=None if fence is None else fence.number())
        if fence is not None:
            fence.check()
    replace_text(tracker, content)


@contextlib.contextmanager
def _publication(tracker: Path) -> Iterator[io.StringIO]:
    """What upstream writes to, in the place of the file."""
    content = io.StringIO()
    yield content
    publish_checkpoint(tracker, content.getvalue())


class _FilesWithTracker:
    """Upstream's access to files, local or in an object store, but for writing the tracker."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        from megatron.core.msc_utils import MultiStorageClientFeature

        is_local = not MultiStorageClientFeature.is_enabled()
        if is_local and "w" in mode and Path(path).name == TRACKER:
            return _publication(Path(path))
        return self._original.open(path, mode, *args, **kwargs)


GROUP = PatchGroup(
    name="tracker",
    patches=(
        Patch(
            target="megatron.core.msc_utils:maybe_msc",
            kind=Kind.VALUE,
            replacement=_FilesWithTracker,
            fingerprint="d95605e41474f3fc",
        ),
    ),
    reason="a crash while the tracker is written leaves it empty, and no save is marked as whole",
    upstream="megatron-core 0.19.2, training/checkpointing.py:1011",
)
