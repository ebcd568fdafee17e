"""Which checkpoints are written while the batch size still rises."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import train
from harness.corpus import model_argv

# 4 samples a step for 4 steps, 8 for 4, then 12 for 6: 120 samples of 64 tokens, 14 steps.
_RAMP = {
    "bf16": False,  # which CPUs without units for bf16 do much faster
    "train_iters": None,
    "global_batch_size": None,
    "train_samples": 120,
    "step_batch_size_schedule": "0:4 1024:8 3072:12",
    "save_interval": 3,
}


def _saved(directory: Path) -> list[int]:
    return sorted(int(d.name.removeprefix("iter_")) for d in directory.glob("iter_*"))


@pytest.mark.parametrize(
    ("arguments", "kill", "saved"),
    [
        pytest.param({}, None, [3, 6, 9, 12, 14], id="default"),
        pytest.param({"save_at_batch_size_change": True}, None, [3, 4, 6, 8, 9, 12, 14], id="all"),
        pytest.param({"ramp_save_interval": 6}, None, [6, 9, 12, 14], id="ramp-interval"),
        pytest.param({"ramp_save_interval": 6, "exit_interval": 3}, None, [3], id="exit-interval"),
        pytest.param(
            {"ramp_save_interval": 6, "exit_signal_handler": True}, 3, [3], id="signal"
        ),
        pytest.param(
            {"ramp_save_interval": 100, "step_batch_size_schedule": "0:4 4096:12",
             "train_samples": 24},
            None, [6], id="last-step",
        ),
    ],
)  # fmt: skip
def test_saves_in_a_ramp(
    corpus: Path, tmp_path: Path, arguments: dict[str, object], kill: int | None, saved: list[int]
) -> None:
    argv = model_argv(corpus, save=tmp_path / "checkpoints", **{**_RAMP, **arguments})
    signalled = (0, kill, signal.SIGTERM) if kill else None
    ended = train(argv, tmp_path / "logs", kill=signalled)
    assert ended.exit_codes == ([75] if kill else [0]), ended.ranks[0].log[-3000:]
    assert _saved(tmp_path / "checkpoints") == saved
