"""Weights and optimizer states in global coordinates: put together, read, compared by bits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["GlobalState", "assemble", "differences", "read_fully_reshardable"]

Bits = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class GlobalState:
    """Weights and optimizer states, whole.

    Args:
        tensors: By (kind, key), the bits of each element; kinds are ``weight`` and what the
            optimizer keeps, keys those of a ``torch_dist`` checkpoint, layers stacked as there.
        groups: By key, what the optimizer's groups of that tensor's parameters say.
        progress: Iteration, samples, steps of the scheduler, padded vocabulary.
    """

    tensors: Mapping[tuple[str, str], Bits]
    groups: Mapping[str, Any] = field(default_factory=dict)
    progress: Mapping[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write to ``path``.npz and ``path``.json."""
        arrays = {f"{kind} {key}": bits for (kind, key), bits in self.tensors.items()}
        np.savez(path.with_suffix(".npz"), **arrays)
        notes = {"groups": self.groups, "progress": self.progress}
        path.with_suffix(".json").write_text(json.dumps(notes))

    @classmethod
    def load(cls, path: Path) -> GlobalState:
        """Read what :meth:`save` wrote."""
        with np.load(path.with_suffix(".npz")) as archive:
            arrays = {name: archive[name] for name in archive.files}
        tensors = {(name.split(" ")[0], name.split(" ")[1]): bits for name, bits in arrays.items()}
        return cls(tensors, **json.loads(path.with_suffix(".json").read_text()))


@dataclass
class _Assembly:
    """One tensor as its parts come in."""

    bits: Bits
    held: Bits

    def add(self, at: tuple[slice, ...], values: Bits, held: Bits | None) -> int:
        """Put a part in place; returns how many elements differ from copies already there."""
        mine = np.ones(values.shape, bool) if held is None else held
        here, before = self.bits[at], self.held[at]
        stale = int(((here != values) & before & mine).sum())
        here[mine] = values[mine]
        before |= mine
        return stale


def assemble(directory: Path) -> GlobalState:
    """Put together what the ranks wrote into ``directory``.

    Raises:
        AssertionError: Copies differ (replicas, or tied embeddings), or elements are held by none.
    """
    parts: dict[tuple[str, str], _Assembly] = {}
    groups: dict[str, Any] = {}
    progress: dict[str, Any] = {}
    for notes_file in sorted(directory.glob("rank_*.json")):
        notes = json.loads(notes_file.read_text())
        with np.load(notes_file.with_suffix(".npz")) as archive:
            arrays = {name: archive[name] for name in archive.files}
        for number, row in enumerate(notes["boxes"]):
            values, held = arrays[str(number)], arrays.get(f"{number}.held")
            tensor = row["kind"], row["key"]
            shape, offset = tuple(row["global_shape"]), row["offset"]
            if tensor not in parts:
                parts[tensor] = _Assembly(np.zeros(shape, values.dtype), np.zeros(shape, bool))
            # Upstream prepends axes (the layer, the expert) that the local tensor lacks.
            lead = (1,) * (len(shape) - values.ndim)
            size = lead + values.shape
            at = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
            whole_held = None if held is None else held.reshape(size)
            stale = parts[tensor].add(at, values.reshape(size), whole_held)
            assert not stale, f"{notes_file.name}: {stale} elements of {tensor} differ from a copy"
        for key, group in notes["groups"].items():
            assert groups.setdefault(key, group) == group, f"{key}: param groups differ by rank"
        progress = progress or notes["progress"]
        assert progress == notes["progress"], f"{notes_file.name}: progress differs by rank"
    assert parts, f"no rank wrote its state into {directory}"
    for tensor, part in parts.items():
        missing = int((~part.held).sum())
        assert not missing, f"{missing} of {part.held.size} elements of {tensor} are held by none"
    return GlobalState({key: part.bits for key, part in parts.items()}, groups, progress)


_OPTIMIZER_KEY = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(\w+?)\.(.+)$")


def read_fully_reshardable(checkpoint: Path) -> GlobalState:
    """What torch's own reader finds in a ``fully_reshardable`` checkpoint's iteration directory."""
    import torch

    from harness.checkpoint import read_tensors

    tensors = {}
    for name, tensor in read_tensors(checkpoint).items():
        match = _OPTIMIZER_KEY.match(name)
        key = (match[1], match[2]) if match else ("weight", name)
        integer = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
        tensors[key] = tensor.view(integer).numpy()
    return GlobalState(tensors)


def differences(
    expected: GlobalState, got: GlobalState, *, grown_from: int | None = None
) -> list[str]:
    """What is not bit-equal, each line naming a tensor and the number of elements; [] if all is.

    Args:
        expected: The truth.
        got: What is held to it; its groups and progress are compared where it has any.
        grown_from: Rows that the vocabulary had before it grew; only these are compared.
    """
    lines = [f"{kind} {key}: missing" for kind, key in sorted({*expected.tensors} - {*got.tensors})]
    lines += [f"{kind} {key}: extra" for kind, key in sorted({*got.tensors} - {*expected.tensors})]
    for kind, key in sorted({*expected.tensors} & {*got.tensors}):
        left, right = expected.tensors[kind, key], got.tensors[kind, key]
        if grown_from is not None and left.shape[0] == grown_from < right.shape[0]:
            right = right[:grown_from]
        if left.shape != right.shape or left.dtype.itemsize != right.dtype.itemsize:
            lines.append(
                f"{kind} {key}: {right.dtype.itemsize}-byte {right.shape} where "
                f"{left.dtype.itemsize}-byte {left.shape} was expected"
            )
        elif wrong := int((left != right).sum()):
            lines.append(f"{kind} {key}: {wrong} of {left.size} elements differ")
    if got.groups:
        lines += _note_differences("param group of", expected.groups, got.groups)
    if got.progress and grown_from is None:
        lines += _note_differences("progress:", expected.progress, got.progress)
    return lines


def _note_differences(what: str, left: Mapping[str, Any], right: Mapping[str, Any]) -> list[str]:
    return [
        f"{what} {key}: {str(right.get(key))[:200]} where {str(left.get(key))[:200]} was expected"
        for key in sorted({*left, *right})
        if left.get(key) != right.get(key)
    ]
