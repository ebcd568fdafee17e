"""Opens legacy checkpoints: each rank's model, and flat buffers without a word on their order."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from flagscale.ckpt_io import legacy
from flagscale.ckpt_io.archive import load_tree
from flagscale.ckpt_io.values import StoredTensor
from flagscale.errors import CheckpointError
from flagscale.layout.model import LayerSpec, LocalParam, layer_specs
from flagscale.layout.pieces import OPTIMIZER_KINDS, Piece, TensorKey
from flagscale.optim.extra_state import ExtraState, from_local
from flagscale.optim.flat import FlatRun, local_pieces
from flagscale.optim.job import Group, Job
from flagscale.optim.order import FlatBuffer
from flagscale.optim.source import Source, without_params

__all__ = ["open_legacy"]


def open_legacy(directory: Path, *, weights_only: bool = False) -> Source:
    """Open the checkpoint of one iteration; flat buffers are not yet told apart.

    Args:
        directory: Of the iteration.
        weights_only: Whether states of the optimizer, if there are any, are left alone.

    Raises:
        CheckpointError: It is damaged, or of an optimizer or model that is not known here.
    """
    stored = legacy.read(directory)
    job = Job.saved(stored.args, str(directory))
    pieces: list[Piece] = []
    tensors: dict[TensorKey, tuple[tuple[int, ...], str]] = {}
    listed: dict[tuple[int, int, int], list[str]] = {}
    extra_states: dict[ExtraState, Any] = {}
    spec: LayerSpec = "local"
    experts = (job.model.dims.num_experts or 0) // job.layout.ep_size
    for place, rank in stored.ranks.items():
        if len(rank.models) != job.pipeline.num_chunks:
            raise CheckpointError(
                "a rank does not hold as many model chunks as its arguments say",
                where=str(directory / rank.directory),
                expected=job.pipeline.num_chunks,
                got=len(rank.models),
            )
        for chunk, model in enumerate(rank.models):
            listed[place.pp_rank, chunk, place.ep_rank] = [
                name for name, value in model.items() if isinstance(value, StoredTensor)
            ]
            spec, params = _model_params(job, place, chunk, model, directory / rank.directory)
            pieces += _model_pieces(params, model, directory / rank.directory)
            layers = job.pipeline.stage(place.pp_rank, chunk).layers
            for name, value in model.items():
                if state := from_local(name, layers, place.ep_rank * experts):
                    extra_states[state] = value
    for name, tensor in job.tensors.items():
        tensors[TensorKey("weight", name)] = (tensor.shape, tensor.dtype)
    first = stored.ranks[min(stored.ranks)]
    loaded = functools.partial(load_tree, directory)
    common = {
        key: loaded(value)
        for key, value in first.model_state.items()
        if not re.fullmatch(r"model\d*|optimizer|rng_state|rerun_state_machine", key)
    }
    optimizer = [] if weights_only else first.model_state.get("optimizer")
    if optimizer is None:
        raise CheckpointError(
            "a checkpoint holds no state of an optimizer",
            where=str(directory / first.directory),
            cure="save it without --no-save-optim",
        )
    chained = optimizer if isinstance(optimizer, list) else [optimizer]
    rng: dict[tuple[int, int], Any] = {}
    for place, rank in sorted(stored.ranks.items(), key=lambda item: item[0].ep_rank):
        if "rng_state" in rank.model_state:
            rng.setdefault((place.pp_rank, place.tp_rank), loaded(rank.model_state["rng_state"]))
    return Source(
        directory=directory,
        iteration=0,  # for whoever opens it to set: the checkpoint may not tell
        ckpt_format="torch",
        optim_format="none" if weights_only else "legacy",
        args=stored.args,
        job=job,
        tensors=tensors,
        pieces=tuple(pieces),
        common=common,
        optimizers=tuple(without_params(loaded(one)) for one in chained),
        rng=rng,
        extra_states={state: loaded(value) for state, value in extra_states.items()},
        spec=spec,
        buffers=() if weights_only else tuple(_legacy_buffers(job, stored)),
        listed=listed,
    )


def _model_params(
    job: Job, place: legacy.RankKey, chunk: int, model: Mapping[str, Any], where: Path
) -> tuple[LayerSpec, tuple[LocalParam, ...]]:
    """What a rank's model chunk should hold, and by which layer spec."""
    stored = {name for name, value in model.items() if isinstance(value, StoredTensor)}
    stored = {name for name in stored if not name.endswith("._extra_state")}
    attempts = []
    for spec in layer_specs(job.args):
        params = job.weights(place.pp_rank, chunk, place.tp_rank, place.ep_rank, spec)
        wrong = {param.name for param in params} ^ stored
        if not wrong:
            return spec, params
        attempts.append(f"{spec}: {', '.join(sorted(wrong)[:3])}")
    raise CheckpointError(
        "the tensors of a rank are not those of the model that the arguments describe",
        where=f"{where}, model chunk {chunk}",
        expected="the parameters of one of the layer specs",
        got=f"missing or in excess: {'; '.join(attempts)}",
    )


def _model_pieces(
    params: Iterable[LocalParam], model: Mapping[str, Any], where: Path
) -> Iterator[Piece]:
    for param in params:
        tensor = model[param.name]
        if (tensor.shape, tensor.dtype) != (param.shape, param.dtype) or not tensor.dense:
            raise CheckpointError(
                "a tensor is not of the shape that the arguments give it",
                where=f"{where}, {param.name}",
                expected=f"{param.dtype} {param.shape}",
                got=f"{tensor.dtype} {tensor.shape}",
            )
        yield from local_pieces(param, tensor.file, tensor.offset)


def _legacy_buffers(job: Job, stored: legacy.LegacyCheckpoint) -> Iterator[FlatBuffer]:
    for group in job.groups():
        places = [
            place
            for place, rank in stored.ranks.items()
            if _in_group(job, group, place)
            and group.optimizer < len(rank.optimizers)
            and rank.optimizers[group.optimizer] is not None
        ]
        if not places:
            raise CheckpointError(
                "the states of a part of the optimizer are missing",
                where=f"{stored.directory}, {group}",
                expected="distrib_optim.pt in the directory of one of its ranks",
                cure="save with --use-distributed-optimizer and without --no-save-optim",
            )
        for buffer in stored.ranks[min(places)].optimizers[group.optimizer] or ():
            if wrong := set(OPTIMIZER_KINDS) ^ buffer.states.keys():
                raise CheckpointError(
                    "the states of the optimizer are not those of an Adam in fp32",
                    where=f"{stored.directory}, {group}",
                    expected=", ".join(OPTIMIZER_KINDS),
                    got=f"missing or in excess: {', '.join(sorted(wrong))}",
                )
            parts = buffer.states["param"]
            yield FlatBuffer(
                group,
                buffer.gbuf_idx,
                buffer.param_dtype,
                {kind: tuple(_consecutive(runs)) for kind, runs in buffer.states.items()},
                buffer.numel_unpadded,
                tuple(part.numel for part in parts) if len(parts) > 1 else None,
            )


def _in_group(job: Job, group: Group, place: legacy.RankKey) -> bool:
    if place.pp_rank != group.pp_rank:
        return False
    if not group.expert:
        return place.tp_rank == group.tp_rank
    return (
        place.ep_rank == group.ep_rank
        and place.tp_rank % job.layout.expert_tp_size == group.etp_rank
    )


def _consecutive(parts: Iterable[StoredTensor]) -> Iterator[FlatRun]:
    start = 0
    for part in parts:
        yield FlatRun(start, part.numel, part.file, part.offset)
        start += part.numel
