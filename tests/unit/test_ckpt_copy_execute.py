"""Execution: the same bytes as numpy's, whatever the layout, the interruptions and the company."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import execute_job
from harness.regions import Case, draw_case, strides_of
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from flagscale.ckpt_copy import execute, gather
from flagscale.ckpt_copy.execute import Execution, execute_plan
from flagscale.ckpt_copy.plan import CopyPlan, plan_copy
from flagscale.ckpt_copy.verify import verify_plan
from flagscale.ckpt_io import raw
from flagscale.ckpt_io.claims import Task
from flagscale.ckpt_io.journal import Journal, Staging
from flagscale.ckpt_io.output import Hole, OutputFile
from flagscale.ckpt_io.publish import TRACKER, publish
from flagscale.ckpt_io.readback import read_back_holes
from flagscale.errors import CheckpointError, ConfigError
from flagscale.layout.boxes import Box, flat_boxes
from flagscale.layout.pieces import Piece, Region, TensorKey

W = TensorKey("param", "decoder.layers.0.mlp.linear_fc2.weight")


def plan_of(case: Case, unit_bytes: int, **options: Any) -> CopyPlan:
    plan = plan_copy(case.sources, case.files, case.targets, unit_bytes=unit_bytes, **options)
    assert verify_plan(plan, case.source_sizes) == []
    return plan


def check(case: Case, execution: Execution, directory: Path) -> None:
    for file in case.files:
        data = (directory / file.path).read_bytes()
        assert data == case.expected[file.path]
        assert execution.digests[file.path] == hashlib.sha256(data).hexdigest()
        assert execution.hole_crcs[file.path] == tuple(
            zlib.crc32(data[hole.offset : hole.offset + hole.nbytes]) for hole in file.holes
        )


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking would take minutes
)
@given(
    st.randoms(use_true_random=False),
    st.sampled_from([64, 100, 1 << 20]),
    st.sampled_from([16, 48, 1 << 20]),
    st.sampled_from([4, 4096]),
    st.integers(1, 3),
)
def test_the_bytes_are_those_of_numpy(
    rng: random.Random, unit_bytes: int, block: int, page: int, workers: int
) -> None:
    """Tiny blocks and pages bring every way of reading into play on tiny tensors."""
    case = draw_case(rng)
    plan = plan_of(case, unit_bytes)
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        for module in (gather, execute):
            patch.setattr(module, "BLOCK_BYTES", block)
        patch.setattr(gather, "_PAGE_BYTES", page)
        root = Path(name)
        case.write_sources(root / "source")
        destination = root / "new" / "iter_0000010"
        execution = execute_plan(plan, root / "source", destination, workers=workers)
        check(case, execution, execution.staging.data)
        publish(execution.staging, 10, dict(execution.digests))
        check(case, execution, destination)


def large_case(rows: int = 512, columns: int = 4096, tensors: int = 3, crc: bool = True) -> Case:
    """Columns on two ranks and shards of a flat buffer, to whole tensors and to columns."""
    case = Case()
    rng = np.random.default_rng(0)
    data = bytearray()
    holes: list[Hole] = []
    for number in range(tensors):
        key = TensorKey("param", f"decoder.layers.{number}.weight")
        values = rng.integers(0, 1 << 32, (rows, columns), dtype="<u4")
        if number % 2:
            half = columns // 2
            for rank in range(2):
                name = f"columns_{number}_{rank}"
                part = np.ascontiguousarray(values[:, rank * half : (rank + 1) * half])
                case.source_bytes[name] = bytearray(part.tobytes())
                box = Box((0, rank * half), (rows, half))
                case.sources.append(Piece(key, box, "float32", Region(name, 0, (half * 4, 4))))
        else:
            case.source_bytes[f"flat_{number}"] = bytearray(values.tobytes())
            cuts = [values.size * shard // 3 + 5 * (shard % 3) for shard in range(4)]
            for start, stop in pairwise(cuts):
                offset = start * 4
                for box in flat_boxes(values.shape, start, stop):
                    region = Region(f"flat_{number}", offset, strides_of(box.shape, 4))
                    case.sources.append(Piece(key, box, "float32", region))
                    offset += box.numel * 4
        # The whole tensor in one file of all, and the right half of its columns in one of its own.
        at = len(data) + 64
        data += bytes(64) + values.tobytes() + b"PKxx" + zlib.crc32(values).to_bytes(4, "little")
        holes.append(Hole(at, values.nbytes, "float32", values.shape, (len(data) - 4,) * crc))
        if not crc:
            data[-4:] = bytes(4)
        region = Region("whole.bin", at, (columns * 4, 4))
        case.targets.append(Piece(key, Box.whole(values.shape), "float32", region))
        right = np.ascontiguousarray(values[:, columns // 2 :])
        name = f"right_{number}.bin"
        shape = right.shape
        case.files.append(
            OutputFile(name, right.nbytes, (), (Hole(0, right.nbytes, "float32", shape),))
        )
        case.expected[name] = right.tobytes()
        box = Box((0, columns // 2), shape)
        case.targets.append(Piece(key, box, "float32", Region(name, 0, strides_of(shape, 4))))
    marks = tuple((hole.offset + hole.nbytes, b"PKxx") for hole in holes)
    case.files.append(OutputFile("whole.bin", len(data), marks, tuple(holes)))
    case.expected["whole.bin"] = bytes(data)
    return case


@pytest.fixture(scope="module")
def large() -> Case:
    return large_case()


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("unit_bytes", [1 << 20, 3 << 20, 64 << 20])
def test_large_tensors(large: Case, tmp_path: Path, workers: int, unit_bytes: int) -> None:
    large.write_sources(tmp_path)
    plan = plan_of(large, unit_bytes)
    seen: list[int] = []
    execution = execute_plan(
        plan, tmp_path, tmp_path / "new" / "iter_7", workers=workers, on_progress=seen.append
    )
    check(large, execution, execution.staging.data)
    assert execution.bytes_written == plan.total_bytes
    assert execution.bytes_read <= 1.05 * plan.total_bytes
    assert seen == sorted(seen)
    assert seen[-1] == plan.total_bytes


def test_workers_share_one_file(tmp_path: Path) -> None:
    """With more workers than files all take part, and the digest is still that of the whole."""
    case = large_case(tensors=4)
    case.files = [file for file in case.files if file.path == "whole.bin"]
    case.targets = [piece for piece in case.targets if piece.region.file == "whole.bin"]
    case.write_sources(tmp_path)
    at_work: set[str] = set()
    make = execute._Run._make

    def noted(*args: Any) -> int:
        at_work.add(threading.current_thread().name)
        return make(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute._Run, "_make", noted)
        execution = execute_plan(plan_of(case, 1 << 20), tmp_path, tmp_path / "new", workers=4)
    check(case, execution, execution.staging.data)
    assert len(at_work) > 1


@pytest.mark.parametrize("crc_first", [False, True])
def test_checksums_before_and_behind_their_holes(tmp_path: Path, crc_first: bool) -> None:
    rng = random.Random(3)
    case = draw_case(rng, crc_first=crc_first)
    while not any(hole.crc_offsets for file in case.files for hole in file.holes):
        case = draw_case(rng, crc_first=crc_first)
    case.write_sources(tmp_path / "s")
    execution = execute_plan(plan_of(case, 64), tmp_path / "s", tmp_path / "new")
    check(case, execution, execution.staging.data)


FLOATS = [0.0, -0.0, 1.0, 1 / 3, -2.5e-41, 1e38, 3.4e38, float("inf"), -float("inf"), 1.00390625]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("float32", "bfloat16"),
        ("bfloat16", "float32"),
        ("float32", "float16"),
        ("float16", "float32"),
    ],
)
@pytest.mark.parametrize("scalar", [False, True])
def test_conversions_are_those_of_torch(
    tmp_path: Path, source: str, target: str, scalar: bool
) -> None:
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 15,), dtype=torch.int32).view(torch.float32)
    values = torch.cat([torch.tensor(FLOATS), bits[~bits.isnan()]])
    values = (values[3] if scalar else values).to(getattr(torch, source))
    wanted = values.to(getattr(torch, target))
    data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
    (tmp_path / "a").write_bytes(data)
    shape, size = tuple(values.shape), wanted.element_size()
    nbytes = wanted.numel() * size
    case = Case(
        [
            Piece(
                W,
                Box.whole(shape),
                source,
                Region("a", 0, values.stride() and (len(data) // values.numel(),)),
            )
        ],
        {"a": bytearray(data)},
        [OutputFile("out", nbytes, (), (Hole(0, nbytes, target, shape),))],
        [Piece(W, Box.whole(shape), target, Region("out", 0, strides_of(shape, size)))],
        {"out": wanted.reshape(-1).view(torch.uint8).numpy().tobytes()},
    )
    unlisted = plan_copy(case.sources, case.files, case.targets)
    assert any(target in problem.what for problem in verify_plan(unlisted, case.source_sizes))
    plan = plan_of(case, 4096, conversions=[(source, target)])
    execution = execute_plan(plan, tmp_path, tmp_path / "new")
    check(case, execution, execution.staging.data)


def test_nan_stays_nan(tmp_path: Path) -> None:
    bits = np.array([0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0xFF800001], "<u4")
    (tmp_path / "a").write_bytes(bits.tobytes())
    case = Case(
        [Piece(W, Box.whole((4,)), "float32", Region("a", 0, (4,)))],
        {"a": bytearray(bits.tobytes())},
        [OutputFile("out", 8, (), (Hole(0, 8, "bfloat16", (4,)),))],
        [Piece(W, Box.whole((4,)), "bfloat16", Region("out", 0, (2,)))],
    )
    plan = plan_of(case, 64, conversions=[("float32", "bfloat16")])
    execution = execute_plan(plan, tmp_path, tmp_path / "new")
    data = bytearray((execution.staging.data / "out").read_bytes())
    assert torch.frombuffer(data, dtype=torch.bfloat16).isnan().all()


def test_a_grown_vocabulary_repeats_a_row_and_zeros_fill(tmp_path: Path) -> None:
    row = np.arange(5000, dtype="<u4")
    (tmp_path / "a").write_bytes(row.tobytes())
    shape = (700, 5000)
    wanted = np.zeros(shape, "<u4")
    wanted[1:300] = row
    case = Case(
        [Piece(W, Box((1, 0), (299, 5000)), "float32", Region("a", 0, (0, 4)))],
        {"a": bytearray(row.tobytes())},
        [OutputFile("out", wanted.nbytes, (), (Hole(0, wanted.nbytes, "float32", shape),))],
        [Piece(W, Box.whole(shape), "float32", Region("out", 0, (20000, 4)))],
        {"out": wanted.tobytes()},
    )
    plan = plan_of(case, 1 << 20, zero_fill=[W])
    execution = execute_plan(plan, tmp_path, tmp_path / "new")
    check(case, execution, execution.staging.data)


def test_an_earlier_run_is_gone_on_with(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path)
    plan, destination = plan_of(large, 1 << 20), tmp_path / "new" / "iter_7"
    make, made = execute._Run._make, []

    def limited(run: Any, output: Any, unit: Any, *rest: Any) -> int:
        if len(made) == 10:
            raise KeyboardInterrupt
        made.append((output.index, unit.index))
        return make(run, output, unit, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute._Run, "_make", limited)
        with pytest.raises(KeyboardInterrupt, match=r"\.iter_7\.partial keeps what is finished"):
            execute_plan(plan, tmp_path, destination, workers=1)
    assert not destination.exists()
    units = sum(len(list(plan.units(index))) for index in range(len(plan.files)))
    execution = execute_plan(plan, tmp_path, destination, workers=2)
    assert execution.units == units - 10
    check(large, execution, execution.staging.data)
    assert execute_plan(plan, tmp_path, destination).units == 0


def test_what_the_disk_lost_is_made_again(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path)
    plan, destination = plan_of(large, 1 << 20), tmp_path / "new" / "iter_7"
    execution = execute_plan(plan, tmp_path, destination)
    data = execution.staging.data
    (data / "right_0.bin").unlink()
    os.truncate(data / "right_1.bin", 100)
    (records,) = execution.staging.journal.glob("*.records")
    lines = records.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if b'"file",3' not in line]  # whole.bin is not finished
    assert len(kept) == len(lines) - 1
    records.write_bytes(b"".join(kept))
    with (data / "whole.bin").open("r+b") as stream:  # and a block of it is not what was written
        stream.seek(5_000_000)
        stream.write(b"rotten")
        stream.seek(large.files[-1].literals[1][0])
        stream.write(b"????")
    execution = execute_plan(plan, tmp_path, destination)
    check(large, execution, data)
    assert execution.units == 4 + 4 + 1


def test_holes_are_read_back(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path)
    execution = execute_plan(plan_of(large, 1 << 20), tmp_path, tmp_path / "new" / "iter_7")
    data, crcs = execution.staging.data, execution.hole_crcs
    assert read_back_holes(data, large.files, crcs) == []
    with (data / "right_1.bin").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)[0]
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last ^ 1]))
    (wrong,) = read_back_holes(data, large.files, crcs)
    assert wrong.startswith("right_1.bin: the 4194304 bytes at 0 have CRC-32")
    samples = [
        read_back_holes(data, large.files, crcs, sample_bytes=1, seed=seed) for seed in range(20)
    ]
    assert [wrong] in samples
    assert [] in samples
    os.truncate(data / "right_0.bin", 5)
    with pytest.raises(CheckpointError, match="too short"):
        read_back_holes(data, large.files, crcs)


# --- bad input ----------------------------------------------------------------------------------


def test_a_missing_source_is_named_before_any_work(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path)
    (tmp_path / "flat_0").unlink()
    with pytest.raises(CheckpointError, match="cannot be read") as error:
        execute_plan(plan_of(large, 1 << 20), tmp_path, tmp_path / "new" / "iter_7")
    assert "flat_0" in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_source_that_shrinks_is_named_with_its_tensor(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path)
    os.truncate(tmp_path / "flat_0", 5_000_000)
    with pytest.raises(CheckpointError, match="too short") as error:
        execute_plan(plan_of(large, 1 << 20), tmp_path, tmp_path / "new" / "iter_7")
    assert "flat_0, param decoder.layers.0.weight" in str(error.value)
    assert not (tmp_path / "new" / "iter_7").exists()


def test_a_source_that_changed_since_is_refused(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path)
    plan, destination = plan_of(large, 1 << 20), tmp_path / "new" / "iter_7"
    execute_plan(plan, tmp_path, destination)
    os.utime(tmp_path / "flat_0", (1, 1))
    with pytest.raises(CheckpointError, match="other source files"):
        execute_plan(plan, tmp_path, destination)
    execute_plan(plan, tmp_path, destination, restart=True)


def test_another_plan_is_refused(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path)
    execute_plan(plan_of(large, 1 << 20), tmp_path, tmp_path / "new" / "iter_7")
    with pytest.raises(CheckpointError, match="another plan"):
        execute_plan(plan_of(large, 2 << 20), tmp_path, tmp_path / "new" / "iter_7")


@pytest.mark.parametrize(
    ("options", "what"), [({"workers": 0}, "no workers"), ({"max_memory": 1 << 20}, "memory")]
)
def test_wrong_arguments(large: Case, tmp_path: Path, options: dict[str, int], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        execute_plan(plan_of(large, 1 << 20), tmp_path, tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


@contextlib.contextmanager
def small_disk(path: Path, nbytes: int) -> Iterator[bool]:
    """A file system of its own; whether there is one, for which one must be root."""
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs", str(path)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(path)], check=True)


@contextlib.contextmanager
def small_files(nbytes: int) -> Iterator[None]:
    """No file grows larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asked", [True, False], ids=["asked", "not asked"])
def test_a_full_disk_is_said_before_any_work(large: Case, tmp_path: Path, asked: bool) -> None:
    large.write_sources(tmp_path / "source")
    plan, disk = plan_of(large, 1 << 20), tmp_path / "disk"
    with (
        small_disk(disk, 8 << 20) as mounted,
        small_files(1 << 30 if mounted else 8 << 20),
        pytest.MonkeyPatch.context() as patch,
    ):
        if not asked:  # the file system says so itself, when the files are made
            patch.setattr(execute, "require_room", lambda *_: None)
        patch.setattr(execute, "_Run", None)
        with pytest.raises(CheckpointError, match="the disk is full"):
            execute_plan(plan, tmp_path / "source", disk / "new" / "iter_7")
        assert not (disk / "new" / "iter_7").exists()
        if asked and mounted:  # then not even the files are made
            assert not list((disk / "new").rglob("*.bin"))


def test_a_disk_that_fills_up_meanwhile_leaves_what_can_be_gone_on_with(
    large: Case, tmp_path: Path
) -> None:
    large.write_sources(tmp_path / "source")
    plan, disk = plan_of(large, 1 << 20), tmp_path / "disk"
    destination = disk / "new" / "iter_7"
    with small_disk(disk, 30 << 20) as mounted, pytest.MonkeyPatch.context() as patch:
        patch.setattr(raw, "_allocate", lambda *_: None)  # a file system that cannot
        patch.setattr(execute, "require_room", lambda *_: None)
        if not mounted:
            patch.setattr(execute.StagedFile, "sync", _full)
        with pytest.raises(CheckpointError, match="the disk is full"):
            execute_plan(plan, tmp_path / "source", destination)
        assert not destination.exists()
        if mounted:
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        patch.undo()
        execution = execute_plan(plan, tmp_path / "source", destination)
        assert mounted is False or execution.units < 40  # of 48: the rest was kept
        check(large, execution, execution.staging.data)


def _full(staged: raw.StagedFile) -> None:
    with raw.disk_errors(staged.path):
        raise OSError(28, "No space left on device")


# --- the source is never touched ------------------------------------------------------------------

_OPENED: list[tuple[str, int]] = []
_WATCHED: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _WATCHED and event in ("open", "os.remove", "os.rename", "os.truncate", "os.chmod"):
        path = str(arguments[0])
        if path.startswith(_WATCHED[0]):
            _OPENED.append((event, arguments[2] if event == "open" else 0))


def test_the_source_is_opened_to_read_and_never_otherwise(large: Case, tmp_path: Path) -> None:
    source = tmp_path / "source"
    large.write_sources(source)
    for path in source.iterdir():
        path.chmod(0o444)
    source.chmod(0o555)
    before = {
        path.name: (path.stat().st_mtime_ns, path.stat().st_mode) for path in source.iterdir()
    }
    sys.addaudithook(_audit)
    _WATCHED.append(str(source))
    try:
        execute_plan(plan_of(large, 1 << 20), source, tmp_path / "new" / "iter_7")
    finally:
        _WATCHED.clear()
        source.chmod(0o755)
    assert len(_OPENED) >= len(before)
    assert {event for event, _ in _OPENED} == {"open"}
    assert not any(
        flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) for _, flags in _OPENED
    )
    assert before == {
        path.name: (path.stat().st_mtime_ns, path.stat().st_mode) for path in source.iterdir()
    }
    assert all((source / name).read_bytes() == data for name, data in large.source_bytes.items())


# --- killed, and in company -----------------------------------------------------------------------


class Jobs:
    """Processes that execute and publish the same plan."""

    def __init__(self, case: Case, root: Path, workers: int) -> None:
        self.case, self.root, self.workers = case, root, workers
        case.write_sources(root / "source")
        self.destination = root / "new" / "iter_0000007"
        self.plan = plan_of(case, 1 << 20)
        job = (case.sources, case.files, case.targets, 1 << 20, workers)
        (root / "job").write_bytes(pickle.dumps(job))
        self.units = sum(len(list(self.plan.units(index))) for index in range(len(case.files)))

    def start(self, log: str, **environment: str) -> subprocess.Popen[str]:
        arguments = [self.root / "job", self.root / "source", self.destination, self.root / log]
        return subprocess.Popen(
            [sys.executable, execute_job.__file__, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    def finish(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result

    def begun(self, log: str) -> set[str]:
        with contextlib.suppress(FileNotFoundError):
            return set((self.root / log).read_text().splitlines())
        return set()

    def published(self) -> bool:
        """Whether a reader sees the output; it must be whole."""
        pointed_to = (self.destination.parent / TRACKER).exists()
        if not self.destination.exists():
            assert not pointed_to
            return False
        for path, data in self.case.expected.items():
            assert (self.destination / path).read_bytes() == data
        return True


@pytest.fixture
def jobs(large: Case, tmp_path: Path) -> Jobs:
    return Jobs(large, tmp_path, workers=2)


KILLS = int(os.environ.get("FLAGSCALE_TEST_KILLS", "4"))


@pytest.mark.parametrize("seed", range(KILLS))
def test_killed_at_a_random_moment_it_goes_on(jobs: Jobs, seed: int) -> None:
    """Bytes alike, at most one unit of a worker redone, nothing half seen meanwhile."""
    first = jobs.start("first")
    assert first.stdout is not None
    assert first.stdout.readline() == "ready\n"
    deadline = time.monotonic() + random.Random(seed).uniform(0, 0.5)
    while time.monotonic() < deadline:
        jobs.published()
    first.kill()
    first.communicate()
    staging = jobs.destination.parent / f".{jobs.destination.name}.partial"
    finished = jobs.published() and not staging.exists()
    second = jobs.start("second")
    while second.poll() is None:
        jobs.published()
    if finished:
        second.communicate()
        assert second.returncode != 0  # nothing was left to do
    else:
        jobs.finish(second)
    assert jobs.published()
    assert (jobs.destination.parent / TRACKER).read_text() == "7"
    assert sorted(os.listdir(jobs.destination.parent)) == [jobs.destination.name, TRACKER]
    redone = jobs.begun("first") & jobs.begun("second")
    assert len(redone) <= jobs.workers
    assert len(jobs.begun("first") | jobs.begun("second")) == jobs.units


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_tasks_share_the_work(jobs: Jobs, names: tuple[str, str]) -> None:
    tasks = [jobs.start(f"{rank}", **{names[0]: f"{rank}", names[1]: "3"}) for rank in range(3)]
    results = [jobs.finish(task) for task in tasks]
    assert [result["published"] for result in results].count(True) == 1
    assert sum(result["units"] for result in results) == jobs.units
    assert jobs.published()


def test_a_task_that_dies_is_made_up_for(jobs: Jobs) -> None:
    first = jobs.start("0", RANK="0", WORLD_SIZE="2")
    while not jobs.begun("0"):
        time.sleep(0.001)
    second = jobs.start("1", RANK="1", WORLD_SIZE="2")
    first.send_signal(signal.SIGKILL)
    first.communicate()
    jobs.finish(second)
    assert jobs.published()
    assert len(jobs.begun("0") & jobs.begun("1")) <= jobs.workers


def test_a_late_task_finds_the_work_done(large: Case, tmp_path: Path) -> None:
    large.write_sources(tmp_path / "source")
    plan, destination = plan_of(large, 1 << 20), tmp_path / "new" / "iter_7"
    tasks = [Task(rank, 2) for rank in range(2)]
    execution = execute_plan(plan, tmp_path / "source", destination, task=tasks[0])
    assert publish(execution.staging, 7, dict(execution.digests))
    late = execute_plan(plan, tmp_path / "source", destination, task=tasks[1])
    assert late.units == 0
    assert not publish(late.staging, 7, dict(late.digests))
    with pytest.raises(CheckpointError, match="exists already"):
        execute_plan(plan, tmp_path / "source", destination)


def test_another_task_publishes_under_our_hands(
    large: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is seen in the middle: the output is there, the staging directory not yet all gone."""
    large.write_sources(tmp_path / "source")
    plan, destination = plan_of(large, 1 << 20), tmp_path / "new" / "iter_7"
    allocate = execute._allocate

    def overtaken(plan: CopyPlan, staging: Staging, journal: Journal) -> None:
        with monkeypatch.context() as other:
            other.setattr(execute, "_allocate", allocate)
            other.setattr(Staging, "remove", lambda self: shutil.rmtree(self.journal))
            task = Task(1, 2)
            faster = execute_plan(plan, tmp_path / "source", destination, task=task)
            assert publish(faster.staging, 7, dict(faster.digests))
        assert staging.root.exists()
        allocate(plan, staging, journal)

    monkeypatch.setattr(execute, "_allocate", overtaken)
    ours = execute_plan(plan, tmp_path / "source", destination, task=Task(0, 2))
    assert not publish(ours.staging, 7, dict(ours.digests))
    assert not ours.staging.root.exists()
    assert (destination.parent / TRACKER).read_text() == "7"


@pytest.mark.parametrize("workers", [1, 2, 8])
@pytest.mark.parametrize("memory", [4 << 20, 5 << 20, 16 << 20, 1 << 30])
def test_memory_is_bounded(large: Case, workers: int, memory: int) -> None:
    """Buffers follow ``max_memory``, not the size of the job, and no worker lacks one."""
    plan = plan_of(large, 1 << 20)
    found, buffers = execute._affordable(plan, workers, memory)
    assert 1 <= found <= min(workers, buffers)
    assert buffers <= 2 * found
    assert buffers * plan.unit_bytes + found * execute._WORKER_BYTES <= memory
    assert memory < 1 << 30 or (found, buffers) == (workers, 2 * workers)
    nothing = replace(plan, files=plan.files[:0])
    assert execute._affordable(nothing, workers, memory)[0] >= 1
