"""Reads a torch_dist checkpoint with torch's own reader, and nothing of ours."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

__all__ = ["read_tensors"]


def read_tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an iteration's directory, whole, by its name there."""
    metadata = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, on its own internals
        load(state, storage_reader=FileSystemReader(checkpoint), no_dist=True)
    return state
