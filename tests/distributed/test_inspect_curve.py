"""What a real training logs, read back: its log and its event files against what each step was."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from harness import RunResult, train
from harness.corpus import model_argv

from flagscale.data_inspect.curve import Curve, surviving
from flagscale.data_inspect.events import read_events
from flagscale.data_inspect.logs import read_log

_KILLED_AT = 14
_LAST = 30
_PASSED_OVER = (18, 20)


def _train(corpus: Path, work: Path) -> list[RunResult]:
    """A run that is killed behind a checkpoint, and goes on past some iterations."""
    argv = model_argv(
        corpus,
        num_layers=2,
        global_batch_size=4,
        train_iters=_LAST,
        log_interval=4,
        save=work / "checkpoints",
        load=work / "checkpoints",
        save_interval=9,
        tensorboard_dir=work / "tensorboard",
    )
    passing_over = [*argv, "--iterations-to-skip", *map(str, _PASSED_OVER)]
    return [
        train(argv, work / "logs" / "0", 1, kill=(0, _KILLED_AT, signal.SIGKILL)),
        train(passing_over, work / "logs" / "1", 1).require_success(),
    ]


@pytest.fixture(scope="module")
def runs(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[RunResult]]:
    work = tmp_path_factory.mktemp("run")
    return work, _train(corpus, work)


def _appended(work: Path) -> Curve:
    """The log as a job that is started again appends it to itself."""
    whole = work / "whole.log"
    whole.write_bytes(b"".join((work / "logs" / n / "rank_0.log").read_bytes() for n in "01"))
    return read_log(whole)


def test_each_printed_loss_is_the_mean_of_its_interval(
    runs: tuple[Path, list[RunResult]],
) -> None:
    work, results = runs
    curve = _appended(work)
    assert [(p.attempt, p.iteration) for p in curve.points] == [
        *((0, iteration) for iteration in (1, 4, 8, 12)),
        *((1, iteration) for iteration in (10, 12, 16, 24, 28)),
    ]
    for point in curve.points:
        losses = results[point.attempt].losses
        mean = [losses[i] for i in range(point.first_iteration, point.iteration + 1) if i in losses]
        assert point.loss == pytest.approx(sum(mean) / len(mean), abs=2e-6), point
        assert point.consumed_after == 4 * point.iteration
    assert [point.iteration for point in surviving(curve).points] == [1, 4, 8, 10, 12, 16, 24, 28]
    by_folder = read_log(work / "logs")
    assert [(p.attempt, p.loss) for p in by_folder.points] == [
        (p.attempt, p.loss) for p in curve.points
    ]


def test_event_files_have_every_step_exactly(runs: tuple[Path, list[RunResult]]) -> None:
    work, results = runs
    curve = read_events(work / "tensorboard")
    # The first was killed before its writer wrote out the last of its queue, if not all of it.
    silent = len(results) - len(curve.attempts)
    steps = {(point.attempt + silent, point.iteration): point for point in curve.points}
    truth = {
        (attempt, step.iteration): step
        for attempt, result in enumerate(results)
        for step in result.ranks[0].steps
        if step.losses
    }
    assert set(steps) <= set(truth)
    assert {attempt for attempt, _ in set(truth) - set(steps)} <= {0}
    for key, point in steps.items():
        assert point.loss == pytest.approx(truth[key].losses["lm loss"], rel=1e-7)
        assert point.skipped == 0
        if point.grad_norm is None:  # the kill came between two values of a step
            assert key == max(one for one in steps if one[0] == 0)
        else:
            assert point.grad_norm == pytest.approx(truth[key].grad_norm, rel=1e-6)
        assert point.consumed_after == 4 * point.iteration
