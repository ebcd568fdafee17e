"""A rank is killed in mid-run; the job starts again; nothing can be told from the result."""

from __future__ import annotations

import hashlib
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import train
from harness.checkpoint import read_tensors
from harness.corpus import model_argv

_KILLED_AT = 5
_LAST = 8


def _tensor_digests(checkpoint: Path) -> dict[str, str]:
    return {
        name: hashlib.sha256(np.asarray(tensor.view(torch.uint8)).tobytes()).hexdigest()
        for name, tensor in read_tensors(checkpoint).items()
    }


@pytest.mark.parametrize(
    "layout",
    [pytest.param({}, id="DP2"), pytest.param({"tensor_model_parallel_size": 2}, id="TP2")],
)
def test_killed_and_restarted_is_bit_identical(
    corpus: Path, tmp_path: Path, layout: dict[str, object]
) -> None:
    def run(
        name: str, attempt: int = 0, kill: tuple[int, int, signal.Signals] | None = None
    ) -> Any:
        save = tmp_path / name
        argv = model_argv(
            corpus,
            train_iters=_LAST,
            save=save,
            load=save,
            save_interval=4,
            attention_dropout=0.1,  # so that every generator's state matters
            hidden_dropout=0.1,
            **layout,
        )
        return train(argv, tmp_path / f"{name}.{attempt}", 2, kill=kill)

    whole = run("whole").require_success()

    killed = run("broken", 0, kill=(1, _KILLED_AT, signal.SIGKILL))
    assert killed.exit_codes[1] == -9
    assert killed.exit_codes[0] != 0
    assert (tmp_path / "broken" / "latest_checkpointed_iteration.txt").read_text() == "4"
    restarted = run("broken", 1).require_success()

    assert sorted(restarted.losses) == [5, 6, 7, 8]
    assert restarted.losses == {i: whole.losses[i] for i in restarted.losses}
    whole_norms = [s.grad_norm for s in whole.ranks[-1].steps][4:]
    assert [s.grad_norm for s in restarted.ranks[-1].steps] == whole_norms

    digests = _tensor_digests(tmp_path / "broken" / "iter_0000008")
    assert digests == _tensor_digests(tmp_path / "whole" / "iter_0000008")
    assert any(".exp_avg_sq" in name for name in digests)
    assert any("linear_qkv" in name for name in digests)
