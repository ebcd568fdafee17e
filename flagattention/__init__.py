"""Attention operators that run anywhere: Triton kernels on a GPU, torch elsewhere.

``piecewise_attention`` scores far keys with another pair of queries and keys than near ones;
``flash_attention`` is the same code with one pair. The package stands alone: it imports torch, and
Triton only when a GPU tensor comes.
"""

from flagattention.errors import (
    AttentionError,
    BackendError,
    DeviceError,
    DtypeError,
    ShapeError,
)
from flagattention.piecewise import flash_attention, piecewise_attention

__all__ = [
    "AttentionError",
    "BackendError",
    "DeviceError",
    "DtypeError",
    "ShapeError",
    "flash_attention",
    "piecewise_attention",
]
