"""Quarantined tokens do not count, and nothing else changes: no order, no step, no weight.

What a sample holds is told by stock upstream, from a twin of the dataset with documents of the same
lengths, in which every token has a number of its own.
"""

from __future__ import annotations

import itertools
import re
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import RunResult, train
from harness.checkpoint import read_tensors
from harness.corpus import model_argv, write_corpus
from harness.quarantine import train_watched
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from torch.utils.data import default_collate

from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.quarantine import (
    QuarantineEntry,
    QuarantineList,
    spans_by_sequence,
    write_quarantine,
)
from flagscale.train import step
from flagscale.train.dataset import GPTDataset, GPTDatasetConfig

_SEED = 1234  # upstream's default


class _Tokenizer:
    """As much of a tokenizer as datasets ask for."""

    vocab_size, pad, eod = 70_000, -1, 7
    unique_identifiers = {"class": "test"}  # noqa: RUF012


def write_documents(prefix: Path, documents: Sequence[Sequence[int]], tokens: Iterator[int]) -> str:
    """Documents of sequences of so many tokens, which come from ``tokens``."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for lengths in documents:
        content = torch.tensor([next(tokens) for _ in range(sum(lengths))])
        builder.add_document(content, list(lengths))
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_twin(prefix: Path, documents: Sequence[Sequence[int]]) -> str:
    return write_documents(prefix, documents, iter(range(10**9)))


def documents_of(prefix: Path) -> list[list[int]]:
    dataset = IndexedDataset(str(prefix))
    bounds = dataset.document_indices.tolist()
    lengths = dataset.sequence_lengths.tolist()
    return [lengths[i:j] for i, j in itertools.pairwise(bounds)]


def build(
    kind: type[Any], config: type[Any], prefixes: Sequence[str], size: int, **more: Any
) -> Any:
    """The training dataset that upstream's builder makes, of two prefixes at 3 : 7 or of one."""
    weights = [0.3, 0.7] if len(prefixes) == 2 else None
    values = {
        "random_seed": _SEED, "blend": (list(prefixes), weights), "split": "100,0,0",
        "tokenizer": _Tokenizer(), "reset_position_ids": False, "reset_attention_mask": False,
        "eod_mask_loss": False, "create_attention_mask": False, **more,
    }  # fmt: skip
    sizes = [size, 0, 0]
    return BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config(**values)).build()[0]


class Oracle:
    """Which tokens the samples of one or two datasets are made of, by stock upstream."""

    def __init__(
        self, where: Path, datasets: Sequence[Sequence[Sequence[int]]], size: int, **more: Any
    ) -> None:
        self._documents = datasets
        twins = []
        for ordinal, documents in enumerate(datasets):
            twins.append(write_twin(where / f"twin_{ordinal}", documents))
        config = gpt_dataset.GPTDatasetConfig
        self.top = build(gpt_dataset.GPTDataset, config, twins, size, **more)
        self._datasets = getattr(self.top, "datasets", [self.top])

    def labels(self, dataset: int, sample: int) -> list[int]:
        """The number of each label token of a sample."""
        found: list[int] = self._datasets[dataset][sample]["labels"].tolist()
        return found

    def numbers(self, dataset: int, document: int, start: int, end: int | None) -> set[int]:
        """The numbers of a span of a document."""
        before = [sum(lengths) for lengths in self._documents[dataset]]
        first = sum(before[:document])
        return set(range(first + start, first + (before[document] if end is None else end)))

    def spans(self, dataset: int, numbers: Iterable[int]) -> list[tuple[int, int, int]]:
        """(document, start, end) of tokens, one a token."""
        ends = np.cumsum([sum(lengths) for lengths in self._documents[dataset]])
        found = []
        for number in numbers:
            document = int(np.searchsorted(ends, number, "right"))
            offset = number - (int(ends[document - 1]) if document else 0)
            found.append((document, offset, offset + 1))
        return found


def quarantine(path: Path, spans: Iterable[tuple[str, int, int, int | None]]) -> QuarantineList:
    entries = tuple(QuarantineEntry(*span, "noise", "2026-11-24") for span in spans)
    fingerprints = {}
    for prefix in {entry.dataset for entry in entries}:
        with IndexedFile(prefix) as indexed:
            fingerprints[prefix] = indexed.fingerprint()
    written = QuarantineList(fingerprints, entries)
    write_quarantine(path, written)
    return written


# The dataset.


def files_in(folder: Path) -> dict[str, int]:
    """Their names and when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_cache_files_are_those_of_stock(tmp_path: Path) -> None:
    prefixes = [write_twin(tmp_path / name, [[20, 3], [50], [31]] * 4) for name in ("a", "b")]
    spans = {prefixes[0]: {sequence: np.array([[0, 2]]) for sequence in range(16)}}
    stock = build(
        gpt_dataset.GPTDataset, gpt_dataset.GPTDatasetConfig, prefixes, 20, sequence_length=8,
        path_to_cache=str(tmp_path / "cache"),
    )  # fmt: skip
    before = files_in(tmp_path / "cache")
    assert any("-GPTDataset-train-sample_index.npy" in name for name in before)
    for lazy in (False, True):
        ours = build(
            GPTDataset, GPTDatasetConfig, prefixes, 20, sequence_length=8,
            path_to_cache=str(tmp_path / "cache"), quarantined=spans, defer_npy_index_mmap=lazy,
        )  # fmt: skip
        assert files_in(tmp_path / "cache") == before
        assert ours.unique_description == stock.unique_description
        assert [type(one).__name__ for one in ours.datasets] == ["GPTDataset"] * 2
        assert type(ours.datasets[0]) is not type(stock.datasets[0])
        for index in range(20):
            assert torch.equal(ours[index]["tokens"], stock[index]["tokens"])
        assert any((ours[index]["loss_mask"] < 0).any() for index in range(20))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_mask_is_of_the_tokens_meant(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    where = tmp_path_factory.mktemp("data")
    some_documents = st.lists(
        st.lists(st.integers(1, 12), min_size=1, max_size=3), min_size=3, max_size=8
    )
    datasets = data.draw(st.lists(some_documents, min_size=1, max_size=2))
    size = data.draw(st.integers(1, 25))
    shape = {
        "sequence_length": data.draw(st.integers(2, 12)),
        "add_extra_token_to_sequence": data.draw(st.booleans()),
    }
    eod_mask = data.draw(st.booleans())
    oracle = Oracle(where, datasets, size, **shape)
    rng = np.random.default_rng(0)
    prefixes, meant, spans = [], [], {}
    for ordinal, documents in enumerate(datasets):
        tokens = iter(rng.integers(3, 11, 10**4).tolist())
        prefixes.append(write_documents(where / f"real_{ordinal}", documents, tokens))
        meant.append(set())
        rows = []
        for _ in range(data.draw(st.integers(0, 4))):
            document = data.draw(st.integers(0, len(documents) - 1))
            start = data.draw(st.integers(0, sum(documents[document]) - 1))
            end = data.draw(st.none() | st.integers(start + 1, sum(documents[document])))
            rows.append(QuarantineEntry(prefixes[-1], document, start, end, "", "2026-11-24"))
            meant[-1] |= oracle.numbers(ordinal, document, start, end)
        with IndexedFile(prefixes[-1]) as indexed:
            spans[prefixes[-1]] = spans_by_sequence(rows, indexed)

    shape |= {"eod_mask_loss": eod_mask}
    stock = build(gpt_dataset.GPTDataset, gpt_dataset.GPTDatasetConfig, prefixes, size, **shape)
    ours = build(GPTDataset, GPTDatasetConfig, prefixes, size, quarantined=spans, **shape)
    order = data.draw(st.permutations(range(len(stock))))
    for index in [*order, *order]:  # the first one's mask is the one that upstream keeps
        wanted, item = stock[index], ours[index]
        dataset = int(item.get("dataset_id", 0))
        sample = int(item.pop("sample_index"))
        if len(prefixes) == 2:
            assert sample == ours.dataset_sample_index[index]
        else:
            assert sample == index
        labels = oracle.labels(dataset, sample)
        if not shape["add_extra_token_to_sequence"]:
            labels[-1] = -1  # no token of the dataset: upstream pads
        bad = torch.tensor([number in meant[dataset] for number in labels])
        mask = torch.where(bad & (wanted["loss_mask"] > 0), -1.0, wanted["loss_mask"])
        assert torch.equal(item.pop("loss_mask"), mask)
        wanted.pop("loss_mask")
        assert item.keys() == wanted.keys()
        assert all(np.array_equal(item[key], wanted[key]) for key in item)


def test_items_collate_and_padding_is_no_sample(tmp_path: Path) -> None:
    prefix = write_twin(tmp_path / "a", [[20], [30]])
    spans = {prefix: {0: np.array([[0, 20]]), 1: np.array([[0, 30]])}}
    ours = build(GPTDataset, GPTDatasetConfig, [prefix], 4, sequence_length=8, quarantined=spans)
    batch = default_collate([ours[np.int64(2)], ours[0], ours[None]])
    assert batch["sample_index"].tolist() == [2, 0, -1]
    assert batch["sample_index"].dtype == torch.int64
    assert batch["loss_mask"].tolist() == [[-1.0] * 8, [-1.0] * 8, [0.0] * 8]
    assert batch["loss_mask"].dtype == torch.float32


def test_validation_is_not_masked(tmp_path: Path) -> None:
    prefix = write_twin(tmp_path / "a", [[20]] * 10)
    spans = {prefix: {i: np.array([[0, 20]]) for i in range(10)}}
    config = GPTDatasetConfig(
        random_seed=_SEED, blend=([prefix], None), split="60,20,20", tokenizer=_Tokenizer(),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
        sequence_length=8, quarantined=spans,
    )  # fmt: skip
    splits = BlendedMegatronDatasetBuilder(GPTDataset, [2, 2, 2], lambda: True, config).build()
    assert [float(split[1]["loss_mask"].min()) for split in splits] == [-1.0, 1.0, 1.0]


# The loss.

masks = st.lists(st.sampled_from([0.0, 1.0, -1.0]), min_size=6, max_size=6)


@settings(deadline=None)
@given(masks, st.integers(0, 2**32 - 1))
def test_the_loss_is_stock_arithmetic_over_what_counts(coded: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(2, 3, generator=generator) * 9
    coded_mask = torch.tensor(coded).view(2, 3)
    mask, quarantined = coded_mask.clamp(min=0), coded_mask < 0

    with pytest.MonkeyPatch.context() as patch:
        args = Namespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=False)
        patch.setattr(step, "get_args", lambda: args)
        loss, count, report = step.masked_loss(mask, None, losses)
        stock = torch.sum(losses.view(-1) * mask.view(-1))
        assert loss.equal(stock)
        assert (count.dtype, count.item()) == (torch.int32, coded.count(1.0))
        assert report["lm loss"].tolist() == [stock.item(), coded.count(1.0)]

        spoiled = losses.clone()
        spoiled[quarantined] = torch.inf
        loss, count, report = step.masked_loss(mask, quarantined, spoiled)
    assert loss.equal(stock)
    assert (count.dtype, count.item()) == (torch.int32, coded.count(1.0) + coded.count(-1.0))
    assert report["lm loss"].tolist() == [stock.item(), coded.count(1.0) or 2.0**-40]


def test_micro_batches_in_which_nothing_counts_are_lost_in_the_sum() -> None:
    reports = [torch.tensor([0.0, step._NOTHING_COUNTED])] * 50_000
    for counted in (1.0, 3.0, 4096.0):
        for order in (
            [torch.tensor([5.0, counted]), *reports],
            [*reports, torch.tensor([5.0, counted])],
        ):
            assert torch.vstack(order).sum(dim=0).tolist() == [5.0, counted]
    nothing = torch.vstack(reports).sum(dim=0)
    assert (nothing[0] / nothing[1]).item() == 0.0


# Whole trainings.

_SMALL = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "num_query_groups": 2,
    "ffn_hidden_size": 64, "seq_length": 32, "max_position_embeddings": 32,
    "micro_batch_size": 2, "global_batch_size": 8, "train_iters": 5,
}  # fmt: skip
_SAMPLES = 40


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    where = tmp_path_factory.mktemp("corpora")
    return [write_corpus(where / f"{seed}_document", 60, seed) for seed in (1, 2)]


@pytest.fixture
def oracle_of(tmp_path: Path) -> Any:
    def make(prefixes: Sequence[Path]) -> Oracle:
        where = tmp_path / "twins"
        where.mkdir()
        return Oracle(where, [documents_of(p) for p in prefixes], _SAMPLES, sequence_length=32)

    return make


def argv_of(prefixes: Sequence[Path], **more: object) -> list[str]:
    words = ["0.3", prefixes[0], "0.7", prefixes[1]] if len(prefixes) == 2 else list(prefixes)
    argv = model_argv(prefixes[0], **{**_SMALL, "data_path": None, **more})
    return [*argv, "--data-path", *map(str, words)]


def steps_of(arrays: np.ndarray[Any, Any], steps: int = 5) -> np.ndarray[Any, Any]:
    """[step, sample, ...] of [micro batch, b, ...]."""
    return arrays.reshape(steps, -1, *arrays.shape[2:])


def consumed(result: RunResult) -> list[tuple[str, ...]]:
    pattern = r"iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+)"
    return [found for rank in result.ranks for found in re.findall(pattern, rank.log)]


def expected_masks(
    oracle: Oracle, listed: QuarantineList, prefixes: Sequence[Path], drawn: Any
) -> np.ndarray[Any, Any]:
    """[micro batch, b, s] bool."""
    meant: list[set[int]] = [set() for _ in prefixes]
    for entry in listed.entries:
        dataset = [str(prefix) for prefix in prefixes].index(entry.dataset)
        span = (entry.document, entry.token_start, entry.token_end)
        meant[dataset] |= oracle.numbers(dataset, *span)
    samples = drawn["sample_index"]
    datasets = drawn.get("dataset_id", np.zeros_like(samples))
    bad = [
        [number in meant[dataset] for number in oracle.labels(int(dataset), int(sample))]
        for dataset, sample in zip(datasets.flat, samples.flat, strict=True)
    ]
    return np.array(bad).reshape(*samples.shape, -1)


def spans_of(
    oracle: Oracle, prefixes: Sequence[Path], drawn: Any, chosen: np.ndarray[Any, Any]
) -> list[tuple[str, int, int, int | None]]:
    """Entries for the chosen [micro batch, b, s] labels."""
    samples = drawn["sample_index"]
    datasets = drawn.get("dataset_id", np.zeros_like(samples))
    found: list[tuple[str, int, int, int | None]] = []
    for place in np.ndindex(*samples.shape):
        dataset = int(datasets[place])
        labels = np.array(oracle.labels(dataset, int(samples[place])))
        spans = oracle.spans(dataset, labels[chosen[place]].tolist())
        found += [(str(prefixes[dataset]), *span) for span in spans]
    return found


LAYOUTS = {
    "two workers, two datasets": (1, 2, {"num_workers": 2}),
    "TP2": (2, 1, {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "PP2": (2, 1, {"pipeline_model_parallel_size": 2}),
    "DP2": (2, 1, {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_but_the_mask_changes(
    corpora: list[Path], oracle_of: Any, tmp_path: Path, layout: str
) -> None:
    nproc, datasets, more = LAYOUTS[layout]
    prefixes = corpora[:datasets]
    oracle = oracle_of(prefixes)
    plain = train_watched(argv_of(prefixes, **more), tmp_path / "plain", nproc)

    # A part of the stream's first sample, a whole sample, a whole step.
    spans = []
    for rank in {"DP2": (0, 1)}.get(layout, (0,)):
        drawn = plain.drawn[rank]
        chosen = np.zeros(drawn["loss_mask"].shape, np.bool_)
        by_step = steps_of(chosen)
        by_step[0, 0, :9] = rank == 0
        by_step[2, 1] = True
        by_step[3] = True
        spans += spans_of(oracle, prefixes, drawn, chosen)
    path = tmp_path / "quarantine.json"
    listed = quarantine(path, spans)
    masked = train_watched(argv_of(prefixes, quarantine=path, **more), tmp_path / "masked", nproc)

    for before, after in zip(plain.drawn, masked.drawn, strict=True):
        assert before.keys() == after.keys()
        for name in before.keys() - {"loss_mask"}:
            assert np.array_equal(before[name], after[name]), name
        if before:
            bad = expected_masks(oracle, listed, prefixes, before)
            assert np.array_equal(after["loss_mask"], np.where(bad, -1.0, before["loss_mask"]))
            assert steps_of(bad)[3].all()
            assert steps_of(bad)[0, 0, :9].all() == (before is plain.drawn[0] or layout != "DP2")
            assert not steps_of(bad)[[1, 4]].any()

    watchers = [rank for rank, losses in enumerate(plain.losses) if losses]
    assert watchers == {"PP2": [1], "two workers, two datasets": [0]}.get(layout, [0, 1])
    sums = np.zeros((5, 2))
    for rank in watchers:
        reader = 0 if layout == "TP2" else rank
        before, after = plain.losses[rank], masked.losses[rank]
        bad = expected_masks(oracle, listed, prefixes, plain.drawn[reader])
        assert "quarantined" not in before
        assert np.array_equal(after["quarantined"].astype(np.bool_), bad)
        assert np.array_equal(after["loss_mask"], np.where(bad, 0.0, before["loss_mask"]))
        # The first step holds a quarantined token, the second has been led to by another update.
        losses = [steps_of(run["token_losses"]) for run in (before, after)]
        assert np.array_equal(losses[0][0].view(np.int32), losses[1][0].view(np.int32))
        assert not np.array_equal(losses[0][1], losses[1][1])
        if rank == reader or rank == 0:
            counts = steps_of(after["loss_mask"]).astype(np.float64)
            sums += np.stack([(losses[1] * counts).sum((1, 2)), counts.sum((1, 2))], axis=1)

    assert consumed(masked.result) == consumed(plain.result)
    assert len(consumed(plain.result)) == 5
    assert masked.result.losses[4] == 0.0
    for i in (0, 1, 2, 4):
        assert masked.result.losses[i + 1] == pytest.approx(sums[i, 0] / sums[i, 1], rel=1e-5)
    for rank in masked.result.ranks:
        assert not any(one.skipped for one in rank.steps)
        assert [one.grad_norm == 0 for one in rank.steps] == [False, False, False, True, False]
        assert "nan iterations:   0" in rank.log or "lm loss" not in rank.log
    logged = re.findall(r"lm loss: (\S+)", "".join(rank.log for rank in masked.result.ranks))
    assert len(logged) == 5
    assert float(logged[3]) == 0.0


def test_a_resumed_job_is_the_same_up_to_the_first_quarantined_token(
    corpora: list[Path], oracle_of: Any, tmp_path: Path
) -> None:
    prefixes = corpora[:1]
    oracle = oracle_of(prefixes)
    save = tmp_path / "plain_checkpoints"
    plain = train_watched(argv_of(prefixes, save=save, save_interval=3), tmp_path / "plain", 2)

    spans = []
    for drawn in plain.drawn:
        chosen = np.zeros(drawn["loss_mask"].shape, np.bool_)
        steps_of(chosen)[4, 2, 5:20] = True
        spans += spans_of(oracle, prefixes, drawn, chosen)
    path = tmp_path / "quarantine.json"
    quarantine(path, spans)
    more = {"load": save, "ckpt_step": 3, "save": tmp_path / "checkpoints", "save_interval": 1}
    resumed = train_watched(argv_of(prefixes, quarantine=path, **more), tmp_path / "resumed", 2)

    assert sorted(resumed.result.losses) == [4, 5]
    assert resumed.result.losses[4] == plain.result.losses[4]
    assert resumed.result.losses[5] != plain.result.losses[5]
    for rank in range(2):
        steps = plain.result.ranks[rank].steps, resumed.result.ranks[rank].steps
        assert steps[0][3].grad_norm == steps[1][0].grad_norm
        assert steps[0][4].grad_norm != steps[1][1].grad_norm
        before, after = plain.losses[rank], resumed.losses[rank]
        last = steps_of(before["token_losses"])[3:], steps_of(after["token_losses"], 2)
        assert np.array_equal(last[0].view(np.int32), last[1].view(np.int32))
        for name in ("tokens", "sample_index"):
            drawn = steps_of(plain.drawn[rank][name])[3:]
            assert np.array_equal(steps_of(resumed.drawn[rank][name], 2), drawn)
    assert consumed(resumed.result) == consumed(plain.result)[3:]

    states = [read_tensors(folder / "iter_0000005") for folder in (save, tmp_path / "checkpoints")]
    shapes = [{name: tensor.shape for name, tensor in state.items()} for state in states]
    assert shapes[0] == shapes[1]
    assert any(not torch.equal(states[0][name], states[1][name]) for name in shapes[0])


@pytest.mark.parametrize("per_token", [False, True])
def test_unmasked_tokens_keep_their_weight(
    corpora: list[Path], oracle_of: Any, tmp_path: Path, per_token: bool
) -> None:
    prefixes = corpora[:1]
    oracle = oracle_of(prefixes)
    more = {
        "bf16": None, "use_distributed_optimizer": None, "clip_grad": 0.0, "train_iters": 1,
        "eod_mask_loss": True, "calculate_per_token_loss": per_token,
    }  # fmt: skip
    plain = train_watched(argv_of(prefixes, **more), tmp_path / "plain")
    drawn = plain.drawn[0]
    chosen = np.zeros(drawn["loss_mask"].shape, np.bool_)
    chosen[0, :, 3:31] = True  # few are left: where each micro batch is divided by what is left,
    chosen[1, 1] = True  # they would have the weight of all
    chosen[3] = True
    path = tmp_path / "quarantine.json"
    listed = quarantine(path, spans_of(oracle, prefixes, drawn, chosen))
    bad = expected_masks(oracle, listed, prefixes, drawn)
    assert (bad >= chosen).all()

    mask = drawn["loss_mask"].astype(np.float64)
    assert 0 < (mask == 0).sum() < 20, "some ends of documents, which upstream masks itself"
    count = mask.sum() if per_token else mask.sum((1, 2), keepdims=True) * len(mask)
    np.save(tmp_path / "weights.npy", mask * ~bad / count)
    masked = train_watched(
        argv_of(prefixes, quarantine=path, **more),
        tmp_path / "masked",
        weights=tmp_path / "weights.npy",
    )
    squares = 0.0
    for name, gradient in masked.gradients[0].items():
        scale = np.abs(gradient["wanted"]).max()
        assert scale > 0, name
        assert np.abs(gradient["got"] - gradient["wanted"]).max() < 1e-5 * scale, name
        squares += float((gradient["wanted"] ** 2).sum())
    (only,) = masked.result.ranks[0].steps
    assert only.grad_norm == pytest.approx(squares**0.5, rel=1e-5)


# What is refused.


def test_what_cannot_be_in_force_is_refused(corpora: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "quarantine.json"
    quarantine(path, [(str(corpora[1]), 0, 0, None)])

    def refusal(name: str, **more: object) -> str:
        argv = argv_of(corpora[:1], quarantine=path, **more)
        (rank,) = train(argv, tmp_path / name).ranks
        assert rank.exit_code == 2
        assert rank.error is not None
        return str(rank.error["message"])

    unread = refusal("unread")
    assert str(corpora[0]) in unread
    assert str(corpora[1]) in unread
    quarantine(path, [(str(corpora[0]), 0, 0, None)])
    assert "--mtp-num-layers" in refusal("mtp", mtp_num_layers=1)
    path.write_text("{")
    assert f"--quarantine, {path}" in refusal("broken")
    path.unlink()
    missing = refusal("missing")
    assert "--quarantine" in missing
    assert str(path) in missing


def test_another_dataset_and_another_list_are_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "text_document", 20)
    path, other = tmp_path / "quarantine.json", tmp_path / "other.json"
    quarantine(path, [(str(prefix), 0, 0, None)])
    quarantine(other, [(str(prefix), 1, 0, None)])
    run = train_watched(
        argv_of([prefix], quarantine=path), tmp_path / "lists", 2, other_lists={1: other}
    )
    assert run.result.exit_codes == [2, 2]
    for rank in run.result.ranks:
        assert rank.error is not None
        assert "different quarantine lists" in str(rank.error["message"])
        assert "on rank 1" in str(rank.error["message"])

    write_corpus(prefix, 20, seed=3)
    (rank,) = train(argv_of([prefix], quarantine=path), tmp_path / "rewritten").ranks
    assert rank.exit_code == 2
    assert rank.error is not None
    assert f"{prefix}.idx" in str(rank.error["message"])
