"""Which layout a job takes on its machines, and what its checkpoint needs for that. Pure.

A layout never changes the samples of a step: the global batch and everything the data order depends
on stay as the recipe has them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale.errors import ConfigError
from flagscale.launch.settings import LayoutChoice, Settings
from flagscale.layout.parallel import ParallelLayout

__all__ = [
    "NodeRange",
    "checkpoint_layout",
    "choose_layout",
    "describe_change",
    "layout_choices",
    "needs_reshard",
    "nodes_to_ask_for",
    "reshard_words",
]

_SHAPE = ("tp", "pp", "cp", "ep", "etp", "vpp", "bucket")
"""What flat buffers depend on, besides the data-parallel size."""


@dataclass(frozen=True)
class NodeRange:
    """How many machines to ask for.

    Args:
        least: Fewer are of no use.
        most: More are of no use.
    """

    least: int
    most: int

    def __str__(self) -> str:
        """As sbatch has it."""
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


def layout_choices(settings: Settings, nodes: int) -> tuple[LayoutChoice, ...]:
    """The layouts a job may take, the largest first; the recipe's own is for ``nodes`` machines.

    Those for more are left out: whoever asks for so many machines wants no more.
    """
    listed = [choice for choice in settings.layouts if choice.nodes <= nodes]
    own = [] if any(choice.nodes == nodes for choice in listed) else [LayoutChoice(nodes)]
    return tuple(sorted((*own, *listed), key=lambda choice: -choice.nodes))


def nodes_to_ask_for(settings: Settings, nodes: int) -> NodeRange:
    """The machines of the largest layout and the spares; at least those of the smallest."""
    sizes = [choice.nodes for choice in layout_choices(settings, nodes)]
    return NodeRange(min(sizes), max(sizes) + settings.spares)


def choose_layout(
    choices: Sequence[LayoutChoice],
    available: int,
    problem_of: Callable[[LayoutChoice], str | None],
) -> LayoutChoice:
    """The largest layout that the machines suffice for and that is valid.

    Args:
        choices: The largest first.
        available: Healthy machines.
        problem_of: Why a layout is not valid; ``None`` if it is.

    Raises:
        ConfigError: There is none.
    """
    refused = []
    for choice in choices:
        if choice.nodes <= available:
            problem = problem_of(choice)
            if problem is None:
                return choice
            refused.append(f"{choice} ({choice.where}): {problem}")
    least = min(choice.nodes for choice in choices)
    raise ConfigError(
        "no layout of the recipe fits the machines of this job",
        where="flagscale: layouts, nodes and spares",
        expected=f"at least {least} machines" if available < least else "a valid layout",
        got="; ".join(refused) or f"{available} healthy machines",
        cure="add a layout for so few machines to the recipe, or repair those that were named",
    )


def checkpoint_layout(layout: ParallelLayout, values: Mapping[str, Any]) -> dict[str, Any]:
    """The parallel sizes, and how checkpoints are stored: what an attempt is recorded with.

    Args:
        layout: How the ranks are divided.
        values: Megatron's arguments, by attribute.
    """
    storage = str(values["ckpt_format"])
    if storage == "torch_dist":
        full = values.get("dist_ckpt_optim_fully_reshardable")
        storage += "/fully_reshardable" if full else "/dp_reshardable"
    bucket = 0  # all in one
    if values.get("overlap_grad_reduce"):
        # Source: megatron-core 0.19.2, core/distributed/distributed_data_parallel.py.
        default = max(40_000_000, 1_000_000 * layout.dp_size * layout.cp_size)
        bucket = values.get("ddp_bucket_size") or default
    return {
        "tp": layout.tp_size,
        "pp": layout.pp_size,
        "dp": layout.dp_size,
        "cp": layout.cp_size,
        "ep": layout.ep_size,
        "etp": layout.expert_tp_size,
        "vpp": layout.vpp_size or 1,
        "bucket": bucket,
        "format": storage,
    }


def needs_reshard(saved: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> str | None:
    """Why a checkpoint has to be resharded before it loads; ``None`` if it loads as it is.

    Args:
        saved: The layout it was saved at, of :func:`checkpoint_layout`; ``None`` if unknown.
        wanted: The one it is to be loaded at.
    """
    if saved is None:
        return "nobody recorded the layout it was saved at"
    storage = saved.get("format")
    if storage == "torch_dist/fully_reshardable":
        return None  # its loader brings it to any layout
    same_shape = all(saved.get(size) == wanted.get(size) for size in _SHAPE)
    if storage == "torch_dist/dp_reshardable":
        return (
            None
            if same_shape
            else "dp_reshardable states load at their own TP, PP and buckets only"
        )
    same = same_shape and saved.get("dp") == wanted["dp"]
    return None if same else f"a checkpoint of format {storage} loads at its own layout only"


def reshard_words(wanted: Mapping[str, Any], saved: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The resharder's arguments for a layout, without directories."""
    words = [
        f"--target-tensor-parallel-size={wanted['tp']}",
        f"--target-pipeline-parallel-size={wanted['pp']}",
        f"--target-data-parallel-size={wanted['dp']}",
    ]
    if wanted["vpp"] > 1 or (saved or {}).get("vpp", 1) > 1:
        words.append(f"--target-virtual-pipeline-parallel-size={wanted['vpp']}")
    if wanted["ep"] > 1 or (saved or {}).get("ep", 1) > 1:
        words.append(f"--target-expert-parallel-size={wanted['ep']}")
        words.append(f"--target-expert-tensor-parallel-size={wanted['etp']}")
    if wanted["format"] == "torch":
        words.append("--target-ckpt-format=torch")
    return tuple(words)


def describe_change(
    recipe_nodes: int,
    choice: LayoutChoice,
    wanted: Mapping[str, Any],
    saved: Mapping[str, Any] | None,
    batch: str,
) -> str:
    """One line about a layout that is not the recipe's own, or not the last attempt's.

    Args:
        recipe_nodes: Machines the recipe is for.
        choice: The layout taken.
        wanted: Its sizes.
        saved: The sizes before; ``None`` if there is nothing before.
        batch: The global batch, for people.
    """
    now = _sizes(wanted)
    before = f"{_sizes(saved)} -> " if saved is not None and _sizes(saved) != now else ""
    return (
        f"layout: {choice.nodes} of {recipe_nodes} machines, {before}{now}; {batch} and the order "
        "of the data stay"
    )


def _sizes(layout: Mapping[str, Any]) -> str:
    names = [name for name in ("tp", "pp", "dp") if name in layout]
    names += [name for name in ("cp", "ep", "vpp") if layout.get(name, 1) != 1]
    return " ".join(f"{name.upper()} {layout[name]}" for name in names)
