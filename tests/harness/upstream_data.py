"""Token data sets of any shape, and what upstream's own builder makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["StubTokenizer", "build_upstream", "upstream_spans", "write_documents"]

SPAN = tuple[int, int]


class StubTokenizer:
    """What a data set asks of a tokenizer."""

    vocab_size = 1000
    eod = 999
    pad = 998
    unique_identifiers = {"class": "StubTokenizer"}  # noqa: RUF012 - as upstream's have it


def write_documents(
    prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16, seed: int = 0
) -> None:
    """Write ``prefix``.bin and .idx: documents as lists of the lengths of their sequences.

    A tenth of the tokens are padding.
    """
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for lengths in documents:
        for length in lengths:
            tokens = np.where(rng.random(length) < 0.1, 998, rng.integers(0, 998, length))
            builder.add_item(torch.from_numpy(tokens))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def build_upstream(
    blend: tuple[list[str], list[float] | None],
    num_samples: int,
    *,
    split: str | None,
    seed: int,
    seq_length: int,
    cache: Path | None,
    surplus: float = 0.005,
) -> Any:
    """Upstream's training data set; without a split, of data sets of its own."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    whole = {"blend": blend} if split else {"blend_per_split": [blend, None, None]}
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        split=split,
        tokenizer=StubTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        path_to_cache=None if cache is None else str(cache),
        mid_level_dataset_surplus=surplus,
        **whole,
    )
    sizes = [num_samples, None, None] if blend[1] is None else [num_samples, 0, 0]
    return BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()[0]


def upstream_spans(dataset: Any, sample: int) -> tuple[np.ndarray, list[SPAN]]:
    """A sample's tokens, and ``(sequence, tokens)`` of each of its parts that has any."""
    text, sequences, lengths = dataset._query_document_sample_shuffle_indices(sample)
    parts = zip(sequences.tolist(), map(int, lengths), strict=True)
    return text, [(sequence, length) for sequence, length in parts if length]
