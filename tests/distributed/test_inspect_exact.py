"""What is predicted of a step against what every rank of a real training was given to read."""

from __future__ import annotations

import random
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import train
from harness.corpus import model_argv, write_corpus
from harness.watch import WATCH, Drawn, read_watched

from flagscale.data_inspect.answers import Label, SampleAnswer, StepAnswer
from flagscale.data_inspect.locate import find_readings, locate
from flagscale.data_inspect.run import Run, open_run

PREFIXES = ("web", "books", "code")
TINY = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "seq_length": 32}
TINY |= {"max_position_embeddings": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets of different size."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (name, documents) in enumerate(zip(PREFIXES, (9, 5, 3), strict=True)):
        write_corpus(folder / name, num_documents=documents, seed=seed)
    return folder


def argv(data: Path, run: Path, blend: list[object], **overrides: Any) -> list[str]:
    facts = {**TINY, "save": run / "checkpoints", "load": run / "checkpoints", "save_interval": 100}
    words = model_argv(data, **{**facts, "data_path": None, **overrides})
    return [*words, "--data-path", *map(str, blend)]


def train_watched(words: list[str], run: Path, nproc: int, name: str, **more: Any) -> Any:
    """Train; what the ranks saw goes to ``run/watch``, where later starts write over it."""
    environ = {WATCH: str(run / "watch")}
    return train(words, run / name, nproc, environ=environ, **more)


def text_of(sample: SampleAnswer) -> np.ndarray[Any, Any]:
    """The tokens of a sample, straight from the bytes of the ``.bin``."""
    parts = []
    for span in sample.documents:
        count = span.token_end - span.token_start
        parts.append(np.fromfile(f"{sample.prefix}.bin", "<u2", count, offset=span.byte_offset))
        assert span.sample_start == sum(map(len, parts[:-1]))
        assert span.token_start >= 0
    return np.concatenate(parts)


def expect_step(
    run: Run, iteration: int, seen: Mapping[int, Drawn], tp: int, dp: int
) -> StepAnswer:
    """A step is predicted exactly: ids, tokens and spans of every rank that draws data."""
    answer = locate(run, iteration)
    assert answer.label is Label.EXACT, answer.reasons
    by_rank: dict[int, list[SampleAnswer]] = {}
    for sample in answer.samples:
        by_rank.setdefault(sample.rank, []).append(sample)
    assert sorted(by_rank) == list(range(dp))
    drawing = {rank: drawn for rank, drawn in seen.items() if "tokens" in drawn}
    assert {(rank // tp) % dp for rank in drawing} == set(range(dp))
    for rank, drawn in drawing.items():
        mine = by_rank[(rank // tp) % dp]
        shape = drawn["index"].shape
        assert [(s.micro_batch, s.position) for s in mine] == list(np.ndindex(*shape))
        assert [s.dataset for s in mine] == drawn["dataset"].ravel().tolist()
        assert [s.sample_index for s in mine] == drawn["index"].ravel().tolist()
        tokens = drawn["tokens"].reshape(len(mine), -1)
        for sample, expected in zip(mine, tokens, strict=True):
            np.testing.assert_array_equal(text_of(sample), expected)
    return answer


def expect_inverse(run: Run, answers: Sequence[StepAnswer], dataset: int) -> None:
    """A document is read when, and only when, a rank was given some of it."""
    reads: dict[int, Counter[tuple[int, int, int, int]]] = {}
    for answer in answers:
        for sample in answer.samples:
            if sample.dataset == dataset:
                place = (answer.iteration, sample.rank, sample.micro_batch, sample.position)
                for document in {span.document for span in sample.documents}:
                    reads.setdefault(document, Counter())[place] += 1
    assert reads
    for document in random.Random(0).sample(sorted(reads), min(3, len(reads))):
        expected = reads[document]
        found = [one for one in find_readings(run, dataset, document) if one.done]
        assert {one.label for one in found} == {Label.EXACT}
        got = Counter((r.iteration, r.rank, r.micro_batch, r.position) for r in found)
        assert got == expected
        for one in found:
            assert {span.document for span in one.spans} == {document}


CASES = {
    # Three datasets, the smaller ones read several times; the last epoch is shuffled apart.
    "TP2-PP2-blend": (
        4,
        [0.5, "web", 0.3, "books", 0.2, "code"],
        {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "train_iters": 30},
    ),
    # Without weights a blend is one epoch of each, which the cyclic sampler repeats.
    "DP2-cyclic": (
        2,
        ["web", "books", "code"],
        {"dataloader_type": "cyclic", "train_iters": 30, "micro_batch_size": 2},
    ),
    "DP3-cyclic-unsharded": (
        3,
        ["books", "code", "web"],
        {"dataloader_type": "cyclic", "no_data_sharding": True, "train_iters": 25},
    ),
    "DP2-schedule": (
        2,
        ["web"],
        {
            "step_batch_size_schedule": "0:4,640:8,2048:12",
            "global_batch_size": None,
            "train_iters": None,
            "train_samples": 240,
            "num_workers": 2,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_predicted_exactly(data: Path, tmp_path: Path, case: str) -> None:
    nproc, blend, overrides = CASES[case]
    words = [str(data / one) if isinstance(one, str) else one for one in blend]
    train_watched(argv(data, tmp_path, words, **overrides), tmp_path, nproc, "l").require_success()
    watched = read_watched(tmp_path / "watch")
    assert len(watched) >= 20
    run = open_run(tmp_path)
    tp = int(overrides.get("tensor_model_parallel_size", 1))
    pp = int(overrides.get("pipeline_model_parallel_size", 1))
    answers = [
        expect_step(run, iteration, seen, tp, nproc // tp // pp)
        for iteration, seen in watched.items()
    ]
    expect_inverse(run, answers, dataset=len(blend) // 2 if blend[0] == "books" else 0)


def test_restarted_otherwise_after_a_kill(data: Path, tmp_path: Path) -> None:
    words = [0.6, data / "web", 0.4, data / "books"]
    facts: dict[str, Any] = {"train_iters": 26, "save_interval": 5, "iterations_to_skip": 22}
    first = argv(data, tmp_path, words, **facts, micro_batch_size=2)
    train_watched(first, tmp_path, 2, "first", kill=(0, 13, signal.SIGKILL))
    before = read_watched(tmp_path / "watch")
    again = argv(data, tmp_path, words, **facts, micro_batch_size=1)
    train_watched(again, tmp_path, 4, "second").require_success()
    after = read_watched(tmp_path / "watch")
    run = open_run(tmp_path)
    assert [one.start.iteration for one in run.starts] == [0, 10]
    answers = [expect_step(run, i, before[i], 1, 2) for i in range(1, 11)]
    answers += [expect_step(run, i, after[i], 1, 4) for i in range(11, 27) if i != 22]
    skipped = locate(run, 22)
    assert (skipped.label, skipped.skipped) == (Label.RECONSTRUCTED, True)
    assert (skipped.consumed_before, skipped.consumed_after) == (21 * 12, 22 * 12)
    assert len(skipped.samples) == 12
    expect_inverse(run, answers, dataset=1)


def test_a_run_without_a_ledger_is_reconstructed_from_its_log(data: Path, tmp_path: Path) -> None:
    words = argv(data, tmp_path, [data / "web"], train_iters=20, micro_batch_size=2, no_ledger=True)
    train_watched(words, tmp_path, 2, "logs").require_success()
    watched = read_watched(tmp_path / "watch")
    run = open_run(tmp_path)
    assert run.ledger is None
    for iteration in random.Random(0).sample(sorted(watched), 5):
        answer = locate(run, iteration)
        assert answer.label is Label.RECONSTRUCTED
        assert "no ledger" in answer.reasons[0]
        for rank, drawn in watched[iteration].items():
            mine = [s for s in answer.samples if s.rank == rank]
            assert [s.sample_index for s in mine] == drawn["index"].ravel().tolist()
            for sample, expected in zip(mine, drawn["tokens"].reshape(len(mine), -1), strict=True):
                np.testing.assert_array_equal(text_of(sample), expected)
