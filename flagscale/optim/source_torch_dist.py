"""Opens ``torch_dist`` checkpoints: states stored by name, or in the buckets of flat buffers."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from flagscale.ckpt_io import torch_dist
from flagscale.ckpt_io.archive import load_tree
from flagscale.ckpt_io.values import StoredTensor
from flagscale.errors import CheckpointError
from flagscale.layout.boxes import Box
from flagscale.layout.model import LayerSpec, canonical_name, layer_specs, stored_name
from flagscale.layout.pieces import OPTIMIZER_KINDS, Piece, Region, TensorKey
from flagscale.optim.extra_state import from_stored
from flagscale.optim.flat import FlatRun
from flagscale.optim.job import Group, Job
from flagscale.optim.order import FlatBuffer
from flagscale.optim.source import Source, without_params

__all__ = ["open_torch_dist"]

_STATE: Final = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)", re.DOTALL)
_BUCKET: Final = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)"
    r"\.dtype_\(torch\.(\w+), torch\.(\w+)\)\.bucket_idx_(\d+)\.(\w+)"
)
_OPTIMIZER: Final = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_0\.(.+)/.*"
)
_OF_OPTIMIZER: Final = re.compile(r"(?:chained_\d+\.)?optimizer\.")
_RNG: Final = re.compile(r"rng_state/shard_(\d+)\.(\d+)_\d+\.\d+")
_LAYERS: Final = re.compile(r"decoder\.layers\.(?!\d)")
_OLD_KINDS: Final = {"fp32_param": "param"}  # of fully_sharded_model_space
_NAMED: Final = ("fully_reshardable", "fully_sharded_model_space")


def open_torch_dist(directory: Path, *, weights_only: bool = False) -> Source:
    """Open the checkpoint of one iteration; flat buffers are not yet told apart.

    Args:
        directory: Of the iteration.
        weights_only: Whether states of the optimizer, if there are any, are left alone.

    Raises:
        CheckpointError: It is damaged, or of an optimizer or model that is not known here.
    """
    stored = torch_dist.read(directory)
    args: Any = stored.common.get("args")
    job = Job.saved(args, str(directory))  # refuses what is no Namespace
    if weights_only:
        stored = _without_optimizer(stored)
    optim_format = "none" if weights_only else _sharding_type(stored, job)
    pieces: list[Piece] = []
    tensors: dict[TensorKey, tuple[tuple[int, ...], str]] = {}
    flat: dict[tuple[int, int, int], dict[int, dict[str, torch_dist.TensorEntry]]] = {}
    dtypes: dict[tuple[int, int, int], str] = {}
    for key, entry in stored.tensors.items():
        if match := _BUCKET.fullmatch(key):
            optimizer, group, gbuf, param_dtype, _grad, bucket, kind = match.groups()
            place = (int(optimizer or 0), int(group), int(gbuf))
            flat.setdefault(place, {}).setdefault(int(bucket), {})[kind] = entry
            dtypes[place] = param_dtype
            continue
        match = _STATE.fullmatch(key)
        kind = _OLD_KINDS.get(match[1], match[1]) if match else "weight"
        if kind == "step":
            continue
        pieces += _named_pieces(kind, match[2] if match else key, entry)
        _add_named(tensors, kind, match[2] if match else key, entry)
    loaded = functools.partial(load_tree, directory)
    return Source(
        directory=directory,
        iteration=0,  # for whoever opens it to set: the checkpoint may not tell
        ckpt_format="torch_dist",
        optim_format=optim_format,
        args=args,
        job=job,
        tensors=tensors,
        pieces=tuple(pieces),
        common={key: loaded(value) for key, value in stored.common.items() if key != "optimizer"},
        optimizers=_optimizers(stored, loaded),
        rng={
            (int(match[1]), int(match[2])): loaded(entry.load())
            for key, entry in stored.objects.items()
            if (match := _RNG.fullmatch(key))
        },
        extra_states={
            state: loaded(entry.load())
            for key, entry in stored.objects.items()
            if (state := from_stored(key))
        },
        spec=_stored_spec(job, stored),
        steps=_parameter_steps(stored, loaded),
        buffers=tuple(_bucket_buffers(job, flat, dtypes, directory)),
    )


def _without_optimizer(stored: torch_dist.TorchDistCheckpoint) -> torch_dist.TorchDistCheckpoint:
    return replace(
        stored,
        tensors={key: value for key, value in stored.tensors.items() if not _is_state(key)},
        objects={key: value for key, value in stored.objects.items() if not _is_state(key)},
        common={key: value for key, value in stored.common.items() if key != "optimizer"},
    )


def _is_state(key: str) -> bool:
    return bool(_OF_OPTIMIZER.match(key))


def _parameter_steps(stored: torch_dist.TorchDistCheckpoint, loaded: Any) -> int | None:
    """Steps as single parameters count them, in tensors or in the common state."""
    counts = [
        chunk
        for key, entry in stored.tensors.items()
        if (match := _STATE.fullmatch(key)) and match[1] == "step"
        for _, chunk in entry.chunks
    ]
    optimizer = stored.common.get("optimizer")
    for state in _chained(optimizer if isinstance(optimizer, dict) else {}).values():
        params = state.get("param_state") if isinstance(state, dict) else None
        counts += [
            one["step"]
            for one in (params.values() if isinstance(params, dict) else ())
            if isinstance(one, dict) and isinstance(one.get("step"), StoredTensor)
        ]
    found = {value for count in counts for value in loaded(count).flatten().tolist()}
    if len(found) > 1 or not all(float(value).is_integer() for value in found):
        raise CheckpointError(
            "the parameters do not agree on how many steps were done",
            where=str(stored.directory),
            got=", ".join(map(str, sorted(found)[:4])),
        )
    return int(found.pop()) if found else None


def _chained(optimizer: dict[Any, Any]) -> dict[Any, Any]:
    """The states of chained optimizers by index, also where there is one and no index."""
    return optimizer if 0 in optimizer else {0: optimizer}


def _sharding_type(stored: torch_dist.TorchDistCheckpoint, job: Job) -> str:
    """How the optimizer is stored: said by ``content_metadata``, before 0.13 by the arguments."""
    metadata = stored.common.get("content_metadata") or {}
    known = (*_NAMED, "dp_reshardable")
    kind = metadata.get("distrib_optim_sharding_type")
    if kind is None:
        if any(_BUCKET.fullmatch(key) for key in stored.tensors):
            kind = "dp_reshardable"
        elif any(_STATE.fullmatch(key) for key in stored.tensors):
            kind = "fully_sharded_model_space"
    if kind not in known:
        raise CheckpointError(
            "the optimizer is not stored in a way that is known here",
            where=str(stored.directory),
            expected=", ".join(known),
            got="no state of an optimizer" if kind is None else kind,
            cure="save it with --use-distributed-optimizer and without --no-save-optim",
        )
    return str(kind)


def _stored_spec(job: Job, stored: torch_dist.TorchDistCheckpoint) -> LayerSpec:
    """The layer spec whose names of norms are there; where all have them, the likeliest."""

    def found(spec: LayerSpec) -> int:
        return sum(stored_name(job.model, name, spec).key in stored.tensors for name in job.tensors)

    return max(layer_specs(job.args), key=found)


def _named_pieces(kind: str, key: str, entry: torch_dist.TensorEntry) -> Iterator[Piece]:
    stacked = bool(_LAYERS.match(key))
    for box, chunk in entry.chunks:
        if not stacked:
            region = Region(chunk.file, chunk.offset, chunk.strides)
            yield Piece(TensorKey(kind, canonical_name(key)), box, entry.dtype, region)
            continue
        for index in range(box.shape[0]):
            name = canonical_name(key, box.offset[0] + index)
            offset = chunk.offset + index * chunk.strides[0]
            region = Region(chunk.file, offset, chunk.strides[1:])
            yield Piece(
                TensorKey(kind, name), Box(box.offset[1:], box.shape[1:]), entry.dtype, region
            )


def _add_named(
    tensors: dict[TensorKey, tuple[tuple[int, ...], str]],
    kind: str,
    key: str,
    entry: torch_dist.TensorEntry,
) -> None:
    if not _LAYERS.match(key):
        tensors[TensorKey(kind, canonical_name(key))] = (entry.shape, entry.dtype)
        return
    for layer in range(entry.shape[0] if entry.shape else 0):
        tensors[TensorKey(kind, canonical_name(key, layer))] = (entry.shape[1:], entry.dtype)


def _optimizers(stored: torch_dist.TorchDistCheckpoint, loaded: Any) -> tuple[dict[str, Any], ...]:
    """The state of each chained optimizer, from where its format keeps it."""
    found: dict[int, dict[str, Any]] = {}
    for key, entry in stored.objects.items():
        match = _OPTIMIZER.fullmatch(key)
        if match and not match[2].startswith("per_bucket"):
            found.setdefault(int(match[1] or 0), {})[match[2]] = loaded(entry.load())
    if not found:
        chained = _chained(stored.common.get("optimizer") or {})
        found = {index: dict(loaded(chained[index])) for index in sorted(chained)}
    return tuple(without_params(found[index]) for index in sorted(found))


def _bucket_buffers(
    job: Job,
    flat: Mapping[tuple[int, int, int], Mapping[int, Mapping[str, torch_dist.TensorEntry]]],
    dtypes: Mapping[tuple[int, int, int], str],
    directory: Path,
) -> Iterator[FlatBuffer]:
    groups = {(group.optimizer, group.index): group for group in job.groups()}
    seen: set[Group] = set()
    for (optimizer, index, gbuf), buckets in sorted(flat.items()):
        group = groups.get((optimizer, index))
        where = f"{directory}, optimizer {optimizer}, dp_group_idx {index}, gbuf_idx {gbuf}"
        if group is None or sorted(buckets) != list(range(len(buckets))):
            raise CheckpointError(
                "the optimizer's buffers are not those of the job that the arguments describe",
                where=where,
                expected=f"TP {job.layout.tp_size}, PP {job.layout.pp_size}, buckets from 0 on",
                got=f"buckets {sorted(buckets)}",
            )
        seen.add(group)
        numels = tuple(_bucket_numel(buckets[number], where) for number in sorted(buckets))
        runs: dict[str, list[FlatRun]] = {}
        for number in sorted(buckets):
            start = sum(numels[:number])
            for kind, entry in buckets[number].items():
                runs.setdefault(kind, []).extend(
                    FlatRun(start + box.offset[0], box.numel, chunk.file, chunk.offset)
                    for box, chunk in sorted(entry.chunks, key=lambda pair: pair[0].offset)
                )
        yield FlatBuffer(
            group,
            gbuf,
            dtypes[optimizer, index, gbuf],
            {kind: tuple(parts) for kind, parts in runs.items()},
            sum(numels),
            numels,
        )
    absent = [group for group in groups.values() if group not in seen]
    if flat and (missing := [group for group in absent if _has_params(job, group)]):
        raise CheckpointError(
            "the states of a part of the optimizer are missing",
            where=f"{directory}, {missing[0]}",
            expected="a buffer for each group of the optimizer",
        )


def _has_params(job: Job, group: Group) -> bool:
    """Whether a group has any; not so on a stage without layers, or without experts."""
    return any(
        param.expert_parallel == group.expert
        for chunk in group.chunks
        for param in job.params(group, chunk, "local")
    )


def _bucket_numel(states: Mapping[str, torch_dist.TensorEntry], where: str) -> int:
    shapes = {entry.shape for entry in states.values()}
    wrong = set(OPTIMIZER_KINDS) ^ states.keys()
    if wrong or len(shapes) != 1 or {entry.dtype for entry in states.values()} != {"float32"}:
        raise CheckpointError(
            "the states of the optimizer are not those of an Adam in fp32",
            where=where,
            expected=f"{', '.join(OPTIMIZER_KINDS)}, float32, of one size",
            got=", ".join(f"{kind} {e.dtype} {e.shape}" for kind, e in states.items()),
        )
    return int(next(iter(shapes))[0])
