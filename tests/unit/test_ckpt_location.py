from __future__ import annotations

from pathlib import Path

import pytest
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

from flagscale.ckpt_io.location import TRACKER, detect_format, find_iteration
from flagscale.errors import CheckpointError


@pytest.fixture
def load_dir(tmp_path: Path) -> Path:
    for name in ("iter_0000003", "iter_0000012", "release"):
        (tmp_path / name).mkdir()
    (tmp_path / TRACKER).write_text("12\n")
    return tmp_path


def test_names_are_upstreams(load_dir: Path) -> None:
    assert get_checkpoint_tracker_filename(str(load_dir)) == str(load_dir / TRACKER)
    for iteration in (3, 12):
        path = get_checkpoint_name(str(load_dir), iteration, return_base_dir=True)
        assert find_iteration(load_dir, iteration) == (iteration, Path(path))


def test_the_last_iteration(load_dir: Path) -> None:
    assert find_iteration(load_dir) == (12, load_dir / "iter_0000012")
    (load_dir / TRACKER).write_text("release")
    assert find_iteration(load_dir) == (0, load_dir / "release")


def test_the_directory_of_an_iteration_itself(load_dir: Path) -> None:
    assert find_iteration(load_dir / "iter_0000003") == (3, load_dir / "iter_0000003")
    assert find_iteration(load_dir / "release") == (0, load_dir / "release")


@pytest.mark.parametrize("content", ["", "x", "-1", "1.5", "9" * 5000, "\x00", "iter_3", "\xff"])
def test_a_damaged_tracker(load_dir: Path, content: str) -> None:
    (load_dir / TRACKER).write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match=TRACKER):
        find_iteration(load_dir)


def test_iterations_that_are_not_there(load_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"iter_0000004[^$]*iter_0000012"):
        find_iteration(load_dir, 4)
    (load_dir / TRACKER).write_text("5")
    with pytest.raises(CheckpointError, match="iter_0000005"):
        find_iteration(load_dir)
    (load_dir / TRACKER).unlink()
    with pytest.raises(CheckpointError, match="complete"):
        find_iteration(load_dir)
    with pytest.raises(CheckpointError, match="No such file"):
        find_iteration(load_dir / "nowhere")


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        ({"metadata.json": '{"sharded_backend": "torch_dist"}', ".metadata": ""}, "torch_dist"),
        ({"mp_rank_00/model_optim_rng.pt": ""}, "torch"),
        ({"mp_rank_00_000_001/model_optim_rng.pt": ""}, "torch"),
        ({".metadata": "", "__0_0.distcp": ""}, "fsdp_dtensor"),
    ],
)
def test_formats(tmp_path: Path, files: dict[str, str], kind: str) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert detect_format(tmp_path) == kind


@pytest.mark.parametrize("content", ["", "[]", '{"sharded_backend": "zarr"}', "[" * 100_000])
def test_other_backends(tmp_path: Path, content: str) -> None:
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        detect_format(tmp_path)


def test_no_format(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="an empty directory"):
        detect_format(tmp_path)
    for number in range(20):
        (tmp_path / f"file{number:02d}\n\udc80").touch()
    with pytest.raises(CheckpointError, match=r"file07[^$]*\.\.\.") as caught:
        detect_format(tmp_path)
    str(caught.value).encode()
    with pytest.raises(CheckpointError, match="No such file"):
        detect_format(tmp_path / "nowhere")
