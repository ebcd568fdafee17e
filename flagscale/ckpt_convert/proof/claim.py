"""The proof that a Megatron checkpoint and a Hugging Face directory hold the same model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Final, Literal

from flagscale.ckpt_convert.proof.parity import Parity, compare, fits_in_memory
from flagscale.ckpt_convert.proof.weights import verify_weights
from flagscale.ckpt_convert.tensors import HFTensor, Shape
from flagscale.errors import VerificationError
from flagscale.optim.source import Source

__all__ = ["Claim", "Level", "Proof", "prove", "verify_tensors"]

Level = Literal["auto", "logits", "weights", "none"]
"""How much is proved: weights to the bit; logits as well; logits if the model fits in memory."""

_SHOWN: Final = 10


@dataclass(frozen=True)
class Claim:
    """What is to be proved.

    Args:
        source: The opened Megatron checkpoint.
        hf_dir: The Hugging Face directory.
        tensors: That it holds, and where in the checkpoint each comes from.
        shape: What decides how they are cut.
        dtype: Torch's name of the element type that the directory should have; ``None``: any, as
            the checkpoint was made from it.
        kind: Of the checkpoint's tensors: the weights, or a state of the optimizer.
    """

    source: Source
    hf_dir: Path
    tensors: tuple[HFTensor, ...]
    shape: Shape
    dtype: str | None
    kind: str = "weight"

    @property
    def parameters(self) -> int:
        """Elements in all."""
        return sum(prod(tensor.shape) for tensor in self.tensors)


@dataclass(frozen=True)
class Proof:
    """What was proved.

    Args:
        tensors: That are what they should be, to the bit; 0 if it was not looked at.
        elements: In them.
        parities: Of the logits, in each type they were computed in.
        left_out: What was not looked at, and why.
    """

    tensors: int
    elements: int
    parities: tuple[Parity, ...]
    left_out: str = ""

    def report(self) -> Iterator[str]:
        """A short table, line by line."""
        if self.tensors:
            yield f"weights             {self.tensors:,} tensors, {self.elements:,} elements: equal"
        for parity in self.parities:
            yield from parity.report()
        if self.left_out:
            yield f"not proved          {self.left_out}"


def verify_tensors(claim: Claim, on_progress: Callable[[int], None] | None = None) -> None:
    """Compare tensors to the bit.

    Args:
        claim: What is to be proved; of weights, or of a state of the optimizer.
        on_progress: Called with the bytes compared.

    Raises:
        VerificationError: They differ; the message names them.
        CheckpointError: The checkpoint, or the directory, cannot be read.
    """
    problems = verify_weights(
        claim.source,
        claim.hf_dir,
        claim.tensors,
        claim.shape,
        on_progress,
        dtype=claim.dtype,
        imported=claim.dtype is None,
        kind=claim.kind,
    )
    if problems:
        more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
        raise VerificationError(
            "the two directories do not hold the same tensors",
            where=f"{claim.source.directory}, {claim.hf_dir}",
            expected="every tensor bit-equal to what it comes from",
            got="".join(f"\n    {line}" for line in (*problems[:_SHOWN], *more)),
            cure="nothing is published that is not proved",
        )


def prove(
    claim: Claim, level: Level = "auto", on_progress: Callable[[int], None] | None = None
) -> Proof:
    """Compare the weights to the bit and, where asked and possible, the logits of the two models.

    Args:
        claim: What is to be proved.
        level: How much of it.
        on_progress: Called with the bytes of weights compared.

    Raises:
        VerificationError: It is not true; the message names the tensors, or the layer.
        CheckpointError: One of the two cannot be read.
    """
    if level == "none":
        return Proof(0, 0, (), "anything: --verify none")
    verify_tensors(claim, on_progress)
    done = len(claim.tensors), claim.parameters
    if level == "weights":
        return Proof(*done, (), "logits: --verify weights")
    if level == "auto" and not fits_in_memory(claim.parameters, "float32"):
        return Proof(*done, (), "logits: the model does not fit in memory in fp32")
    parities = [_logits(claim, "float32")]
    if level == "logits" and claim.source.job.model.dtype == "bfloat16":
        parities.append(_logits(claim, "bfloat16"))
    return Proof(*done, tuple(parities))


def _logits(claim: Claim, dtype: str) -> Parity:
    parity = compare(
        claim.source.directory,
        None,
        claim.hf_dir,
        dtype=dtype,
        vocab_size=claim.shape.vocab_size,
    )
    if not parity.passed:
        raise VerificationError(
            "the two models do not compute the same logits",
            where=f"{claim.source.directory}, {claim.hf_dir}",
            expected="the same model",
            got="".join(f"\n    {line}" for line in parity.report()),
            cure="the weights are equal to the bit: compare config.json with the job's arguments",
        )
    return parity
