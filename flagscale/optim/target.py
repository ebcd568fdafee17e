"""A checkpoint to be written: its files, what their holes hold, and what else is in them."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, Final, Literal

from flagscale.ckpt_io.legacy import RankKey, plan_rank, rank_directory
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.torch_dist_plan import ChunkKey, TensorPlan, plan_checkpoint
from flagscale.ckpt_io.values import TensorSlot
from flagscale.errors import ConfigError
from flagscale.layout.boxes import Box
from flagscale.layout.model import LayerSpec, LocalParam, layer_specs, stored_name
from flagscale.layout.parallel import BatchSizes, raise_problems, verify_layout
from flagscale.layout.pieces import (
    DTYPE_BYTES,
    OPTIMIZER_KINDS,
    Piece,
    Region,
    TensorKey,
    dense_strides,
)
from flagscale.optim.carry import Request, rng_states, target_args, target_optimizers
from flagscale.optim.extra_state import CORE_ATTENTION, to_local, to_stored
from flagscale.optim.flat import FlatParam, FlatRun, flat_pieces, gaps, local_pieces
from flagscale.optim.job import Group, Job
from flagscale.optim.source import Source

__all__ = ["CkptFormat", "OptimFormat", "Target", "plan_target"]

CkptFormat = Literal["torch", "torch_dist"]
OptimFormat = Literal["fully_reshardable", "dp_reshardable", "none"]
"""Upstream's names; ``"none"`` for weights alone, as with ``--no-save-optim``."""

CHUNK_BYTES: Final = 128 << 20
"""A stored chunk is no larger, if one row of it is not."""

FILE_BYTES: Final = 256 << 20
"""A ``.distcp`` file is closed when it has as many; a file is what one worker writes."""

_VOCAB_ROWS: Final = ("embedding.word_embeddings.weight", "output_layer.weight")

_PADDING: Final = "alignment"
"""Kind of the elements of flat buffers that belong to no parameter; they are zero."""


@dataclass(frozen=True)
class Target:
    """What is to be written.

    Args:
        args: Arguments of the job it is for.
        job: What they describe.
        ckpt_format: Upstream's name of the format.
        optim_format: How ``torch_dist`` is to store the optimizer's states.
        files: The files.
        pieces: What their holes hold.
        grown: Source pieces of rows that the source does not have: copies of a trained pad row.
        zero_fill: Tensors that are zero where no source has them.
        rng: What was done with the random generators' states.
        notes: What whoever resumes must know.
    """

    args: Namespace
    job: Job
    ckpt_format: CkptFormat
    optim_format: OptimFormat
    files: tuple[OutputFile, ...]
    pieces: tuple[Piece, ...]
    grown: tuple[Piece, ...]
    zero_fill: frozenset[TensorKey]
    rng: str
    notes: tuple[str, ...]


def plan_target(
    source: Source,
    request: Request,
    ckpt_format: CkptFormat = "torch_dist",
    optim_format: OptimFormat = "fully_reshardable",
) -> Target:
    """Plan the target of a reshard.

    Args:
        source: The opened checkpoint.
        request: The layout to go to.
        ckpt_format: Upstream's name of the format.
        optim_format: How ``torch_dist`` is to store the optimizer's states.

    Raises:
        ConfigError: The model does not fit the layout.
        CheckpointError: The source lacks what the target needs.
    """
    args = target_args(source, request)
    if optim_format == "none":
        args.no_save_optim = True  # upstream then does not look for it
    _verify_fit(source, args)
    job = Job.of(vars(args))
    rng, rng_note = rng_states(source, job)
    if "no_save_rng" in args and not rng:
        args.no_save_rng = True  # upstream then does not look for them
    planner = _Legacy if ckpt_format == "torch" else _TorchDist
    files, pieces = planner(source, job, args, rng, optim_format).plan()
    grown, zero_fill, notes = _growth(source, job)
    if ckpt_format == "torch" and not rng:
        notes.append("resume with --no-load-rng: this format has no other way to do without")
    flat = ckpt_format == "torch" or optim_format == "dp_reshardable"
    if job.model.dtype == "float32" and flat and optim_format != "none":
        notes.append(
            "megatron-core 0.19 fails to load flat states of a model in fp32: choose torch_dist "
            "with fully_reshardable"
        )
    padding = {piece.tensor for piece in pieces if piece.tensor.kind == _PADDING}
    return Target(
        args,
        job,
        ckpt_format,
        optim_format,
        tuple(files),
        tuple(pieces),
        tuple(grown),
        frozenset(zero_fill | padding),
        rng_note,
        tuple(notes),
    )


def _verify_fit(source: Source, args: Namespace) -> None:
    """Refuse a grid that the model does not fit on, by the rules of a launch."""
    values = vars(args)
    layout = replace(
        source.job.layout,
        world_size=values["world_size"],
        tp_size=values["tensor_model_parallel_size"],
        pp_size=values["pipeline_model_parallel_size"],
        ep_size=values.get("expert_model_parallel_size") or 1,
        etp_size=values.get("expert_tensor_parallel_size"),
        vpp_size=None,  # where the layers lie, the pipeline itself verifies
        sequence_parallel=False,
        uneven_pipeline=True,
    )
    dims = replace(source.job.model.dims, padded_vocab_size=values["padded_vocab_size"])
    raise_problems(verify_layout(layout, dims, BatchSizes(1, max(1, values["data_parallel_size"]))))


def _growth(source: Source, job: Job) -> tuple[list[Piece], set[TensorKey], list[str]]:
    """Source pieces for the rows that a larger vocabulary has beyond the source's."""
    old = source.job.model.dims.padded_vocab_size or 0
    new = job.model.dims.padded_vocab_size or 0
    notes = [f"give --padded-vocab-size {new}, so that upstream pads the vocabulary alike"]
    if new == old:
        return [], set(), notes
    vocab_size = vars(source.args).get("vocab_size")
    has_pad_row = vocab_size is not None and int(vocab_size) < old
    pieces: list[Piece] = []
    keys = {
        key
        for key, (shape, _) in source.tensors.items()
        if shape[:1] == (old,)
        and key.name.endswith(("word_embeddings.weight", "output_layer.weight"))
    }
    for piece in source.pieces if has_pad_row else ():
        row = old - 1 - piece.box.offset[0] if piece.tensor in keys else -1
        if 0 <= row < (piece.box.shape[0] if piece.tensor in keys else 0):
            last = Box((old - 1, *piece.box.offset[1:]), (1, *piece.box.shape[1:]))
            box = Box((old, *piece.box.offset[1:]), (new - old, *piece.box.shape[1:]))
            region = piece.part(last)
            repeated = Region(region.file, region.offset, (0, *region.strides[1:]))
            pieces.append(Piece(piece.tensor, box, piece.dtype, repeated))
    what = f"copies of the trained pad row {old - 1}" if has_pad_row else "zeros"
    notes.append(
        f"the vocabulary grows from {old} to {new} rows; the new ones are {what}, weights and "
        "states alike. Upstream's softmax counts pad rows, so the loss changes"
    )
    return pieces, set() if has_pad_row else keys, notes


@dataclass(frozen=True)
class _Format:
    """What both formats' planners have."""

    source: Source
    job: Job
    args: Namespace
    rng: Mapping[tuple[int, int], Any]
    optim_format: OptimFormat

    def common(self) -> dict[str, Any]:
        """What all ranks share, without the state of the rerun engine, which is of one layout."""
        dropped = {"args", "optimizer", "content_metadata", "rerun_state_machine"}
        kept = {key: value for key, value in self.source.common.items() if key not in dropped}
        return {"args": self.args, **kept}


class _TorchDist(_Format):
    """Plans a checkpoint of the format ``torch_dist``."""

    def plan(self) -> tuple[Sequence[OutputFile], list[Piece]]:
        """Its files, and what their holes hold."""
        tensors: dict[str, TensorPlan] = {}
        members: list[ChunkKey] = []
        named: dict[ChunkKey, tuple[TensorKey, Box]] = {}
        flat: dict[str, tuple[str, list[FlatParam], int]] = {}
        objects = dict(self._objects())
        common = self.common() | {"content_metadata": self._content_metadata()}
        if self.optim_format != "none":
            optimizers = target_optimizers(self.source, self.job)
            if self.optim_format == "fully_reshardable":
                self._add_named(OPTIMIZER_KINDS, tensors, members, named)
                states: list[dict[str, Any]] = optimizers
            else:
                states = [{} for _ in optimizers]
                self._add_flat(optimizers, tensors, members, flat, objects)
            kinds = [{**state, "param_state_sharding_type": self.optim_format} for state in states]
            common["optimizer"] = dict(enumerate(kinds)) if len(kinds) > 1 else kinds[0]
        self._add_named(("weight",), tensors, members, named)
        planned = plan_checkpoint(tensors, _in_files(tensors, members), objects, common)
        pieces: list[Piece] = []
        runs: dict[str, list[FlatRun]] = {}
        for member, (path, hole) in planned.chunks.items():
            if member.key in flat:
                run = FlatRun(member.box.offset[0], member.box.numel, path, hole.offset)
                runs.setdefault(member.key, []).append(run)
            else:
                tensor, box = named[member]
                strides = dense_strides(box.shape, DTYPE_BYTES[hole.dtype])
                pieces.append(Piece(tensor, box, hole.dtype, Region(path, hole.offset, strides)))
        for key, (kind, params, numel) in flat.items():
            ordered = sorted(runs.get(key, ()), key=lambda run: run.start)
            pieces += flat_pieces(kind, "float32", params, ordered)
            pieces += _padding_pieces(key, params, numel, ordered)
        return planned.files, pieces

    def _content_metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {
            "chained_optim_avoid_prefix": True,
            "singleton_local_shards": False,
        }
        if self.optim_format != "none":
            metadata["distrib_optim_sharding_type"] = self.optim_format
        if self.optim_format == "fully_reshardable":
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
        return metadata

    def _objects(self) -> Iterator[tuple[str, Any]]:
        at = self.job.layout
        for (pp_rank, tp_rank), state in self.rng.items():
            yield f"rng_state/shard_{pp_rank}.{tp_rank}_{at.pp_size}.{at.tp_size}", state
        for extra_state, value in self.source.extra_states.items():
            yield to_stored(extra_state, self.job.model), value

    def _specs(self) -> tuple[LayerSpec, ...]:
        """Whose names tensors are given: a source that no job has saved is to serve either spec."""
        if self.source.ckpt_format == "safetensors":
            return layer_specs(self.job.args)
        return (self.source.spec,)

    def _add_named(
        self,
        kinds: Iterable[str],
        tensors: dict[str, TensorPlan],
        members: list[ChunkKey],
        named: dict[ChunkKey, tuple[TensorKey, Box]],
    ) -> None:
        """Tensors that are stored by name, whole; chunks of one layer."""
        model = self.job.model
        for kind, (name, tensor) in product(kinds, self.job.tensors.items()):
            if kind != "weight" and not tensor.trained:
                continue
            dtype = tensor.dtype if kind == "weight" else "float32"
            for stored in dict.fromkeys(stored_name(model, name, spec) for spec in self._specs()):
                key = stored.key if kind == "weight" else f"optimizer.state.{kind}.{stored.key}"
                lead = () if stored.layer is None else (stored.layer,)
                shape = (*(model.dims.num_layers for _ in lead), *tensor.shape)
                tensors[key] = TensorPlan(shape, dtype)
                for box in _chunks(tensor.shape, dtype):
                    ones = (1,) * len(lead)
                    member = ChunkKey(key, Box((*lead, *box.offset), (*ones, *box.shape)))
                    members.append(member)
                    named[member] = (TensorKey(kind, name), box)

    def _add_flat(
        self,
        optimizers: Sequence[Mapping[str, Any]],
        tensors: dict[str, TensorPlan],
        members: list[ChunkKey],
        flat: dict[str, tuple[str, list[FlatParam], int]],
        objects: dict[str, Any],
    ) -> None:
        """Buckets, one tensor for each kind of state."""
        for group in self.job.groups():
            prefix = f"chained_{group.optimizer}." if len(optimizers) > 1 else ""
            prefix += f"optimizer.distributed.dp_group_idx_{group.index}."
            numels: list[dict[Any, list[int]]] = []
            unpadded: list[dict[Any, list[int]]] = []
            for gbuf, (buffer, params) in enumerate(self.job.buffers(group, self.source.spec)):
                key = buffer.key
                dtypes = _torch_dtypes(key.param_dtype, key.grad_dtype)
                numels.append({dtypes: [bucket.end - bucket.start for bucket in buffer.buckets]})
                unpadded.append({dtypes: [bucket.numel_unpadded for bucket in buffer.buckets]})
                name = f"{prefix}gbuf_idx_{gbuf}.dtype_{dtypes}.bucket_idx_"
                for number, bucket in enumerate(buffer.buckets):
                    inside = [
                        FlatParam(params[slot.param], buffer.in_bucket(slot)[0])
                        for slot in buffer.slots
                        if slot.bucket == number
                    ]
                    for kind in OPTIMIZER_KINDS:
                        full = f"{name}{number}.{kind}"
                        shape = (bucket.numel_unpadded,)
                        tensors[full] = TensorPlan(shape, "float32")
                        members += [ChunkKey(full, box) for box in _chunks(shape, "float32")]
                        flat[full] = (kind, inside, bucket.numel_unpadded)
            for part, value in {
                **optimizers[group.optimizer],
                "per_bucket_numel": numels,
                "per_bucket_numel_unpadded": unpadded,
            }.items():
                objects[f"{prefix}{part}/shard_0_1"] = value


class _Legacy(_Format):
    """Plans a checkpoint of the format ``torch``."""

    def plan(self) -> tuple[Sequence[OutputFile], list[Piece]]:
        """Its files, and what their holes hold."""
        files: list[OutputFile] = []
        pieces: list[Piece] = []
        at = self.job.layout
        optimizers: list[dict[str, Any]] = []
        if self.optim_format != "none":
            optimizers = target_optimizers(self.source, self.job)
        writers = self._writers()
        for place in writers:
            name = rank_directory(place, pipeline=at.pp_size > 1, experts=at.ep_size > 1)
            held: dict[str, tuple[LocalParam | str, list[FlatParam], int]] = {}
            model_state = self._model_state(place, optimizers, held)
            states = [
                self._buffers_state(group, held) if group else None
                for group in (writers[place] if optimizers else ())
            ]
            distrib_optim = states if len(states) > 1 else states[0] if states else None
            for planned in plan_rank(name, model_state, distrib_optim):
                files.append(planned.output)
                for key, hole in planned.holes.items():
                    pieces += _slot_pieces(planned.output.path, hole, key, *held[key])
        return files, pieces

    def _writers(self) -> dict[RankKey, list[Group | None]]:
        """The ranks that save, and which group's states each saves for each optimizer.

        A group's states are saved by its first rank, into the directory of that rank.
        """
        at, groups = self.job.layout, list(self.job.groups())
        optimizers = 1 + max(group.optimizer for group in groups)
        by_place: dict[tuple[int, ...], list[Group]] = {}
        for group in groups:
            own = (group.ep_rank, group.etp_rank) if group.expert else (group.tp_rank,)
            by_place.setdefault((group.pp_rank, *own), []).append(group)
        writers: dict[RankKey, list[Group | None]] = {}
        for rank in range(at.world_size):
            dense, expert = at.coordinates(rank), at.expert_coordinates(rank)
            place = RankKey(dense.tp_rank, dense.pp_rank, expert.ep_rank)
            saved = writers.setdefault(place, [None] * optimizers)
            firsts: list[Group] = []
            if dense.dp_rank == dense.cp_rank == 0:
                firsts += by_place[dense.pp_rank, dense.tp_rank]
            if expert.expert_dp_rank == 0:
                firsts += by_place.get((expert.pp_rank, expert.ep_rank, expert.etp_rank), [])
            for group in firsts:
                saved[group.optimizer] = group
        return writers

    def _model_state(
        self,
        place: RankKey,
        optimizers: Sequence[Mapping[str, Any]],
        held: dict[str, tuple[LocalParam | str, list[FlatParam], int]],
    ) -> dict[str, Any]:
        job, source = self.job, self.source
        chunks = job.pipeline.num_chunks
        experts = (job.model.dims.num_experts or 0) // job.layout.ep_size
        own = range(place.ep_rank * experts, (place.ep_rank + 1) * experts)
        state = self.common()
        for chunk in range(chunks):
            model: dict[str, Any] = {}
            for param in job.weights(
                place.pp_rank, chunk, place.tp_rank, place.ep_rank, source.spec
            ):
                key = f"model{chunk}.{param.name}"
                model[param.name] = TensorSlot(param.dtype, param.shape, key)
                held[key] = (param, [], param.numel)
            at = (place.pp_rank, chunk)
            states = {
                state: value
                for state, value in source.extra_states.items()
                if source.spec != "local" or state.module != CORE_ATTENTION
            }
            model |= to_local(states, job.pipeline, at, own)
            state["model" if chunks == 1 else f"model{chunk}"] = model
        if optimizers:
            state["optimizer"] = list(optimizers) if len(optimizers) > 1 else optimizers[0]
        if rng := self.rng.get((place.pp_rank, place.tp_rank)):
            state["rng_state"] = rng
        return state

    def _buffers_state(
        self, group: Group, held: dict[str, tuple[LocalParam | str, list[FlatParam], int]]
    ) -> dict[Any, Any]:
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for gbuf, (buffer, params) in enumerate(self.job.buffers(group, self.source.spec)):
            flat = [FlatParam(params[slot.param], buffer.compact(slot)[0]) for slot in buffer.slots]
            tensors: dict[str, Any] = {}
            for kind in OPTIMIZER_KINDS:
                key = f"{group.optimizer}.{gbuf}.{kind}"
                tensors[kind] = TensorSlot("float32", (buffer.numel_unpadded,), key)
                held[key] = (kind, flat, buffer.numel_unpadded)
            tensors["numel_unpadded"] = buffer.numel_unpadded
            dtypes = _torch_dtypes(buffer.key.param_dtype, buffer.key.grad_dtype)
            state[gbuf] = {dtypes: tensors}
        return state


def _slot_pieces(
    path: str,
    hole: Hole,
    key: str,
    what: LocalParam | str,
    flat: Sequence[FlatParam],
    numel: int,
) -> Iterator[Piece]:
    """What a hole of a legacy file holds: a rank's weight, or a state of a buffer."""
    if isinstance(what, LocalParam):
        yield from local_pieces(what, path, hole.offset)
        return
    run = FlatRun(0, numel, path, hole.offset)
    yield from flat_pieces(what, "float32", flat, [run])
    yield from _padding_pieces(f"{path} {key}", flat, numel, [run])


def _padding_pieces(
    key: str, params: Sequence[FlatParam], numel: int, runs: Sequence[FlatRun]
) -> Iterator[Piece]:
    """The elements of a flat tensor between its parameters, in every run that has some."""
    itemsize = DTYPE_BYTES["float32"]
    for start, stop in gaps(params, numel):
        for run in runs:
            begin, end = max(start, run.start), min(stop, run.start + run.numel)
            if begin < end:
                region = Region(run.file, run.offset + (begin - run.start) * itemsize, (itemsize,))
                yield Piece(
                    TensorKey(_PADDING, key), Box((begin,), (end - begin,)), "float32", region
                )


def _chunks(shape: tuple[int, ...], dtype: str) -> Iterator[Box]:
    """A tensor in chunks of bounded size: whole rows of its first dimension."""
    if not shape:
        yield Box((), ())
        return
    row = prod(shape[1:]) * DTYPE_BYTES[dtype]
    rows = max(1, CHUNK_BYTES // max(1, row))
    for start in range(0, shape[0], rows):
        size = min(rows, shape[0] - start)
        yield Box((start,) + (0,) * (len(shape) - 1), (size, *shape[1:]))


def _in_files(
    tensors: Mapping[str, TensorPlan], members: Iterable[ChunkKey]
) -> list[list[ChunkKey]]:
    files: list[list[ChunkKey]] = [[]]
    filled = 0
    for member in members:
        nbytes = member.box.numel * DTYPE_BYTES[tensors[member.key].dtype]
        if filled and filled + nbytes > FILE_BYTES:
            files.append([])
            filled = 0
        files[-1].append(member)
        filled += nbytes
    return files


def _torch_dtypes(param_dtype: str, grad_dtype: str) -> tuple[Any, Any]:
    import torch

    try:
        return getattr(torch, param_dtype), getattr(torch, grad_dtype)
    except AttributeError as error:
        raise ConfigError(
            "an element type that torch does not have", got=f"{param_dtype}, {grad_dtype}"
        ) from error
