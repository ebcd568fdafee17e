"""One offline HTML file about a run: its curves, its spikes, and the documents behind them.

model.py      what it is made from
curves.py     the curves, by plotly, as plain data
heat.py       the samples of a step, likewise
excerpt.py    texts, cut around what matters
page.py       the page; page.css how it looks, page.js what it does
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from flagscale.data.output import flush_to_disk, writing_to
from flagscale.data_inspect.report.model import (
    AttemptMark,
    Command,
    CurveArrays,
    DocumentText,
    Highlight,
    Limits,
    Mark,
    RankedDocument,
    Report,
    SpikeStep,
)
from flagscale.data_inspect.report.page import MARKER, build_page, verdict
from flagscale.errors import ConfigError

__all__ = [
    "AttemptMark",
    "Command",
    "CurveArrays",
    "DocumentText",
    "Highlight",
    "Limits",
    "Mark",
    "RankedDocument",
    "Report",
    "SpikeStep",
    "render",
    "verdict",
    "write_report",
]


def render(report: Report, limits: Limits | None = None) -> str:
    """The page as a string, which needs nothing but a browser.

    Raises:
        ConfigError: plotly is not installed.
    """
    return build_page(report, limits or Limits())


def write_report(
    report: Report, path: Path, *, limits: Limits | None = None, overwrite: bool = False
) -> int:
    """Write the page beside its place and rename it into it: a reader sees all of it or none.

    Args:
        report: What it shows.
        path: The file; an older report is replaced.
        limits: How much it may hold.
        overwrite: Replace a file that no report was.

    Returns:
        Its size in bytes.

    Raises:
        ConfigError: Another file is there, or plotly is not installed.
        DataError: The disk refuses.
    """
    if not overwrite:
        _refuse_other_files(path)
    page = render(report, limits).encode("utf-8")
    draft = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with writing_to(path):
        try:
            draft.write_bytes(page)
            flush_to_disk(draft)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
    return len(page)


def _refuse_other_files(path: Path) -> None:
    if not os.path.lexists(path):
        return
    with writing_to(path):
        start = _first_bytes(path) if path.is_file() else b""
    if MARKER.encode() not in start.splitlines()[:2]:
        raise ConfigError(
            "a file is there that is not a report",
            where=str(path),
            expected="no file, or a report to replace",
            cure="give another path, or ask for the file to be overwritten",
        )


def _first_bytes(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(256)
