"""Predicted memory of each rank, term by term, beside the peak measured in a real run.

Trains a model of the tiny recipe's sizes on the CPU platform, two steps in each layout. Measured is
what the storages of all living tensors add up to; what an operator allocates and frees inside of
itself is not in it.

Example:
    python bench/memory.py
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import astuple, fields
from pathlib import Path

# The tests' harness forks its ranks from one process that has torch and megatron imported.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from harness.corpus import model_argv, write_corpus
from harness.memory import LAYOUTS, TINY_SIZES, measure_peaks, predict_ranks

from flagscale.layout.memory import MemoryTerms


def main() -> int:
    """Print one row a rank, in MB; 1 if a prediction is off by more than a tenth."""
    terms = [field.name for field in fields(MemoryTerms)]
    columns = [*terms, "predicted", "measured", "ratio"]
    print(f"{'layout':10}{'rank':>5}" + "".join(f"{name:>13}" for name in columns))
    ratios = []
    with tempfile.TemporaryDirectory() as scratch:
        corpus = write_corpus(Path(scratch, "text_document"))
        for name, (nproc, changes) in LAYOUTS.items():
            argv = model_argv(corpus, **{**TINY_SIZES, **changes})
            peaks = measure_peaks(argv, Path(scratch, name), nproc)
            predictions = predict_ranks(argv, nproc)
            for rank, (memory, peak) in enumerate(zip(predictions, peaks, strict=True)):
                numbers = [number / 1e6 for number in (*astuple(memory), memory.total, peak)]
                row = "".join(f"{number:13.2f}" for number in numbers)
                ratios.append(memory.total / peak)
                print(f"{name:10}{rank:5}{row}{ratios[-1]:13.3f}", flush=True)
    return int(not all(0.9 < ratio < 1.1 for ratio in ratios))


if __name__ == "__main__":
    raise SystemExit(main())
