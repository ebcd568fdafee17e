"""In which order parameters lie in stored flat buffers: known from a map, or guessed and proved.

Nothing in a flat checkpoint names its parameters, and the arguments hardly do: a layer spec can
register them in any order, and a wrong order may fill the buffers as well as the right one. So each
candidate is held to the weights: rounded to the type of the model, the optimizer's main copy of
every parameter has to be the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from flagscale.ckpt_io.buffer_map import BUFFER_MAP_DIR, OptimizerMap
from flagscale.errors import CheckpointError
from flagscale.layout.buffers import (
    BufferKey,
    BufferLayout,
    bucket_size,
    buffer_rules,
    group_params,
    plan_buffers,
    stored_buffer,
)
from flagscale.layout.model import LayerSpec, LocalParam, layer_specs
from flagscale.optim.flat import FlatParam, FlatRun
from flagscale.optim.job import Group, Job

__all__ = ["Candidate", "FlatBuffer", "Orders", "candidates"]

Orders = Mapping[tuple[int, int, int], Sequence[str]]
"""Names of the parameters of a model chunk in the order its state dict lists them, by pipeline
rank, chunk and expert rank; empty where a checkpoint does not tell."""


@dataclass(frozen=True)
class FlatBuffer:
    """A stored buffer in compact positions: without the padding at the ends of its buckets.

    Args:
        group: Whose it is.
        gbuf: Its index among the group's buffers.
        param_dtype: Torch's name of the parameters' type; ``None`` where the checkpoint is too old
            to tell.
        runs: By kind of state, where it lies.
        numel: Elements.
        bucket_numels: Elements of each bucket; ``None`` where the checkpoint does not tell.
    """

    group: Group
    gbuf: int
    param_dtype: str | None
    runs: Mapping[str, tuple[FlatRun, ...]]
    numel: int
    bucket_numels: tuple[int, ...] | None

    def __str__(self) -> str:
        """As upstream's keys name it."""
        return f"{self.group}, gbuf_idx {self.gbuf}"


@dataclass(frozen=True)
class Candidate:
    """One order.

    Args:
        name: What it is, for a report.
        spec: The layer spec; ``None`` where a map tells the order.
        params: Of each buffer, in the order in which they were given; by position.
    """

    name: str
    spec: LayerSpec | None
    params: tuple[tuple[FlatParam, ...], ...]


def candidates(
    job: Job, buffers: Sequence[FlatBuffer], maps: Sequence[OptimizerMap], listed: Orders
) -> Iterator[Candidate | CheckpointError]:
    """The orders worth a proof, the likeliest first; for one that cannot be, why.

    Args:
        job: That saved the buffers.
        buffers: All of them.
        maps: Those written while training; if there are any, nothing else is tried.
        listed: What the checkpoint tells of the order in the model.
    """
    if maps:
        name = f"the map in {BUFFER_MAP_DIR}, written while training"
        yield _attempt(name, None, lambda buffer: _by_map(job, buffer, maps), buffers)
        return
    for spec in layer_specs(job.args):
        for name, names in (("the state dict's order, ", listed), ("", {})):
            if names or not name:
                rule = functools.partial(_by_rule, job, spec, names)
                yield _attempt(f"{name}layer spec {spec}", spec, rule, buffers)


def _attempt(
    name: str,
    spec: LayerSpec | None,
    rule: Callable[[FlatBuffer], Iterable[FlatParam]],
    buffers: Sequence[FlatBuffer],
) -> Candidate | CheckpointError:
    try:
        return Candidate(name, spec, tuple(tuple(rule(buffer)) for buffer in buffers))
    except CheckpointError as error:
        return CheckpointError(
            f"{name}: {error.what}", where=error.where, expected=error.expected, got=error.got
        )


def _by_rule(job: Job, spec: LayerSpec, listed: Orders, buffer: FlatBuffer) -> Iterable[FlatParam]:
    """The parameters of a buffer by upstream's rules for a layer spec."""
    key, chunk, params, indices = _members(job, buffer, spec, listed)
    for layout in _layouts(job, spec, buffer, key, chunk, params, indices):
        if layout.numel_unpadded == buffer.numel:
            return [FlatParam(params[slot.param], layout.compact(slot)[0]) for slot in layout.slots]
    raise CheckpointError(
        "the parameters do not fill a buffer of the optimizer",
        where=str(buffer),
        expected=f"{len(indices)} parameters with {sum(params[i].numel for i in indices)} elements",
        got=f"{buffer.numel} elements",
    )


def _members(
    job: Job, buffer: FlatBuffer, spec: LayerSpec, listed: Orders
) -> tuple[BufferKey, int, tuple[LocalParam, ...], tuple[int, ...]]:
    """Key and chunk of a buffer, the chunk's parameters, and which of them it holds."""
    group = buffer.group
    position = buffer.gbuf
    for chunk in group.chunks:
        params = job.params(group, chunk, spec)
        if names := listed.get((group.pp_rank, chunk, group.ep_rank)):
            params = _listed(params, names, buffer)
        members = group_params(params, buffer_rules(job.args, job.layout).grads_in_fp32)
        own = [(key, indices) for key, indices in members.items() if key.expert == group.expert]
        if position < len(own):
            key, indices = own[position]
            if buffer.param_dtype not in (None, key.param_dtype):
                raise CheckpointError(
                    "a buffer of the optimizer holds parameters of another type",
                    where=str(buffer),
                    expected=key.param_dtype,
                    got=buffer.param_dtype,
                )
            return key, chunk, params, indices
        position -= len(own)
    raise CheckpointError(
        "the optimizer has more buffers than the model has parameters for", where=str(buffer)
    )


def _listed(
    params: tuple[LocalParam, ...], names: Sequence[str], buffer: FlatBuffer
) -> tuple[LocalParam, ...]:
    by_name = {param.name: param for param in params}
    found = tuple(by_name[name] for name in names if name in by_name)
    if len(found) != len(params):
        missing = sorted(by_name.keys() - set(names))
        raise CheckpointError(
            "the model does not have the parameters of this layer spec",
            where=str(buffer),
            expected=missing[0],
            got=", ".join(names[:4]),
        )
    return found


def _layouts(
    job: Job,
    spec: LayerSpec,
    buffer: FlatBuffer,
    key: BufferKey,
    chunk: int,
    params: tuple[LocalParam, ...],
    indices: tuple[int, ...],
) -> Iterator[BufferLayout]:
    if buffer.bucket_numels is not None:
        yield stored_buffer(key, params, indices, buffer.bucket_numels)
        return
    rules = buffer_rules(job.args, job.layout)
    numel = job.numel(buffer.group, spec)
    size = bucket_size(job.args, job.layout, buffer.group.pp_rank, chunk, numel)
    for attempt in dict.fromkeys((size, None)):
        yield from (plan for plan in plan_buffers(params, rules, attempt) if plan.key == key)


def _by_map(job: Job, buffer: FlatBuffer, maps: Sequence[OptimizerMap]) -> Iterator[FlatParam]:
    """The parameters of a buffer as the map beside the checkpoint has them."""
    group = buffer.group
    found = [one for one in maps if (one.optimizer, one.group) == (group.optimizer, group.index)]
    if not found or buffer.gbuf >= len(found[0].buffers):
        raise CheckpointError(
            "the map of the buffers does not know a buffer of the checkpoint",
            where=str(buffer),
            got=", ".join(one.file_name for one in maps[:4]),
            cure=f"remove {BUFFER_MAP_DIR}: the order is then proved",
        )
    mapped = found[0].buffers[buffer.gbuf]
    # Specs may give one name to parameters of several shapes.
    by_shape = {
        (param.name, param.shape): param
        for spec in layer_specs(job.args)
        for param in job.params(group, mapped.chunk, spec)
    }
    numels = [bucket.numel_unpadded for bucket in mapped.buckets]
    if sum(numels) != buffer.numel or numels != list(buffer.bucket_numels or numels):
        raise CheckpointError(
            "the map of the buffers is of another checkpoint",
            where=str(buffer),
            expected=f"{buffer.numel} elements in buckets of {buffer.bucket_numels}",
            got=f"buckets of {numels}",
            cure=f"remove {BUFFER_MAP_DIR}: the order is then proved",
        )
    for entry in mapped.parameters:
        param = by_shape.get((entry.name, entry.shape))
        if param is None:
            shapes = [shape for name, shape in by_shape if name == entry.name]
            raise CheckpointError(
                "the map of the buffers names a parameter that the model has not",
                where=f"{buffer}, {entry.name}",
                expected=f"one of shape {shapes[0]}" if shapes else "a name of the model",
                got=f"shape {entry.shape}",
            )
        shift = sum(numels[: entry.bucket]) - mapped.buckets[entry.bucket].start
        yield FlatParam(param, entry.start + shift)
