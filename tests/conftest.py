"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a small .bin/.idx pair."""
    from harness.corpus import write_corpus  # imports torch: not for the fast tests

    return write_corpus(tmp_path_factory.mktemp("corpus") / "text_document")


@pytest.fixture(scope="session")
def fp32_checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One step from a seed on one rank, saved in fp32: a start common to every layout."""
    from harness import train
    from harness.corpus import model_argv

    work = tmp_path_factory.mktemp("fp32")
    argv = model_argv(corpus, bf16=False, save=work / "checkpoints", save_interval=1, train_iters=1)
    train(argv, work / "logs").require_success()
    return work / "checkpoints"
