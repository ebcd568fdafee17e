"""Checkpoints of the format ``torch``: one directory for each model-parallel rank.

``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`` holds a rank's model, arguments and schedules,
``distrib_optim.pt`` beside it the distributed optimizer's flat buffers, whole over data-parallel
ranks. The pipeline rank is named where there is a pipeline, the expert rank where experts are
spread; so one number after the first may be either, and the saved arguments tell which.

Source: megatron-core 0.19.2, ``training/checkpointing.py`` 195-241, 671-755;
``core/optimizer/distrib_optimizer.py`` 1262-1430, 2121-2252.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count, takewhile
from math import lcm
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from flagscale.ckpt_io.archive import read_tree
from flagscale.ckpt_io.archive_plan import PlannedFile, plan_file
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.values import StoredTensor
from flagscale.errors import CheckpointError

__all__ = [
    "LegacyBuffer",
    "LegacyCheckpoint",
    "LegacyRank",
    "RankKey",
    "plan_rank",
    "rank_directory",
    "read",
]

_MODEL_FILE: Final = "model_optim_rng.pt"
_OPTIMIZER_FILE: Final = "distrib_optim.pt"
_DIRECTORY: Final = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")


class RankKey(NamedTuple):
    """A rank of the model-parallel group, all three counted from 0."""

    tp_rank: int
    pp_rank: int
    ep_rank: int


@dataclass(frozen=True)
class LegacyBuffer:
    """A flat gradient buffer of a distributed optimizer, whole over its data-parallel ranks.

    Args:
        gbuf_idx: Its number in its optimizer.
        param_dtype: Torch's name of the parameters' type; ``None`` before February 2024.
        grad_dtype: The same of the gradients.
        states: ``param``, ``exp_avg`` and so on, each in one run or, where buckets were not
            coalesced, one run for each bucket; flat, without the padding at the end of buckets.
        numel_unpadded: Elements in all.
    """

    gbuf_idx: int
    param_dtype: str | None
    grad_dtype: str
    states: Mapping[str, tuple[StoredTensor, ...]]
    numel_unpadded: int


@dataclass(frozen=True)
class LegacyRank:
    """What one rank saved.

    Args:
        directory: Name of its directory.
        model_state: Tree of ``model_optim_rng.pt``.
        distrib_optim: Tree of ``distrib_optim.pt``; ``None`` where there is no such file.
        optimizers: The same in one form for all ages of it: for each chained optimizer its buffers,
            or ``None`` where another rank saved them.
    """

    directory: str
    model_state: Mapping[str, Any]
    distrib_optim: Any
    optimizers: tuple[tuple[LegacyBuffer, ...] | None, ...]

    @property
    def models(self) -> tuple[Mapping[str, Any], ...]:
        """State dicts of the rank's model chunks; more than one in a virtual pipeline."""
        if "model" in self.model_state:
            return (self.model_state["model"],)
        keys = takewhile(self.model_state.__contains__, (f"model{n}" for n in count()))
        return tuple(self.model_state[key] for key in keys)


@dataclass(frozen=True)
class LegacyCheckpoint:
    """An opened checkpoint.

    Args:
        directory: Of the iteration.
        args: Arguments of the job, as its first rank saved them.
        ranks: By their place in the model-parallel group.
    """

    directory: Path
    args: Namespace
    ranks: Mapping[RankKey, LegacyRank]


def read(directory: Path) -> LegacyCheckpoint:
    """Open the checkpoint of one iteration; no tensor is loaded.

    Raises:
        CheckpointError: A rank's file is missing or damaged, the directories do not fit the saved
            arguments, or a pickle names what may not be opened.
    """
    names = _rank_names(directory)
    with Sources(directory) as sources:
        ranks = {name: _rank(sources, name) for name in names}
    args = ranks[names[0]].model_state["args"]
    placed = {_rank_key(directory, name, args): rank for name, rank in ranks.items()}
    _verify_complete(directory, args, placed)
    return LegacyCheckpoint(directory, args, placed)


def rank_directory(rank: RankKey, *, pipeline: bool, experts: bool) -> str:
    """Name of a rank's directory.

    Args:
        rank: Its place.
        pipeline: Whether there is more than one pipeline stage.
        experts: Whether experts are spread over ranks.
    """
    name = f"mp_rank_{rank.tp_rank:02d}"
    if pipeline:
        name += f"_{rank.pp_rank:03d}"
    return f"{name}_{rank.ep_rank:03d}" if experts else name


def plan_rank(
    rank_dir: str, model_state: Mapping[str, Any], distrib_optim: Any = None
) -> tuple[PlannedFile, ...]:
    """Plan the files of one rank.

    Args:
        rank_dir: Name of its directory, by :func:`rank_directory`.
        model_state: Tree of ``model_optim_rng.pt``, with slots for its tensors.
        distrib_optim: Tree of ``distrib_optim.pt``, likewise; ``None`` for no such file.

    Raises:
        ConfigError: A tree cannot be written.
    """
    trees = {_MODEL_FILE: model_state, _OPTIMIZER_FILE: distrib_optim}
    return tuple(
        plan_file(f"{rank_dir}/{name}", tree) for name, tree in trees.items() if tree is not None
    )


def _rank_names(directory: Path) -> list[str]:
    try:
        entries = sorted(entry.name for entry in directory.iterdir() if entry.is_dir())
    except OSError as error:
        raise CheckpointError(
            "the directory of a checkpoint cannot be read",
            where=str(directory),
            got=error.strerror,
        ) from error
    names = [name for name in entries if _DIRECTORY.fullmatch(name)]
    if not names:
        raise CheckpointError(
            "a checkpoint of format torch has a directory for each rank, and there is none",
            where=str(directory),
            expected="mp_rank_00 or the like",
            got=", ".join(entries[:8]) or "no directory",
        )
    return names


def _rank(sources: Sources, name: str) -> LegacyRank:
    model_path, optimizer_path = f"{name}/{_MODEL_FILE}", f"{name}/{_OPTIMIZER_FILE}"
    state = read_tree(sources, model_path)
    where = str(sources.directory / model_path)
    if not isinstance(state, dict) or not isinstance(state.get("args"), Namespace):
        raise CheckpointError(
            "the state of a rank does not hold the arguments of its job",
            where=where,
            expected="a dict with args, model, optimizer and so on",
            got=f"{type(state).__name__}",
        )
    distrib_optim: Any = None
    optimizers: tuple[tuple[LegacyBuffer, ...] | None, ...] = ()
    if (sources.directory / optimizer_path).exists():
        distrib_optim = read_tree(sources, optimizer_path)
        optimizers = _optimizers(distrib_optim, str(sources.directory / optimizer_path))
    rank = LegacyRank(name, state, distrib_optim, optimizers)
    if not all(isinstance(model, dict) for model in rank.models):
        raise CheckpointError("the model of a rank is not a dict of tensors", where=where)
    return rank


def _optimizers(tree: Any, where: str) -> tuple[tuple[LegacyBuffer, ...] | None, ...]:
    chained = tree if isinstance(tree, list) else [tree]
    try:
        return tuple(None if each is None else _buffers(each) for each in chained)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "the buffers of a distributed optimizer do not have a known form",
            where=where,
            got=f"{type(error).__name__}: {error}"[:300],
            cure="it may have been saved by a newer release, or be damaged",
        ) from None


def _buffers(tree: Any) -> tuple[LegacyBuffer, ...]:
    indices = [key for key in tree if type(key) is int]
    if unknown := [key for key in tree if type(key) is not int and key != "buckets_coalesced"]:
        raise ValueError(f"the unknown entry {unknown[0]!a}")
    return tuple(_buffer(index, *pair) for index in indices for pair in tree[index].items())


def _buffer(gbuf_idx: int, dtypes: Any, state: Any) -> LegacyBuffer:
    param_dtype, grad_dtype = dtypes if isinstance(dtypes, tuple) else (None, dtypes)
    if not isinstance(grad_dtype, torch.dtype):
        raise TypeError("a buffer of an unknown element type")
    states = {
        name: tuple(value) if isinstance(value, list) else (value,)
        for name, value in state.items()
        if name != "numel_unpadded"
    }
    numels = {name: tuple(map(_numel, parts)) for name, parts in states.items()}
    if len(set(numels.values())) != 1 or "param" not in numels:
        raise ValueError(f"states of different sizes: {numels}")
    numel = sum(numels["param"])
    if state.get("numel_unpadded", numel) != numel:
        raise ValueError(f"numel_unpadded {state['numel_unpadded']!a} of {numel} elements")
    param_name = None if param_dtype is None else str(param_dtype).removeprefix("torch.")
    return LegacyBuffer(gbuf_idx, param_name, str(grad_dtype).removeprefix("torch."), states, numel)


def _numel(value: Any) -> int:
    if not isinstance(value, StoredTensor) or len(value.shape) != 1 or not value.dense:
        raise TypeError("a state that is not a flat tensor")
    return value.numel


def _rank_key(directory: Path, name: str, args: Namespace) -> RankKey:
    match = _DIRECTORY.fullmatch(name)
    numbers = [int(number) for number in match.groups() if number] if match else []
    pipeline, experts = _size(directory, args, "pp") > 1, _size(directory, args, "ep") > 1
    if len(numbers) != 1 + pipeline + experts:
        raise CheckpointError(
            "a rank's directory does not fit the saved arguments",
            where=str(directory / name),
            expected=rank_directory(RankKey(0, 0, 0), pipeline=pipeline, experts=experts)
            + " and the like",
            got=name,
        )
    return RankKey(
        numbers[0], numbers[1] if pipeline else 0, numbers[1 + pipeline] if experts else 0
    )


_SIZES: Final = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def _size(directory: Path, args: Namespace, kind: str) -> int:
    size = getattr(args, _SIZES[kind], None)
    if size is None:  # a release without experts; or the experts' default
        return _size(directory, args, "tp") if kind == "etp" else 1
    if type(size) is not int or not 1 <= size <= 1 << 20:
        raise CheckpointError(
            "the saved arguments hold a parallel size that is none",
            where=str(directory),
            got=f"{_SIZES[kind]} {size!a}"[:200],
        )
    return size


def _verify_complete(directory: Path, args: Namespace, ranks: Mapping[RankKey, LegacyRank]) -> None:
    tp, pp, ep, etp = (_size(directory, args, kind) for kind in _SIZES)
    # Tensor ranks vary fastest among dense ranks, and the experts' own among expert ranks: which
    # pairs of tensor and expert rank occur repeats with the least common multiple.
    stage = lcm(tp, etp * ep)
    if stage * pp > 1 << 24:
        raise CheckpointError(
            "the saved arguments do not fit the checkpoint",
            where=str(directory),
            expected=f"{stage * pp} ranks or more",
            got=f"{len(ranks)} directories",
        )
    wanted = {
        RankKey(rank % tp, stage_index, rank // etp % ep)
        for rank in range(stage)
        for stage_index in range(pp)
    }
    for problem, some in (
        ("a rank is missing from a checkpoint", wanted - ranks.keys()),
        ("a checkpoint holds a rank that its arguments do not allow", ranks.keys() - wanted),
    ):
        if some:
            key = min(some)
            raise CheckpointError(
                problem,
                where=str(directory / rank_directory(key, pipeline=pp > 1, experts=ep > 1)),
                expected=f"{len(wanted)} ranks: TP {tp}, PP {pp}, EP {ep}",
                got=f"{len(ranks)} directories",
            )
