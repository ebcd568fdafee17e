"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.hookimpl(wrapper=True, tryfirst=True)  # so that what it writes comes last
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> Iterator[None]:
    """In CI, fail a run that skipped a test: a check that does not run protects nothing."""
    yield
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not os.environ.get("CI") or exitstatus != pytest.ExitCode.OK:
        return
    if skipped := reporter.stats.get("skipped"):
        reporter.write_line(f"CI is set: {len(skipped)} skipped, so the run fails", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
