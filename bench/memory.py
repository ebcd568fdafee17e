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
from harness.memory import TINY_SIZES, measure_peaks, predict_ranks

from flagscale.layout.memory import MemoryTerms

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "DP1": (1, {}),
    "DP2": (2, {}),
    "TP2": (2, {TP: 2}),
    "TP2+SP": (2, {TP: 2, "sequence_parallel": True}),
    "PP2": (2, {PP: 2}),
    "PP2xVPP2": (2, {PP: 2, "num_virtual_stages_per_pipeline_rank": 2}),
    "TP2xPP2": (4, {TP: 2, PP: 2}),
    "selective": (1, {"recompute_granularity": "selective"}),
    "full": (
        1,
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}


def main() -> int:
    """Print one row a rank, in MB."""
    terms = [field.name for field in fields(MemoryTerms)]
    columns = [*terms, "predicted", "measured", "ratio"]
    print(f"{'layout':10}{'rank':>5}" + "".join(f"{name:>13}" for name in columns))
    with tempfile.TemporaryDirectory() as scratch:
        corpus = write_corpus(Path(scratch, "text_document"))
        for name, (nproc, changes) in LAYOUTS.items():
            argv = model_argv(corpus, **{**TINY_SIZES, **changes})
            peaks = measure_peaks(argv, Path(scratch, name), nproc)
            predictions = predict_ranks(argv, nproc)
            for rank, (memory, peak) in enumerate(zip(predictions, peaks, strict=True)):
                numbers = [number / 1e6 for number in (*astuple(memory), memory.total, peak)]
                row = "".join(f"{number:13.2f}" for number in numbers)
                print(f"{name:10}{rank:5}{row}{memory.total / peak:13.3f}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
