"""What a rank of a real run holds, told by upstream itself, and a save in several formats at once.

Nothing here knows our layouts: names, shapes and places of parameters are those of upstream's own
``sharded_state_dict``, and which part of a main parameter a rank has is what its distributed
optimizer says. A rank writes its part; :mod:`harness.reshard` puts the parts together.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness import worker

__all__ = ["FORMATS", "ORDERS", "Format", "run_observed_rank"]

ORDERS = "RESHARD_HARNESS_ORDERS"
"""Environment variable: what :func:`run_observed_rank` is to do, as JSON."""


@dataclass(frozen=True)
class Format:
    """A checkpoint format that upstream writes.

    Args:
        ckpt_format: Upstream's ``--ckpt-format``.
        fully_reshardable: Upstream's ``--dist-ckpt-optim-fully-reshardable``.
    """

    ckpt_format: str
    fully_reshardable: bool = False


FORMATS = {
    "legacy": Format("torch"),
    "dp_reshardable": Format("torch_dist"),
    "fully_reshardable": Format("torch_dist", fully_reshardable=True),
}


def run_observed_rank(
    argv: Sequence[str], environ: Mapping[str, str], work_dir: str, kill: Any
) -> None:
    """Entry of the forked process; never returns.

    The orders may have ``save_all`` (a directory: each save is made there once in every format,
    and each rank's state beside it), ``resave`` (the same at once after the load, and no step is
    made), ``dump`` (a directory: each rank's state after the load) and ``watch`` (record the losses
    without any patch of ours; else the layer's own hooks do).
    """
    from megatron.training import training

    orders = json.loads(environ[ORDERS])
    if "save_all" in orders:
        save = _save_in_every_format(training.save_checkpoint, Path(orders["save_all"]))
        training.save_checkpoint = save
    if "resave" in orders:
        save = _save_in_every_format(training.save_checkpoint, Path(orders["resave"]))
        training.train = _save_instead(save)
    if "dump" in orders:
        training.train = _dump_before(training.train, Path(orders["dump"]))
    if orders.get("watch"):
        steps = Path(work_dir, f"rank_{environ['RANK']}.steps.jsonl")
        training.train_step = _record_losses(training.train_step, steps)
    worker.run_rank(argv, environ, work_dir, kill)


def _save_in_every_format(original: Callable[..., Any], root: Path) -> Callable[..., Any]:
    def save_checkpoint(iteration: int, model: Any, optimizer: Any, *args: Any, **more: Any) -> Any:
        from megatron.training import get_args

        run = get_args()
        scheduler, operations, _context, *rest = args
        for name, form in FORMATS.items():
            run.save, run.ckpt_format = str(root / name), form.ckpt_format
            run.use_dist_ckpt = form.ckpt_format != "torch"  # which upstream sets from the format
            run.dist_ckpt_optim_fully_reshardable = form.fully_reshardable
            # A context of its own: what upstream keeps in it is of the format saved before.
            original(iteration, model, optimizer, scheduler, operations, {}, *rest, **more)
        run.iteration = iteration  # which upstream sets when it loads
        dump_rank(model, optimizer, scheduler, root / "dump")

    return save_checkpoint


def _dump_before(original: Callable[..., Any], directory: Path) -> Callable[..., Any]:
    def train(
        step: Any, model: Any, optimizer: Any, scheduler: Any, *args: Any, **kwargs: Any
    ) -> Any:
        dump_rank(model, optimizer, scheduler, directory)
        return original(step, model, optimizer, scheduler, *args, **kwargs)

    return train


def _save_instead(save: Callable[..., Any]) -> Callable[..., Any]:
    def train(_step: Any, model: Any, optimizer: Any, scheduler: Any, *_args: Any, **_: Any) -> Any:
        from megatron.training import get_args

        run = get_args()
        save(run.iteration, model, optimizer, scheduler, 0, None)
        raise SystemExit(0)

    return train


def _record_losses(original: Callable[..., Any], path: Path) -> Callable[..., Any]:
    def train_step(*args: Any, iteration: int, **kwargs: Any) -> Any:
        result = original(*args, iteration=iteration, **kwargs)
        losses, skipped, _checkpoint, _exit, _code, grad_norm, *_ = result
        row = {
            "iteration": iteration + 1,
            "losses": {name: float(loss) for name, loss in losses.items()},
            "grad_norm": float(grad_norm or 0.0),
            "skipped": bool(skipped),
        }
        with path.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        return result

    return train_step


def dump_rank(model: Sequence[Any], optimizer: Any, scheduler: Any, directory: Path) -> None:
    """Write what this rank holds: ``rank_N.npz``, and ``rank_N.json`` which says what it is.

    Args:
        model: Upstream's model chunks, wrapped or not.
        optimizer: Upstream's; all parameters must be in distributed optimizers.
        scheduler: Upstream's, of the learning rate.
        directory: Made if missing.
    """
    import torch

    rank = torch.distributed.get_rank()
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    rows: list[dict[str, Any]] = []
    for kind, key, global_shape, offset, values, held in _boxes(model, optimizer):
        name = str(len(rows))
        arrays[name] = _bits(values)
        if held is not None:
            arrays[f"{name}.held"] = held.numpy()
        rows.append(
            {"kind": kind, "key": key, "global_shape": list(global_shape), "offset": list(offset)}
        )
    directory.mkdir(parents=True, exist_ok=True)
    np.savez(directory / f"rank_{rank}.npz", **arrays)
    notes = {
        "boxes": rows,
        "groups": _param_groups(model, optimizer),
        "progress": {**_progress(), "scheduler_steps": scheduler.num_steps},
    }
    (directory / f"rank_{rank}.json").write_text(json.dumps(notes))


def _bits(tensor: Any) -> np.ndarray[Any, Any]:
    import torch

    size = tensor.element_size()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return np.ascontiguousarray(tensor.detach().contiguous().view(integer).numpy())


def _sharded_params(model: Sequence[Any]) -> dict[int, tuple[Any, Any]]:
    """By identity: each parameter, and what upstream's ``sharded_state_dict`` says of it."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
    from megatron.core.utils import unwrap_model
    from megatron.training import get_args
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    metadata = _build_sharded_state_dict_metadata(get_args())
    found: dict[int, tuple[Any, Any]] = {}
    for chunk in unwrap_model(list(model)):
        leaves = [
            leaf
            for leaf in nested_values(chunk.sharded_state_dict(metadata=metadata))
            if isinstance(leaf, ShardedTensor | ShardedTensorFactory)
        ]
        by_data = {id(leaf.data): leaf for leaf in leaves}
        for name, param in chunk.named_parameters():
            if id(param) not in by_data:
                raise RuntimeError(f"{name} is not in upstream's sharded_state_dict")
            found[id(param)] = (param, by_data[id(param)])
    return found


def _distributed_optimizers(optimizer: Any) -> list[Any]:
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [one for one in chained if not getattr(one, "is_stub_optimizer", False)]


def _boxes(model: Sequence[Any], optimizer: Any) -> Iterator[tuple[Any, ...]]:
    """All that this rank holds: (kind, key, global shape, offset, values, mask or None)."""
    import torch

    params = _sharded_params(model)
    for param, leaf in params.values():
        for box in _place(leaf, param):
            yield "weight", box.key, *_global(box), box.data, None
    for one in _distributed_optimizers(optimizer):
        for param in one.model_param_gbuf_map:
            part = one._get_model_param_range_map(param)["param"]
            leaf = params[id(param)][1]
            held = torch.zeros(param.numel(), dtype=torch.bool)
            held[part.start : part.end] = True
            masks = _place(leaf, held.view(param.shape))
            for kind, shard in one._get_main_param_and_optimizer_states(param).items():
                whole = torch.zeros(param.numel(), dtype=shard.dtype)
                whole[part.start : part.end] = shard.detach().flatten()
                for box, mask in zip(_place(leaf, whole.view(param.shape)), masks, strict=True):
                    yield kind, box.key, *_global(box), box.data, mask.data


def _place(leaf: Any, tensor: Any) -> list[Any]:
    """Upstream's boxes of a tensor that is cut as the parameter of ``leaf`` is."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    if isinstance(leaf, ShardedTensor):
        return [replace(leaf, data=tensor.detach(), dtype=tensor.dtype)]
    built = list(nested_values(replace(leaf, data=tensor.detach()).build()))
    if not built or not all(isinstance(box, ShardedTensor) for box in built):
        raise RuntimeError(f"{leaf.key}: upstream's factory made {built}")
    return built


def _global(box: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if getattr(box, "flattened_range", None) is not None:
        raise RuntimeError(f"{box.key}: a flattened range where a box was expected")
    return tuple(box.global_shape), tuple(box.global_offset)


def _param_groups(model: Sequence[Any], optimizer: Any) -> dict[str, list[dict[str, Any]]]:
    """By key: what the optimizer's groups of its parameters say, ``step`` included.

    Whether a group is of experts depends on the layout: with EP1 they are as any other parameter.
    """
    params = _sharded_params(model)
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in _distributed_optimizers(optimizer):
        for param in one.model_param_gbuf_map:
            index, _ = one.model_param_group_index_map[param]
            group = one.optimizer.param_groups[index]
            values = {k: v for k, v in group.items() if k not in ("params", "is_expert_parallel")}
            for box in _place(params[id(param)][1], param):
                seen = groups.setdefault(box.key, [])
                if values not in seen:
                    seen.append(values)
    result: dict[str, list[dict[str, Any]]] = json.loads(json.dumps(groups, default=repr))
    return result


def _progress() -> dict[str, Any]:
    from megatron.training import get_args

    run = get_args()
    names = ("iteration", "consumed_train_samples", "skipped_train_samples", "padded_vocab_size")
    return {name: getattr(run, name) for name in names}
