"""What modules keep besides tensors (``_extra_state``), under the names of either format.

With the local layer spec it is ``None`` everywhere; Transformer Engine keeps the scales of fp8.
Upstream misses the key in either format, so it has to be there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

from flagscale.layout.model import CanonicalTensor, ModelSpec
from flagscale.layout.pipeline import Pipeline

__all__ = [
    "CORE_ATTENTION",
    "ExtraState",
    "expected_states",
    "from_local",
    "from_stored",
    "to_local",
    "to_stored",
]

_STORED: Final = re.compile(
    r"decoder\.layers\.(?:(\d+)\.)?(.+)\._extra_state/shard_([\d.]+)_[\d.]+", re.DOTALL
)
_LOCAL: Final = re.compile(r"decoder\.layers\.(\d+)\.(.+)\._extra_state", re.DOTALL)
_LOCAL_EXPERT: Final = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)", re.DOTALL)
_LINEAR: Final = re.compile(r"decoder\.layers\.(\d+)\.(.+\.linear_\w+)\.weight", re.DOTALL)
_EXPERTS: Final = "mlp.experts.experts."

CORE_ATTENTION: Final = "self_attention.core_attention"
"""A module that has such a state with Transformer Engine alone."""


class ExtraState(NamedTuple):
    """Whose it is.

    Args:
        layer: Number in the model.
        module: Name in the layer; of experts as ``torch_dist`` has it.
        expert: Number among the layer's experts; ``None`` for a module that is none.
    """

    layer: int
    module: str
    expert: int | None


def expected_states(tensors: Mapping[str, CanonicalTensor]) -> dict[ExtraState, None]:
    """The states of a model that no job has saved: of every linear layer, and of attention.

    Args:
        tensors: Of the model, by canonical name.
    """
    states: dict[ExtraState, None] = {}
    for name, tensor in tensors.items():
        if not (match := _LINEAR.fullmatch(name)):
            continue
        layer, module = int(match[1]), match[2]
        states[ExtraState(layer, CORE_ATTENTION, None)] = None
        experts = range(tensor.shape[0]) if module.startswith(_EXPERTS) else (None,)
        states |= dict.fromkeys(ExtraState(layer, module, expert) for expert in experts)
    return states


def from_stored(key: str) -> ExtraState | None:
    """Read a key of ``torch_dist``; ``None`` if it is of another form."""
    match = _STORED.fullmatch(key)
    if match is None:
        return None
    number, module, shard = match.groups()
    offsets = [int(offset) for offset in shard.split(".")]
    layer = offsets.pop(0) if number is None else int(number)
    is_expert = module.startswith(_EXPERTS)
    return ExtraState(layer, module, offsets.pop() if is_expert and offsets else None)


def to_stored(state: ExtraState, model: ModelSpec) -> str:
    """The key in ``torch_dist``."""
    offsets, sizes = [], []
    name = f"decoder.layers.{state.layer}.{state.module}"
    if model.stacked_layers:
        name = f"decoder.layers.{state.module}"
        offsets.append(state.layer)
        sizes.append(model.dims.num_layers)
    if state.expert is not None:
        offsets.append(state.expert)
        sizes.append(model.dims.num_experts or 1)
    shard = ".".join(map(str, offsets or [0]))
    return f"{name}._extra_state/shard_{shard}_{'.'.join(map(str, sizes or [1]))}"


def from_local(name: str, layers: range, first_expert: int) -> ExtraState | None:
    """Read a key of a rank's model chunk; ``None`` if it belongs to no layer.

    Args:
        name: The key.
        layers: The chunk's layers.
        first_expert: The rank's first expert.
    """
    match = _LOCAL.fullmatch(name)
    if match is None or int(match[1]) >= len(layers):
        return None
    layer, module = layers[int(match[1])], match[2]
    if expert := _LOCAL_EXPERT.fullmatch(module):
        return ExtraState(layer, f"{_EXPERTS}{expert[2]}", first_expert + int(expert[1]))
    return ExtraState(layer, module, None)


def to_local(
    states: Mapping[ExtraState, Any], pipeline: Pipeline, place: tuple[int, int], experts: range
) -> Iterator[tuple[str, Any]]:
    """The keys of a rank's model chunk, with their values.

    Args:
        states: Of the whole model.
        pipeline: Which layers lie where.
        place: Pipeline rank and chunk.
        experts: The experts of the rank.
    """
    stage = pipeline.stage(*place)
    for state, value in states.items():
        if state.layer not in stage.layers:
            continue
        prefix = f"decoder.layers.{state.layer - stage.layers.start}."
        if state.expert is None:
            yield f"{prefix}{state.module}._extra_state", value
        elif state.expert in experts:
            module = state.module.removeprefix(_EXPERTS)
            index = state.expert - experts.start
            yield f"{prefix}mlp.experts.local_experts.{index}.{module}._extra_state", value
    if stage.last:
        yield "output_layer._extra_state", None  # upstream's own layer, whichever the spec
