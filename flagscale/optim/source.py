"""A checkpoint to be read, of any format, as a table of pieces and what comes along with them."""

from __future__ import annotations

import contextlib
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from flagscale.ckpt_io import legacy, torch_dist
from flagscale.ckpt_io.archive import read_tensor
from flagscale.ckpt_io.buffer_map import read_maps
from flagscale.ckpt_io.location import detect_format, find_iteration
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.values import StoredTensor
from flagscale.errors import CheckpointError
from flagscale.layout.boxes import Box
from flagscale.layout.model import (
    LayerSpec,
    LocalParam,
    canonical_name,
    layer_specs,
)
from flagscale.layout.pieces import OPTIMIZER_KINDS, Piece, Region, TensorKey
from flagscale.optim.extra_state import ExtraState, from_local, from_stored
from flagscale.optim.flat import FlatRun, flat_pieces, local_pieces
from flagscale.optim.job import Group, Job
from flagscale.optim.order import Candidate, FlatBuffer, candidates
from flagscale.optim.proof import compare

__all__ = ["Source", "damage_named", "open_source"]

_STATE: Final = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.([^.]+)\.(.+)", re.DOTALL)
_BUCKET: Final = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_(\d+)\.gbuf_idx_(\d+)"
    r"\.dtype_\(torch\.(\w+), torch\.(\w+)\)\.bucket_idx_(\d+)\.(\w+)"
)
_OPTIMIZER: Final = re.compile(
    r"(?:chained_(\d+)\.)?optimizer\.distributed\.dp_group_idx_0\.(.+)/.*"
)
_RNG: Final = re.compile(r"rng_state/shard_(\d+)\.(\d+)_\d+\.\d+")
_LAYERS: Final = re.compile(r"decoder\.layers\.(?!\d)")
_OLD_KINDS: Final = {"fp32_param": "param"}  # of fully_sharded_model_space
_NAMED: Final = ("fully_reshardable", "fully_sharded_model_space")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Args:
        directory: Of the iteration.
        iteration: Counted from 1.
        ckpt_format: Upstream's name of the format.
        optim_format: Upstream's name of how a ``torch_dist`` checkpoint stores the optimizer's
            states; ``"legacy"`` for the format ``torch``.
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

    def of_kind(self, kind: str) -> list[Piece]:
        """The pieces of the weights, or of one state of the optimizer."""
        return [piece for piece in self.pieces if piece.tensor.kind == kind]


def open_source(load_dir: Path, iteration: int | None = None, *, prove: bool = True) -> Source:
    """Open a checkpoint; no tensor is loaded but the sample that proves the parameters' order.

    Args:
        load_dir: As ``--load`` takes it, or the directory of an iteration.
        iteration: The one wanted, counted from 1; ``None``: the last complete one.
        prove: Whether an order of flat buffers has to prove itself; without, the first that fits.

    Raises:
        CheckpointError: It is missing or damaged, its format or optimizer is not known here, or it
            is not what its arguments say.
    """
    iteration, directory = find_iteration(load_dir, iteration)
    ckpt_format = detect_format(directory)
    openers = {"torch_dist": _open_torch_dist, "torch": _open_legacy}
    if ckpt_format not in openers:
        raise CheckpointError(
            "checkpoints of this format are not read here",
            where=str(directory),
            expected=" or ".join(openers),
            got=ckpt_format,
            cure="save it as torch_dist with the release of Megatron that wrote it",
        )
    with damage_named(directory):
        source, listed = openers[ckpt_format](directory)
        source = replace(source, iteration=int(source.common.get("iteration", iteration)))
        _verify_tensors(source, kinds=("weight",))
        if source.buffers:
            source = _with_order(source, listed, prove)
        _verify_tensors(source, kinds=OPTIMIZER_KINDS)
    return source


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


# ---------------------------------------------------------------------------------------------
# torch_dist


def _open_torch_dist(directory: Path) -> tuple[Source, dict[tuple[int, int, int], list[str]]]:
    stored = torch_dist.read(directory)
    args: Any = stored.common.get("args")
    job = Job.saved(args, str(directory))  # refuses what is no Namespace
    optim_format = _sharding_type(stored, job)
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
    loaded = _loader(directory)
    return (
        Source(
            directory,
            0,
            "torch_dist",
            optim_format,
            args,
            job,
            tensors,
            tuple(pieces),
            {key: loaded(value) for key, value in stored.common.items() if key != "optimizer"},
            _optimizers(stored, loaded),
            {
                (int(match[1]), int(match[2])): loaded(entry.load())
                for key, entry in stored.objects.items()
                if (match := _RNG.fullmatch(key))
            },
            {
                state: loaded(entry.load())
                for key, entry in stored.objects.items()
                if (state := from_stored(key))
            },
            _stored_spec(job, stored),
            _parameter_steps(stored, loaded),
            buffers=tuple(_bucket_buffers(job, flat, dtypes, directory)),
        ),
        {},
    )


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
    """The layer spec, which shows in the name of the norm before experts and nowhere else."""
    if any("pre_mlp_layernorm." in key for key in stored.tensors):
        return "transformer_engine"
    return "local" if job.model.dims.moe_layers else layer_specs(job.args)[0]


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
    return tuple(_without_params(found[index]) for index in sorted(found))


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


# ---------------------------------------------------------------------------------------------
# torch


def _open_legacy(directory: Path) -> tuple[Source, dict[tuple[int, int, int], list[str]]]:
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
    loaded = _loader(directory)
    common = {
        key: loaded(value)
        for key, value in first.model_state.items()
        if not re.fullmatch(r"model\d*|optimizer|rng_state|rerun_state_machine", key)
    }
    optimizer = first.model_state.get("optimizer")
    if optimizer is None:
        raise CheckpointError(
            "a checkpoint holds no state of an optimizer",
            where=str(directory / first.directory),
            cure="save it without --no-save-optim",
        )
    chained = optimizer if isinstance(optimizer, list) else [optimizer]
    return (
        Source(
            directory,
            0,
            "torch",
            "legacy",
            stored.args,
            job,
            tensors,
            tuple(pieces),
            common,
            tuple(_without_params(loaded(one)) for one in chained),
            {
                (place.pp_rank, place.tp_rank): loaded(rank.model_state["rng_state"])
                for place, rank in stored.ranks.items()
                if place.ep_rank == min(p.ep_rank for p in stored.ranks)
                and "rng_state" in rank.model_state
            },
            {state: loaded(value) for state, value in extra_states.items()},
            spec,
            buffers=tuple(_legacy_buffers(job, stored)),
        ),
        listed,
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


# ---------------------------------------------------------------------------------------------
# Both


def _with_order(source: Source, listed: Mapping[Any, Sequence[str]], prove: bool) -> Source:
    """The source with the pieces of its flat buffers, in an order that proves itself."""
    refused: list[str] = []
    weights = source.of_kind("weight")
    for candidate in candidates(source.job, source.buffers, read_maps(source.directory), listed):
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


def _without_params(state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state without what belongs to single parameters."""
    return {key: value for key, value in state.items() if not key.startswith("param_state")}


def _loader(directory: Path) -> Any:
    """Puts the tensors of a small tree in their places."""

    def loaded(tree: Any) -> Any:
        if isinstance(tree, StoredTensor):
            with Sources(directory) as sources:
                return read_tensor(sources, tree)
        if isinstance(tree, dict):
            return type(tree)((key, loaded(value)) for key, value in tree.items())
        if type(tree) in (list, tuple):
            return type(tree)(loaded(value) for value in tree)
        return tree

    return loaded
