"""The ledger of real trainings against what their ranks saw."""

from __future__ import annotations

import signal
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RunResult, train
from harness.corpus import model_argv, write_corpus
from harness.watch import WATCH, Drawn, read_watched

from flagscale.data_inspect.ledger import Ledger, Row
from flagscale.hooks import ForwardLoss, StepStart
from flagscale.train.ledger import _Step

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}


def run(
    tmp_path: Path, data: Any, nproc: int, *, name: str = "run", kill: Any = None, **overrides: Any
) -> RunResult:
    """Train with every rank watched; checkpoints and ledger in ``tmp_path/name``."""
    logs = tmp_path / f"{name}.logs"
    argv = model_argv(
        data, save=tmp_path / name, load=tmp_path / name, **{"save_interval": 100, **overrides}
    )
    return train(argv, logs, nproc, kill=kill, environ={WATCH: str(tmp_path / f"{name}.watch")})


def expect_row(row: Row, drawn: Drawn) -> None:
    """A row says what a watched rank of the last stage saw."""
    pairs = np.stack([drawn["dataset"], drawn["index"]], axis=-1).astype("<i8")
    assert row.ids_crc == zlib.crc32(pairs.tobytes())
    assert row.tokens_crc == zlib.crc32(drawn["tokens"].astype("<i8").tobytes())
    counted = drawn["counted"]
    samples = counted.shape[0] * counted.shape[1]
    assert (row.micro_batches, row.micro_batch_size) == counted.shape[:2]
    assert row.counted_tokens == counted.sum()
    sums = (drawn["losses"].astype(np.float64) * counted).reshape(samples, -1)
    mean = sums.sum(axis=1) / counted.reshape(samples, -1).sum(axis=1)
    np.testing.assert_allclose(row.sample_losses, mean, rtol=2**-10)  # fp16
    if row.block_losses.size:
        blocks = sums.reshape(samples, row.block_losses.shape[1], -1).mean(axis=2)
        np.testing.assert_allclose(row.block_losses, blocks, rtol=2**-10)


@pytest.mark.parametrize(
    ("nproc", "layout", "ranks"),
    [
        # ranks: of each data-parallel rank, the one that records
        pytest.param(2, {}, (0, 1), id="DP2"),
        pytest.param(2, TP2, (0,), id="TP2"),
        pytest.param(4, {**TP2, "sequence_parallel": True}, (0, 2), id="TP2-DP2-SP"),
        pytest.param(4, PP2, (2, 3), id="PP2-DP2"),
        pytest.param(4, {**TP2, **PP2, "num_virtual_stages_per_pipeline_rank": 2}, (2,), id="VPP"),
    ],
)
def test_rows_are_what_the_ranks_saw(
    corpus: Path, tmp_path: Path, nproc: int, layout: dict[str, Any], ranks: tuple[int, ...]
) -> None:
    done = run(
        tmp_path, corpus, nproc, **layout, train_iters=4, micro_batch_size=2,
        ledger_blocks=8, eval_iters=2, eval_interval=2, split="80,10,10", num_workers=1,
    ).require_success()  # fmt: skip
    watched = read_watched(tmp_path / "run.watch")
    ledger = Ledger(tmp_path / "run" / "ledger")
    (attempt,) = ledger.attempts
    assert sorted(attempt.files) == list(range(len(ranks)))
    steps = list(ledger.steps())
    assert [step.rows[0].iteration for step in steps] == [1, 2, 3, 4]
    for step in steps:
        assert step.complete
        for dp_rank, row in step.rows.items():
            expect_row(row, watched[row.iteration][ranks[dp_rank]])
            assert row.consumed_before == 12 * (row.iteration - 1)
            assert row.loss == np.float32(done.losses[row.iteration])
            seen = done.ranks[ranks[dp_rank]].steps[row.iteration - 1]
            assert row.grad_norm == np.float32(seen.grad_norm)
            assert row.learning_rate is not None
            assert (row.skipped, row.nan, row.rerun) == (False, False, False)


def test_a_blend_has_the_datasets_own_indices(corpus: Path, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", num_documents=50, seed=1)
    argv = model_argv(
        corpus, data_path=None, save=tmp_path / "run", train_iters=3, save_interval=100
    )
    argv += ["--data-path", "0.7", str(corpus), "0.3", str(other)]
    train(argv, tmp_path / "logs", environ={WATCH: str(tmp_path / "watch")}).require_success()
    watched = read_watched(tmp_path / "watch")
    ledger = Ledger(tmp_path / "run" / "ledger")
    for step in ledger.steps():
        drawn = watched[step.rows[0].iteration][0]
        assert set(drawn["dataset"].flat) == {0, 1}
        expect_row(step.rows[0], drawn)
    segment = ledger.attempts[0].segment
    assert [one["prefix"] for one in segment["datasets"]] == [str(corpus), str(other)]
    assert segment["blend"]["size"] >= 36
    assert segment["args"]["data_path"] == ["0.7", str(corpus), "0.3", str(other)]


def test_killed_and_restarted(corpus: Path, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"train_iters": 8, "save_interval": 4, "iterations_to_skip": 7}
    run(tmp_path, corpus, 2, kill=(1, 6, signal.SIGKILL), **facts)
    before = read_watched(tmp_path / "run.watch")
    again = {**facts, "micro_batch_size": 3}
    run(tmp_path, corpus, 4, **again).require_success()
    after = read_watched(tmp_path / "run.watch")  # writes over the steps that were done again
    ledger = Ledger(tmp_path / "run" / "ledger")
    first, second = ledger.attempts
    assert (first.start_iteration, second.start_iteration) == (0, 4)
    assert (first.dp_size, second.dp_size) == (2, 4)
    # Rank 1 was killed as iteration 6 ended, and with it the row of 5: it is written a step late.
    assert first.files[1].iterations == [1, 2, 3, 4]
    iterations = []
    for step in ledger.steps():
        assert step.complete
        (iteration,) = {row.iteration for row in step.rows.values()}
        iterations.append(iteration)
        seen = before if iteration <= 4 else after
        for rank, row in step.rows.items():
            expect_row(row, seen[iteration][rank])
    assert iterations == [1, 2, 3, 4, 5, 6, 8]  # 7 is skipped by request: nothing was trained
    last = ledger.step(8)
    assert last is not None
    assert last.rows[0].consumed_before == 7 * 12


def test_a_nan_step_is_marked(corpus: Path, tmp_path: Path) -> None:
    run(
        tmp_path, corpus, 1, train_iters=3, bf16=False, lr=1e30, min_lr=1e30, clip_grad=0.0,
        no_check_for_nan_in_loss_and_grad=True, use_distributed_optimizer=False,
    ).require_success()  # fmt: skip
    rows = [step.rows[0] for step in Ledger(tmp_path / "run" / "ledger").steps()]
    assert [row.nan for row in rows] == [False, False, True]
    assert [row.loss is None for row in rows] == [False, False, True]
    assert np.isnan(rows[2].sample_losses).any()


@pytest.mark.parametrize(
    ("rerun_mode", "exit_code"),
    [
        pytest.param("disabled", 1, id="raised"),
        # Upstream's rerun engine does the step once more, then leaves to be started elsewhere.
        pytest.param("validate_results", 16, id="repeated, then left"),
    ],
)
def test_a_step_that_ends_the_run_is_recorded_as_far_as_it_came(
    corpus: Path, tmp_path: Path, rerun_mode: str, exit_code: int
) -> None:
    facts: dict[str, Any] = {
        "bf16": False, "lr": 1e30, "min_lr": 1e30, "clip_grad": 0.0,
        "use_distributed_optimizer": False, "ledger_blocks": 16,
    }  # fmt: skip
    done = run(tmp_path, corpus, 1, train_iters=5, rerun_mode=rerun_mode, **facts)
    assert done.exit_codes == [exit_code]
    rows = [step.rows[0] for step in Ledger(tmp_path / "run" / "ledger").steps()]
    repeated = rerun_mode != "disabled"
    assert [(row.unfinished, row.rerun) for row in rows] == [(False, False), (True, repeated)]
    # What upstream has found is a NaN in the gradient; the losses were finite.
    assert (rows[1].loss, rows[1].grad_norm) == (None, None)
    # The same job with the same data, which only passes over the NaN, says what was drawn.
    run(
        tmp_path, corpus, 1, name="again", train_iters=2, no_check_for_nan_in_loss_and_grad=True,
        **facts,
    ).require_success()  # fmt: skip
    expect_row(rows[1], read_watched(tmp_path / "again.watch")[2][0])


def test_a_step_that_ends_between_two_micro_batches() -> None:
    step = _Step(StepStart(iteration=5, consumed_samples=16, num_micro_batches=4), 2)
    tokens = torch.arange(2 * 3 * 5).view(3, 2, 5)
    for micro_batch in range(3):
        batch = {"tokens": tokens[micro_batch, :, :4], "labels": tokens[micro_batch, :, 1:]}
        step.add_batch({**batch, "sample_index": torch.tensor([7, 8])})
        if micro_batch < 2:
            step.add_losses(ForwardLoss(torch.full((2, 4), 3.0), torch.ones(2, 4), None))
    row = step.unfinished_row()
    assert row is not None
    assert (row.iteration, row.micro_batches, row.unfinished, row.nan) == (5, 3, True, False)
    assert row.tokens_crc == zlib.crc32(tokens.numpy().tobytes())
    assert row.sample_losses.tolist() == [3, 3, 3, 3, -1, -1]
    assert row.block_losses.tolist() == 4 * [[3, 3]] + 2 * [[-1, -1]]


def test_an_overflowing_fp16_step_is_marked_as_skipped(corpus: Path, tmp_path: Path) -> None:
    run(
        tmp_path, corpus, 1, train_iters=3, bf16=False, fp16=True, initial_loss_scale=2.0**60,
    ).require_success()  # fmt: skip
    rows = [step.rows[0] for step in Ledger(tmp_path / "run" / "ledger").steps()]
    assert all(row.skipped for row in rows)
    assert all(row.loss is not None for row in rows)
    assert [row.consumed_before for row in rows] == [0, 12, 24]


def test_no_ledger_when_asked_for_none(corpus: Path, tmp_path: Path) -> None:
    run(tmp_path, corpus, 1, train_iters=1, no_ledger=True).require_success()
    assert not (tmp_path / "run" / "ledger").exists()


def test_a_place_that_cannot_be_written_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run(tmp_path, corpus, 1, train_iters=1, ledger_dir=tmp_path / "file" / "ledger")
    assert done.exit_codes == [2]
    assert "--no-ledger" in done.ranks[0].log or "ledger" in str(done.ranks[0].error)


def test_blocks_must_divide_a_sample(corpus: Path, tmp_path: Path) -> None:
    done = run(tmp_path, corpus, 1, train_iters=1, ledger_blocks=7)
    assert done.exit_codes == [2]
    assert "--ledger-blocks" in done.ranks[0].log
