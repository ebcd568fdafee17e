"""A checkpoint to be read, of any format, as a table of pieces and what comes along with them."""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flagscale.errors import CheckpointError
from flagscale.layout.model import LayerSpec
from flagscale.layout.pieces import Piece, TensorKey
from flagscale.optim.extra_state import ExtraState
from flagscale.optim.job import Job
from flagscale.optim.order import FlatBuffer, Orders

__all__ = ["Source", "damage_named", "without_params"]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Args:
        directory: Of the iteration.
        iteration: Counted from 1.
        ckpt_format: Upstream's name of the format.
        optim_format: Upstream's name of how a ``torch_dist`` checkpoint stores the optimizer's
            states; ``"legacy"`` for the format ``torch``; ``"none"`` without the optimizer.
        args: Arguments of the job that saved it.
        job: What they describe.
        tensors: Shape and element type of every canonical tensor.
        pieces: Where they lie.
        common: What all ranks share: iteration, scheduler, versions and so on.
        optimizers: For each chained optimizer its state without tensors: parameter groups, and the
            loss scaler of fp16.
        rng: States of the random generators by pipeline and tensor rank.
        extra_states: What modules keep besides tensors.
        spec: Which modules the layers are made of.
        steps: Steps of the optimizer where single parameters tell; ``None`` where groups do.
        order: How it is known where the states of each parameter lie, for the report.
        buffers: The flat buffers, in a format that has them.
        listed: Names of the parameters in the order of a state dict, in a format that has one.
    """

    directory: Path
    iteration: int
    ckpt_format: str
    optim_format: str
    args: Namespace
    job: Job
    tensors: Mapping[TensorKey, tuple[tuple[int, ...], str]]
    pieces: tuple[Piece, ...]
    common: Mapping[str, Any]
    optimizers: tuple[Mapping[str, Any], ...]
    rng: Mapping[tuple[int, int], Any]
    extra_states: Mapping[ExtraState, Any] = field(default_factory=dict)
    spec: LayerSpec = "local"
    steps: int | None = None
    order: str = "stored by name"
    buffers: tuple[FlatBuffer, ...] = ()
    listed: Orders = field(default_factory=dict)

    def of_kind(self, kind: str) -> list[Piece]:
        """The pieces of the weights, or of one state of the optimizer."""
        return [piece for piece in self.pieces if piece.tensor.kind == kind]


@contextlib.contextmanager
def damage_named(directory: Path) -> Iterator[None]:
    """Call it damage where a checkpoint's content has a form that upstream never writes.

    What is wrong with it shows as any of Python's own errors: any value can be of any type.

    Raises:
        CheckpointError: In the place of such an error, which is its cause.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            "a checkpoint holds what Megatron does not write",
            where=str(directory),
            got=f"{type(error).__name__}: {error}"[:300],
            cure="it may be damaged, or of a release that is not known here; --check says more",
        ) from error


def without_params(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state without what belongs to single parameters."""
    return {key: value for key, value in state.items() if not key.startswith("param_state")}
