"""Safetensors: files as save_pretrained writes them, found again byte for byte, or refused."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.mutate import mutate
from harness.outputs import write_outputs
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save, save_file

from flagscale.ckpt_io.pickling import tensor_bytes
from flagscale.ckpt_io.safetensors_files import MAX_HEADER, SafetensorsCheckpoint, read
from flagscale.ckpt_io.safetensors_plan import (
    DTYPE_CODES,
    INDEX,
    METADATA,
    WEIGHTS,
    PlannedTensor,
    SafetensorsPlan,
    plan_files,
)
from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.pieces import DTYPE_BYTES

NAMES = st.text(min_size=1, max_size=8) | st.from_regex(r"\A[a-c]\.\d\.w\Z")
TABLES = st.dictionaries(
    NAMES.filter(lambda name: name != METADATA),
    st.tuples(
        st.sampled_from(sorted(DTYPE_CODES)),
        st.lists(st.integers(0, 4), max_size=3).map(tuple),
    ),
    min_size=1,
    max_size=8,
)


def make_tensor(dtype: str, shape: tuple[int, ...], rng: random.Random) -> torch.Tensor:
    numbers = [rng.randrange(2) for _ in range(torch.Size(shape).numel() * DTYPE_BYTES[dtype])]
    flat = torch.tensor(numbers, dtype=torch.uint8).view(getattr(torch, dtype))
    return flat.reshape(shape)


def planned(name: str, tensor: torch.Tensor, **more: Any) -> PlannedTensor:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return PlannedTensor(name, dtype, tuple(tensor.shape), **more)


def write(directory: Path, plan: SafetensorsPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    write_outputs(
        directory, plan.files, {place: tensors[name] for name, place in plan.holes.items()}
    )


def assert_found(found: SafetensorsCheckpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    assert found.tensors.keys() == tensors.keys()
    for name, stored in found.tensors.items():
        assert f"torch.{stored.dtype}" == str(tensors[name].dtype)
        assert stored.shape == tuple(tensors[name].shape)
        assert stored.dense
        with (found.directory / stored.file).open("rb") as stream:
            stream.seek(stored.offset)
            assert stream.read(stored.nbytes) == tensor_bytes(tensors[name])


def test_neither_reading_nor_planning_imports_torch() -> None:
    code = "import sys, flagscale.ckpt_io.safetensors_files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_type_we_know_has_a_code() -> None:
    assert DTYPE_CODES.keys() == DTYPE_BYTES.keys()


@settings(deadline=None)
@given(TABLES, st.integers(0))
def test_one_file_is_as_safetensors_writes_it(
    tmp_path_factory: pytest.TempPathFactory, table: dict[str, Any], seed: int
) -> None:
    rng = random.Random(seed)
    tensors = {name: make_tensor(*kind, rng) for name, kind in table.items()}
    plan = plan_files([planned(name, tensor) for name, tensor in tensors.items()])
    (file,) = plan.files
    theirs = save(tensors, {"format": "pt"})
    (length,) = struct.unpack("<Q", theirs[:8])
    assert file.literals == ((0, theirs[: 8 + length]),)
    assert (file.path, file.size) == (WEIGHTS, len(theirs))
    header = json.loads(theirs[8 : 8 + length])
    for name, (path, hole) in plan.holes.items():
        start, end = header[name]["data_offsets"]
        assert (path, hole.offset, hole.nbytes) == (WEIGHTS, 8 + length + start, end - start)
        assert hole in file.holes
    assert plan.total_size == sum(hole.nbytes for hole in file.holes)

    directory = tmp_path_factory.mktemp("model")
    write(directory, plan, tensors)
    assert (directory / WEIGHTS).read_bytes() == theirs
    found = read(directory)
    assert_found(found, tensors)
    assert found.metadata == {"format": "pt"}


BLOCKS = st.lists(st.tuples(st.sampled_from(["a", "b", None]), st.integers(0, 6)), min_size=1)


@settings(deadline=None)
@given(BLOCKS, st.integers(1, 80) | st.sampled_from(["0.02KB", "1 KB", "5GB"]))
@example([(None, 0), (None, 2), (None, 2), (None, 0)], 8)  # what is empty goes to what is empty
@example([("a", 1), (None, 1), ("b", 1), ("a", 2), ("b", 0)], 12)
def test_tensors_are_distributed_as_the_hub_does(
    table: list[tuple[str | None, int]], max_shard_size: int | str
) -> None:
    """Those of a block are made as views of one tensor; the hub's own code looks at the memory."""
    numel: dict[str | None, int] = {}
    for block, size in table:
        numel[block] = numel.get(block, 0) + size
    rest = {block: torch.zeros(size) for block, size in numel.items()}
    tensors: dict[str, torch.Tensor] = {}
    plans = []
    for at, (block, size) in enumerate(table):
        if block is None:
            tensors[f"{at}"] = torch.zeros(size)
        else:
            tensors[f"{at}"], rest[block] = rest[block][:size], rest[block][size:]
        plans.append(planned(f"{at}", tensors[f"{at}"], block=block))
    theirs = split_torch_state_dict_into_shards(
        tensors,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    ours = plan_files(plans, max_shard_size)
    assert {name: path for name, (path, _) in ours.holes.items()} == theirs.tensor_to_filename
    assert ours.total_size == theirs.metadata["total_size"]
    assert [file.path for file in ours.files] == [
        *theirs.filename_to_tensors,
        *([INDEX] if theirs.is_sharded else []),
    ]


SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "head_dim": 4,
}
LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_tied": ("Llama", {"tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 3}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "deepseek_v3": ("DeepseekV3", LATENT),
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    import transformers

    family, more = MODELS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    return getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)


def saved_state_dict(model: Any) -> dict[str, torch.Tensor]:
    """What save_pretrained saves, in its order."""
    from transformers.core_model_loading import revert_weight_conversion

    state_dict = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state_dict["lm_head.weight"]
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state_dict)
    return reverted


def plan_model(model: Any, max_shard_size: int | str) -> SafetensorsPlan:
    tensors = []
    for name, tensor in saved_state_dict(model).items():
        block, experts = re.subn(r"\.experts\.\d+\.", ".experts.*.", name)
        buffer = name.endswith("e_score_correction_bias")
        tensors.append(
            planned(name, tensor, block=block if experts else None, parameter=not buffer)
        )
    return plan_files(tensors, max_shard_size)


@pytest.mark.parametrize(
    ("max_shard_size", "files"),
    [("5GB", 1), (9000, None), (3000, None), ("1.5KB", None), (1, None)],
)
def test_a_model_is_as_save_pretrained_writes_it(
    tmp_path: Path, model: Any, max_shard_size: int | str, files: int | None
) -> None:
    model.save_pretrained(tmp_path / "theirs", max_shard_size=max_shard_size)
    plan = plan_model(model, max_shard_size)
    tensors = saved_state_dict(model)
    write(tmp_path / "ours", plan, tensors)
    theirs = {
        path.name: path.read_bytes()
        for path in (tmp_path / "theirs").iterdir()
        if "safetensors" in path.name
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == theirs
    assert len(theirs) == files if files else len(theirs) > 2
    assert_found(read(tmp_path / "theirs"), tensors)


def test_two_files_are_as_save_pretrained_writes_them(tmp_path: Path, model: Any) -> None:
    size = plan_model(model, "5GB").total_size * 3 // 4
    plan = plan_model(model, size)
    assert [file.path for file in plan.files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        INDEX,
    ]
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    write(tmp_path / "ours", plan, saved_state_dict(model))
    for file in plan.files:
        ours, theirs = (tmp_path / side / file.path for side in ("ours", "theirs"))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("tensors", "where"),
    [
        ([], WEIGHTS),
        ([PlannedTensor("a", "float32", ()), PlannedTensor("a", "float32", ())], "'a'"),
        ([PlannedTensor(METADATA, "float32", ())], METADATA),
        ([PlannedTensor("\ud800", "float32", ())], "ud800"),
        ([PlannedTensor("a", "complex64", ())], "'a'"),
        ([PlannedTensor("a", "float32", (2, -1))], "'a'"),
    ],
)
def test_what_cannot_be_written_is_refused(tensors: list[PlannedTensor], where: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan_files(tensors)
    assert where in str(error.value.where)


@pytest.mark.parametrize("size", [0, -1, "5", "5GiB", "-5GB", "nanGB", "infGB", "0GB", "", "GB"])
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with pytest.raises(ConfigError, match="no size"):
        plan_files([PlannedTensor("a", "float32", ())], size)


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def raw_file(header: object, data: bytes = bytes(8)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


BROKEN_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "no length": (b"1234567", "too short"),
    "no header": (struct.pack("<Q", 1), "too long, or cut off"),
    "longer than the file": (struct.pack("<Q", 1 << 63) + b"{}", "too long, or cut off"),
    "a pickle": (b"PK\x03\x04" + bytes(100), "too long, or cut off"),
    "not JSON": (raw_file(b"{'a': 1}"), "cannot be read"),
    "an empty header": (raw_file(b"", b""), "cannot be read"),
    "not UTF-8": (raw_file(b'{"\xff": 1}'), "cannot be read"),
    "UTF-16": (raw_file(json.dumps({"a": entry()}).encode("utf-16")), "cannot be read"),
    "half a surrogate pair": (raw_file({"\ud800": entry()}), "cannot be read"),
    "deep": (raw_file(b"[" * 100_000), "cannot be read"),
    "a number of many digits": (raw_file(b"1" * 10_000), "cannot be read"),
    "no object": (raw_file([]), "cannot be read"),
    "a name twice": (
        raw_file(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "a": {}}'),
        "cannot be read",
    ),
    "metadata that are none": (raw_file({METADATA: 1, "a": entry()}), "what is not text"),
    "metadata that are no text": (raw_file({METADATA: {"x": 1}, "a": entry()}), "what is not text"),
    "no entry": (raw_file({"a": 1}), "describes no tensor"),
    "a deep entry": (raw_file(b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"), "describes no tensor"),
    "too little said": (raw_file({"a": {"dtype": "F32"}}), "describes no tensor"),
    "too much said": (raw_file({"a": {**entry(), "strides": [4]}}), "describes no tensor"),
    "an unknown type": (raw_file({"a": entry("C64")}), "type that is not known"),
    "a type in no ASCII": (raw_file({"a": entry("F\u00e9")}), "type that is not known"),
    "a type that is no name": (raw_file({"a": entry(["F32"])}), "type that is not known"),
    "a shape that is none": (raw_file({"a": entry(shape=2)}), "no shape"),
    "a negative size": (raw_file({"a": entry(shape=[-1, -2])}), "no shape"),
    "a size that is true": (raw_file({"a": entry(shape=[2, True])}), "no shape"),
    "a size with a point": (raw_file({"a": entry(shape=[2.0])}), "no shape"),
    "a huge size": (raw_file({"a": entry(shape=[1 << 62, 0], offsets=[0, 0])}, b""), "no shape"),
    "too many dimensions": (raw_file({"a": entry(shape=[1] * 65 + [2])}), "no shape"),
    "offsets that are none": (raw_file({"a": entry(offsets=8)}), "does not fit its place"),
    "three offsets": (raw_file({"a": entry(offsets=[0, 8, 8])}), "does not fit its place"),
    "offsets with a point": (raw_file({"a": entry(offsets=[0.0, 8.0])}), "does not fit its place"),
    "a negative offset": (raw_file({"a": entry(offsets=[-8, 0])}), "does not fit its place"),
    "turned round": (raw_file({"a": entry(offsets=[8, 0])}), "does not fit its place"),
    "too few bytes": (raw_file({"a": entry(offsets=[0, 4])}), "does not fit its place"),
    "too many bytes": (raw_file({"a": entry(offsets=[0, 16])}, bytes(16)), "does not fit"),
    "a gap in front": (raw_file({"a": entry(offsets=[8, 16])}, bytes(16)), "gap before"),
    "an overlap": (raw_file({"b": entry(), "a": entry(offsets=[4, 12])}, bytes(12)), "overlap"),
    "a tensor twice": (raw_file({"b": entry(), "a": entry()}), "overlap"),
    "a gap": (raw_file({"b": entry(), "a": entry(offsets=[9, 17])}, bytes(17)), "gap before"),
    "cut off": (raw_file({"a": entry()}, bytes(7)), "beyond the end"),
    "too long": (raw_file({"a": entry()}, bytes(9)), "goes on behind"),
}


@pytest.mark.parametrize("name", BROKEN_FILES)
def test_a_broken_file_is_refused(tmp_path: Path, name: str) -> None:
    content, what = BROKEN_FILES[name]
    (tmp_path / WEIGHTS).write_bytes(content)
    with pytest.raises(CheckpointError, match=what) as error:
        read(tmp_path)
    assert str(tmp_path / WEIGHTS) in str(error.value.where)
    if what not in ("too short", "too long, or cut off", "cannot be read", "goes on behind"):
        assert re.search(f"'a'|{METADATA}", str(error.value.where))
    assert str(error.value).isascii()


def test_a_header_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / WEIGHTS).open("wb") as stream:
        stream.write(struct.pack("<Q", MAX_HEADER + 1))
        stream.truncate(1 << 33)  # sparse
    with pytest.raises(CheckpointError, match="too long"):
        read(tmp_path)


def write_shards(directory: Path) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for shard in "xy":
        tensors = {f"{shard}{n}": torch.full((n, 2), n, dtype=torch.int16) for n in range(3)}
        save_file(tensors, directory / f"{shard}.safetensors", {"format": "pt", "shard": shard})
        index["weight_map"] |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (directory / INDEX).write_text(json.dumps(index))
    return index


def test_shards_are_found_and_what_they_agree_on(tmp_path: Path) -> None:
    write_shards(tmp_path)
    found = read(tmp_path)
    assert list(found.tensors) == ["x0", "x1", "x2", "y0", "y1", "y2"]
    assert found.metadata == {"format": "pt"}
    assert found.tensors["y2"].file == "y.safetensors"
    assert found.tensors["y2"].strides == (4, 2)


def test_a_single_file_goes_before_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path)
    save_file({"single": torch.ones(2)}, tmp_path / WEIGHTS)
    assert list(read(tmp_path).tensors) == ["single"]


def _rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        index = json.loads((directory / INDEX).read_text())
        change(index)
        (directory / INDEX).write_text(json.dumps(index))

    return damage


def _two_copies(directory: Path) -> None:
    tensors = {f"y{n}": torch.ones(n) for n in range(3)}
    save_file({**tensors, "x0": torch.ones(2)}, directory / "y.safetensors")


def _map_to(file: object) -> Callable[[Path], None]:
    return _rewritten(lambda index: index["weight_map"].update(x1=file))


BROKEN_INDICES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "not JSON": (lambda d: (d / INDEX).write_text("{"), "cannot be read", INDEX),
    "no object": (lambda d: (d / INDEX).write_text("[]"), "cannot be read", INDEX),
    "no map": (_rewritten(lambda i: i.pop("weight_map")), "names no tensors", INDEX),
    "a map that is none": (_rewritten(lambda i: i.update(weight_map=[])), "names no", INDEX),
    "an empty map": (_rewritten(lambda i: i["weight_map"].clear()), "names no tensors", INDEX),
    "no file": (_map_to(None), "no safetensors file", f"{INDEX}: 'x1'"),
    "a pickle": (_map_to("pytorch_model.bin"), "no safetensors file", f"{INDEX}: 'x1'"),
    "above": (_map_to("../x.safetensors"), "outside itself", ""),
    "absolute": (_map_to("/x.safetensors"), "outside itself", ""),
    "nul": (_map_to("x\0.safetensors"), "outside itself", ""),
    "half a surrogate pair": (_map_to("\ud800.safetensors"), "cannot be read", INDEX),
    "another file": (_map_to("y.safetensors"), "not in the file", "y.safetensors: 'x1'"),
    "another spelling": (_map_to("./x.safetensors"), "not look for", "x.safetensors: 'x"),
    "a missing file": (lambda d: (d / "y.safetensors").unlink(), "missing", "y.safetensors"),
    "a missing tensor": (
        _rewritten(lambda i: i["weight_map"].update(z="x.safetensors")),
        "not in the file",
        "x.safetensors: 'z'",
    ),
    "an unnamed tensor": (
        _rewritten(lambda i: i["weight_map"].pop("x1")),
        "not look for",
        "x.safetensors: 'x1'",
    ),
    "a tensor in two files": (_two_copies, "not look for", "y.safetensors: 'x0'"),
}


@pytest.mark.parametrize("name", BROKEN_INDICES)
def test_a_broken_index_is_refused(tmp_path: Path, name: str) -> None:
    damage, what, where = BROKEN_INDICES[name]
    write_shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=what) as error:
        read(tmp_path)
    assert where in str(error.value.where)


def test_an_index_above_the_limit_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as stream:
        stream.truncate(MAX_HEADER + 1)
    with pytest.raises(CheckpointError, match="too large"):
        read(tmp_path)


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "x.pth"]
)
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="can run code") as error:
        read(tmp_path)
    assert name in str(error.value.where)
    assert "safe_serialization=True" in str(error.value.cure)
    save_file({"a": torch.ones(2)}, tmp_path / WEIGHTS)  # then they do not matter
    assert list(read(tmp_path).tensors) == ["a"]


@pytest.mark.parametrize("there", ["nothing", "a file", "an empty directory", "a configuration"])
def test_no_weights(tmp_path: Path, there: str) -> None:
    directory = tmp_path / "model"
    if there == "a file":
        directory.write_text("")
    elif there != "nothing":
        directory.mkdir()
    if there == "a configuration":
        (directory / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no weights|no directory") as error:
        read(directory)
    assert there != "a configuration" or "config.json" in str(error.value.got)


VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3, 8, 1 << 31, 1 << 62, 1 << 64, 10**400, 1.0, 1e400, "", "F64", "F4",
    "\ud800", [], [[]], [0], [1 << 40, 1 << 40], {}, {"a": 1}, entry(),
)  # fmt: skip


def edit_json(tree: Any, rng: random.Random) -> None:
    """Change, remove or add one value, at any depth."""
    while True:
        keys: list[Any] = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
        key = rng.choice(keys)
        if not isinstance(tree[key], (dict, list)) or not tree[key] or rng.random() < 0.2:
            break
        tree = tree[key]
    kind = rng.choice(("set", "set", "nudge", "remove", "copy"))
    if kind == "remove":
        del tree[key]
    elif kind == "copy" and isinstance(tree, dict):
        tree[rng.choice(("", "x1", METADATA, "é\n"))] = tree[key]
    elif kind == "nudge" and isinstance(tree[key], int):
        tree[key] += rng.choice((-4, -1, 1, 2, 4))
    else:
        tree[key] = rng.choice(VALUES)


def edit_header(directory: Path, rng: random.Random) -> str:
    """Damage a header, or the index, and leave all around it intact."""
    path = rng.choice(sorted(directory.glob("*safetensors*")))
    content = path.read_bytes()
    if path.name == INDEX:
        tree = json.loads(content)
        edit_json(tree, rng)
        path.write_text(json.dumps(tree))
        return str(tree)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.7:
        tree = json.loads(header)
        edit_json(tree, rng)
        path.write_bytes(raw_file(tree, data))
        return str(tree)
    at, more = rng.randrange(length), rng.choice((b"", b"{", b"]", b'"', b"9", b",", b"\xff"))
    header = header[:at] + more + header[at + rng.choice((0, 1)) :]
    path.write_bytes(raw_file(header, data))
    return ascii(header)


def test_of_mutations_nothing_worse_than_an_error_comes(tmp_path: Path) -> None:
    """And what is still read, safetensors reads, too, as the same."""
    rng = random.Random(5)
    sources = tmp_path / "sharded", tmp_path / "single"
    write_shards(sources[0])
    sources[1].mkdir()
    single = {"x1": torch.ones(2, dtype=torch.int8), "b": torch.ones(()), "c": torch.ones(0, 3)}
    save_file(single, sources[1] / WEIGHTS, {"format": "pt"})
    (sources[1] / "config.json").write_text("{}")
    refused = 0
    for number in range(2000):
        damaged = tmp_path / f"{number}"
        if number % 4 == 0:
            done = mutate(rng.choice(sources), damaged, rng)
        else:
            damaged.mkdir()
            for path in rng.choice(sources).iterdir():
                (damaged / path.name).write_bytes(path.read_bytes())
            done = edit_header(damaged, rng)
        try:
            found = read(damaged)
        except CheckpointError as error:
            refused += len(str(error)) > 0
            continue
        except Exception as error:
            raise AssertionError(f"{number}: {done}") from error
        for file in {stored.file for stored in found.tensors.values()}:
            with safe_open(damaged / file, "pt") as theirs:
                ours = {name: one for name, one in found.tensors.items() if one.file == file}
                assert set(theirs.keys()) == set(ours)
                for name, stored in ours.items():
                    tensor = theirs.get_tensor(name)
                    assert_stored(damaged, stored, tensor)
    assert 1000 < refused < 2000


def assert_stored(directory: Path, stored: Any, tensor: torch.Tensor) -> None:
    assert (f"torch.{stored.dtype}", stored.shape) == (str(tensor.dtype), tuple(tensor.shape))
    with (directory / stored.file).open("rb") as stream:
        assert os.pread(stream.fileno(), stored.nbytes, stored.offset) == tensor_bytes(tensor)
