"""The names of megatron-core that data preparation builds on; import this module late: torch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

# What upstream's imports warn of (its optimizers, its own deprecations) is nothing to someone who
# tokenises text, and each worker would say it again.
with warnings.catch_warnings(action="ignore"):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

__all__ = ["DType", "IndexedDatasetBuilder", "build_tokenizer", "missing_rank_ignored"]


@contextlib.contextmanager
def missing_rank_ignored() -> Iterator[None]:
    """Keep upstream from warning, at each log line, that there is no training job around it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not determine rank", UserWarning)
        yield
