"""Real checkpoints are read, written again by our plans, and resumed as if untouched."""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import train
from harness.checkpoint import read_tensors
from harness.corpus import model_argv
from harness.outputs import write_outputs

from flagscale.ckpt_io import legacy, torch_dist
from flagscale.ckpt_io.archive import read_tensor
from flagscale.ckpt_io.location import TRACKER, detect_format, find_iteration
from flagscale.ckpt_io.output import Hole
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.torch_dist_plan import ChunkKey, TensorPlan, plan_checkpoint
from flagscale.ckpt_io.values import Foreign, StoredTensor, TensorSlot

_SAVED, _LAST = 2, 5
_LAYOUTS: dict[str, dict[str, object]] = {
    "legacy-MoE": {
        "ckpt_format": "torch",
        "num_experts": 4,
        "expert_model_parallel_size": 2,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 96,
    },
    "legacy-layout": {
        "ckpt_format": "torch",
        "pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_layout": "Et|t|t|tL",
    },
    "dist-DP2": {"dist_ckpt_optim_fully_reshardable": True},
}


class _Slots:
    """Turns the tensors of trees into slots, and remembers what belongs into them."""

    def __init__(self) -> None:
        self.stored: dict[str, StoredTensor] = {}

    def put(self, tree: Any) -> Any:
        if isinstance(tree, StoredTensor):
            key = str(len(self.stored))
            self.stored[key] = tree
            return TensorSlot(tree.dtype, tree.shape, key)
        if isinstance(tree, dict):
            for key in tree:
                tree[key] = self.put(tree[key])
            return tree
        if type(tree) in (list, tuple):
            return type(tree)(map(self.put, tree))
        return tree


def _rewrite_legacy(source: Path, target: Path) -> None:
    slots = _Slots()
    planned = [
        file
        for rank in legacy.read(source).ranks.values()
        for file in legacy.plan_rank(
            rank.directory, slots.put(rank.model_state), slots.put(rank.distrib_optim)
        )
    ]
    places = {
        (file.output.path, hole): slots.stored[key]
        for file in planned
        for key, hole in file.holes.items()
    }
    with Sources(source) as sources:
        contents = {place: read_tensor(sources, stored) for place, stored in places.items()}
    write_outputs(target, [file.output for file in planned], contents)


def _rewrite_dist(source: Path, target: Path) -> None:
    read = torch_dist.read(source)
    slots = _Slots()
    stored = {
        ChunkKey(key, box): chunk for key, e in read.tensors.items() for box, chunk in e.chunks
    }
    planned = plan_checkpoint(
        {key: TensorPlan(entry.shape, entry.dtype) for key, entry in read.tensors.items()},
        [list(stored)[number::3] for number in range(3)],
        {key: slots.put(entry.load()) for key, entry in read.objects.items()},
        slots.put(read.common),
    )
    places: dict[tuple[str, Hole], StoredTensor] = {
        place: stored[member] for member, place in planned.chunks.items()
    }
    places |= {place: slots.stored[key] for key, place in planned.slots.items()}
    with Sources(source) as sources:
        contents = {place: read_tensor(sources, each) for place, each in places.items()}
    write_outputs(target, planned.files, contents)
    got, want = read_tensors(target), read_tensors(source)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[key], want[key]) for key in want)


def _same(sources: Sources, ours: Any, upstreams: Any) -> bool:
    """Whether a tree of ours says what torch, which runs the pickle, makes of the same file."""
    if isinstance(ours, StoredTensor):
        return torch.equal(read_tensor(sources, ours), upstreams)
    if isinstance(ours, Foreign):
        if ours.state is None:
            return ours.args == (upstreams.value,)
        return _same(sources, ours.state, vars(upstreams))
    if isinstance(ours, Namespace):
        ours, upstreams = vars(ours), vars(upstreams)
    if isinstance(ours, Mapping):
        return list(ours) == list(upstreams) and all(
            _same(sources, ours[key], upstreams[key]) for key in ours
        )
    if isinstance(ours, list | tuple):
        return len(ours) == len(upstreams) and all(
            _same(sources, a, b) for a, b in zip(ours, upstreams, strict=True)
        )
    return bool(type(ours) is type(upstreams) and (ours == upstreams if _plain(ours) else True))


def _plain(value: Any) -> bool:
    return not hasattr(value, "shape")


@pytest.mark.parametrize("name", list(_LAYOUTS))
def test_written_again_it_resumes_alike(corpus: Path, tmp_path: Path, name: str) -> None:
    layout = {**_LAYOUTS[name], "train_iters": _LAST}
    argv = model_argv(
        corpus, save=tmp_path / "a", save_interval=_SAVED, exit_interval=_SAVED, **layout
    )
    train(argv, tmp_path / "logs", 2).require_success()
    iteration, source = find_iteration(tmp_path / "a")
    assert iteration == _SAVED
    target = tmp_path / "b" / source.name
    if detect_format(source) == "torch":
        with Sources(source) as sources:
            for rank in legacy.read(source).ranks.values():
                path = source / rank.directory
                state = torch.load(path / "model_optim_rng.pt", weights_only=False)  # noqa: TID251
                optimizer = torch.load(path / "distrib_optim.pt", weights_only=False)  # noqa: TID251
                assert _same(sources, rank.model_state, state)
                assert _same(sources, rank.distrib_optim, optimizer)
        _rewrite_legacy(source, target)
    else:
        _rewrite_dist(source, target)
    shutil.copy(tmp_path / "a" / TRACKER, tmp_path / "b" / TRACKER)
    losses = []
    for load in ("a", "b"):
        resumed = train(
            model_argv(corpus, load=tmp_path / load, **layout), tmp_path / f"logs-{load}", 2
        )
        losses.append(resumed.require_success().losses)
    assert sorted(losses[0]) == list(range(_SAVED + 1, _LAST + 1))
    assert losses[0] == losses[1]
