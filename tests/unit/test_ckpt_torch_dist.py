from __future__ import annotations

import itertools
import json
import math
import os
import pickle
import random
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from harness.checkpoint import read_tensors
from harness.mutate import mutate, read_everything, write_small_checkpoints
from harness.outputs import write_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.validation import StrictHandling
from megatron.core.safe_globals import register_safe_globals
from megatron.core.transformer.enums import AttnBackend
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from flagscale.ckpt_io import torch_dist
from flagscale.ckpt_io.archive import read_tensor
from flagscale.ckpt_io.coverage import verify_tiling
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.torch_dist_plan import ChunkKey, TensorPlan, plan_checkpoint
from flagscale.ckpt_io.values import Foreign, TensorSlot
from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.boxes import Box

_BACKEND = Foreign("megatron.core.transformer.enums", "AttnBackend", (5,))
_COMMON = {
    "args": Namespace(hidden_size=8, attention_backend=_BACKEND, params_dtype=torch.bfloat16),
    "iteration": 7,
    "content_metadata": {"distrib_optim_sharding_type": "fully_reshardable"},
}
_TENSORS = {
    "decoder.layers.mlp.linear_fc1.weight": (torch.randn(3, 8, 6).bfloat16(), (1, 4, 6)),
    "embedding.word_embeddings.weight": (torch.randn(10, 5), (4, 5)),
    "optimizer.state.exp_avg.decoder.final_layernorm.weight": (torch.randn(7), (7,)),
    "scalar": (torch.tensor(3.5), ()),
    "empty": (torch.empty(0, 4), (1, 4)),
}


def _grid(shape: tuple[int, ...], step: tuple[int, ...]) -> list[Box]:
    boxes = [Box((), ())]
    for size, part in zip(shape, step, strict=True):
        starts = range(0, size, part) if size else (0,)
        boxes = [
            Box((*box.offset, at), (*box.shape, min(part, size - at)))
            for box in boxes
            for at in starts
        ]
    return boxes


def _slice(box: Box) -> tuple[slice, ...]:
    return tuple(map(slice, box.offset, box.stop))


def _write(directory: Path, files: int = 2) -> None:
    """All of ``_TENSORS`` through our plan."""
    chunks = [
        ChunkKey(key, box)
        for key, (tensor, step) in _TENSORS.items()
        for box in _grid(tuple(tensor.shape), step)
    ]
    rng = [{"torch_rng_state": TensorSlot("uint8", (4,), "rng"), "cuda": torch.arange(3)}]
    planned = plan_checkpoint(
        {
            key: TensorPlan(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            for key, (tensor, _) in _TENSORS.items()
        },
        [chunks[number::files] for number in range(files)],
        {"rng_state/shard_0.0_1.1": rng, "x._extra_state/shard_1_2": None},
        _COMMON,
    )
    contents = {
        place: _TENSORS[member.key][0][_slice(member.box)]
        for member, place in planned.chunks.items()
    }
    contents[planned.slots["rng"]] = torch.arange(4, dtype=torch.uint8)
    directory.mkdir(parents=True, exist_ok=True)
    write_outputs(directory, planned.files, contents)


def _tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors by our reader."""
    whole: dict[str, torch.Tensor] = {}
    with Sources(directory) as sources:
        for key, entry in torch_dist.read(directory).tensors.items():
            whole[key] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
            for box, stored in entry.chunks:
                whole[key][_slice(box)] = read_tensor(sources, stored)
    return whole


def _same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return got.keys() == want.keys() and all(
        got[key].dtype == want[key].dtype and torch.equal(got[key], want[key]) for key in want
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("planned") / "iter_0000007"
    _write(directory)
    return directory


@pytest.fixture
def damaged(planned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(planned, tmp_path / "iter_0000007"))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


_WANT = {key: tensor for key, (tensor, _) in _TENSORS.items()}


def test_torch_reads_what_is_planned(planned: Path) -> None:
    assert _same(read_tensors(planned), _WANT)


def test_we_read_what_is_planned(planned: Path) -> None:
    assert _same(_tensors(planned), _WANT)
    read = torch_dist.read(planned)
    assert read.common == _COMMON
    assert read.mcore_data == {}
    assert read.objects["x._extra_state/shard_1_2"].load() is None
    (state,) = read.objects["rng_state/shard_0.0_1.1"].load()
    with Sources(planned) as sources:
        assert read_tensor(sources, state["torch_rng_state"]).tolist() == [0, 1, 2, 3]
        assert read_tensor(sources, state["cuda"]).tolist() == [0, 1, 2]


@pytest.mark.usefixtures("one_process")
def test_upstream_loads_what_is_planned_in_another_layout(planned: Path) -> None:
    register_safe_globals()
    name = "decoder.layers.mlp.linear_fc1.weight"
    state = {
        **{
            f"half {half}": ShardedTensor.from_rank_offsets(
                name, torch.zeros(1, 8, 3, dtype=torch.bfloat16), (0, layer, 3), (2, half, 2),
                replica_id=0,
            )
            for layer in (1,) for half in (0, 1)
        },
        "vocabulary": ShardedTensor.from_rank_offsets(
            "embedding.word_embeddings.weight", torch.zeros(10, 5), replica_id=0
        ),
        "rng": ShardedObject("rng_state", None, (1, 1), (0, 0), replica_id=0),
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = dist_checkpointing.load(
            state,
            str(planned),
            validate_access_integrity=False,
            strict=StrictHandling.ASSUME_OK_UNEXPECTED,
        )
        keys = dist_checkpointing.load_tensors_metadata(str(planned))
        sharded = dist_checkpointing.serialization.load_sharded_metadata(str(planned))
    want = _WANT[name]
    assert torch.equal(loaded["half 0"], want[1:2, :, :3])
    assert torch.equal(loaded["half 1"], want[1:2, :, 3:])
    assert torch.equal(loaded["vocabulary"], _WANT["embedding.word_embeddings.weight"])
    assert loaded["rng"][0]["torch_rng_state"].tolist() == [0, 1, 2, 3]
    assert loaded["iteration"] == 7
    assert loaded["args"].attention_backend is AttnBackend.auto
    assert loaded["args"].params_dtype is torch.bfloat16
    assert keys.keys() == _WANT.keys()
    assert "x._extra_state/shard_1_2" in sharded
    assert dist_checkpointing.check_is_distributed_checkpoint(str(planned))


def _save_with_torch(directory: Path, state: dict[str, Any], threads: int = 1) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = dcp.FileSystemWriter(directory, thread_count=threads)
        dcp.save(state, storage_writer=writer, no_dist=True)
    (directory / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')


@pytest.mark.parametrize("threads", [1, 3])
def test_we_read_what_torch_saves(tmp_path: Path, threads: int) -> None:
    view = torch.arange(24.0).view(4, 6)
    state = {**_WANT, "transposed": view.T, "columns": view[:, 1:3]}
    _save_with_torch(tmp_path, state, threads)
    torch.save({"iteration": 3, "args": Namespace(a=1)}, tmp_path / "common.pt")
    assert _same(_tensors(tmp_path), state)
    assert torch_dist.read(tmp_path).common == {"iteration": 3, "args": Namespace(a=1)}


def test_the_common_file_comes_first(damaged: Path) -> None:
    torch.save({"iteration": 8}, damaged / "common.pt")
    assert torch_dist.read(damaged).common == {"iteration": 8}


def test_old_and_odd_metadata(damaged: Path) -> None:
    """What other releases leave out or add."""
    metadata = pickle.loads((damaged / ".metadata").read_bytes())
    del metadata.version, metadata.storage_meta
    metadata.mcore_data = {"a": {"told by another release": 3}}
    metadata.all_local_plans = []
    (damaged / ".metadata").write_bytes(pickle.dumps(metadata, 2))
    config = {"sharded_backend": "torch_dist", "sharded_backend_version": 1,
              "common_backend": "torch", "common_backend_version": 1}  # fmt: skip
    (damaged / "metadata.json").write_text(json.dumps(config))
    assert _same(_tensors(damaged), _WANT)
    assert torch_dist.read(damaged).mcore_data == metadata.mcore_data


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_flattened_parts_of_old_releases(
    tmp_path_factory: pytest.TempPathFactory,
    dims: list[tuple[int, int]],
    rng: random.Random,
) -> None:
    """Each data-parallel rank stored a range of each tensor rank's part, flattened."""
    grid, part = (tuple(axis) for axis in zip(*dims, strict=True))
    shape = tuple(count * size for count, size in dims)
    tensor = torch.arange(float(math.prod(shape))).view(shape)
    numel = math.prod(part)
    chunks: dict[ChunkKey, torch.Tensor] = {}
    for place in itertools.product(*map(range, grid)):
        corner = [slice(i * size, (i + 1) * size) for i, size in zip(place, part, strict=True)]
        flat = tensor[tuple(corner)].contiguous().view(-1)
        cuts = sorted({0, numel, *(rng.randint(0, numel) for _ in range(rng.randint(0, 2)))})
        for start, stop in itertools.pairwise(cuts):
            box = Box((*place, start), (*(1 for _ in place), stop - start))
            chunks[ChunkKey("w", box)] = flat[start:stop].clone().view(box.shape)
    planned = plan_checkpoint({"w": TensorPlan((*grid, numel), "float32")}, [[*chunks]], {}, {})
    directory = tmp_path_factory.mktemp("old") / "iter_0000007"
    contents = {place: chunks[member] for member, place in planned.chunks.items()}
    write_outputs(directory, planned.files, contents)
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.mcore_data = {"w": {"nd_reformulated_orig_global_shape": shape}}
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    assert torch.equal(_tensors(directory)["w"], tensor)
    metadata.mcore_data = {"w": {"nd_reformulated_orig_global_shape": (*shape[:-1], 1 + shape[-1])}}
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="does not have the shape"):
        torch_dist.read(directory)


# What must be refused, and what the message must name.

_FC1 = "decoder.layers.mlp.linear_fc1.weight"


def _edit(change: Callable[[Metadata], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        metadata = pickle.loads((directory / ".metadata").read_bytes())
        change(metadata)
        (directory / ".metadata").write_bytes(pickle.dumps(metadata))

    return damage


def _chunks(metadata: Metadata) -> list[ChunkStorageMetadata]:
    return metadata.state_dict_metadata[_FC1].chunks  # type: ignore[union-attr]


def _place(metadata: Metadata, **changes: Any) -> None:
    for index in metadata.storage_data:
        if index.fqn == _FC1:
            metadata.storage_data[index] = replace(metadata.storage_data[index], **changes)


def _cut(directory: Path) -> None:
    os.truncate(directory / "__1_0.distcp", (directory / "__1_0.distcp").stat().st_size // 2)


_REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (lambda d: (d / "metadata.json").unlink(), "fsdp_dtensor and torch_dcp"),
    "other-backend": (lambda d: (d / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
                      "'zarr'"),
    "no-metadata": (lambda d: (d / ".metadata").unlink(), r"\.metadata"),
    "cut-metadata": (lambda d: os.truncate(d / ".metadata", 500), r"\.metadata"),
    "hostile-metadata": (lambda d: (d / ".metadata").write_bytes(b"\x80\x02cos\nsystem\n."),
                         r"\.metadata[^$]*os\.system"),
    "no-file": (lambda d: (d / "__1_0.distcp").unlink(), r"__1_0\.distcp"),
    "cut-file": (_cut, r"__1_0\.distcp, "),
    "no-common": (_edit(lambda m: m.state_dict_metadata.pop("common_state/shard_0_1")), "common"),
    "no-place": (_edit(lambda m: [m.storage_data.pop(i) for i in list(m.storage_data)
                                  if i.fqn == _FC1]), _FC1),
    "overlap": (_edit(lambda m: _chunks(m).append(_chunks(m)[0])), f"{_FC1}[^$]*overlap"),
    "uncovered": (_edit(lambda m: _chunks(m).pop()), f"{_FC1}[^$]*120 of 144"),
    "out-of-bounds": (_edit(lambda m: setattr(_chunks(m)[0], "offsets", (3, 0, 0))),
                      f"{_FC1}[^$]*out of bounds"),
    "other-shape": (_edit(lambda m: [setattr(m.state_dict_metadata[_FC1], "size", (3, 6, 8))]
                          + [setattr(c, "sizes", (1, 6, 4)) or
                             setattr(c, "offsets", (c.offsets[0], 0, c.offsets[1]))
                             for c in _chunks(m)]), _FC1),
    "other-type": (_edit(lambda m: setattr(m.state_dict_metadata[_FC1].properties, "dtype",
                                           torch.float16)), f"{_FC1}[^$]*float16"),
    "elsewhere": (_edit(lambda m: _place(m, relative_path="../x")), "outside itself"),
    "shifted": (_edit(lambda m: _place(m, offset=1)), r"distcp"),
    "longer": (_edit(lambda m: _place(m, length=1 << 40)), f"distcp, {_FC1}"),
    "negative": (_edit(lambda m: _place(m, offset=-1)), "out of range"),
    "compressed": (_edit(lambda m: _place(m, transform_descriptors=["zstd"])), "compressed"),
    "other-common": (lambda d: torch.save([1], d / "common.pt"), r"common\.pt"),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(_REFUSED))
def test_damage_is_named(damaged: Path, kind: str) -> None:
    damage, message = _REFUSED[kind]
    damage(damaged)
    with pytest.raises(CheckpointError, match=message) as caught:
        torch_dist.read(damaged)
    assert str(damaged) in (caught.value.where or "")


@pytest.mark.parametrize(
    ("tensors", "files", "message"),
    [
        ({}, [], "needs a file"),
        ({}, [[ChunkKey("a", Box((0,), (1,)))]], "unknown tensor"),
        ({"a": TensorPlan((2,), "float32")}, [[ChunkKey("a", Box((0,), (1,)))]], "1 of 2"),
        ({"a": TensorPlan((2,), "float32")}, [[ChunkKey("a", Box((0,), (3,)))]], "out of bounds"),
        ({"a": TensorPlan((1,), "float32")}, [[ChunkKey("a", Box((0,), (1,)))]] * 2, "overlap"),
        ({"a": TensorPlan((1,), "complex64")}, [[ChunkKey("a", Box((0,), (1,)))]], "element type"),
    ],
)
def test_plans_that_cannot_be(
    tensors: dict[str, TensorPlan], files: list[list[ChunkKey]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_checkpoint(tensors, files, {}, {})


def test_the_same_plan_twice_is_the_same(tmp_path: Path, planned: Path) -> None:
    _write(tmp_path)
    for path in planned.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@st.composite
def _boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor split at random, and often one box moved, dropped or repeated."""
    shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, 6))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, max(len(shape) - 1, 0)))
        if not shape or box.shape[dim] < 2:
            boxes.append(box)
            continue
        at = draw(st.integers(1, box.shape[dim] - 1))
        low, high, middle = list(box.shape), list(box.shape), list(box.offset)
        low[dim], high[dim], middle[dim] = at, box.shape[dim] - at, box.offset[dim] + at
        boxes += [Box(box.offset, tuple(low)), Box(tuple(middle), tuple(high))]
    change = draw(st.sampled_from(["none", "drop", "repeat", "move"]))
    chosen = draw(st.integers(0, len(boxes) - 1))
    if change == "drop":
        boxes.pop(chosen)
    elif change == "repeat":
        boxes.append(boxes[chosen])
    elif change == "move" and shape:
        by = tuple(draw(st.integers(-1, 1)) for _ in shape)
        boxes[chosen] = boxes[chosen].shifted(by)
    return shape, draw(st.permutations(boxes))


@given(_boxes())
def test_coverage_is_what_counting_says(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    counts = np.zeros(shape, dtype=int)
    inside = all(box.within(shape) for box in boxes)
    if inside:
        for box in boxes:
            counts[_slice(box)] += 1
    assert (verify_tiling(shape, boxes) is None) == (inside and bool((counts == 1).all()))


def test_coverage_of_many_chunks_is_quick() -> None:
    boxes = _grid((60, 64, 64), (1, 4, 8))
    random.Random(0).shuffle(boxes)
    assert len(boxes) == 7680
    assert verify_tiling((60, 64, 64), boxes) is None
    assert "overlap" in (verify_tiling((60, 64, 64), [*boxes, boxes[0]]) or "")


def test_random_damage(tmp_path: Path) -> None:
    """A small part of ``bench/fuzz.py``."""
    checkpoints = [path.parent for path in write_small_checkpoints(tmp_path / "sources")]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = 0
    for seed in range(150):
        rng = random.Random(seed)
        mutate(rng.choice(checkpoints), tmp_path / "mutated", rng)
        try:
            read_everything(tmp_path / "mutated")
        except CheckpointError:
            refused += 1
        shutil.rmtree(tmp_path / "mutated")
    assert 75 < refused < 150
    assert {path: path.read_bytes() for path in before} == before
