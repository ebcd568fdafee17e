"""Mend a ``fully_reshardable`` checkpoint that upstream's #5077 has damaged.

The slices are put back to where they belong (:mod:`flagscale.optim.mend`). What was stored nowhere
is refilled: a main copy from the weight, which is the same number rounded to the model's type (in
fp32, the same number); a moment with zero. Everything else is a reshard to the layout of the
source: planned, verified, proved and published by the same code.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from flagscale.ckpt_copy import run as copying
from flagscale.ckpt_io.output import OutputFile
from flagscale.ckpt_io.sources import Sources
from flagscale.errors import CheckpointError
from flagscale.layout.boxes import Box
from flagscale.layout.pieces import OPTIMIZER_KINDS, TensorKey
from flagscale.optim.carry import Request
from flagscale.optim.mend import Mending, mendings
from flagscale.optim.proof import Mismatch, compare
from flagscale.optim.reshard import Reshard
from flagscale.optim.source import Source
from flagscale.optim.target import plan_target

__all__ = ["RECORD", "Repair", "plan_repair", "prove", "read_record"]

RECORD: Final = "flagscale_repair.json"
"""In a repaired checkpoint: which moments are zero because they were lost, and which main copies
are only as exact as the weights."""


@dataclass(frozen=True)
class Repair:
    """What is to be done.

    Args:
        mending: Where everything lies.
        reshard: The plan, for :func:`flagscale.optim.reshard.run`.
        refill: Torch's name of the type that lost main copies are refilled from, by parameter.
    """

    mending: Mending
    reshard: Reshard
    refill: Mapping[str, str]

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(whole.numel for whole in self._wholes.values())

    @property
    def numel_shifted(self) -> int:
        """Elements that are stored where they do not belong, for each kind of state."""
        return sum(one.numel for slices in self.mending.shifted.values() for one in slices)

    @property
    def numel_lost(self) -> int:
        """Elements that are stored nowhere, for each kind of state."""
        return sum(map(self.mending.numel_lost, self.mending.lost))

    @property
    def _wholes(self) -> dict[str, Box]:
        tensors = self.reshard.source.job.tensors
        return {name: Box.whole(t.shape) for name, t in tensors.items() if t.trained}

    def report(self) -> Iterator[str]:
        """What is exact afterwards and what is not, a line each."""
        shifted, lost = self.mending.shifted, self.mending.lost
        yield (
            f"{self.numel_shifted:,} of {self.numel:,} elements of each state are stored where "
            f"they do not belong, in {len(shifted)} parameters; {self.numel_lost:,} are stored "
            "nowhere. All others come back to the bit."
        )
        for name in sorted(shifted.keys() | lost.keys()):
            numel, gone = self._wholes[name].numel, self.mending.numel_lost(name)
            if not gone:
                yield f"{name}: exact, {numel:,} elements"
                continue
            exact = self.refill[name] == "float32"
            how = "exact" if exact else f"not exact: rounded to {self.refill[name]}"
            yield (
                f"{name}: exact but for {gone:,} of {numel:,} elements: their main copies are the "
                f"weights ({how}), their exp_avg and exp_avg_sq are zero (lost)"
            )


def plan_repair(source: Source) -> Repair:
    """Plan the repair; touches no file but to read.

    Args:
        source: The damaged checkpoint, opened.

    Raises:
        CheckpointError: It is not damaged in this way, or in others as well.
    """
    mending = _proven(source)
    shifted = mending.shifted
    target = plan_target(source, Request())
    record = _record(mending)
    target = replace(target, files=(*target.files, record))
    weights = source.of_kind("weight")
    refills = [
        replace(piece, tensor=TensorKey("param", piece.tensor.name))
        for piece in weights
        if piece.tensor.name in mending.lost
    ]
    lost = {TensorKey(kind, name) for name in mending.lost for kind in OPTIMIZER_KINDS[1:]}
    copy = copying.prepare(
        source.directory,
        (*weights, *mending.pieces, *refills),  # by priority
        target.files,
        target.pieces,
        conversions={(p.dtype, "float32") for p in refills if p.dtype != "float32"},
        zero_fill=lost,
    )
    dtypes = {piece.tensor.name: piece.dtype for piece in weights}
    refill = {name: dtypes[name] for name in sorted(shifted.keys() | mending.lost.keys())}
    return Repair(mending, Reshard(source, target, copy), refill)


def prove(source: Source, mending: Mending) -> list[Mismatch]:
    """Every main copy that, put back, is not its weight; of what was stored at all."""
    mains = [piece for piece in mending.pieces if piece.tensor.kind == "param"]
    found = compare(source.directory, source.of_kind("weight"), mains, full=True)
    return [mismatch for mismatch in found if mismatch.compared]


def _proven(source: Source) -> Mending:
    if source.optim_format != "fully_reshardable":
        raise CheckpointError(
            "only fully_reshardable states are damaged in this way",
            where=str(source.directory),
            expected="fully_reshardable",
            got=source.optim_format,
            cure="--check says whether and how this checkpoint is damaged",
        )
    stored = list(
        compare(source.directory, source.of_kind("weight"), source.of_kind("param"), full=True)
    )
    if not stored:
        raise CheckpointError(
            "there is nothing to mend",
            where=str(source.directory),
            got="every main copy, rounded, is the weight",
        )
    refused = []
    for mending in mendings(source.job, source.pieces):
        wrong = prove(source, mending)
        if not wrong:
            return mending
        refused.append(f"layer spec {mending.spec}: {len(wrong)} parameters, {wrong[0]}")
    raise CheckpointError(
        "this is not the damage that can be mended here, or not that alone",
        where=str(source.directory),
        expected="slices that, put back, are the weights",
        got=f"as stored: {len(stored)} parameters, {stored[0]}"
        + "".join(f"\n    put back by {reason}" for reason in refused or ["no buffer has padding"]),
        cure="--check names the damage; nothing was written",
    )


def _record(mending: Mending) -> OutputFile:
    content = {
        "repaired": "NVIDIA/Megatron-LM #5077",
        "lost": {
            name: [[list(box.offset), list(box.shape)] for box in boxes]
            for name, boxes in mending.lost.items()
        },
    }
    data = json.dumps(content, indent=1).encode()
    return OutputFile(RECORD, len(data), ((0, data),), ())


def read_record(directory: Path) -> dict[str, tuple[Box, ...]]:
    """What a repair could not bring back, by parameter; empty where none was.

    Raises:
        CheckpointError: The record is damaged.
    """
    if not (directory / RECORD).exists():
        return {}
    with Sources(directory) as sources:
        raw = sources.read(RECORD, 0, sources.size(RECORD))
    try:
        lost: Any = json.loads(raw)["lost"]
        return {
            name: tuple(Box(tuple(offset), tuple(shape)) for offset, shape in boxes)
            for name, boxes in lost.items()
        }
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the record of a repair is damaged",
            where=str(directory / RECORD),
            got=f"{type(error).__name__}: {error}"[:300],
        ) from None
