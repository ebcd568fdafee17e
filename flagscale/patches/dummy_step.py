"""``--iterations-to-skip`` on pipeline stages that read no data, and under virtual pipelines."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from flagscale.patches.registry import Kind, Patch, PatchGroup

__all__ = ["GROUP"]


def _give_every_stage_an_iterator(original: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(original)
    def dummy_train_step(data_iterator: Any) -> None:
        from megatron.core.rerun_state_machine import RerunDataIterator

        # Under a virtual pipeline there is one iterator a model chunk, and at most one of a rank's
        # chunks reads data: the first of the first stage, the last of the last. Every rank still
        # makes exactly one call, because upstream's function joins collectives of the whole world.
        chunks = data_iterator if isinstance(data_iterator, list) else [data_iterator]
        reading = [iterator for iterator in chunks if iterator is not None]
        if reading:
            (iterator,) = reading
        else:
            iterator = RerunDataIterator({} for _ in itertools.count())
        original(iterator)

    return dummy_train_step


GROUP = PatchGroup(
    name="dummy-step",
    patches=(
        Patch(
            target="megatron.training.training:dummy_train_step",
            kind=Kind.FUNCTION,
            replacement=_give_every_stage_an_iterator,
            fingerprint="208bdf3a5abe156e",
        ),
    ),
    reason="--iterations-to-skip dies on middle pipeline stages and under a virtual pipeline",
    upstream="megatron-core 0.19.2, training/training.py:2289",
)
