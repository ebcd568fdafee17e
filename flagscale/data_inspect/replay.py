"""A step's samples once more, from checkpoints: is it the data, or the state of the model?

A replay is a stock training run over a list of samples: one sample a step, a learning rate of 0, no
dropout, the weights of a checkpoint and nothing else of it. Its own ledger has the loss and the
gradient norm of each step, which are those of the sample. Beside the samples of the step in
question it reads those of a calm one, which say what the same weights make of ordinary data.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from flagscale.data_inspect.checksums import ids_crc
from flagscale.data_inspect.ledger import Ledger
from flagscale.errors import ConfigError, DataError, VerificationError

__all__ = [
    "Replay",
    "Score",
    "Verdict",
    "checkpoints_of",
    "execute_replay",
    "judge",
    "plan_replay",
]

STANDS_OUT: Final = 5.0
"""Standard errors by which a step's mean must exceed the calm step's, under the same weights."""

_REPLACED: Final = {
    "--micro-batch-size": "1",
    "--global-batch-size": "1",
    "--lr": "0",
    "--min-lr": "0",
    "--weight-decay": "0",
    "--attention-dropout": "0",
    "--hidden-dropout": "0",
    "--eval-iters": "0",
    "--num-workers": "0",
    "--log-interval": "1",
    "--dataloader-type": "single",
    "--context-parallel-size": "1",
    "--expert-model-parallel-size": "1",
}
_DROPPED: Final = frozenset(
    (
        *("--save", "--load", "--save-interval", "--tensorboard-dir", "--train-samples"),
        *("--step-batch-size-schedule", "--rampup-batch-size", "--iterations-to-skip"),
        *("--phase-transition-iterations", "--lr-warmup-fraction", "--lr-warmup-iters"),
        *("--lr-warmup-samples", "--lr-decay-iters", "--lr-decay-samples", "--train-iters"),
        *("--ledger-dir", "--no-ledger", "--quarantine", "--ckpt-step", "--no-data-sharding"),
        *("--exit-signal-handler", "--exit-signal", "--exit-interval", "--exit-duration-in-mins"),
        *("--decrease-batch-size-if-needed", "--replay-samples", "--async-save"),
        *("--lr-wsd-decay-iters", "--lr-wsd-decay-samples", "--save-retain-interval"),
        *("--use-checkpoint-opt_param-scheduler", "--override-opt_param-scheduler", "--finetune"),
    )
)


@dataclass(frozen=True)
class Replay:
    """A job that scores samples, planned.

    Args:
        argv: Of ``python -m flagscale.train``.
        num_ranks: Tensor times pipeline parallel size of the run.
        samples: What it reads, ``(dataset, sample index)``.
        num_samples: For which the datasets are built.
        work_dir: Its own: samples, log and ledger go there.
    """

    argv: tuple[str, ...]
    num_ranks: int
    samples: tuple[tuple[int, int], ...]
    num_samples: int
    work_dir: Path


@dataclass(frozen=True)
class Score:
    """What a checkpoint makes of a sample.

    Args:
        loss: Mean over its counted tokens; ``None`` if none counts.
        grad_norm: Of its gradient alone; ``None`` if upstream had none.
    """

    loss: float | None
    grad_norm: float | None


@dataclass(frozen=True)
class Verdict:
    """What the scores of one checkpoint say.

    Args:
        mean: Loss of the step's samples.
        calm_mean: Loss of the calm step's.
        excess: Their difference in standard errors.
    """

    mean: float
    calm_mean: float
    excess: float

    @property
    def stands_out(self) -> bool:
        """Whether the step's data are hard for these weights, too."""
        return self.excess > STANDS_OUT


def checkpoints_of(directory: Path) -> list[int]:
    """The iterations that a run has checkpoints of, rising."""
    return sorted(
        int(path.name.removeprefix("iter_"))
        for path in directory.glob("iter_*")
        if path.is_dir() and path.name.removeprefix("iter_").isdecimal()
    )


def plan_replay(
    segment: Mapping[str, Any],
    samples: Sequence[tuple[int, int]],
    num_samples: int,
    checkpoints: Path,
    iteration: int,
    work_dir: Path,
) -> Replay:
    """What to start.

    Args:
        segment: Of the start that ran the step, from the ledger.
        samples: ``(dataset, sample index)``, in the order wanted.
        num_samples: For which that start built its datasets.
        checkpoints: The directory of the checkpoints.
        iteration: Which of them.
        work_dir: For the replay's own files.
    """
    args = segment["args"]
    kept = _without(segment["argv"], _DROPPED | _REPLACED.keys())
    words = [word for option in _REPLACED.items() for word in option]
    words += ["--train-iters", str(len(samples)), "--ledger-dir", str(work_dir / "ledger")]
    words += ["--load", str(checkpoints), "--ckpt-step", str(iteration), "--finetune"]
    words += ["--no-load-optim", "--no-load-rng"]
    words += ["--replay-samples", str(work_dir / "samples.json")]
    ranks = int(args.get("tensor_model_parallel_size") or 1) * int(
        args.get("pipeline_model_parallel_size") or 1
    )
    return Replay((*kept, *words), ranks, tuple(samples), num_samples, work_dir)


def _without(argv: Sequence[str], options: frozenset[str] | set[str]) -> list[str]:
    """A command line without some options and their values."""
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            dropping = word.partition("=")[0] in options
        if not dropping:
            kept.append(word)
    return kept


def execute_replay(replay: Replay, *, platform: str | None = None) -> list[Score]:
    """Run it on this machine.

    Args:
        replay: The plan.
        platform: As ``--platform``; the run's own if not given.

    Returns:
        A score for each sample, in order.

    Raises:
        ConfigError: The job failed; its log is named.
        VerificationError: It did not read what it was to read.
    """
    work = replay.work_dir
    work.mkdir(parents=True, exist_ok=True)
    content = {"num_samples": replay.num_samples, "samples": replay.samples}
    (work / "samples.json").write_text(json.dumps(content))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--master-addr", "127.0.0.1"]
    command += ["--master-port", str(port), "--nproc-per-node", str(replay.num_ranks)]
    command += ["-m", "flagscale.train", *replay.argv]
    command += ["--platform", platform] if platform else []
    with (work / "log").open("wb") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise ConfigError(
            "the replay failed",
            where=str(work / "log"),
            got=f"exit code {done.returncode}",
            cure="read the log; a replay needs the devices of one replica of the model",
        )
    return _scores(replay)


def _scores(replay: Replay) -> list[Score]:
    (attempt,) = Ledger(replay.work_dir / "ledger").attempts
    (file,) = attempt.files.values()
    rows = list(file.rows())
    read = [row.ids_crc for row in rows]
    expected = [ids_crc(dataset, [sample]) for dataset, sample in replay.samples]
    if read != expected:
        raise VerificationError(
            "the replay did not read the samples it was to read",
            where=str(file.path),
            expected=f"{len(expected)} samples",
            got=f"{len(read)}, of which {sum(a == b for a, b in zip(read, expected, strict=False))}"
            " are those",
            cure="see the log beside it",
        )
    return [
        Score(None if row.sample_losses[0] < 0 else float(row.sample_losses[0]), row.grad_norm)
        for row in rows
    ]


def judge(scores: Sequence[Score], calm: Sequence[Score]) -> Verdict:
    """Hold a step's samples against a calm step's, under the same weights.

    Raises:
        DataError: One of the two has no loss.
    """
    step, usual = (
        np.array([np.nan if one.loss is None else one.loss for one in side])
        for side in (scores, calm)
    )
    step, usual = step[np.isfinite(step)], usual[np.isfinite(usual)]
    if not len(step) or len(usual) < 2:
        raise DataError(
            "there are too few losses to compare",
            expected="a loss of the step, and two of the calm one",
            got=[len(step), len(usual)],
            cure="choose another calm step: --calm-iteration",
        )
    deviation = max(float(usual.std(ddof=1)), 1e-6)
    error = deviation * float(np.sqrt(1 / len(step) + 1 / len(usual)))
    mean, calm_mean = float(step.mean()), float(usual.mean())
    return Verdict(mean, calm_mean, (mean - calm_mean) / error)
