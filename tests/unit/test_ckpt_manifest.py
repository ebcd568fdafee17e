from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.validation import (
    INTEGRITY_FNAME,
    save_integrity_manifest,
    verify_integrity_manifest,
)

from flagscale.ckpt_io.manifest import MANIFEST, read_manifest, verify_manifest, write_manifest
from flagscale.errors import CheckpointError


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "iter_0000003"
    (directory / "mp_rank_00").mkdir(parents=True)
    contents = {".metadata": b"a", "__0_0.distcp": os.urandom(5 << 20), "empty": b"",
                "mp_rank_00/model_optim_rng.pt": b"b" * 100}  # fmt: skip
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    return directory


def test_upstream_accepts_ours(checkpoint: Path) -> None:
    assert write_manifest(checkpoint) == checkpoint / INTEGRITY_FNAME
    verify_integrity_manifest(str(checkpoint))
    assert verify_manifest(checkpoint) == ()
    # Upstream verifies what lies in directories, too.
    (checkpoint / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"c" * 100)
    with pytest.raises(CheckpointingException, match="mp_rank_00"):
        verify_integrity_manifest(str(checkpoint))


def test_flat_directories_are_upstreams_byte_for_byte(checkpoint: Path) -> None:
    (checkpoint / "mp_rank_00" / "model_optim_rng.pt").unlink()
    save_integrity_manifest(str(checkpoint))
    want = (checkpoint / MANIFEST).read_bytes()
    assert verify_manifest(checkpoint) == ()
    write_manifest(checkpoint)
    assert (checkpoint / MANIFEST).read_bytes() == want
    assert sorted(path.name for path in checkpoint.iterdir() if path.is_file()) == [
        ".metadata", "__0_0.distcp", "empty", "integrity.json",
    ]  # fmt: skip


@pytest.mark.parametrize("at", [0, 1 << 20, (5 << 20) - 1])
def test_a_flipped_bit_is_found(checkpoint: Path, at: int) -> None:
    write_manifest(checkpoint)
    content = bytearray((checkpoint / "__0_0.distcp").read_bytes())
    content[at] ^= 1
    (checkpoint / "__0_0.distcp").write_bytes(content)
    (problem,) = verify_manifest(checkpoint)
    assert problem.startswith("__0_0.distcp: its SHA-256 is ")
    with pytest.raises(CheckpointingException):
        verify_integrity_manifest(str(checkpoint))


def test_missing_and_short_files_are_found(checkpoint: Path) -> None:
    write_manifest(checkpoint)
    (checkpoint / ".metadata").unlink()
    os.truncate(checkpoint / "__0_0.distcp", 5)
    assert sorted(problem.partition(":")[0] for problem in verify_manifest(checkpoint)) == [
        ".metadata", "__0_0.distcp",
    ]  # fmt: skip


def test_digests_given_in_advance_are_not_computed_again(checkpoint: Path) -> None:
    real = hashlib.sha256((checkpoint / "__0_0.distcp").read_bytes()).hexdigest()
    write_manifest(checkpoint, {"__0_0.distcp": real})
    verify_integrity_manifest(str(checkpoint))
    write_manifest(checkpoint, {"__0_0.distcp": "0" * 64})
    assert read_manifest(checkpoint)["__0_0.distcp"] == "0" * 64
    assert len(verify_manifest(checkpoint)) == 1
    with pytest.raises(CheckpointError, match=r"is gone[^$]*nowhere"):
        write_manifest(checkpoint, {"nowhere": real})


def test_memory_is_bounded(checkpoint: Path) -> None:
    with (checkpoint / "large").open("wb") as stream:
        stream.truncate(64 << 20)
    tracemalloc.start()
    try:
        write_manifest(checkpoint)
        assert verify_manifest(checkpoint) == ()
        assert tracemalloc.get_traced_memory()[1] < 20 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", "[" * 100_000, '{"files": []}', '{"files": {"a": 3}}',
        '{"files": {"a": "xyz"}}', json.dumps({"algorithm": "md5", "files": {}}),
    ],
    ids=range(8),
)  # fmt: skip
def test_damaged_manifests(checkpoint: Path, content: str) -> None:
    (checkpoint / MANIFEST).write_text(content)
    with pytest.raises(CheckpointError, match=r"integrity\.json"):
        verify_manifest(checkpoint)


def test_no_manifest(checkpoint: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing[^$]*integrity\.json"):
        verify_manifest(checkpoint)
    with pytest.raises(CheckpointError, match="cannot be"):
        write_manifest(checkpoint / "nowhere")


def test_a_manifest_does_not_lead_outside(checkpoint: Path) -> None:
    files = {"../secret": "0" * 64, "/etc/passwd": "0" * 64}
    (checkpoint / MANIFEST).write_text(json.dumps({"algorithm": "sha256", "files": files}))
    assert [problem.rpartition(": ")[2] for problem in verify_manifest(checkpoint)] == [
        "a checkpoint names a file outside itself"
    ] * 2
