"""Writes the map of the optimizer's flat buffers beside each checkpoint.

With it ``tools/reshard_optimizer.py`` knows what lies where; without it, it has to prove a guess.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flagscale.ckpt_io.buffer_map import (
    BucketMap,
    BufferMap,
    OptimizerMap,
    ParameterMap,
    write_map,
)
from flagscale.hooks import Hooks, SaveEvent, TrainStart

__all__ = ["connect", "optimizer_maps"]


def connect(hooks: Hooks, args: Namespace) -> None:
    """Take the maps down when training starts, for they never change; write them at each save."""
    if not (args.save and args.use_distributed_optimizer) or args.ckpt_format == "fsdp_dtensor":
        return
    maps: list[OptimizerMap] = []

    def on_train_start(event: TrainStart) -> None:
        maps[:] = optimizer_maps(event.model, event.optimizer)

    def on_save(event: SaveEvent) -> None:
        for optimizer_map in maps:
            write_map(Path(args.save) / f"iter_{event.iteration:07d}", optimizer_map)

    hooks.on_train_start.append(on_train_start)
    hooks.on_save.append(on_save)


def optimizer_maps(model: Sequence[Any], optimizer: Any) -> list[OptimizerMap]:
    """The maps that this rank has to write: those of the groups it is the first member of.

    Args:
        model: This rank's model chunks, wrapped or not.
        optimizer: Upstream's; of one that is not distributed there is no map.
    """
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.utils import unwrap_model

    names = {
        parameter: (chunk, name)
        for chunk, module in enumerate(unwrap_model(list(model)))
        for name, parameter in module.named_parameters()
    }
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        _optimizer_map(index, one, names)
        for index, one in enumerate(chained)
        if isinstance(one, DistributedOptimizer)
        and not one.is_stub_optimizer
        and one.data_parallel_group.rank() == 0
        and one.distributed_optimizer_instance_id == 0
    ]


def _optimizer_map(
    index: int, optimizer: Any, names: Mapping[Any, tuple[int, str]]
) -> OptimizerMap:
    from megatron.core import parallel_state

    # Upstream marks the parameters that plain data parallelism must not reduce.
    expert = any(
        not getattr(parameter, "allreduce", True)
        for buffer in optimizer.buffers
        for parameter in buffer.params
    )
    tp_rank, ep_rank = parallel_state.get_tensor_model_parallel_rank(), 0
    if expert:
        tp_rank = parallel_state.get_expert_tensor_parallel_rank()
        ep_rank = parallel_state.get_expert_model_parallel_rank()
    return OptimizerMap(
        optimizer=index,
        group=optimizer.data_parallel_group_idx,
        tp_rank=tp_rank,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        ep_rank=ep_rank,
        expert=expert,
        buffers=tuple(_buffer_map(buffer, names) for buffer in optimizer.buffers),
    )


def _buffer_map(buffer: Any, names: Mapping[Any, tuple[int, str]]) -> BufferMap:
    return BufferMap(
        chunk=names[buffer.params[0]][0],
        param_dtype=str(buffer.param_dtype).removeprefix("torch."),
        grad_dtype=str(buffer.grad_dtype).removeprefix("torch."),
        buckets=tuple(
            BucketMap(
                start=bucket.offset,
                end=bucket.offset + bucket.grad_data.numel(),
                numel_unpadded=bucket.numel_unpadded,
            )
            for bucket in buffer.buckets
        ),
        parameters=tuple(
            ParameterMap(
                name=names[parameter][1],
                shape=tuple(parameter.shape),
                start=start,
                end=end,
                bucket=bucket,
            )
            for parameter, (start, end, bucket) in sorted(
                buffer.param_index_map.items(), key=lambda item: item[1]
            )
        ),
    )
