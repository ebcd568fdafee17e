"""``torch.randperm`` without torch: the permutation that a seeded CPU generator gives.

Both of torch's ways shuffle ``0, 1, ..., n - 1`` by one exchange of two elements per step. They are
done here a block of steps at a time: two steps of a block rarely touch the same element, and those
that do are done one after the other.

Source: torch 2.14, aten/src/ATen/native/TensorFactories.cpp and core/MT19937RNGEngine.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from flagscale.errors import DataError

__all__ = ["MANY", "randperm"]

MANY = (2**32 - 1) // 20
"""From so many elements on torch draws 64 bits a step, and exchanges with elements before."""
MOST = 2**32

Order = npt.NDArray[Any]
Draws = npt.NDArray[np.uint64]


def randperm(n: int, seed: int) -> Order:
    """``torch.randperm(n, generator=torch.Generator().manual_seed(seed))``.

    Args:
        n: Elements.
        seed: Only its low 32 bits matter, as to torch.

    Returns:
        The permutation, [n], int32 if that is enough, else int64.

    Raises:
        DataError: There are more elements than anyone shuffles in memory.
    """
    if not 0 <= n < MOST:
        raise DataError(
            "a permutation is too large to be made again",
            expected=f"less than {MOST} elements",
            got=n,
            cure="check the number of samples",
        )
    order = np.arange(n, dtype=np.int32 if n < 2**31 else np.int64)
    random = np.random.MT19937()
    random._legacy_seeding(seed & 0xFFFFFFFF)
    first = 0
    for partners in _partners(random, n):
        _exchange(order, first, partners)
        first += len(partners)
    return order


def _partners(random: np.random.MT19937, n: int) -> Iterator[npt.NDArray[np.int64]]:
    """With which element each step's own is exchanged, a block of steps at a time."""
    steps = n if n >= MANY else max(0, n - 1)
    block = max(64, isqrt(n))
    for first in range(0, steps, block):
        count = min(block, steps - first)
        own = np.arange(first, first + count, dtype=np.uint64)
        if n >= MANY:
            yield (_draw_64_bits(random, count) % (own + np.uint64(1))).astype(np.int64)
        else:
            draws: Draws = random.random_raw(count)
            yield (own + draws % (np.uint64(n) - own)).astype(np.int64)


def _draw_64_bits(random: np.random.MT19937, count: int) -> Draws:
    halves: Draws = random.random_raw(2 * count)
    return (halves[::2] << np.uint64(32)) | halves[1::2]


def _exchange(order: Order, first: int, partners: npt.NDArray[np.int64]) -> None:
    """Exchange element ``first + i`` with ``partners[i]``, for one ``i`` after the other."""
    own = np.arange(first, first + len(partners))
    tied = _tied(own, partners)
    if tied is None:
        order[own], order[partners] = order[partners], order[own]
        return
    for mine, other in zip(own[tied].tolist(), partners[tied].tolist(), strict=True):
        order[mine], order[other] = order[other], order[mine]
    own, partners = own[~tied], partners[~tied]
    order[own], order[partners] = order[partners], order[own]


def _tied(
    own: npt.NDArray[np.int64], partners: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_] | None:
    """Which steps touch an element that another one touches, too; ``None`` if none does."""
    ranked = np.sort(partners)
    again = ranked[1:] == ranked[:-1]
    inside = (partners >= own[0]) & (partners <= own[-1])
    if not again.any() and not inside.any():
        return None
    tied: npt.NDArray[np.bool_] = inside | np.isin(partners, ranked[1:][again])
    tied[partners[inside] - own[0]] = True
    return tied
