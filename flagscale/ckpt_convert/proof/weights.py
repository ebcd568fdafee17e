"""Is a Hugging Face directory, bit for bit, the checkpoint that it was made from?

This shares with the conversion nothing but the table of a family: the checkpoint's tensors are put
together anew, reshaped by torch (:mod:`flagscale.ckpt_convert.proof.transforms`), and compared with
what safetensors itself reads. Memory holds one canonical tensor at a time, or one expert of it, and
what is not reshaped only in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Final

import numpy as np
import torch

from flagscale.ckpt_convert.proof.hf_directory import HFDirectory
from flagscale.ckpt_convert.proof.mistakes import Candidate, candidates
from flagscale.ckpt_convert.proof.transforms import cut
from flagscale.ckpt_convert.proof.wholes import Wholes, row_blocks
from flagscale.ckpt_convert.tensors import HFTensor, Shape
from flagscale.layout.pieces import DTYPE_BYTES
from flagscale.optim.source import Source

__all__ = ["verify_weights"]

_SAMPLED: Final = 64  # rows by which it is guessed what a wrong tensor is
_GUESSED: Final = 20  # wrong tensors of which that is tried
_BITS: Final = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def verify_weights(
    source: Source,
    hf_dir: Path,
    tensors: Sequence[HFTensor],
    shape: Shape,
    on_progress: Callable[[int], None] | None = None,
    *,
    dtype: str | None = None,
    imported: bool = False,
    kind: str = "weight",
) -> list[str]:
    """What of a Hugging Face directory is not as its checkpoint has it, in words; best empty.

    Args:
        source: The checkpoint.
        hf_dir: The directory.
        tensors: The tensors it should hold.
        shape: The model.
        on_progress: Called with the bytes of tensors compared so far.
        dtype: Torch's name of the element type that was asked for; ``None``: the checkpoint's.
        imported: Whether the checkpoint was made from the directory, whose tensors then are of any
            type and are compared as the checkpoint has them.
        kind: Of the checkpoint's tensors: the weights, or a state of the optimizer.

    Raises:
        CheckpointError: The checkpoint, or a file of the directory, cannot be read.
    """
    checkpoint, directory = Wholes(source, kind), HFDirectory(hf_dir)
    problems = [*directory.verify_names(tensors), *_verify_use(checkpoint, tensors, shape)]
    groups: dict[tuple[str, int | None], list[HFTensor]] = {}
    for tensor in tensors:
        if tensor.canonical in checkpoint.shapes:
            groups.setdefault((tensor.canonical, tensor.expert), []).append(tensor)
    known = [tensor for group in groups.values() for tensor in group]
    comparison, done = _Comparison(checkpoint, directory, known, shape, dtype, imported), 0
    for group in groups.values():
        problems += comparison.verify(
            [tensor for tensor in group if tensor.name in directory.files]
        )
        done += sum(comparison.nbytes(tensor) for tensor in group)
        if on_progress is not None:
            on_progress(done)
    return problems


@dataclass
class _Comparison:
    """Compares tensors, and looks what wrong ones are instead."""

    checkpoint: Wholes
    directory: HFDirectory
    tensors: Sequence[HFTensor]
    shape: Shape
    dtype: str | None
    imported: bool
    wrong: int = field(default=0, init=False)

    def nbytes(self, tensor: HFTensor) -> int:
        """Bytes of a tensor."""
        return prod(tensor.shape) * DTYPE_BYTES[self._dtype(tensor)]

    def verify(self, group: Sequence[HFTensor]) -> Iterator[str]:
        """What is wrong with tensors that come from one canonical tensor, or one expert of it."""
        whole = None
        for tensor in group:
            want = None
            if tensor.take not in ("whole", "vocab"):  # whose rows are not in their old place
                if whole is None:
                    rows = self.checkpoint.num_rows(tensor.canonical, tensor.expert)
                    whole = self.checkpoint.rows(tensor.canonical, tensor.expert, 0, rows)
                want = cut(tensor.take, whole, self.shape)
            label = f"{tensor.name}, from {tensor.canonical}"
            label += "" if tensor.expert is None else f" of expert {tensor.expert}"
            yield from (f"{label}: {problem}" for problem in self._verify(tensor, want))

    def _dtype(self, tensor: HFTensor) -> str:
        asked = None if self.imported else tensor.dtype or self.dtype
        return asked or self.checkpoint.dtypes[tensor.canonical]

    def _verify(self, tensor: HFTensor, want: torch.Tensor | None) -> Iterator[str]:
        """What is wrong with a tensor that should be ``want``, or the canonical tensor's rows."""
        shape, dtype = self.directory.shape(tensor.name), self._dtype(tensor)
        stored = self.directory.dtype(tensor.name)
        if shape != tensor.shape or (stored != dtype and not self.imported):
            yield f"{stored} {shape}, not {dtype} {tensor.shape}"
            return
        differing, first, told = 0, 0, ""
        for start, stop in row_blocks(shape[0], self.nbytes(tensor)):
            got = self.directory.rows(tensor.name, start, stop).to(getattr(torch, dtype))
            right = self._as_stored(tensor, want, start, stop)
            if not (wrong := (_bits(got) != _bits(right)).flatten()).any():
                continue
            if not differing:
                at = int(wrong.to(torch.uint8).argmax())
                first = start * prod(shape[1:]) + at
                told = f"{got.flatten()[at].item()} instead of {right.flatten()[at].item()}"
            differing += int(wrong.sum())
        if differing:
            index = [int(i) for i in np.unravel_index(first, shape)]
            yield (
                f"{differing} of {prod(shape)} elements differ, the first at {index}: {told}"
                f"{self._guess(tensor, index[0])}"
            )

    def _as_stored(
        self, tensor: HFTensor, want: torch.Tensor | None, start: int, stop: int
    ) -> torch.Tensor:
        if want is None:
            rows = self.checkpoint.rows(tensor.canonical, tensor.expert, start, stop)
        else:
            rows = want[start:stop]
        return rows.to(getattr(torch, self._dtype(tensor)))

    def _guess(self, tensor: HFTensor, first: int) -> str:
        """What a tensor is, in words, of which a row is wrong; empty where that is nothing."""
        self.wrong += 1
        if self.wrong > _GUESSED:
            return ""
        rows = tensor.shape[0]
        sampled = [first, *range(0, rows, max(1, rows // _SAMPLED)), rows - 1]
        for candidate in candidates(tensor, self.tensors, self.checkpoint, self.shape):
            if self._is(tensor, candidate, sampled):
                return f"; {candidate.words}"
        return ""

    def _is(self, tensor: HFTensor, candidate: Candidate, sampled: Sequence[int]) -> bool:
        known = 0
        limit = self.checkpoint.num_rows(candidate.canonical, candidate.expert)
        for row in sampled:
            if not 0 <= (at := int(candidate.rows[row])) < limit:
                continue
            known += 1
            is_there = self.directory.rows(tensor.name, row, row + 1)
            should = self.checkpoint.rows(candidate.canonical, candidate.expert, at, at + 1)
            if not torch.equal(_bits(is_there), _bits(should.to(is_there.dtype))):
                return False
        return known > 0


def _verify_use(checkpoint: Wholes, tensors: Sequence[HFTensor], shape: Shape) -> Iterator[str]:
    """Rows of a checkpoint that are not used exactly once; those that pad the vocabulary: never."""
    users: dict[str, list[HFTensor]] = {name: [] for name in checkpoint.shapes}
    for tensor in tensors:
        if tensor.canonical in users:
            users[tensor.canonical].append(tensor)
        else:
            yield f"{tensor.name}: the checkpoint has no {tensor.canonical}"
    for name, using in users.items():
        dims = 1 + any(tensor.expert is not None for tensor in using)
        uses = torch.zeros(checkpoint.shapes[name][:dims], dtype=torch.int32)
        for tensor in using:
            of_one = uses if tensor.expert is None else uses[tensor.expert]
            rows = cut(tensor.take, torch.arange(len(of_one)), shape)
            of_one.index_put_((rows,), torch.ones((), dtype=torch.int32), accumulate=True)
            if (came := (len(rows), *checkpoint.shapes[name][dims:])) != tensor.shape:
                yield f"{tensor.name}: of {name} comes {came}, not {tensor.shape}"
        if any(tensor.take == "vocab" for tensor in using):
            uses[shape.vocab_size :] += 1
        for wrong, words in ((uses == 0, "in no tensor"), (uses > 1, "in more than one place")):
            if wrong.any():
                yield (
                    f"{name}: {int(wrong.sum())} of {wrong.numel()} rows are {words}, "
                    f"the first {wrong.nonzero()[0].tolist()}"
                )


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(_BITS[tensor.element_size()])
