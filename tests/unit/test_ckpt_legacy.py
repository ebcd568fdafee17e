from __future__ import annotations

import shutil
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.outputs import write_outputs
from hypothesis import given
from hypothesis import strategies as st
from megatron.training.checkpointing import get_checkpoint_name

from flagscale.ckpt_io import legacy
from flagscale.ckpt_io.archive import read_tensor
from flagscale.ckpt_io.legacy import RankKey
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.values import StoredTensor, TensorSlot
from flagscale.errors import CheckpointError

_KINDS = ("param", "exp_avg", "exp_avg_sq")


@given(
    st.integers(0, 200), st.integers(0, 2000), st.integers(0, 2000), st.booleans(), st.booleans()
)
def test_directories_are_upstreams(
    tp: int, pp: int, ep: int, pipeline: bool, experts: bool
) -> None:
    path = get_checkpoint_name(
        "", 3, False, pipeline, tp, pp, experts, ep, basename="model_optim_rng.pt"
    )
    name = legacy.rank_directory(RankKey(tp, pp, ep), pipeline=pipeline, experts=experts)
    assert path == f"iter_0000003/{name}/model_optim_rng.pt"


def _args(tp: int = 1, pp: int = 1, ep: int = 1, etp: int | None = None) -> Namespace:
    return Namespace(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
        expert_model_parallel_size=ep, expert_tensor_parallel_size=etp,
    )  # fmt: skip


def _flat(numel: int, start: float = 0.0) -> dict[str, torch.Tensor]:
    return {kind: torch.arange(numel) + start + index / 4 for index, kind in enumerate(_KINDS)}


def _save(directory: Path, name: str, args: Namespace, optimizer: Any = None, **state: Any) -> None:
    rank = directory / name
    rank.mkdir(parents=True)
    torch.save({"args": args, "iteration": 3, **state}, rank / "model_optim_rng.pt")
    if optimizer is not None:
        torch.save(optimizer, rank / "distrib_optim.pt")


_MODERN = {
    "buckets_coalesced": True,
    0: {(torch.bfloat16, torch.float32): {**_flat(6), "numel_unpadded": 6}},
    1: {(torch.bfloat16, torch.float32): {**_flat(4, 100.0), "numel_unpadded": 4}},
}


def _tensor(directory: Path, stored: StoredTensor) -> list[float]:
    with Sources(directory) as sources:
        return [float(value) for value in read_tensor(sources, stored)]


def test_buffers(tmp_path: Path) -> None:
    _save(tmp_path, "mp_rank_00", _args(), _MODERN, model={"a.weight": torch.ones(2, 3)})
    read = legacy.read(tmp_path)
    assert read.args == _args()
    rank = read.ranks[RankKey(0, 0, 0)]
    assert rank.model_state["iteration"] == 3
    (model,) = rank.models
    assert model["a.weight"].file == "mp_rank_00/model_optim_rng.pt"
    ((first, second),) = rank.optimizers
    assert (first.gbuf_idx, first.param_dtype, first.grad_dtype) == (0, "bfloat16", "float32")
    assert (first.numel_unpadded, second.gbuf_idx, second.numel_unpadded) == (6, 1, 4)
    for buffer in (first, second):
        want = _MODERN[buffer.gbuf_idx][torch.bfloat16, torch.float32]  # type: ignore[index]
        for kind in _KINDS:
            (stored,) = buffer.states[kind]
            assert _tensor(tmp_path, stored) == want[kind].tolist()


@pytest.mark.parametrize("key", [torch.float32, (torch.bfloat16, torch.float32)])
def test_bucket_lists_of_older_releases(tmp_path: Path, key: Any) -> None:
    parts = [_flat(4), _flat(3, 50.0)]
    buckets = {kind: [part[kind] for part in parts] for kind in _KINDS}
    _save(tmp_path, "mp_rank_00", _args(), {0: {key: buckets}}, model={})
    (((buffer,),),) = (rank.optimizers for rank in legacy.read(tmp_path).ranks.values())
    assert buffer.param_dtype == ("bfloat16" if isinstance(key, tuple) else None)
    assert buffer.numel_unpadded == 7
    for kind in _KINDS:
        got = [_tensor(tmp_path, stored) for stored in buffer.states[kind]]
        assert got == [part[kind].tolist() for part in parts]


def test_chained_optimizers(tmp_path: Path) -> None:
    names = {"mp_rank_00_000": [_MODERN, _MODERN], "mp_rank_00_001": [None, _MODERN]}
    for name, optimizer in names.items():
        _save(tmp_path, name, _args(ep=2), optimizer, model={})
    ranks = legacy.read(tmp_path).ranks
    assert list(ranks) == [RankKey(0, 0, 0), RankKey(0, 0, 1)]
    dense, experts = ranks[RankKey(0, 0, 1)].optimizers
    assert dense is None
    assert experts is not None
    assert [buffer.numel_unpadded for buffer in experts] == [6, 4]


def test_virtual_pipeline(tmp_path: Path) -> None:
    for name in ("mp_rank_00_000", "mp_rank_00_001"):
        chunks = {f"model{n}": {f"{name}.{n}": None} for n in range(12)}
        _save(tmp_path, name, _args(pp=2), **chunks)
    ranks = legacy.read(tmp_path).ranks
    assert list(ranks) == [RankKey(0, 0, 0), RankKey(0, 1, 0)]
    models = ranks[RankKey(0, 1, 0)].models
    assert [list(model) for model in models] == [[f"mp_rank_00_001.{n}"] for n in range(12)]
    assert ranks[RankKey(0, 1, 0)].distrib_optim is None
    assert ranks[RankKey(0, 1, 0)].optimizers == ()


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (_args(), ["00"]),
        (_args(tp=2), ["00", "01"]),
        (_args(tp=2, pp=2), ["00_000", "00_001", "01_000", "01_001"]),
        (_args(tp=2, ep=2), ["00_000", "00_001", "01_000", "01_001"]),
        (_args(tp=2, ep=2, etp=1), ["00_000", "01_001"]),
        (_args(tp=2, ep=4, etp=1), ["00_000", "00_002", "01_001", "01_003"]),
        (_args(tp=1, pp=2, ep=2), ["00_000_000", "00_000_001", "00_001_000", "00_001_001"]),
        (Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=1), ["00", "01"]),
    ],
    ids=["one", "TP2", "TP2-PP2", "TP2-EP2", "TP2-EP2-ETP1", "TP2-EP4-ETP1", "PP2-EP2", "old"],
)
def test_which_ranks_there_are(tmp_path: Path, args: Namespace, names: list[str]) -> None:
    for name in names:
        _save(tmp_path, f"mp_rank_{name}", args, model={})
    (tmp_path / "other").mkdir()
    ranks = legacy.read(tmp_path).ranks
    assert [rank.directory for rank in ranks.values()] == [f"mp_rank_{name}" for name in names]
    for key, rank in ranks.items():
        pipeline = args.pipeline_model_parallel_size > 1
        experts = getattr(args, "expert_model_parallel_size", 1) > 1
        assert legacy.rank_directory(key, pipeline=pipeline, experts=experts) == rank.directory
    if len(names) > 1:
        shutil.rmtree(tmp_path / f"mp_rank_{names[-1]}")
        with pytest.raises(CheckpointError, match=f"a rank is missing[^$]*{names[-1]}"):
            legacy.read(tmp_path)


def test_ranks_that_should_not_be_there(tmp_path: Path) -> None:
    _save(tmp_path, "mp_rank_00", _args(), model={})
    _save(tmp_path, "mp_rank_01", _args(), model={})
    with pytest.raises(CheckpointError, match=r"do not allow[^$]*mp_rank_01"):
        legacy.read(tmp_path)
    shutil.rmtree(tmp_path / "mp_rank_01")
    _save(tmp_path, "mp_rank_00_000", _args(), model={})
    with pytest.raises(CheckpointError, match=r"mp_rank_00_000[^$]*does not fit|does not fit"):
        legacy.read(tmp_path)


def test_not_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(CheckpointError, match=r"got: +sub"):
        legacy.read(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        legacy.read(tmp_path / "missing")


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"args": {"a": 1}}, "arguments of its job"),
        ([1], "arguments of its job"),
        ({"args": Namespace(), "model": [1]}, "not a dict of tensors"),
        ({"args": Namespace(), "model0": {}, "model1": 3}, "not a dict of tensors"),
        ({"args": Namespace(tensor_model_parallel_size="2")}, "parallel size"),
        ({"args": Namespace(tensor_model_parallel_size=1 << 19,
                            pipeline_model_parallel_size=1 << 19)}, "does not fit"),
        ({"args": Namespace(tensor_model_parallel_size=1 << 20,
                            expert_tensor_parallel_size=(1 << 20) - 1)}, "do not fit"),
    ],
)  # fmt: skip
def test_arguments_that_cannot_be(tmp_path: Path, state: Any, message: str) -> None:
    (tmp_path / "mp_rank_00").mkdir()
    torch.save(state, tmp_path / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(CheckpointError, match=message):
        legacy.read(tmp_path)


_PAIR = (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    "optimizer",
    [
        3,
        {"unknown": 1},
        {0: {_PAIR: {"exp_avg": torch.ones(2)}}},
        {0: {_PAIR: {**_flat(3), "exp_avg": torch.ones(2)}}},
        {0: {_PAIR: {**_flat(3), "numel_unpadded": 4}}},
        {0: {_PAIR: {**_flat(3), "exp_avg": None}}},
        {0: {_PAIR: dict.fromkeys(_KINDS, torch.ones(2, 2))}},
        {0: {"float32": _flat(3)}},
        {0: [_flat(3)]},
    ],
)
def test_buffers_that_cannot_be(tmp_path: Path, optimizer: Any) -> None:
    _save(tmp_path, "mp_rank_00", _args(), optimizer, model={})
    with pytest.raises(CheckpointError, match=r"distrib_optim\.pt"):
        legacy.read(tmp_path)


def test_planned_files_are_read_by_torch(tmp_path: Path) -> None:
    weight = torch.randn(3, 4).bfloat16()
    model = OrderedDict({"a.weight": TensorSlot("bfloat16", (3, 4), "weight"), "b": None})
    flat = _flat(8)
    slots = {kind: TensorSlot("float32", (8,), kind) for kind in _KINDS}
    files = legacy.plan_rank(
        "mp_rank_00",
        {"args": _args(), "iteration": 3, "model": model},
        {"buckets_coalesced": True, 0: {_PAIR: {**slots, "numel_unpadded": 8}}},
    )
    contents = {"weight": weight, **flat}
    write_outputs(
        tmp_path,
        [file.output for file in files],
        {(f.output.path, hole): contents[key] for f in files for key, hole in f.holes.items()},
    )
    rank = tmp_path / "mp_rank_00"
    with torch.serialization.safe_globals([Namespace]):
        state = torch.load(rank / "model_optim_rng.pt", weights_only=True)  # noqa: TID251
        optimizer = torch.load(rank / "distrib_optim.pt", weights_only=True)  # noqa: TID251
    assert state["args"] == _args()
    assert type(state["model"]) is OrderedDict
    assert torch.equal(state["model"]["a.weight"], weight)
    assert all(torch.equal(optimizer[0][_PAIR][kind], flat[kind]) for kind in _KINDS)
    read = legacy.read(tmp_path).ranks[RankKey(0, 0, 0)]
    assert read.optimizers[0] is not None
    assert read.optimizers[0][0].numel_unpadded == 8


def test_no_optimizer_file_is_planned_without_one() -> None:
    (file,) = legacy.plan_rank("mp_rank_00", {"args": _args()})
    assert file.output.path == "mp_rank_00/model_optim_rng.pt"
