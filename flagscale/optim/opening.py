"""Opens a checkpoint of whichever format, and holds it to its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from flagscale.ckpt_io.buffer_map import read_maps
from flagscale.ckpt_io.location import detect_format, find_iteration
from flagscale.errors import CheckpointError
from flagscale.layout.pieces import OPTIMIZER_KINDS, Piece, TensorKey
from flagscale.optim.flat import flat_pieces
from flagscale.optim.order import Candidate, FlatBuffer, candidates
from flagscale.optim.proof import compare
from flagscale.optim.source import Source, damage_named
from flagscale.optim.source_legacy import open_legacy
from flagscale.optim.source_torch_dist import open_torch_dist

__all__ = ["open_source"]


def open_source(
    load_dir: Path,
    iteration: int | None = None,
    *,
    prove: bool = True,
    weights_only: bool = False,
) -> Source:
    """Open a checkpoint; no tensor is loaded but the sample that proves the parameters' order.

    Args:
        load_dir: As ``--load`` takes it, or the directory of an iteration.
        iteration: The one wanted, counted from 1; ``None``: the last complete one.
        prove: Whether an order of flat buffers has to prove itself; without, the first that fits.
        weights_only: Whether states of the optimizer are left alone, and need not be there.

    Raises:
        CheckpointError: It is missing or damaged, its format or optimizer is not known here, or it
            is not what its arguments say.
    """
    iteration, directory = find_iteration(load_dir, iteration)
    ckpt_format = detect_format(directory)
    openers = {"torch_dist": open_torch_dist, "torch": open_legacy}
    if ckpt_format not in openers:
        raise CheckpointError(
            "checkpoints of this format are not read here",
            where=str(directory),
            expected=" or ".join(openers),
            got=ckpt_format,
            cure="save it as torch_dist with the release of Megatron that wrote it",
        )
    with damage_named(directory):
        source = openers[ckpt_format](directory, weights_only=weights_only)
        source = replace(source, iteration=int(source.common.get("iteration", iteration)))
        _verify_tensors(source, kinds=("weight",))
        if source.buffers:
            source = _with_order(source, prove)
        if not weights_only:
            _verify_tensors(source, kinds=OPTIMIZER_KINDS)
    return source


def _with_order(source: Source, prove: bool) -> Source:
    """The source with the pieces of its flat buffers, in an order that proves itself."""
    refused: list[str] = []
    weights = source.of_kind("weight")
    maps = read_maps(source.directory)
    for candidate in candidates(source.job, source.buffers, maps, source.listed):
        if isinstance(candidate, CheckpointError):
            refused.append(str(candidate))
            continue
        pieces = [*_flat_pieces(source.buffers, candidate)]
        mains = [piece for piece in pieces if piece.tensor.kind == "param"]
        wrong = list(compare(source.directory, weights, mains)) if prove else []
        if not wrong:
            states = {
                TensorKey(kind, name): (tensor.shape, "float32")
                for kind in OPTIMIZER_KINDS
                for name, tensor in source.job.tensors.items()
                if tensor.trained
            }
            return replace(
                source,
                tensors={**source.tensors, **states},
                pieces=(*source.pieces, *pieces),
                spec=candidate.spec or source.spec,
                order=candidate.name + (", proved on a sample of every parameter" if prove else ""),
            )
        refused.append(
            f"{candidate.name}: {len(wrong)} parameters are not their weights; {wrong[0]}"
        )
    raise CheckpointError(
        "no order of the parameters fits the optimizer's buffers",
        where=str(source.directory),
        expected="an order in which every main copy, rounded, is the weight",
        got="".join(f"\n    {reason}" for reason in refused),
        cure="if the checkpoint is damaged, --check says how; if its layer spec is custom, save it "
        "once more from a job of FlagScale, which writes the map of the buffers",
    )


def _flat_pieces(buffers: Sequence[FlatBuffer], candidate: Candidate) -> Iterator[Piece]:
    for buffer, params in zip(buffers, candidate.params, strict=True):
        for kind, runs in buffer.runs.items():
            yield from flat_pieces(kind, "float32", params, runs)


def _verify_tensors(source: Source, kinds: Sequence[str]) -> None:
    """Hold what is stored to what the arguments say of the model."""
    for kind in kinds:
        expected = {
            TensorKey(kind, name): (
                tensor.shape,
                tensor.dtype if kind == "weight" else "float32",
            )
            for name, tensor in source.job.tensors.items()
            if kind == "weight" or tensor.trained
        }
        stored = {key: value for key, value in source.tensors.items() if key.kind == kind}
        for key in sorted(expected.keys() | stored.keys()):
            if expected.get(key) != stored.get(key):
                raise CheckpointError(
                    "the saved arguments do not agree with the tensors",
                    where=f"{source.directory}, {key.kind} {key.name}",
                    expected=_described(expected.get(key)),
                    got=_described(stored.get(key)),
                    cure="an optimizer of another kind, or a model that is not known here",
                )
    unknown = {key.kind for key in source.tensors} - {"weight", *OPTIMIZER_KINDS}
    if unknown:
        raise CheckpointError(
            "the states of the optimizer are not those of an Adam in fp32",
            where=str(source.directory),
            expected=", ".join(OPTIMIZER_KINDS),
            got=", ".join(sorted(unknown)),
        )


def _described(tensor: tuple[tuple[int, ...], str] | None) -> str:
    return "no such tensor" if tensor is None else f"{tensor[1]} {tensor[0]}"
