"""Small JSON files that are read while others write them.

Each is replaced by rename: a reader sees the old content or the new, never a part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flagscale.ckpt_io.raw import replace_text

__all__ = ["read_as", "read_record", "write_record"]


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole; its directory exists.

    Raises:
        CheckpointError: The disk refuses.
    """
    replace_text(path, json.dumps(content) + "\n")


def read_record(path: Path) -> dict[str, Any] | None:
    """What a file holds; ``None`` if it is not there, or holds no record."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def read_as[Record](path: Path, kind: Callable[..., Record]) -> Record | None:
    """What a file holds, as a dataclass; ``None`` also where its fields are those of another."""
    facts = read_record(path)
    try:
        return None if facts is None else kind(**facts)
    except TypeError:
        return None
