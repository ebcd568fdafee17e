"""What comes along with the tensors, made right for the target: arguments, groups, generators."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from flagscale.errors import CheckpointError, ConfigError
from flagscale.optim.job import Job
from flagscale.optim.source import Source

__all__ = ["Request", "rng_states", "target_args", "target_optimizers"]

_PLACEMENT: Final = (
    "pipeline_model_parallel_layout",
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "virtual_pipeline_model_parallel_size",
)
"""Arguments that place layers on stages, which mean nothing for another number of stages."""

_UNTOLD: Final = (None, False, 1)
"""What an argument that is missing means."""


@dataclass(frozen=True)
class Request:
    """The layout asked for; ``None`` keeps the source's where that fits.

    Args:
        tp_size: Tensor parallel size.
        pp_size: Pipeline parallel size.
        dp_size: Data parallel size.
        vpp_size: Model chunks a pipeline rank.
        ep_size: Expert parallel size.
        etp_size: Expert tensor parallel size.
        pipeline_layout: As ``--pipeline-model-parallel-layout`` takes it.
        first_layers: Layers of the first stage.
        last_layers: Layers of the last stage.
        allow_vocab_growth: Whether the padded vocabulary may grow.
        padded_vocab_size: What it grows to; ``None``: as little as the layout asks for.
    """

    tp_size: int | None = None
    pp_size: int | None = None
    dp_size: int | None = None
    vpp_size: int | None = None
    ep_size: int | None = None
    etp_size: int | None = None
    pipeline_layout: str | None = None
    first_layers: int | None = None
    last_layers: int | None = None
    allow_vocab_growth: bool = False
    padded_vocab_size: int | None = None


def target_args(source: Source, request: Request) -> Namespace:
    """The arguments of the target job: the source's, but for what the layout changes.

    Raises:
        ConfigError: A size is none, or the vocabulary would have to grow and may not.
    """
    old, at = vars(source.args), source.job.layout
    for name, size in vars(request).items():
        if size is not None and name.endswith("_size") and size < 1:
            raise ConfigError("a parallel size is none", where=name, expected="1 or more", got=size)
    tp = request.tp_size or at.tp_size
    pp = request.pp_size or at.pp_size
    ep = request.ep_size or at.ep_size
    # Experts that were divided like dense layers still are.
    etp = request.etp_size or (tp if at.expert_tp_size == at.tp_size else at.expert_tp_size)
    dp = request.dp_size or _dp_size(source, tp, pp, ep * etp)
    new = {
        **_placement(source, request, pp),
        "tensor_model_parallel_size": tp,
        "pipeline_model_parallel_size": pp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": etp,
        "tensor_parallel_num_weight_shards": tp,
        "expert_tensor_parallel_num_weight_shards": etp,
        "transformer_pipeline_model_parallel_size": pp,
        "data_parallel_size": dp,
        "world_size": tp * pp * dp * at.cp_size,
        "padded_vocab_size": _padded_vocab_size(source, request, tp),
    }
    # An older release does not have all of them; what was asked for is told all the same.
    told = {name: value for name, value in new.items() if name in old or value not in _UNTOLD}
    return Namespace(**{**old, **told})


def _dp_size(source: Source, tp: int, pp: int, experts: int) -> int:
    """The source's number of ranks if that divides; else its data parallel size."""
    at = source.job.layout
    dp, rest = divmod(at.world_size, tp * pp * at.cp_size)
    if dp and not rest and not (dp * tp * at.cp_size) % experts:
        return dp
    return at.dp_size


def _placement(source: Source, request: Request, pp: int) -> dict[str, Any]:
    old, at = vars(source.args), source.job.layout
    asked = {
        "pipeline_model_parallel_layout": request.pipeline_layout,
        "decoder_first_pipeline_num_layers": request.first_layers,
        "decoder_last_pipeline_num_layers": request.last_layers,
        "num_virtual_stages_per_pipeline_rank": request.vpp_size,
    }
    if pp == at.pp_size and not any(value is not None for value in asked.values()):
        return {name: old.get(name) for name in _PLACEMENT}
    placement: dict[str, Any] = dict.fromkeys(_PLACEMENT) | asked
    for name in _PLACEMENT:
        if name.startswith("account_for"):
            placement[name] = False
    if (request.vpp_size or 1) == 1:
        placement["num_virtual_stages_per_pipeline_rank"] = None
    else:
        placement["virtual_pipeline_model_parallel_size"] = request.vpp_size
    return placement


def _padded_vocab_size(source: Source, request: Request, tp: int) -> int:
    padded = source.job.model.dims.padded_vocab_size or 0
    if request.padded_vocab_size is not None:
        return request.padded_vocab_size
    if padded % tp == 0:
        return padded
    multiple = int(vars(source.args).get("make_vocab_size_divisible_by") or 1) * tp
    grown = -(-padded // multiple) * multiple
    if not request.allow_vocab_growth:
        raise ConfigError(
            "the padded vocabulary does not divide between the tensor parallel ranks",
            where="--target-tensor-parallel-size",
            expected=f"a divisor of {padded}",
            got=tp,
            cure=f"another size; or --allow-vocab-growth, which makes it {grown}: upstream's loss "
            "counts the new rows, so it changes",
        )
    return grown


def target_optimizers(source: Source, target: Job) -> list[dict[str, Any]]:
    """The state of each of the target's chained optimizers.

    Groups are told apart by what they hold (weight decay, learning rate, experts), not by their
    place, so the dense ones serve dense optimizers of any layout. Experts with a grid of their own
    have groups of their own; without one they belong to the dense groups.

    Raises:
        CheckpointError: The source's groups do not have the form that is known here.
    """
    states = [_with_step(source, deepcopy(dict(state))) for state in source.optimizers]
    dense = [state for state in states if not _is_expert(state)]
    experts = [state for state in states if _is_expert(state)]
    if not dense:
        raise CheckpointError(
            "a checkpoint holds no groups of dense parameters",
            where=str(source.directory),
            expected="optimizer.param_groups",
            got=f"{len(states)} optimizers",
        )
    result = [dense[min(i, len(dense) - 1)] for i in range(target.dense_optimizers)]
    if target.has_expert_grid:
        result.append(experts[0] if experts else _for_experts(dense[0]))
    return result


def _groups(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list((state.get("optimizer") or {}).get("param_groups") or ())


def _is_expert(state: Mapping[str, Any]) -> bool:
    groups = _groups(state)
    return bool(groups) and all(group.get("is_expert_parallel") for group in groups)


def _for_experts(dense: Mapping[str, Any]) -> dict[str, Any]:
    """Groups for experts from those that served them among dense parameters."""
    state = deepcopy(dict(dense))
    for group in _groups(state):
        group["is_expert_parallel"] = True
    return state


def _with_step(source: Source, state: dict[str, Any]) -> dict[str, Any]:
    """Every group says how many steps it has done; all have done as many."""
    groups = _groups(state)
    steps = {int(group["step"]) for group in groups if group.get("step") is not None}
    if len(steps) > 1:
        raise CheckpointError(
            "the groups of the optimizer do not agree on how many steps were done",
            where=str(source.directory),
            got=", ".join(map(str, sorted(steps))),
        )
    if not steps and source.steps is not None:
        steps = {source.steps}
    if not steps:
        raise CheckpointError(
            "a checkpoint does not say how many steps its optimizer has done",
            where=str(source.directory),
            expected="step in each group, or for each parameter",
            got=f"{len(groups)} groups",
        )
    for group in groups:
        group["step"] = next(iter(steps))
    return state


def rng_states(source: Source, target: Job) -> tuple[dict[tuple[int, int], Any], str]:
    """The states of the random generators that still mean something, and what was done.

    A state belongs to a place in the grid of pipeline and tensor ranks, and differs between tensor
    ranks on purpose: there is no right one for a place that was not there.
    """
    old, new = source.job.layout, target.layout
    if (old.tp_size, old.pp_size) != (new.tp_size, new.pp_size):
        return {}, "left out: the tensor or pipeline size is another one"
    if source.args.__dict__.get("data_parallel_random_init") and old.dp_size != new.dp_size:
        return {}, "left out: each replica had one, and their number is another one"
    if not source.rng:
        return {}, "there were none"
    return dict(source.rng), "kept"
