"""Weights & Biases' offline files as curves, against a file that wandb itself wrote."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from harness.program import run_program

from flagscale.data_inspect.wandb_files import read_wandb, wandb_files
from flagscale.errors import ConfigError, DataError, FlagScaleError

LAST = 400
PROGRAM = """
import math, os, sys, time, wandb
settings = wandb.Settings(console="off", x_disable_stats=True)
run = wandb.init(project="flagscale", mode="offline", dir=sys.argv[1], settings=settings)
run.config.update({"filler": "x" * 60000})  # longer than a block
for i in range(1, int(sys.argv[2]) + 1):  # in the order of upstream's training_log
    run.log({"samples vs steps": 8 * i}, i)
    run.log({"learning-rate": 1e-3}, i)
    run.log({"batch-size": 8}, i)
    run.log({"lm loss": math.nan if i == 7 else 3.0 + 1.0 / i}, i)
    if i != 9:
        run.log({"grad-norm": 0.5}, i)
run.finish()
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wandb")
    environ = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    command = [sys.executable, "-c", PROGRAM, str(folder), str(LAST)]
    subprocess.run(command, check=True, timeout=120, env=environ, capture_output=True)
    (only,) = wandb_files(folder)
    return only


def test_a_step_has_all_that_was_logged(file: Path) -> None:
    curve = read_wandb(file.parents[1])
    assert [point.iteration for point in curve.points] == list(range(1, LAST + 1))
    for point in curve.points:
        i = point.iteration
        assert (point.consumed_after, point.batch_size, point.learning_rate) == (8 * i, 8, 1e-3)
        assert point.loss == (None if i == 7 else pytest.approx(3.0 + 1.0 / i, rel=1e-12))
        assert (point.nan, point.skipped) == (i == 7, int(i == 9))
        assert point.grad_norm == (None if i == 9 else 0.5)
    assert curve.damaged == ()
    assert (curve.attempts[0].first_iteration, curve.attempts[0].last_iteration) == (1, LAST)


def test_every_record_is_where_it_is_said_to_be(file: Path) -> None:
    content = file.read_bytes()
    assert len(content) > 3 << 15  # records go over the edges of blocks
    for point in read_wandb(file).points:
        assert point.source is not None
        head = content[point.source.position : point.source.position + 7]
        assert struct.unpack("<IHB", head)[2] in (1, 2)


def test_the_spikes_of_an_offline_run(file: Path, tmp_path: Path) -> None:
    ended = run_program("inspect_data", "spikes", tmp_path, "--wandb", file.parents[1])
    assert ended.code == 0
    assert "Weights & Biases" in ended.out
    assert f"1 in {LAST} iterations" in ended.out  # the NaN


def test_a_cut_end_is_noted_and_the_rest_read(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    rng = random.Random(0)
    for number in range(40):
        cut = tmp_path / f"run-{number}.wandb"
        cut.write_bytes(content[: rng.randrange(len(content) // 2, len(content))])
        curve = read_wandb(cut)
        assert [p.iteration for p in curve.points] == list(range(1, len(curve.points) + 1))
        assert len(curve.points) > LAST // 4


def test_zeros_behind_the_last_record_are_noted(file: Path, tmp_path: Path) -> None:
    """As a crash of the machine leaves them."""
    begin = read_wandb(file).points[200].source
    assert begin is not None
    zeros = tmp_path / "run-zeros.wandb"
    zeros.write_bytes(file.read_bytes()[: begin.position] + bytes(9000))
    curve = read_wandb(zeros)
    assert len(curve.points) == 200
    assert [place.position for place in curve.damaged] == [begin.position]


def test_no_damage_is_read_as_something_else(file: Path, tmp_path: Path) -> None:
    content, whole = file.read_bytes(), read_wandb(file).points
    rng = random.Random(1)
    victim = tmp_path / "run-damaged.wandb"
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(content)
        damaged[rng.randrange(len(content))] ^= rng.randrange(1, 256)
        victim.write_bytes(damaged)
        try:
            points = read_wandb(victim).points
        except FlagScaleError:
            outcomes.add("refused")
        else:
            outcomes.add("read")
            assert [(p.iteration, p.loss) for p in points] == [
                (p.iteration, p.loss) for p in whole[: len(points)]
            ]
    assert "refused" in outcomes


def test_what_is_no_such_file_is_named(tmp_path: Path) -> None:
    other = tmp_path / "run-1.wandb"
    for content in (b"", b"a text", b":W&B\xe1\xbe\x00"):
        other.write_bytes(content)
        with pytest.raises(DataError, match="Weights & Biases"):
            read_wandb(other)
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(DataError, match="no training step"):
        read_wandb(folder)
    with pytest.raises(DataError, match="cannot be read"):
        read_wandb(tmp_path / "run-none.wandb")


def test_without_the_package_the_error_names_it(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb.proto.wandb_internal_pb2", None)
    with pytest.raises(ConfigError, match="pip install wandb"):
        read_wandb(file)
