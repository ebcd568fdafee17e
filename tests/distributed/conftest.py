"""One small corpus for all distributed tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.corpus import write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a .bin/.idx pair."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text_document")
