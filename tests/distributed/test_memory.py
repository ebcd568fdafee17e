"""Predicted memory against the measured peak of real runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.corpus import model_argv
from harness.memory import LAYOUTS, TINY_SIZES, measure_peaks, predict_ranks


@pytest.mark.parametrize("layout", ["full", "MoE+EP2"])  # bench/memory.py: all
def test_the_prediction_is_within_a_tenth(corpus: Path, tmp_path: Path, layout: str) -> None:
    nproc, changes = LAYOUTS[layout]
    argv = model_argv(corpus, **{**TINY_SIZES, **changes})
    predicted = [terms.total for terms in predict_ranks(argv, nproc)]
    measured = measure_peaks(argv, tmp_path, nproc)
    ratios = [p / m for p, m in zip(predicted, measured, strict=True)]
    assert all(0.9 < ratio < 1.1 for ratio in ratios), ratios
