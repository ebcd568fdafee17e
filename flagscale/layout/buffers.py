"""Where each parameter lies in the flat buffers of a distributed optimizer.

A buffer holds the parameters of one model chunk that have the same types and the same data-parallel
group, in reverse order of their registration, so that gradients are ready from its start on. It is
cut into buckets; the ranks of the group own an equal, contiguous part of each. All positions are in
elements.

There are two kinds of coordinates. A *padded* position counts the padding at the ends of buckets, a
*compact* one does not; both count the gaps in front of parameters. Upstream computes in padded
positions. A legacy checkpoint holds a buffer in compact ones, ``dp_reshardable`` a bucket alone
without the padding at its end.

Source: megatron-core 0.19.2, core/optimizer/distrib_optimizer.py
(``_compute_per_buffer_param_layout``), core/optimizer/param_layout.py,
core/distributed/param_and_grad_buffer.py (``group_params_for_buffers``) and, for the sizes of
buckets, training/training.py (``resolve_ddp_bucket_size``, ``get_model``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from math import lcm
from typing import Any, Final, Protocol

from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.arguments import whole_number
from flagscale.layout.parallel import Coordinates, ExpertCoordinates, ParallelLayout

__all__ = [
    "Bucket",
    "BufferKey",
    "BufferLayout",
    "BufferRules",
    "BufferedParam",
    "OptimizerBuffers",
    "Slot",
    "bucket_size",
    "buffer_rules",
    "chained_optimizers",
    "group_index",
    "group_params",
    "plan_buffers",
    "stored_buffer",
]

_PARAM_ALIGNMENT: Final = 64
_BUCKET_ALIGNMENT: Final = 128
_BUSBW_ALIGNMENT: Final = 1 << 16


class BufferedParam(Protocol):
    """What is asked of a parameter; :class:`flagscale.layout.model.LocalParam` has it."""

    @property
    def numel(self) -> int:
        """Elements on this rank."""

    @property
    def dtype(self) -> str:
        """Torch's name of the element type."""

    @property
    def expert_parallel(self) -> bool:
        """Whether its gradients are reduced in the expert grid."""

    @property
    def shared_embedding(self) -> bool:
        """Whether it has a bucket of its own."""


@dataclass(frozen=True)
class BufferKey:
    """What the parameters of a buffer have in common.

    Args:
        param_dtype: Torch's name of the parameters' type, without ``torch.``.
        grad_dtype: The same of the gradients.
        expert: Whether their data-parallel group is that of the expert grid.
    """

    param_dtype: str
    grad_dtype: str
    expert: bool


@dataclass(frozen=True)
class Bucket:
    """A contiguous part of a buffer.

    Args:
        start: First element, padded.
        end: First element past it and the padding at its end.
        numel_unpadded: Elements without that padding.
    """

    start: int
    end: int
    numel_unpadded: int

    def shard(self, dp_rank: int, dp_size: int) -> tuple[int, int]:
        """The part that a rank of the data-parallel group owns: first element, first past it.

        Raises:
            ValueError: There is no such rank, or the bucket does not divide.
        """
        size, rest = divmod(self.end - self.start, dp_size)
        if rest or not 0 <= dp_rank < dp_size:
            raise ValueError(f"part {dp_rank} of {dp_size} of {self}")
        return self.start + dp_rank * size, self.start + (dp_rank + 1) * size


@dataclass(frozen=True)
class Slot:
    """The place of a parameter in its buffer.

    Args:
        param: Its index among the parameters that the buffers were planned for.
        start: First element, padded.
        end: First element past it.
        bucket: Index of the bucket, which holds all of it.
    """

    param: int
    start: int
    end: int
    bucket: int


@dataclass(frozen=True)
class BufferLayout:
    """A buffer.

    Args:
        key: What its parameters have in common.
        slots: In the order they lie.
        buckets: In the order they lie.
    """

    key: BufferKey
    slots: tuple[Slot, ...]
    buckets: tuple[Bucket, ...]

    @property
    def numel(self) -> int:
        """Elements, all padding included."""
        return self.buckets[-1].end if self.buckets else 0

    @property
    def numel_unpadded(self) -> int:
        """Elements without the padding at the ends of buckets."""
        return sum(bucket.numel_unpadded for bucket in self.buckets)

    @cached_property
    def compact_starts(self) -> tuple[int, ...]:
        """The compact position at which each bucket begins."""
        return tuple(accumulate((b.numel_unpadded for b in self.buckets[:-1]), initial=0))

    def in_bucket(self, slot: Slot) -> tuple[int, int]:
        """Where a parameter lies in its own bucket: first element, first past it."""
        start = self.buckets[slot.bucket].start
        return slot.start - start, slot.end - start

    def compact(self, slot: Slot) -> tuple[int, int]:
        """Where a parameter lies in compact positions: first element, first past it."""
        shift = self.compact_starts[slot.bucket]
        start, end = self.in_bucket(slot)
        return shift + start, shift + end


@dataclass(frozen=True)
class OptimizerBuffers:
    """The buffers of one optimizer.

    Args:
        expert: Whether it is the one of the expert-parallel parameters.
        buffers: In the order of ``gbuf_idx``, each with the model chunk that it belongs to.
    """

    expert: bool
    buffers: tuple[tuple[int, BufferLayout], ...]


@dataclass(frozen=True)
class BufferRules:
    """What decides the layout of all buffers of a job, but for the size of their buckets.

    Args:
        dp_size: Ranks that share a buffer of dense parameters.
        expert_dp_size: Ranks that share a buffer of expert parameters.
        grads_in_fp32: Whether gradients are reduced in fp32, whatever the type of the parameter.
        pad_high_busbw: Whether bucket ends are padded further, for bandwidth.
    """

    dp_size: int
    expert_dp_size: int
    grads_in_fp32: bool = True
    pad_high_busbw: bool = False


def buffer_rules(args: Mapping[str, Any], layout: ParallelLayout) -> BufferRules:
    """The rules that the arguments of a job set.

    Args:
        args: By attribute, as a checkpoint holds them; what an older release did not know may be
            missing.
        layout: The sizes of the grid.

    Raises:
        ConfigError: The ranks do not divide between the instances of the optimizer.
    """
    instances = whole_number(args, "num_distributed_optimizer_instances") or 1
    dp_size = layout.dp_size * layout.cp_size
    if dp_size % instances or layout.expert_dp_size % instances:
        raise ConfigError(
            "the replicas do not divide between the instances of the distributed optimizer",
            where="--num-distributed-optimizer-instances",
            expected=f"a divisor of {dp_size} and {layout.expert_dp_size}",
            got=instances,
            cure="another number",
        )
    return BufferRules(
        dp_size=dp_size // instances,
        expert_dp_size=layout.expert_dp_size // instances,
        grads_in_fp32=bool(args.get("accumulate_allreduce_grads_in_fp32")),
        pad_high_busbw=bool(args.get("ddp_pad_buckets_for_high_nccl_busbw")),
    )


def bucket_size(
    args: Mapping[str, Any],
    layout: ParallelLayout,
    pp_rank: int,
    chunk: int,
    rank_numel: int | None = None,
) -> int | None:
    """Elements at which a bucket of a model chunk is full; ``None``: it has one bucket.

    Args:
        args: By attribute, as a checkpoint holds them.
        layout: The sizes of the grid.
        pp_rank: Pipeline rank.
        chunk: Model chunk of the pipeline rank.
        rank_numel: Elements of all parameters of the rank, in all its chunks: needed where the
            arguments give a number of buckets instead.

    Raises:
        ConfigError: That is needed and not given.
    """
    # Only the first chunk of the first stage is on the critical path: its gradients come last.
    on_critical_path = pp_rank == 0 and chunk == 0
    gather_with_step = args.get("overlap_param_gather_with_optimizer_step")
    if not args.get("overlap_grad_reduce") or not on_critical_path or gather_with_step:
        return None
    if num_buckets := whole_number(args, "ddp_num_buckets"):
        if rank_numel is None:
            raise ConfigError(
                "the size of a bucket depends on the parameters of the rank",
                where="--ddp-num-buckets",
                expected="the number of parameters",
                got="none",
            )
        return rank_numel // num_buckets
    if (size := whole_number(args, "ddp_bucket_size")) is not None:
        return size
    return max(40_000_000, 1_000_000 * layout.dp_size * layout.cp_size)


def plan_buffers(
    params: Sequence[BufferedParam], rules: BufferRules, bucket_size: int | None
) -> tuple[BufferLayout, ...]:
    """The buffers of a model chunk, in upstream's order.

    Args:
        params: Its parameters in the order of their registration.
        rules: What decides the layout.
        bucket_size: Elements at which a bucket is full; ``None``: no buckets but those of shared
            embeddings.
    """
    return tuple(
        _plan_buffer(
            key,
            params,
            indices,
            bucket_size,
            _bucket_alignment(
                rules.expert_dp_size if key.expert else rules.dp_size, rules.pad_high_busbw
            ),
        )
        for key, indices in group_params(params, rules.grads_in_fp32).items()
    )


def group_params(
    params: Sequence[BufferedParam], grads_in_fp32: bool
) -> dict[BufferKey, tuple[int, ...]]:
    """Which parameters go into which buffer, by index, in the order of their registration."""
    groups: dict[BufferKey, list[int]] = {}
    for index, param in enumerate(params):
        grad_dtype = "float32" if grads_in_fp32 else param.dtype
        key = BufferKey(param.dtype, grad_dtype, param.expert_parallel)
        groups.setdefault(key, []).append(index)
    return {key: tuple(indices) for key, indices in groups.items()}


def stored_buffer(
    key: BufferKey,
    params: Sequence[BufferedParam],
    indices: Sequence[int],
    numel_unpadded: Sequence[int],
    numel: Sequence[int] | None = None,
) -> BufferLayout:
    """The layout of a buffer whose bucket sizes a checkpoint tells.

    Args:
        key: Of the buffer.
        params: The parameters of the model chunk, in the order of their registration.
        indices: Which of them the buffer holds, as :func:`group_params` gives them.
        numel_unpadded: Elements of each bucket without the padding at its end, as
            ``per_bucket_numel_unpadded`` has them.
        numel: Elements of each bucket in all, as ``per_bucket_numel`` has them; ``None``: the
            positions are padded to the least that upstream ever does.

    Raises:
        CheckpointError: The parameters do not fill these buckets.
    """
    if numel is None:
        numel = [_round_up(size, _BUCKET_ALIGNMENT) for size in numel_unpadded]
    if len(numel) != len(numel_unpadded):
        raise _does_not_fit(params, indices, numel_unpadded, min(len(numel), len(numel_unpadded)))
    slots: list[Slot] = []
    buckets: list[Bucket] = []
    waiting = list(indices)  # the last one comes first
    start = 0
    for unpadded, padded in zip(numel_unpadded, numel, strict=True):
        end = position = 0
        while waiting and position < unpadded:
            end = position + params[waiting[-1]].numel
            slots.append(Slot(waiting.pop(), start + position, start + end, len(buckets)))
            position = _round_up(end, _PARAM_ALIGNMENT)
        # Where a shared embedding ends a bucket, that reaches up to where it would have begun.
        cut = bool(waiting) and params[waiting[-1]].shared_embedding
        if not end or unpadded not in {end, position if cut else end} or padded < unpadded:
            raise _does_not_fit(params, indices, numel_unpadded, len(buckets))
        buckets.append(Bucket(start, start + padded, unpadded))
        start += padded
    if waiting:
        raise _does_not_fit(params, indices, numel_unpadded, len(buckets))
    return BufferLayout(key, tuple(slots), tuple(buckets))


def chained_optimizers(
    chunks: Sequence[Sequence[BufferLayout]],
    *,
    expert_parallel: bool,
    split_first_chunk: bool = False,
) -> tuple[OptimizerBuffers, ...]:
    """The buffers of each of a rank's optimizers.

    Args:
        chunks: The buffers of each model chunk.
        expert_parallel: Whether any rank of the job has expert-parallel parameters: if so, every
            rank has an optimizer for them.
        split_first_chunk: Whether the dense parameters of the first chunk have an optimizer of
            their own (``--overlap-param-gather-with-optimizer-step``).
    """
    numbers = range(len(chunks))
    dense = (numbers[:1], numbers[1:]) if split_first_chunk else (numbers,)
    parts = [(False, part) for part in dense] + [(True, numbers)] * expert_parallel
    return tuple(
        OptimizerBuffers(
            expert,
            tuple(
                (chunk, buffer)
                for chunk in part
                for buffer in chunks[chunk]
                if buffer.key.expert == expert
            ),
        )
        for expert, part in parts
    )


def group_index(layout: ParallelLayout, place: Coordinates | ExpertCoordinates) -> int:
    """The number by which a checkpoint names a data-parallel group (``dp_group_idx``).

    Dense and expert groups are numbered apart, each by the place in its own grid.

    Args:
        layout: The sizes of the grid.
        place: Of any member of the group.
    """
    if isinstance(place, Coordinates):
        return place.pp_rank * layout.tp_size + place.tp_rank
    expert_index = place.pp_rank * layout.ep_size + place.ep_rank
    return expert_index * layout.expert_tp_size + place.etp_rank


def _plan_buffer(
    key: BufferKey,
    params: Sequence[BufferedParam],
    indices: Iterable[int],
    bucket_size: int | None,
    alignment: int,
) -> BufferLayout:
    slots: list[Slot] = []
    buckets: list[Bucket] = []
    bucket_start = position = 0

    def close_bucket() -> None:
        nonlocal bucket_start, position
        end = _round_up(position, alignment)
        buckets.append(Bucket(bucket_start, end, position - bucket_start))
        bucket_start = position = end

    def is_open() -> bool:
        return bool(slots) and slots[-1].bucket == len(buckets)

    for index in reversed(tuple(indices)):
        param = params[index]
        position = _round_up(position, _PARAM_ALIGNMENT)
        if param.shared_embedding and is_open():
            close_bucket()
        slots.append(Slot(index, position, position + param.numel, len(buckets)))
        position += param.numel
        is_full = bucket_size is not None and position - bucket_start >= bucket_size
        if is_full or param.shared_embedding:
            close_bucket()
    if is_open():
        close_bucket()
    return BufferLayout(key, tuple(slots), tuple(buckets))


def _bucket_alignment(dp_size: int, pad_high_busbw: bool) -> int:
    return lcm(dp_size, _BUCKET_ALIGNMENT, _BUSBW_ALIGNMENT if pad_high_busbw else 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _does_not_fit(
    params: Sequence[BufferedParam],
    indices: Sequence[int],
    numel_unpadded: Sequence[int],
    bucket: int,
) -> CheckpointError:
    total = sum(params[index].numel for index in indices)
    return CheckpointError(
        "the parameters do not fill the buckets of the optimizer",
        where=f"bucket {bucket}",
        expected=f"{len(indices)} parameters with {total} elements, in this order, and the gaps "
        "that align them",
        got=f"buckets of {', '.join(map(str, numel_unpadded))} elements",
        cure="the model, its layer spec or the layout of the job is not what the arguments say",
    )
