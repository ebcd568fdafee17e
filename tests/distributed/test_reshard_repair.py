"""A checkpoint that stock megatron-core has damaged (#5077): found, mended, and trained on.

Two jobs train alike. Stock upstream saves one; the other is saved with the defect repaired, and is
what the first should have been.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import train
from harness.damage import overwrite
from harness.reshard import SOURCES, STOPPED_AT, resume, stock_environ
from harness.states import differences, read_fully_reshardable

from flagscale.layout.boxes import Box
from flagscale.layout.pieces import Piece
from flagscale.optim.doctor import diagnose
from flagscale.optim.doctor.findings import Kind
from flagscale.optim.opening import open_source
from flagscale.optim.repair import read_record
from flagscale.optim.source import Source

_SOURCE = SOURCES["buckets-dp3"]
_ITERATION = f"iter_{STOPPED_AT:07d}"
_TOOL = Path(__file__).parents[2] / "tools" / "reshard_optimizer.py"


def _save(corpus: Path, work: Path, name: str, environ: Mapping[str, str]) -> Path:
    argv = _SOURCE.argv(
        corpus, _SOURCE.layout, save=work / name, save_interval=1000, exit_interval=STOPPED_AT,
        dist_ckpt_optim_fully_reshardable=True,
    )  # fmt: skip
    logs = work / f"{name}.logs"
    train(argv, logs, _SOURCE.layout.nproc, environ=environ, timeout_s=300).require_success()
    return work / name


def _tool(*arguments: object) -> tuple[int, str]:
    argv = [sys.executable, str(_TOOL), *map(str, arguments)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("repair")


@pytest.fixture(scope="module")
def undamaged(corpus: Path, work: Path) -> Path:
    return _save(corpus, work, "undamaged", {})


@pytest.fixture(scope="module")
def damaged(corpus: Path, work: Path) -> Path:
    return _save(corpus, work, "damaged", stock_environ())


@pytest.fixture(scope="module")
def mended(damaged: Path, work: Path) -> Path:
    code, printed = _tool("--repair", damaged, "--save-dir", work / "mended", "--verify", "full")
    assert code == 0, printed
    assert "832 are stored nowhere" in printed
    code, printed = _tool("--repair", damaged, "--save-dir", work / "x", "--allow-vocab-growth")
    assert code == 2
    assert "a repair keeps the layout" in printed
    return work / "mended"


def test_it_is_found(damaged: Path, undamaged: Path) -> None:
    truth = read_fully_reshardable(undamaged / _ITERATION)
    stored = read_fully_reshardable(damaged / _ITERATION)
    assert {line.split()[0] for line in differences(truth, stored)} == {
        "param", "exp_avg", "exp_avg_sq",
    }  # fmt: skip
    diagnosis = diagnose(damaged)
    assert {one.kind for one in diagnosis.findings} == {Kind.COMPACT}
    names = {one.where.removeprefix("param ") for one in diagnosis.findings}
    assert names == _differing_layers(truth.tensors, stored.tensors)
    numel = sum(bits.size for (kind, _), bits in truth.tensors.items() if kind == "param")
    assert (numel, sum(one.elements for one in diagnosis.findings)) == (229_952, 201_216)
    counts = [re.findall(r"\(([\d,]+) main", one.what)[0] for one in diagnosis.findings]
    wrong = sum(int(count.replace(",", "")) for count in counts)
    assert wrong == _not_the_weight(stored.tensors)
    print(f"{wrong:,} of {numel:,} main copies are not the weight, in {len(names)} parameters")
    code, printed = _tool("--check", damaged)
    assert code == 3
    assert all(f"slices of #5077: param {name}: " in printed for name in names)
    code, printed = _tool("--check", undamaged)
    assert code == 0, printed


def _not_the_weight(stored: Mapping[tuple[str, str], np.ndarray]) -> int:
    """Elements whose main copy, rounded by torch, is not the weight."""
    count = 0
    for (kind, key), bits in stored.items():
        if kind == "param":
            main = torch.from_numpy(bits).view(torch.float32).to(torch.bfloat16)
            count += int((main.view(torch.int16).numpy() != stored["weight", key]).sum())
    return count


def _differing_layers(
    truth: Mapping[tuple[str, str], np.ndarray], stored: Mapping[tuple[str, str], np.ndarray]
) -> set[str]:
    names = set()
    for kind, key in truth:
        differs = truth[kind, key] != stored[kind, key]
        if not key.startswith("decoder.layers."):
            names |= {key} if differs.any() else set()
            continue
        rest = key.removeprefix("decoder.layers.")
        names |= {
            f"decoder.layers.{layer}.{rest}" for layer, one in enumerate(differs) if one.any()
        }
    return names


def test_it_is_mended(undamaged: Path, mended: Path) -> None:
    """All is back to the bit but what the record names, and there is nothing else to find."""
    truth = read_fully_reshardable(undamaged / _ITERATION)
    got = read_fully_reshardable(mended / _ITERATION)
    lost = read_record(mended / _ITERATION)
    numel = sum(box.numel for boxes in lost.values() for box in boxes)
    assert numel == 832
    for kind in ("param", "exp_avg", "exp_avg_sq"):
        lines = [line for line in differences(truth, got) if line.startswith(f"{kind} ")]
        assert sum(int(re.findall(r": (\d+) of", line)[0]) for line in lines) <= numel
    assert not [line for line in differences(truth, got) if line.startswith("weight")]
    after = diagnose(mended)
    assert after.sound, "\n".join(after.report())
    assert f"{numel:,} elements" in after.notes[0]


def test_it_trains_on_as_if_only_the_lost_were_lost(
    corpus: Path, work: Path, undamaged: Path, damaged: Path, mended: Path
) -> None:
    def losses(name: str, load: Path) -> list[float]:
        run = resume(_SOURCE, load, "torch_dist", _SOURCE.layout, corpus, work / f"resume-{name}")
        return [loss for _, loss in sorted(run.losses.items())]

    # The undamaged one, robbed of just what the repair says is lost.
    robbed = work / "robbed"
    shutil.copytree(undamaged, robbed)
    _rob(open_source(robbed, prove=False), read_record(mended / _ITERATION))

    whole, broken = losses("undamaged", undamaged), losses("damaged", damaged)
    repaired, expected = losses("mended", mended), losses("robbed", robbed)
    print(f"undamaged {whole}\ndamaged   {broken}\nmended    {repaired}\nrobbed    {expected}")
    assert repaired == expected
    assert repaired[0] == whole[0]  # the weights are the same
    gaps = [[abs(a - b) for a, b in zip(whole, one, strict=True)] for one in (broken, repaired)]
    assert max(gaps[0]) > 0.03
    assert max(gaps[1]) < 1e-3


def _rob(source: Source, lost: Mapping[str, tuple[Box, ...]]) -> None:
    """Set lost moments to zero and lost main copies to the weights, in place, row by row."""
    weights = source.of_kind("weight")
    for piece in source.pieces:
        for box in lost.get(piece.tensor.name, ()) if piece.tensor.kind != "weight" else ():
            common = piece.box.intersection(box)
            if common is None:
                continue
            for row in range(common.offset[0], common.stop[0]):
                part = common.intersection(Box((row, *box.offset[1:]), (1, *box.shape[1:])))
                assert part is not None
                bits = np.zeros(part.numel, np.uint32)
                if piece.tensor.kind == "param":
                    bits = _weight(source.directory, weights, piece.tensor.name, part)
                one = Piece(piece.tensor, part, piece.dtype, piece.part(part))
                overwrite(source.directory, one, bits)


def _weight(directory: Path, weights: list[Piece], name: str, box: Box) -> np.ndarray:
    """A row of a bf16 weight as the bits of fp32."""
    (piece,) = (p for p in weights if p.tensor.name == name and p.box.intersection(box) == box)
    region = piece.part(box)
    data = (directory / region.file).read_bytes()
    bits = np.frombuffer(data, np.uint16, box.numel, region.offset)
    return bits.astype(np.uint32) << 16
