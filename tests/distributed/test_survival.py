"""Signals, crashes in mid-save, superseded attempts and hangs, in the real training loop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from harness import RunResult, train
from harness.corpus import model_argv
from harness.fault import fault

from flagscale.runs.attempt import ATTEMPT_VARIABLE, RUN_DIR_VARIABLE, begin_attempt, current
from flagscale.runs.complete import MARKER, newest_complete, problem_of
from flagscale.runs.finished import read_finished
from flagscale.runs.status import read_status

_TRACKER = "latest_checkpointed_iteration.txt"
_USR1 = {"exit_signal_handler": True, "exit_signal": "SIGUSR1"}


class Job:
    """A job that is started again and again into one run directory."""

    def __init__(self, corpus: Path, directory: Path, **arguments: object) -> None:
        self.directory = directory
        self.save = directory / "checkpoints"
        self._corpus = corpus
        self._arguments = {
            "save": self.save,
            "load": self.save,
            "save_interval": 2,
            "train_iters": 6,
            "global_batch_size": 4,
            "attention_dropout": 0.1,  # so that every generator's state matters
            **arguments,
        }
        directory.mkdir()

    def start(
        self,
        environ: dict[str, str] | None = None,
        *,
        kill: tuple[int, int, signal.Signals] | None = None,
        **arguments: object,
    ) -> RunResult:
        attempt = begin_attempt(self.directory, hosts=["here"], layout={}, world_size=2)
        return train(
            model_argv(self._corpus, **{**self._arguments, **arguments}),
            self.directory / f"logs.{attempt.number}",
            2,
            environ={
                RUN_DIR_VARIABLE: str(self.directory),
                ATTEMPT_VARIABLE: attempt.token,
                **(environ or {}),
            },
            kill=kill,
        )

    @property
    def tracker(self) -> str:
        return (self.save / _TRACKER).read_text()

    def saved(self) -> list[str]:
        return sorted(entry.name for entry in self.save.glob("iter_*"))


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, RunResult]:
    """A run that nothing happens to."""
    job = Job(corpus, tmp_path_factory.mktemp("whole") / "run")
    return job, job.start().require_success()


def test_a_finished_run_says_so(whole: tuple[Job, RunResult]) -> None:
    job, _ = whole
    finished, status = read_finished(job.directory), read_status(job.directory)
    assert finished is not None
    assert status is not None
    assert (finished.iteration, finished.train_iters, finished.consumed_samples) == (6, 6, 24)
    assert (status.attempt, status.iteration, status.tokens) == (1, 6, 24 * 64)
    assert status.train_tokens == 24 * 64
    assert status.last_checkpoint == 4  # the last step ends before its save
    assert status.loss is not None
    assert newest_complete(job.save) == 6
    marker = json.loads((job.save / "iter_0000006" / MARKER).read_text())
    assert marker["attempt"] == 1
    assert {".metadata", "metadata.json", "__1_0.distcp"} <= set(marker["files"])


def test_signals_are_kept_and_answered(
    corpus: Path, tmp_path: Path, whole: tuple[Job, RunResult]
) -> None:
    job = Job(corpus, tmp_path / "run", **_USR1)
    early = job.start(fault("early-signal", rank=1))
    assert early.exit_codes == [75, 75]
    assert job.tracker == "1"
    later = job.start(kill=(0, 3, signal.SIGUSR1))
    assert later.exit_codes == [75, 75]
    assert job.tracker == "3"
    assert read_finished(job.directory) is None
    at_the_end = job.start(kill=(1, 6, signal.SIGUSR1)).require_success()
    assert read_finished(job.directory) is not None
    losses = early.losses | later.losses | at_the_end.losses
    assert losses == whole[1].losses


def test_leaving_for_other_reasons(corpus: Path, tmp_path: Path) -> None:
    job = Job(corpus, tmp_path / "run", **_USR1)
    stale = job.save / "iter_0000001" / "__9_0.distcp"
    stale.parent.mkdir(parents=True)
    stale.touch()
    job.start(exit_interval=1, load=None).require_success()
    assert not stale.exists()
    assert job.saved() == ["iter_0000001", "iter_0000001.incomplete-1"]
    assert read_finished(job.directory) is None
    assert job.start(exit_duration_in_mins=-1).exit_codes == [75, 75]
    assert job.tracker == "2"
    lost = job.start(kill=(0, 1, signal.SIGUSR1), save=None, load=None)
    assert lost.exit_codes == [1, 1]
    assert "nothing was saved" in lost.ranks[0].log


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "torch"])
def test_killed_in_mid_save(
    corpus: Path, tmp_path: Path, whole: tuple[Job, RunResult], ckpt_format: str
) -> None:
    job = Job(corpus, tmp_path / "run", ckpt_format=ckpt_format)
    first = job.start(fault("die-in-save", rank=0, iteration=4))
    assert first.exit_codes[0] == -9
    half = job.save / "iter_0000004"
    assert any(path.is_file() for path in half.rglob("*"))
    assert job.tracker == "2"
    # Where another rank's data are missing upstream would not notice before it loads them.
    (job.save / _TRACKER).write_text("")
    again = job.start(fault("die-before-tracker", rank=0, iteration=4))
    assert again.exit_codes[0] == -9
    assert "iteration 4 is not whole" in again.ranks[0].log
    assert "the tracker was empty: going on from iteration 2" in again.ranks[0].log
    assert problem_of(half) is None
    last = job.start().require_success()
    assert "iteration 4 is whole, and the tracker still said 2" in last.ranks[0].log
    assert job.saved() == [
        "iter_0000002", "iter_0000004", "iter_0000004.incomplete-1", "iter_0000006",
    ]  # fmt: skip
    assert job.tracker == "6"
    assert sorted(last.losses) == [5, 6]
    assert first.losses | again.losses | last.losses == whole[1].losses


def test_a_superseded_attempt_publishes_nothing(corpus: Path, tmp_path: Path) -> None:
    job = Job(corpus, tmp_path / "run", save_interval=3)
    result = job.start(fault("superseded", rank=1, iteration=2))
    assert result.exit_codes == [76, 76]
    owner = current(job.directory)
    assert owner is not None
    assert owner.number == 2
    assert not list(job.save.glob("iter_*"))
    assert not (job.save / _TRACKER).exists()
    assert [rank.error for rank in result.ranks] == [None, None]
    assert "attempt 2 owns this run now" in result.ranks[0].log


def test_a_hang_is_named(corpus: Path, tmp_path: Path) -> None:
    job = Job(corpus, tmp_path / "run", hang_minutes=0.02, save=None, load=None)
    result = job.start(fault("hang", rank=1, iteration=3))
    assert result.exit_codes[1] == 77
    assert result.exit_codes[0] != 0
    errors = [rank.error or {} for rank in result.ranks]
    assert min(errors, key=lambda e: float(str(e.get("time", "inf"))))["rank"] == 1
    assert errors[1]["waiting"] is False
    assert "sleep_for_ever: time.sleep(1)" in str(errors[1]["line"])
    assert errors[1]["exit_code"] == 77
    for rank in result.ranks:
        assert "most recent call first" in rank.log  # the stacks
