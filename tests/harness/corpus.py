"""A small data set with something to learn in it, made from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np

__all__ = ["VOCAB_SIZE", "model_argv", "write_corpus"]

VOCAB_SIZE = 251
"""Of ``NullTokenizer``, which adds an end-of-document id; not a multiple of anything on purpose."""


def write_corpus(prefix: Path, num_documents: int = 200, seed: int = 0) -> Path:
    """Write ``prefix``.bin and .idx: documents of a random first-order Markov chain."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    cumulative = rng.dirichlet(np.full(250, 0.05), size=250).cumsum(axis=1)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(num_documents):
        tokens = [int(rng.integers(250))]
        for draw in rng.random(int(rng.integers(50, 400))):
            tokens.append(min(249, int(np.searchsorted(cumulative[tokens[-1]], draw))))
        builder.add_document(torch.tensor([*tokens, 250]), [len(tokens) + 1])
    builder.finalize(f"{prefix}.idx")
    return prefix


def model_argv(prefix: Path, **overrides: object) -> list[str]:
    """Arguments of a four-layer Aquila-shaped model; ``None`` drops one, ``True`` is a flag."""
    arguments: dict[str, object] = {
        "num_layers": 4,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "ffn_hidden_size": 192,
        "seq_length": 64,
        "max_position_embeddings": 64,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "swiglu": True,
        "disable_bias_linear": True,
        "untie_embeddings_and_output_weights": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "micro_batch_size": 1,
        "global_batch_size": 12,
        "train_iters": 6,
        "lr": 1e-3,
        "min_lr": 1e-4,
        "lr_decay_style": "cosine",
        "clip_grad": 1.0,
        "weight_decay": 0.1,
        "bf16": True,
        "use_distributed_optimizer": True,
        "data_path": prefix,
        "split": "100,0,0",
        "eval_iters": 0,
        "eval_interval": 1000,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": VOCAB_SIZE,
        "make_vocab_size_divisible_by": 64,
        "log_interval": 1,
        "num_workers": 0,
        "ckpt_format": "torch_dist",
        **overrides,
    }
    argv: list[str] = []
    for name, value in arguments.items():
        if value is None or value is False:
            continue
        argv.append(f"--{name.replace('_', '-')}")
        if value is not True:
            argv.append(str(value))
    return argv
