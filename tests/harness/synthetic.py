"""Checkpoints that nobody trained: of any model, layout and format, and of any size.

Each element is a function of what it is an element of (kind, canonical name, place in the whole
tensor), so whoever reads one can tell whether it is the right one, without the source. Where things
lie is taken from :mod:`flagscale.layout`, which other tests hold to upstream, and files are planned
by :mod:`flagscale.ckpt_io`. What is in them is made here, from whole tensors down, without anything
of :mod:`flagscale.optim`.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch

from flagscale.ckpt_io.buffer_map import (
    BucketMap,
    BufferMap,
    OptimizerMap,
    ParameterMap,
    write_map,
)
from flagscale.ckpt_io.legacy import RankKey, plan_rank, rank_directory
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.torch_dist_plan import ChunkKey, TensorPlan, plan_checkpoint
from flagscale.ckpt_io.values import TensorSlot
from flagscale.layout.boxes import Box
from flagscale.layout.buffers import (
    BufferLayout,
    bucket_size,
    buffer_rules,
    chained_optimizers,
    plan_buffers,
)
from flagscale.layout.model import (
    CanonicalTensor,
    LayerSpec,
    LocalParam,
    ModelSpec,
    canonical_tensors,
    local_params,
    local_weights,
    model_spec,
    stored_name,
)
from flagscale.layout.parallel import ParallelLayout
from flagscale.layout.pipeline import Pipeline, pipeline_from_arguments
from harness.checkpoint import read_tensors
from harness.elements import (
    Bits,
    Content,
    Ranges,
    box_ranges,
    element_bits,
    element_index,
    local_ranges,
)
from harness.saved_job import ITERATION, optimizer_state, rng_state

__all__ = ["FORMS", "Group", "Synthetic", "read_bits"]

FORMS = ("legacy", "dp_reshardable", "fully_reshardable")

_EXPERTS = "mlp.experts.experts."
_BITS = {"float32": np.uint32, "bfloat16": np.uint16, "float16": np.uint16}


@dataclass(frozen=True)
class _Flat:
    """A flat tensor: parameters, each with its part of the whole and its first element here."""

    numel: int
    params: tuple[tuple[int, LocalParam, Ranges], ...]


@dataclass(frozen=True)
class Group:
    """A data-parallel group of one optimizer.

    Args:
        optimizer: Index among the chained optimizers.
        index: Upstream's ``dp_group_idx``.
        expert: Whether it is of experts with a grid of their own.
        place: Pipeline, tensor, expert and expert tensor rank.
        dp_size: Its members.
        buffers: Of each, its model chunk, its layout, and the parameters of the chunk.
    """

    optimizer: int
    index: int
    expert: bool
    place: tuple[int, ...]
    dp_size: int
    buffers: tuple[tuple[int, BufferLayout, Sequence[LocalParam]], ...]


@dataclass(frozen=True)
class Synthetic:
    """A checkpoint.

    Args:
        args: Of the job, from :func:`job_args`.
        form: One of :data:`FORMS`; or ``fully_sharded_model_space``, which is older.
        spec: Which modules the layers are made of.
        registered: Changes the order in which the optimizer has met a chunk's parameters.
        gap: Bits of the elements between parameters in flat buffers.
        extra_state: What every linear layer has as its extra state.
        edit: Changes what all ranks share before it is written.
        kinds: Of the optimizer's states; with ``step``, which is stored by name only, there is a
            number of steps for each parameter.
        grown_from: Rows that the vocabulary had before it grew: the others repeat the last of them.
    """

    args: Namespace
    form: str
    spec: LayerSpec = "local"
    registered: Callable[[Sequence[LocalParam]], Sequence[LocalParam]] = tuple
    gap: int = 0
    extra_state: Any = None
    edit: Callable[[dict[str, Any]], dict[str, Any]] = dict
    kinds: tuple[str, ...] = ("param", "exp_avg", "exp_avg_sq")
    grown_from: int | None = None

    # What the arguments say, by the layout's own functions.

    @cached_property
    def model(self) -> ModelSpec:
        """The model."""
        return model_spec(vars(self.args))

    @cached_property
    def pipeline(self) -> Pipeline:
        """Its layers' places."""
        return pipeline_from_arguments(vars(self.args))

    @cached_property
    def layout(self) -> ParallelLayout:
        """The grid."""
        args = self.args
        return ParallelLayout(
            args.world_size,
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
            args.context_parallel_size,
            args.expert_model_parallel_size,
            args.expert_tensor_parallel_size,
        )

    @cached_property
    def whole(self) -> dict[str, CanonicalTensor]:
        """The model's tensors."""
        return canonical_tensors(self.model)

    @property
    def _expert_grid(self) -> bool:
        at = self.layout
        own = at.ep_size > 1 or at.expert_tp_size != at.tp_size
        return own and bool(self.model.dims.moe_layers)

    # Parts of tensors.

    def ranges(self, param: LocalParam, tp_rank: int, etp_rank: int, first_expert: int) -> Ranges:
        """The part of its canonical tensor that a rank's parameter is."""
        expert = None
        if param.expert:
            # ``local_experts.3.``, or ``weight3`` of a grouped module.
            match = re.search(r"local_experts\.(\d+)\.|(?:weight|bias)(\d+)$", param.name)
            assert match is not None
            expert = first_expert + int(match[1] or match[2] or 0)
        at = self.layout
        rank, size = (etp_rank, at.expert_tp_size) if param.expert else (tp_rank, at.tp_size)
        shape = self.whole[param.canonical].shape
        return local_ranges(param.canonical, shape, self.model.dims.gated, rank, size, expert)

    def part(self, kind: str, name: str, ranges: Ranges) -> Bits:
        """Elements of a canonical tensor."""
        tensor = self.whole[name]
        if kind == "weight" and not tensor.trained:
            kind = "buffer"
        index = element_index(tensor.shape, ranges)
        if self.grown_from and tensor.shape[0] == self.args.padded_vocab_size:
            row = tensor.shape[1]
            index = np.where(
                index < self.grown_from * row, index, (self.grown_from - 1) * row + index % row
            )
        return element_bits(kind, name, index, tensor.dtype)

    def groups(self) -> Iterator[Group]:
        """Every optimizer's groups, as upstream numbers them."""
        at = self.layout
        args = vars(self.args)
        rules = buffer_rules(args, at)
        split = bool(args["overlap_param_gather_with_optimizer_step"])
        for pp_rank in range(at.pp_size):
            # Experts without a grid of their own are divided like everything else.
            dense = [(tp, 0, 0 if self._expert_grid else tp) for tp in range(at.tp_size)]
            expert = list(product((0,), range(at.ep_size), range(at.expert_tp_size)))
            for is_expert, places in ((False, dense), (True, expert if self._expert_grid else [])):
                for number, (tp, ep, etp) in enumerate(places):
                    params = [
                        self.registered(self._params(pp_rank, chunk, tp, ep, etp))
                        for chunk in range(self.pipeline.num_chunks)
                    ]
                    numel = sum(param.numel for chunk in params for param in chunk)
                    planned = [
                        plan_buffers(chunk, rules, bucket_size(args, at, pp_rank, index, numel))
                        for index, chunk in enumerate(params)
                    ]
                    optimizers = chained_optimizers(
                        planned, expert_parallel=self._expert_grid, split_first_chunk=split
                    )
                    for optimizer, one in enumerate(optimizers):
                        if one.expert == is_expert:
                            yield Group(
                                optimizer,
                                pp_rank * len(places) + number,
                                is_expert,
                                (pp_rank, tp, ep, etp),
                                rules.expert_dp_size if is_expert else rules.dp_size,
                                tuple(
                                    (chunk, buffer, params[chunk]) for chunk, buffer in one.buffers
                                ),
                            )

    def _params(
        self, pp_rank: int, chunk: int, tp: int, ep: int, etp: int
    ) -> tuple[LocalParam, ...]:
        return local_params(
            self.model, self.layout, self.pipeline, pp_rank, chunk, tp, ep, self.spec, etp
        )

    def _flat(
        self, group: Group, buffer: BufferLayout, params: Sequence[LocalParam], bucket: int
    ) -> _Flat:
        _, tp, ep, etp = group.place
        first = ep * ((self.model.dims.num_experts or 0) // self.layout.ep_size)
        start = buffer.buckets[bucket].start
        return _Flat(
            buffer.buckets[bucket].numel_unpadded,
            tuple(
                (
                    slot.start - start,
                    params[slot.param],
                    self.ranges(params[slot.param], tp, etp, first),
                )
                for slot in buffer.slots
                if slot.bucket == bucket
            ),
        )

    def _flat_bits(self, kind: str, flats: Sequence[_Flat], box: Box) -> Bits:
        """Elements of flat tensors, one after another."""
        first, stop = box.offset[0], box.offset[0] + box.shape[0]
        bits = np.full(box.shape, self.gap, np.uint32)
        base = 0
        for flat in flats:
            for start, param, ranges in flat.params:
                begin, end = max(first, base + start), min(stop, base + start + param.numel)
                if begin < end:
                    values = self.part(kind, param.canonical, ranges).ravel()
                    assert values.size == param.numel
                    bits[begin - first : end - first] = values[begin - base - start :][
                        : end - begin
                    ]
            base += flat.numel
        return bits

    # torch_dist.

    def named_tensors(self) -> dict[str, Content]:
        """What ``torch_dist`` stores by name."""
        kinds = {"weight": ""}
        if self.form != "dp_reshardable":
            kinds |= {kind: f"optimizer.state.{kind}." for kind in self.kinds}
        if self.form == "fully_sharded_model_space":
            kinds["param"] = "optimizer.state.fp32_param."
        contents: dict[str, Content] = {}
        for key, names in self._stored().items():
            tensor = self.whole[names[0]]
            stacked = stored_name(self.model, names[0], self.spec).layer is not None
            shape = ((len(names),) if stacked else ()) + tensor.shape
            for kind, prefix in kinds.items():
                if kind == "weight" or tensor.trained:
                    dtype = tensor.dtype if kind == "weight" else "float32"
                    bits = self._named_bits(kind, names, stacked)
                    contents[prefix + key] = Content(dtype, shape, bits)
                    if kind == "step":
                        contents[prefix + key] = Content(dtype, shape[: int(stacked)], _steps)
        return contents

    def _stored(self) -> dict[str, list[str]]:
        """Canonical names under each key, by layer."""
        stored: dict[str, list[str]] = {}
        for name in self.whole:
            stored.setdefault(stored_name(self.model, name, self.spec).key, []).append(name)
        return stored

    def _named_bits(self, kind: str, names: Sequence[str], stacked: bool) -> Callable[[Box], Bits]:
        def bits(box: Box) -> Bits:
            if not stacked:
                return self.part(kind, names[0], box_ranges(box))
            inner = box_ranges(Box(box.offset[1:], box.shape[1:]))
            layers = range(box.offset[0], box.offset[0] + box.shape[0])
            return np.stack([self.part(kind, names[layer], inner) for layer in layers])

        return bits

    def _named_boxes(self, name: str) -> Iterator[Box]:
        """The chunks of a canonical tensor: what each tensor rank has, halves apart."""
        tensor, at, dims = self.whole[name], self.layout, self.model.dims
        experts = range(dims.num_experts or 0) if _EXPERTS in name else (None,)
        size = at.tp_size if experts == (None,) else at.expert_tp_size
        boxes: dict[Box, None] = {}  # ranks with the same part write it once
        for expert, rank in product(experts, range(size)):
            ranges = local_ranges(name, tensor.shape, dims.gated, rank, size, expert)
            for parts in product(*ranges):
                boxes[Box(tuple(p.start for p in parts), tuple(map(len, parts)))] = None
        yield from boxes

    def flat_tensors(self) -> tuple[dict[str, Content], dict[str, list[int]], dict[str, Any]]:
        """The buckets of ``dp_reshardable``, where parameters and ranks begin in each, objects."""
        contents: dict[str, Content] = {}
        cuts: dict[str, list[int]] = {}
        objects: dict[str, Any] = {}
        for group in self.groups():
            chained = self._expert_grid or self.args.overlap_param_gather_with_optimizer_step
            prefix = f"chained_{group.optimizer}." if chained else ""
            prefix += f"optimizer.distributed.dp_group_idx_{group.index}."
            numels: dict[str, list[Any]] = {"per_bucket_numel": [], "per_bucket_numel_unpadded": []}
            for gbuf, (_, buffer, params) in enumerate(group.buffers):
                dtypes = _dtypes(buffer)
                padded, unpadded = numels.values()
                padded.append({dtypes: [b.end - b.start for b in buffer.buckets]})
                unpadded.append({dtypes: [b.numel_unpadded for b in buffer.buckets]})
                for number, bucket in enumerate(buffer.buckets):
                    flat = self._flat(group, buffer, params, number)
                    share = (bucket.end - bucket.start) // group.dp_size
                    edges = {start for start, _, _ in flat.params}
                    edges |= {share * rank for rank in range(group.dp_size)}
                    for kind in self.kinds:
                        key = f"{prefix}gbuf_idx_{gbuf}.dtype_{dtypes}.bucket_idx_{number}.{kind}"
                        bits = self._bucket_bits(kind, flat)
                        contents[key] = Content("float32", (flat.numel,), bits)
                        cuts[key] = sorted(edge for edge in edges if edge < flat.numel)
            for name, value in (
                optimizer_state(self.args, is_expert=group.expert) | numels
            ).items():
                objects[f"{prefix}{name}/shard_0_1"] = value
        return contents, cuts, objects

    def _bucket_bits(self, kind: str, flat: _Flat) -> Callable[[Box], Bits]:
        return lambda box: self._flat_bits(kind, [flat], box)

    def _extra_states(self) -> Iterator[tuple[int, str, int | None]]:
        """Layer, module and expert of every module that has one."""
        dims = self.model.dims
        for layer in range(dims.num_layers):
            yield layer, "self_attention.linear_proj", None
            yield layer, "self_attention.linear_qkv", None
            for linear in ("linear_fc1", "linear_fc2"):
                if layer in dims.moe_layers:
                    for expert in range(dims.num_experts or 0):
                        yield layer, f"{_EXPERTS}{linear}", expert
                else:
                    yield layer, f"mlp.{linear}", None

    def _stored_extra_states(self) -> Iterator[str]:
        dims = self.model.dims
        for layer, module, expert in self._extra_states():
            offsets, sizes = ([layer], [dims.num_layers]) if self.model.stacked_layers else ([], [])
            if expert is not None:
                offsets, sizes = [*offsets, expert], [*sizes, dims.num_experts or 0]
            prefix = "decoder.layers." if self.model.stacked_layers else f"decoder.layers.{layer}."
            at = ".".join(map(str, offsets or [0])), ".".join(map(str, sizes or [1]))
            yield f"{prefix}{module}._extra_state/shard_{at[0]}_{at[1]}"

    def common(self) -> dict[str, Any]:
        """What all ranks share."""
        state: dict[str, Any] = {
            "args": self.args,
            "checkpoint_version": 3.0,
            "iteration": ITERATION,
            "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 84, "lr_decay_style": "cosine"},
            "num_floating_point_operations_so_far": 1.5e9,
        }
        dense = 2 if self.args.overlap_param_gather_with_optimizer_step else 1
        states = [optimizer_state(self.args)] * dense + [
            optimizer_state(self.args, is_expert=True)
        ] * self._expert_grid
        if self.form == "legacy":
            state["optimizer"] = states if len(states) > 1 else states[0]
            return self.edit(state)
        if self.form == "dp_reshardable":
            states = [{} for _ in states]
        states = [{**one, "param_state_sharding_type": self.form} for one in states]
        state["optimizer"] = dict(enumerate(states)) if len(states) > 1 else states[0]
        state["rerun_state_machine"] = {"mode": "validate_results", "current_iteration": ITERATION}
        state["content_metadata"] = {"distrib_optim_sharding_type": self.form}
        return self.edit(state)

    def _torch_dist(self) -> tuple[Sequence[OutputFile], Iterator[tuple[str, Hole, Content, Box]]]:
        contents = self.named_tensors()
        members: list[ChunkKey] = []
        at = self.layout
        stored = self._stored()
        for key in contents:
            names = stored[re.sub(r"^optimizer\.state\.[a-z0-9_]+\.", "", key)]
            for name in names:
                layer = stored_name(self.model, name, self.spec).layer
                lead = () if layer is None else (layer,)
                members += [
                    ChunkKey(key, Box(lead + box.offset, (1,) * len(lead) + box.shape))
                    for box in ([Box((), ())] if ".step." in key else self._named_boxes(name))
                ]
        objects: dict[str, Any] = {
            f"rng_state/shard_{pp}.{tp}_{at.pp_size}.{at.tp_size}": rng_state(pp, tp)
            for pp, tp in product(range(at.pp_size), range(at.tp_size))
        }
        objects |= dict.fromkeys(self._stored_extra_states(), self.extra_state)
        if self.form == "dp_reshardable":
            flat, cuts, more = self.flat_tensors()
            objects |= more
            for key, content in flat.items():
                for start, stop in pairwise([*cuts[key], content.shape[0]]):
                    members.append(ChunkKey(key, Box((start,), (stop - start,))))
            contents |= flat
        plans = {key: TensorPlan(one.shape, one.dtype) for key, one in contents.items()}
        number = min(len(members), at.tp_size * at.pp_size + 1)
        # In no order that a reader could rely on.
        files = [members[index::number][::-1] for index in range(number)]
        planned = plan_checkpoint(plans, files, objects, self.common())
        holes = (
            (path, hole, contents[member.key], member.box)
            for member, (path, hole) in planned.chunks.items()
        )
        return planned.files, holes

    # torch.

    def legacy_ranks(self) -> dict[RankKey, tuple[dict[str, Any], list[Any], dict[str, Content]]]:
        """Of each rank's directory: the model's state, the optimizers', and what slots hold."""
        at = self.layout
        groups = {(group.optimizer, *group.place): group for group in self.groups()}
        optimizers = 1 + max(group.optimizer for group in groups.values())
        ranks: dict[RankKey, tuple[dict[str, Any], list[Any], dict[str, Content]]] = {}
        for rank in range(at.world_size):
            dense, expert = at.coordinates(rank), at.expert_coordinates(rank)
            key = RankKey(dense.tp_rank, dense.pp_rank, expert.ep_rank)
            if key not in ranks:
                slots: dict[str, Content] = {}
                state = self._model_state(key, expert.etp_rank, slots)
                ranks[key] = (state, [None] * optimizers, slots)
            _, states, slots = ranks[key]
            for optimizer in range(optimizers):
                is_expert = self._expert_grid and optimizer == optimizers - 1
                if is_expert and expert.expert_dp_rank == 0:
                    place = (expert.pp_rank, 0, expert.ep_rank, expert.etp_rank)
                elif not is_expert and (dense.dp_rank, dense.cp_rank) == (0, 0):
                    etp_rank = 0 if self._expert_grid else dense.tp_rank
                    place = (dense.pp_rank, dense.tp_rank, 0, etp_rank)
                else:
                    continue
                states[optimizer] = self._buffer_states(groups[optimizer, *place], slots)
        return ranks

    def _model_state(self, key: RankKey, etp: int, slots: dict[str, Content]) -> dict[str, Any]:
        state, chunks = self.common(), self.pipeline.num_chunks
        local = (self.model.dims.num_experts or 0) // self.layout.ep_size
        first = key.ep_rank * local
        for chunk in range(chunks):
            model: dict[str, Any] = {}
            for param in local_weights(
                self.model, self.layout, self.pipeline, key.pp_rank, chunk, key.tp_rank,
                key.ep_rank, self.spec, etp,
            ):  # fmt: skip
                slot = f"model{chunk}.{param.name}"
                ranges = self.ranges(param, key.tp_rank, etp, first)
                model[param.name] = TensorSlot(param.dtype, param.shape, slot)
                slots[slot] = Content(param.dtype, param.shape, self._local_bits(param, ranges))
            stage = self.pipeline.stage(key.pp_rank, chunk)
            for layer, module, expert in self._extra_states():
                if layer not in stage.layers or expert not in {None, *range(first, first + local)}:
                    continue
                if expert is not None:
                    linear = module.removeprefix(_EXPERTS)
                    module = f"mlp.experts.local_experts.{expert - first}.{linear}"
                name = f"decoder.layers.{layer - stage.layers.start}.{module}._extra_state"
                model[name] = self.extra_state
            if stage.last:
                model["output_layer._extra_state"] = None
            state["model" if chunks == 1 else f"model{chunk}"] = model
        state["rng_state"] = rng_state(key.pp_rank, key.tp_rank)
        return state

    def _local_bits(self, param: LocalParam, ranges: Ranges) -> Callable[[Box], Bits]:
        def bits(box: Box) -> Bits:
            assert box == Box.whole(param.shape)
            return self.part("weight", param.canonical, ranges).reshape(param.shape)

        return bits

    def _buffer_states(self, group: Group, slots: dict[str, Content]) -> dict[Any, Any]:
        states: dict[Any, Any] = {"buckets_coalesced": True}
        for gbuf, (_, buffer, params) in enumerate(group.buffers):
            flats = [
                self._flat(group, buffer, params, bucket) for bucket in range(len(buffer.buckets))
            ]
            numel = sum(flat.numel for flat in flats)
            tensors: dict[str, Any] = {"numel_unpadded": numel}
            for kind in self.kinds:
                slot = f"{group.optimizer}.{gbuf}.{kind}"
                tensors[kind] = TensorSlot("float32", (numel,), slot)
                slots[slot] = Content("float32", (numel,), self._buffer_bits(kind, flats))
            states[gbuf] = {_dtypes(buffer): tensors}
        return states

    def _buffer_bits(self, kind: str, flats: Sequence[_Flat]) -> Callable[[Box], Bits]:
        return lambda box: self._flat_bits(kind, flats, box)

    def _legacy(self) -> tuple[Sequence[OutputFile], Iterator[tuple[str, Hole, Content, Box]]]:
        files, held = [], []
        for key, (state, optimizers, slots) in self.legacy_ranks().items():
            saved: Any = optimizers if len(optimizers) > 1 else optimizers[0]
            for planned in plan_rank(self._directory(key), state, saved):
                files.append(planned.output)
                for slot, hole in planned.holes.items():
                    whole = Box.whole(slots[slot].shape)
                    held.append((planned.output.path, hole, slots[slot], whole))
        return files, iter(held)

    def _directory(self, key: RankKey) -> str:
        at = self.layout
        return rank_directory(key, pipeline=at.pp_size > 1, experts=at.ep_size > 1)

    # Both.

    def write(self, save_dir: Path, *, sparse: bool = False) -> Path:
        """Write the checkpoint.

        Args:
            save_dir: As upstream's ``--save``.
            sparse: Leave the tensors out: files of the right size, with everything but their data.

        Returns:
            The directory of the iteration.
        """
        directory = save_dir / f"iter_{ITERATION:07d}"
        files, holes = self._legacy() if self.form == "legacy" else self._torch_dist()
        for file in files:
            path = directory / file.path
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as stream:
                for at, data in file.literals:
                    stream.seek(at)
                    stream.write(data)
                stream.truncate(file.size)
        by_file: dict[str, list[tuple[Hole, Content, Box]]] = {}
        for path_name, hole, content, box in () if sparse else holes:
            by_file.setdefault(path_name, []).append((hole, content, box))
        for path_name, filled in by_file.items():
            with (directory / path_name).open("r+b") as stream:
                for hole, content, box in filled:
                    data = content.bits(box).astype(_BITS[hole.dtype])
                    assert (data.shape, data.nbytes) == (hole.shape, hole.nbytes)
                    stream.seek(hole.offset)
                    stream.write(data.tobytes())
                    for at in hole.crc_offsets:
                        stream.seek(at)
                        stream.write(crc32(data.tobytes()).to_bytes(4, "little"))
        (save_dir / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
        return directory

    def write_maps(self, directory: Path) -> None:
        """Write the maps of the buffers, as a job of ours does."""
        for group in self.groups():
            pp_rank, tp_rank, ep_rank, etp_rank = group.place
            buffers = [
                BufferMap(
                    chunk,
                    buffer.key.param_dtype,
                    buffer.key.grad_dtype,
                    tuple(BucketMap(b.start, b.end, b.numel_unpadded) for b in buffer.buckets),
                    tuple(
                        ParameterMap(
                            params[slot.param].name,
                            params[slot.param].shape,
                            slot.start,
                            slot.end,
                            slot.bucket,
                        )
                        for slot in buffer.slots
                    ),
                )
                for chunk, buffer, params in group.buffers
            ]
            rank = etp_rank if group.expert else tp_rank
            place = (group.optimizer, group.index, rank, pp_rank, ep_rank, group.expert)
            if buffers:
                write_map(directory, OptimizerMap(*place, tuple(buffers)))

    def contents(self) -> dict[str, Content]:
        """Every tensor that belongs into the checkpoint, under the names of :func:`read_bits`."""
        if self.form != "legacy":
            flat = self.flat_tensors()[0] if self.form == "dp_reshardable" else {}
            return self.named_tensors() | flat
        return {
            f"{self._directory(key)} {slot}": content
            for key, (_, _, slots) in self.legacy_ranks().items()
            for slot, content in slots.items()
        }

    def differences(self, directory: Path) -> list[str]:
        """What of a checkpoint in a directory is not what it would be here, read by torch."""
        expected, got = self.contents(), read_bits(directory)
        lines = [f"{key}: missing" for key in expected.keys() - got.keys()]
        lines += [f"{key}: extra" for key in got.keys() - expected.keys()]
        for key in expected.keys() & got.keys():
            want = expected[key].whole()
            if (got[key].shape, got[key].dtype) != (want.shape, want.dtype):
                lines.append(f"{key}: {got[key].dtype} {got[key].shape}, not {want.shape}")
            elif wrong := int((got[key] != want).sum()):
                lines.append(f"{key}: {wrong} of {want.size} elements differ")
        return sorted(lines)


def _steps(box: Box) -> Bits:
    return np.full(box.shape, ITERATION, np.float32).view(np.uint32)


def _dtypes(buffer: BufferLayout) -> tuple[torch.dtype, torch.dtype]:
    return getattr(torch, buffer.key.param_dtype), getattr(torch, buffer.key.grad_dtype)


def read_bits(directory: Path) -> dict[str, Bits]:
    """Every tensor of a checkpoint, read by torch: by key, or by rank directory and place."""
    if (directory / "metadata.json").exists():
        return {key: _bits_of(tensor) for key, tensor in read_tensors(directory).items()}
    found: dict[str, Bits] = {}
    for path in sorted(directory.glob("mp_rank_*/*.pt")):
        state = torch.load(path, map_location="cpu", weights_only=False)  # noqa: TID251  (our own)
        rank = path.parent.name
        if path.name == "distrib_optim.pt":
            for optimizer, buffers in enumerate(state if isinstance(state, list) else [state]):
                for gbuf, by_type in (buffers or {"buckets_coalesced": True}).items():
                    for tensors in by_type.values() if gbuf != "buckets_coalesced" else ():
                        for kind in tensors.keys() - {"numel_unpadded"}:
                            found[f"{rank} {optimizer}.{gbuf}.{kind}"] = _bits_of(tensors[kind])
            continue
        for key, model in state.items():
            if match := re.fullmatch(r"model(\d*)", key):
                for name, value in model.items():
                    if isinstance(value, torch.Tensor):
                        found[f"{rank} model{match[1] or 0}.{name}"] = _bits_of(value)
    return found


def _bits_of(tensor: torch.Tensor) -> Bits:
    integer, unsigned = {2: (torch.int16, np.uint16), 4: (torch.int32, np.uint32)}[
        tensor.element_size()
    ]
    return tensor.contiguous().view(integer).numpy().view(unsigned)
