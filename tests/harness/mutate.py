"""Small checkpoints, and damage done to them: what a reader must meet with an error of our own."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from flagscale.ckpt_io import legacy, location, torch_dist
from flagscale.ckpt_io.torch_dist_plan import ChunkKey, TensorPlan, plan_checkpoint
from flagscale.ckpt_io.values import Foreign
from flagscale.layout.boxes import Box
from harness.outputs import write_outputs

__all__ = ["mutate", "read_everything", "write_small_checkpoints"]


def write_small_checkpoints(directory: Path) -> tuple[Path, ...]:
    """One checkpoint of each kind, a few kilobytes each; their iterations' directories."""
    kinds = {
        "torch_dist": _write_torch_dist,
        "common_pt": _write_with_common_file,
        "torch": _write_legacy,
    }
    iterations = []
    for name, write in kinds.items():
        iteration = directory / name / "iter_0000002"
        iteration.mkdir(parents=True)
        write(iteration)
        (directory / name / location.TRACKER).write_text("2")
        iterations.append(iteration)
    return tuple(iterations)


def _args(**sizes: int) -> Namespace:
    backend = Foreign("megatron.core.transformer.enums", "AttnBackend", (5,))
    return Namespace(
        hidden_size=8, lr=1e-3, data_path=["a"], params_dtype=torch.bfloat16,
        attention_backend=backend, **sizes,
    )  # fmt: skip


def _rng_state() -> list[dict[str, Any]]:
    return [
        {
            "np_rng_state": ("MT19937", np.arange(5, dtype=np.uint32), 3, 0, 0.0),
            "torch_rng_state": torch.arange(9, dtype=torch.uint8),
        }
    ]


def _write_torch_dist(directory: Path) -> None:
    tensors = {
        "a.weight": TensorPlan((4, 6), "bfloat16"),
        "optimizer.b": TensorPlan((7,), "float32"),
    }
    first = [ChunkKey("a.weight", Box((0, 0), (2, 6))), ChunkKey("optimizer.b", Box((5,), (2,)))]
    second = [ChunkKey("a.weight", Box((2, 0), (2, 6))), ChunkKey("optimizer.b", Box((0,), (5,)))]
    planned = plan_checkpoint(
        tensors,
        [first, second],
        {"rng_state/shard_0.0_1.1": _rng_state(), "x._extra_state/shard_0_1": None},
        {"args": _args(), "iteration": 2, "content_metadata": {"a": "b"}},
    )
    contents = {
        place: torch.ones(member.box.shape, dtype=getattr(torch, tensors[member.key].dtype))
        for member, place in planned.chunks.items()
    }
    write_outputs(directory, planned.files, contents)


def _write_with_common_file(directory: Path) -> None:
    _write_torch_dist(directory)
    torch.save({"args": Namespace(hidden_size=8), "iteration": 2}, directory / "common.pt")


def _write_legacy(directory: Path) -> None:
    for stage in range(2):
        rank = directory / legacy.rank_directory(
            legacy.RankKey(0, stage, 0), pipeline=True, experts=False
        )
        rank.mkdir()
        args = Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=2)
        model = OrderedDict({"decoder.weight": torch.ones(3, 4), "x._extra_state": None})
        model["view"] = torch.arange(24.0).reshape(4, 6)[1:3, ::2]
        state = {"args": args, "iteration": 2, "model": model, "rng_state": _rng_state()}
        torch.save(state, rank / "model_optim_rng.pt")
        flat = {name: torch.arange(8.0) for name in ("param", "exp_avg", "exp_avg_sq")}
        buffers = {(torch.bfloat16, torch.float32): {**flat, "numel_unpadded": 8}}
        torch.save({"buckets_coalesced": True, 0: buffers}, rank / "distrib_optim.pt")


def read_everything(load_dir: Path) -> None:
    """Open a checkpoint and every tree in it."""
    _, directory = location.find_iteration(load_dir)
    kind = location.detect_format(directory)
    if kind == "torch":
        legacy.read(directory)
        return
    for entry in torch_dist.read(directory).objects.values():
        entry.load()


def mutate(source: Path, target: Path, rng: random.Random) -> str:
    """Make a damaged copy of a small checkpoint.

    Args:
        source: Directory that holds the tracker file and one iteration.
        target: Where the copy goes; it must not exist.
        rng: Decides what is damaged.

    Returns:
        What was done.
    """
    shutil.copytree(source, target, copy_function=os.link)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    victim = rng.choice(files)
    damage = rng.choice(_DAMAGE)
    content = victim.read_bytes()
    victim.unlink()  # and not written to: it is a link to the original
    described = damage(victim, content, rng, files)
    return f"{victim.relative_to(target)}: {damage.__name__} {described}"


Damage = Callable[[Path, bytes, random.Random, list[Path]], object]


def _flip(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    changed = bytearray(content)
    places = [rng.randrange(len(changed)) for _ in range(rng.choice((1, 1, 1, 2, 8)))]
    for at in places:
        changed[at] ^= 1 << rng.randrange(8)
    victim.write_bytes(changed)
    return places


def _overwrite(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    at, count = rng.randrange(len(content)), rng.choice((1, 2, 4, 8, 64))
    fill = rng.choice((b"\0" * count, b"\xff" * count, rng.randbytes(count)))
    victim.write_bytes((content[:at] + fill + content[at + count :])[: len(content)])
    return at, count


def _truncate(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    length = rng.choice((0, len(content) - 1, rng.randrange(len(content))))
    victim.write_bytes(content[:length])
    return length


def _insert(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    at, count = rng.choice((0, len(content), rng.randrange(len(content)))), rng.choice((1, 8, 100))
    victim.write_bytes(content[:at] + rng.randbytes(count) + content[at:])
    return at, count


def _delete(victim: Path, content: bytes, rng: random.Random, _: list[Path]) -> object:
    at, count = rng.randrange(len(content)), rng.choice((1, 8, 100))
    victim.write_bytes(content[:at] + content[at + count :])
    return at, count


def _remove(victim: Path, content: bytes, rng: random.Random, files: list[Path]) -> object:
    """The file is gone, or something else is in its place."""
    kind = rng.choice(("nothing", "directory", "another file", "pipe", "link to itself"))
    if kind == "directory":
        victim.mkdir()
    elif kind == "another file":
        victim.write_bytes(rng.choice([path for path in files if path != victim]).read_bytes())
    elif kind == "pipe":
        os.mkfifo(victim)
    elif kind == "link to itself":
        victim.symlink_to(victim.name)
    return kind


_SNIPPETS = (
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"cbuiltins\ngetattr\n", b"R", b"b", b"\x81", b"\x85",
    b"(", b"t", b"l", b"d", b"i", b"o", b"\x82\x01", b"\x83\x01\x01", b"0", b"1", b"2", b"h\x00",
    b"h\x01", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"X\xff\xff\xff\xff",
    b"\x8d" + b"\xff" * 8, b"\x95" + b"\xff" * 8, b"\x8a\xff", b"\x8b\xff\xff\xff\x7f",
    b"]", b"}", b")", b"a", b"e", b"s", b"u", b"\x90", b"\x91", b"N", b"Q",
    b"P1\n", b"S'x'\n", b"I1\n", b"L1L\n", b"F1\n", b".",
    b"\x80\x05", b"\x94", b"\x93", b"ctorch\nload\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nSize\n", b"c_codecs\nencode\n", b"cargparse\nNamespace\n", b"cnumpy\ndtype\n",
    b"X\x08\x00\x00\x00__class__", b"\x8f", b"K\xff", b"M\xff\xff", b"J\xff\xff\xff\xff",
)  # fmt: skip


def _splice(pickled: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, snippet = rng.randrange(len(pickled)), rng.choice(_SNIPPETS)
        over = rng.choice((0, 0, 1, len(snippet)))
        pickled = pickled[:at] + snippet + pickled[at + over :]
    return pickled


def _edit_pickle(victim: Path, content: bytes, rng: random.Random, files: list[Path]) -> object:
    """Damage the pickle in a file and leave everything around it intact, checksums too."""
    if victim.name == ".metadata":
        victim.write_bytes(_splice(content, rng))
        return "spliced"
    if victim.suffix != ".pt":
        return _flip(victim, content, rng, files)
    rewritten = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(rewritten, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, _splice(data, rng) if name.endswith("data.pkl") else data)
    victim.write_bytes(rewritten.getvalue())
    return "spliced"


def _edit_metadata(victim: Path, content: bytes, rng: random.Random, files: list[Path]) -> object:
    """Change one number or name of the metadata, with torch's own classes."""
    if victim.name == ".metadata":
        metadata = pickle.loads(content)
        edit = rng.choice(_METADATA_EDITS)
        edit(metadata, rng)
        victim.write_bytes(pickle.dumps(metadata))
        return edit.__name__
    if victim.suffix in (".json", ".txt"):
        values = (None, [], {}, 3, "zarr", "../x", "9" * 5000, "[" * 100000, "release", "-1", "1e3")
        value = rng.choice(values)
        victim.write_text(value if isinstance(value, str) else json.dumps(value))
        return ascii(value)[:40]
    if victim.suffix == ".pt":
        tree = torch.load(io.BytesIO(content), weights_only=False)  # noqa: TID251  (our own)
        path = _edit_tree(tree, rng)
        torch.save(tree, victim)
        return path
    return _overwrite(victim, content, rng, files)


def _edit_tree(tree: Any, rng: random.Random) -> str:
    """Put something else in the place of one value of a tree, at any depth."""
    node, path = tree, ""
    while True:
        holder = vars(node) if isinstance(node, Namespace) else node
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = rng.choice(keys)
        path += f"/{key}"
        inner = vars(holder[key]) if isinstance(holder[key], Namespace) else holder[key]
        if not isinstance(inner, (dict, list)) or not inner or rng.random() < 0.3:
            break
        node = holder[key]
    values = (None, 3, -1, "x", [], [1], {}, {"a": 1}, (1,), torch.ones(2, 2), 1.5, 1 << 80)
    if isinstance(holder, dict) and rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(values)
    return path


_NUMBERS = (-1, 0, 1, 3, 7, 1 << 31, 1 << 62, 1 << 64, 1.5, "x", None)


def _edit_tensor(metadata: Metadata, rng: random.Random) -> None:
    keys = [k for k, v in metadata.state_dict_metadata.items() if hasattr(v, "chunks")]
    entry = metadata.state_dict_metadata[rng.choice(keys)]
    assert isinstance(entry, TensorStorageMetadata)
    number: Any = rng.choice(_NUMBERS)
    chunk = rng.choice(entry.chunks)
    kind = rng.choice(("size", "offsets", "sizes", "dtype", "drop", "repeat"))
    if kind == "size":
        entry.size = (number, *entry.size[1:])  # type: ignore[assignment]
    elif kind == "dtype":
        entry.properties.dtype = rng.choice((torch.float64, torch.complex64, torch.int8, number))
    elif kind == "drop":
        entry.chunks.remove(chunk)
    elif kind == "repeat":
        entry.chunks.append(chunk)
    else:
        setattr(chunk, kind, (number, *getattr(chunk, kind)[1:]))


def _edit_place(metadata: Metadata, rng: random.Random) -> None:
    index = rng.choice(list(metadata.storage_data))
    kind = rng.choice(("offset", "length", "relative_path", "transform_descriptors", "drop"))
    if kind == "drop":
        del metadata.storage_data[index]
        return
    paths = ("../x", "/etc/passwd", "", ".", "a\0b", "x" * 5000, "\u20ac", "common.pt", 7)
    value: Any = rng.choice(paths) if kind == "relative_path" else rng.choice(_NUMBERS)
    setattr(metadata.storage_data[index], kind, value)


def _edit_whole(metadata: Metadata, rng: random.Random) -> None:
    field = rng.choice(("state_dict_metadata", "storage_data", "mcore_data", "planner_data"))
    setattr(metadata, field, rng.choice((None, {}, [], 7, {3: 4}, {"a": None})))


_METADATA_EDITS = (_edit_tensor, _edit_place, _edit_whole)
_DAMAGE: tuple[Damage, ...] = (
    _flip, _flip, _overwrite, _truncate, _insert, _delete, _remove, _edit_pickle, _edit_pickle,
    _edit_metadata, _edit_metadata,
)  # fmt: skip
