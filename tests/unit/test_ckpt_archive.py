from __future__ import annotations

import io
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from harness.outputs import write_outputs
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.ckpt_io.archive import open_archive, read_tensor, read_tree
from flagscale.ckpt_io.archive_plan import plan_archive, plan_file
from flagscale.ckpt_io.checksum import combine_crc32
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.sources import Sources
from flagscale.ckpt_io.values import StoredTensor, TensorSlot
from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.pieces import DTYPE_BYTES

_DTYPES = st.sampled_from(sorted(DTYPE_BYTES))


@st.composite
def _tensors(draw: st.DrawFn) -> torch.Tensor:
    """Dense tensors, and views with strides and offsets of their own."""
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    dtype = draw(_DTYPES)
    numel = torch.Size(shape).numel()
    raw = draw(st.binary(min_size=numel * DTYPE_BYTES[dtype], max_size=numel * DTYPE_BYTES[dtype]))
    if dtype == "bool":
        raw = bytes(byte & 1 for byte in raw)
    tensor = (
        torch.frombuffer(bytearray(raw), dtype=getattr(torch, dtype))
        if numel
        else torch.empty(0, dtype=getattr(torch, dtype))
    ).reshape(shape)
    kind = draw(st.sampled_from(["dense", "transposed", "sliced"]))
    if kind == "transposed" and shape:
        return tensor.transpose(0, -1)
    return tensor[1:, ...][::2] if kind == "sliced" and shape and shape[0] else tensor


def _trees(leaves: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner),
        max_leaves=8,
    )


def _bits(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.clone(memory_format=torch.contiguous_format).untyped_storage())


def _equal(got: Any, want: Any) -> bool:
    if isinstance(want, torch.Tensor):
        same = (got.shape, got.dtype) == (want.shape, want.dtype)
        return same and _bits(got) == _bits(want)
    if isinstance(want, dict):
        return list(got) == list(want) and all(_equal(got[key], want[key]) for key in want)
    if isinstance(want, list | tuple):
        return len(got) == len(want) and all(map(_equal, got, want))
    return bool(got == want)


def _torch_load(file: Any, *, mmap: bool = False) -> Any:
    return torch.load(file, weights_only=True, mmap=mmap)  # noqa: TID251


def _loaded(sources: Sources, tree: Any) -> Any:
    if isinstance(tree, StoredTensor):
        return read_tensor(sources, tree)
    if isinstance(tree, dict):
        return {key: _loaded(sources, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_loaded(sources, value) for value in tree)
    return tree


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(deadline=None)
@given(_trees(_tensors()), st.binary(max_size=50), st.binary(max_size=50))
def test_reads_what_torch_saves_anywhere_in_a_file(tree: Any, before: bytes, after: bytes) -> None:
    saved = io.BytesIO()
    torch.save(tree, saved)
    with _directory() as directory:
        (directory / "a").write_bytes(before + saved.getvalue() + after)
        with Sources(directory) as sources:
            read = read_tree(sources, "a", len(before), len(saved.getvalue()))
            assert _equal(_loaded(sources, read), tree)


def _without_id(archive: bytes) -> bytes:
    """An archive, its serialization id and the id's checksums blanked out."""
    at = archive.index(b".data/serialization_id")
    start = archive.index(b"PK\7\x08", at) - 40
    central = archive.rindex(b".data/serialization_id")
    header = archive.rindex(b"PK\1\2", 0, central)
    blank = bytearray(archive)
    blank[start : start + 40] = bytes(40)
    blank[start + 44 : start + 48] = bytes(4)
    blank[header + 16 : header + 20] = bytes(4)
    return bytes(blank)


def _slots(tree: Any, contents: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, torch.Tensor):
        key = f"tensor {len(contents)}"
        contents[key] = tree
        return TensorSlot(str(tree.dtype).removeprefix("torch."), tuple(tree.shape), key)
    if isinstance(tree, dict):
        return {key: _slots(value, contents) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_slots(value, contents) for value in tree)
    return tree


@settings(deadline=None)
@given(_trees(_tensors().map(lambda view: view.clone(memory_format=torch.contiguous_format))))
def test_planned_is_byte_for_byte_what_torch_saves(tree: Any) -> None:
    with _directory() as directory:
        torch.save(tree, directory / "model.pt")
        contents: dict[str, torch.Tensor] = {}
        planned = plan_file("sub/model.pt", _slots(tree, contents))
        holes = {(planned.output.path, hole): contents[k] for k, hole in planned.holes.items()}
        write_outputs(directory, [planned.output], holes)
        ours = directory / "sub" / "model.pt"
        want = (directory / "model.pt").read_bytes()
        assert _without_id(ours.read_bytes()) == _without_id(want)
        for mmap in (False, True):
            assert _equal(_torch_load(ours, mmap=mmap), tree)
        with zipfile.ZipFile(ours) as archive:
            assert archive.testzip() is None
        with Sources(directory) as sources:
            assert _equal(_loaded(sources, read_tree(sources, "sub/model.pt")), tree)
        for hole in planned.holes.values():
            assert hole.offset % 64 == 0
            assert len(hole.crc_offsets) == 2


def test_small_tensors_may_be_part_of_the_plan() -> None:
    state = {"rng": torch.arange(9, dtype=torch.uint8), "view": torch.arange(12.0).view(3, 4).T}
    planned = plan_archive(state)
    assert planned.holes == {}
    content = bytearray(planned.size)
    for at, data in planned.literals:
        content[at : at + len(data)] = data
    assert _equal(_torch_load(io.BytesIO(content)), state)


def test_larger_than_four_gigabytes(tmp_path: Path) -> None:
    """On a sparse file; also what comes after 4 GiB is found, by torch, by zipfile and by us."""
    numel = (1 << 32) + 100
    tree = {
        "large": TensorSlot("uint8", (numel,), "large"),
        "small": TensorSlot("int32", (3,), "small"),
        "literal": torch.ones(3),
    }
    planned = plan_file("large.pt", tree)
    path = tmp_path / "large.pt"
    small = struct.pack("<3i", 1, 2, 3)
    zeros = 0  # the checksum of that many zeros, by doubling
    for bit in reversed(range(numel.bit_length())):
        zeros = combine_crc32(zeros, zeros, numel >> (bit + 1))
        if numel >> bit & 1:
            zeros = combine_crc32(zeros, crc32(b"\0"), 1)
    with path.open("wb") as stream:
        stream.truncate(planned.output.size)
        for at, data in planned.output.literals:
            stream.seek(at)
            stream.write(data)
        stream.seek(planned.holes["small"].offset)
        stream.write(small)
        for key, crc in (("small", crc32(small)), ("large", zeros)):
            for at in planned.holes[key].crc_offsets:
                stream.seek(at)
                stream.write(struct.pack("<I", crc))
    loaded = _torch_load(path, mmap=True)
    assert loaded["large"].shape == (numel,)
    assert loaded["large"][[0, -1]].tolist() == [0, 0]
    assert loaded["small"].tolist() == [1, 2, 3]
    assert loaded["literal"].tolist() == [1, 1, 1]
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("large/data/0").file_size == numel
        assert archive.read("large/data/1") == small
        assert zeros == archive.getinfo("large/data/0").CRC
    with Sources(tmp_path) as sources:
        read = read_tree(sources, "large.pt")
        assert read["large"].nbytes == numel
        assert read["small"].offset > 1 << 32
        assert read_tensor(sources, read["small"]).tolist() == [1, 2, 3]


@given(st.binary(), st.binary())
def test_checksums_combine(first: bytes, second: bytes) -> None:
    assert combine_crc32(crc32(first), crc32(second), len(second)) == crc32(first + second)


def test_two_slots_of_one_key() -> None:
    slots = [TensorSlot("float32", (2,), "a"), TensorSlot("float32", (3,), "a")]
    with pytest.raises(ConfigError, match="same key"):
        plan_archive(slots)


def test_a_tensor_of_the_source_is_not_written() -> None:
    with pytest.raises(ConfigError, match="TensorSlot"):
        plan_archive([StoredTensor("a", 0, "float32", (2,), (4,))])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "a.pt"
    torch.save({"a": torch.arange(4.0), "b": [1]}, path)
    return path


def _read(path: Path) -> Any:
    with Sources(path.parent) as sources:
        return read_tree(sources, path.name)


def test_cut_short_anywhere(saved: Path) -> None:
    content = saved.read_bytes()
    for length in range(len(content)):
        saved.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"a\.pt"):
            _read(saved)


def test_a_flipped_bit_of_the_pickle(saved: Path) -> None:
    content = saved.read_bytes()
    at = content.index(b"ctorch._utils")
    for offset in range(40):
        changed = bytearray(content)
        changed[at + offset] ^= 4
        saved.write_bytes(changed)
        with pytest.raises(CheckpointError, match="checksum"):
            _read(saved)


def test_checksums_that_were_not_computed(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save([1], tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert _read(tmp_path / "a.pt") == [1]


def test_torch_before_1_6(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"before 1\.6") as caught:
        _read(tmp_path / "a.pt")
    assert "begins as a pickle" in str(caught.value)


def _rezipped(path: Path, compression: int, change: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()} | change
    with zipfile.ZipFile(path, "w", compression) as new:
        for name, data in records.items():
            new.writestr(name, data)


@pytest.mark.parametrize(
    ("compression", "change", "message"),
    [
        (zipfile.ZIP_DEFLATED, {}, "compressed"),
        (zipfile.ZIP_STORED, {"a/byteorder": b"big"}, "byte order"),
        (zipfile.ZIP_STORED, {"b/data.pkl": b""}, "one pickle"),
        (zipfile.ZIP_STORED, {"a/data/0": b"\0" * 15}, "holds 15 bytes"),
        (zipfile.ZIP_STORED, {"a/data.pkl": b"\x80\x02cos\nsystem\n."}, r"os\.system"),
        (zipfile.ZIP_STORED, {"a/data.pkl": b"\x80\x02N."}, None),
    ],
)
def test_other_archives(
    saved: Path, compression: int, change: dict[str, bytes], message: str | None
) -> None:
    _rezipped(saved, compression, change)
    if message is None:
        assert _read(saved) is None
        return
    with pytest.raises(CheckpointError, match=message):
        _read(saved)


def test_a_missing_storage(saved: Path) -> None:
    content = saved.read_bytes().replace(b"a/data/0", b"a/data/9")
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected: a/data/0"):
        _read(saved)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: torch.eye(2).to_sparse(), id="sparse"),
        pytest.param(lambda: torch.zeros(2, dtype=torch.complex64).conj(), id="conjugate"),
        pytest.param(lambda: torch._neg_view(torch.ones(2)), id="negative"),
        pytest.param(lambda: torch.zeros(2, dtype=torch.complex128), id="complex"),
        pytest.param(lambda: torch.zeros(2, dtype=torch.uint16), id="unknown"),
        pytest.param(lambda: torch.ones(1).expand(5), id="expanded"),
        pytest.param(torch.nn.parameter.UninitializedParameter, id="subclass"),
    ],
)
def test_tensors_of_other_kinds(tmp_path: Path, make: Callable[[], torch.Tensor]) -> None:
    torch.save([make()], tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        _read(tmp_path / "a.pt")


def test_a_parameter_is_its_tensor(tmp_path: Path) -> None:
    torch.save([torch.nn.Parameter(torch.ones(2))], tmp_path / "a.pt")
    (stored,) = _read(tmp_path / "a.pt")
    assert (stored.shape, stored.dtype, stored.dense) == ((2,), "float32", True)


def test_no_tensor_is_loaded(tmp_path: Path) -> None:
    planned = plan_file("a.pt", {"a": TensorSlot("float32", (1 << 28,), "a")})
    with (tmp_path / "a.pt").open("wb") as stream:
        stream.truncate(planned.output.size)
        for at, data in planned.output.literals:
            stream.seek(at)
            stream.write(data)
    read = 0

    class Counting(Sources):
        def read(self, file: str, offset: int, nbytes: int) -> bytes:
            nonlocal read
            read += nbytes
            return super().read(file, offset, nbytes)

    with Counting(tmp_path) as sources:
        (stored,) = open_archive(sources, "a.pt").tree(sources).values()
    assert stored.nbytes == 1 << 30
    assert read < 4096


def test_sources_are_opened_for_reading_only(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: list[int] = []
    real = os.open

    def spy(path: Any, mode: int, *rest: Any) -> int:
        flags.append(mode)
        return real(path, mode, *rest)

    monkeypatch.setattr(os, "open", spy)
    _read(saved)
    assert flags
    assert all(mode & os.O_ACCMODE == os.O_RDONLY for mode in flags)
    assert not any(mode & (os.O_CREAT | os.O_TRUNC) for mode in flags)


def test_files_stay_inside_the_directory(saved: Path) -> None:
    directory = saved.parent / "sub"
    directory.mkdir()
    with Sources(directory) as sources:
        for name in ("../a.pt", str(saved), "", "a\0b", "x" * 2000):
            with pytest.raises(CheckpointError, match="outside itself"):
                sources.size(name)
        with pytest.raises(CheckpointError, match="missing"):
            sources.size("b.pt")
        os.mkfifo(directory / "pipe")
        for name in ("pipe", "."):
            with pytest.raises(CheckpointError, match="not a file"):
                sources.size(name)


def test_many_files_at_once(tmp_path: Path) -> None:
    for number in range(200):
        (tmp_path / str(number)).write_bytes(b"%d" % number)
    before = len(os.listdir("/proc/self/fd"))
    with Sources(tmp_path) as sources:
        for _ in range(2):
            for number in range(200):
                assert sources.read(str(number), 0, sources.size(str(number))) == b"%d" % number
        assert len(os.listdir("/proc/self/fd")) < before + 70
    assert len(os.listdir("/proc/self/fd")) == before


def test_holes_and_literals_do_not_meet() -> None:
    planned = plan_file("a.pt", [TensorSlot("float32", (3,), "a"), TensorSlot("bool", (5,), "b")])
    assert isinstance(planned.output, OutputFile)
    taken: list[tuple[int, int]] = [(at, at + len(data)) for at, data in planned.output.literals]
    for hole in planned.output.holes:
        assert isinstance(hole, Hole)
        taken.append((hole.offset, hole.offset + hole.nbytes))
        taken += [(at, at + 4) for at in hole.crc_offsets]
    taken.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))
    assert taken[-1][1] == planned.output.size
