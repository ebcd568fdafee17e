"""Does the ranking name planted bad documents? Real trainings, on this machine's CPU.

Each seed takes other documents of the tiny recipe's real text (English and Chinese, cut to at most
the sequence), replaces twenty of them by bad ones of four kinds and the same length, and trains a
tiny model for four epochs by the real entry with ``--ledger-blocks 64``. The ranking sees the run's
ledger and nothing else: once the means of samples only, as the default ledger has them, once the
blocks too. Beside it: documents in random order, and by the mean loss of their steps. The settings
were chosen on seeds 100 to 103.

``burst`` plants eight bad documents that fill half of one late step, which the mapping finds before
anything is trained. Then the spike detector, at its default settings, has to find the step, and the
ranking of that step the documents. The same run without them must raise no alarm.

A run that is done is kept: a bench that was stopped goes on.

Example:
    python bench/planted.py
    python bench/planted.py burst
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from harness import train  # noqa: E402
from harness.corpus import model_argv, write_corpus  # noqa: E402

from flagscale.data.corpus import prepare_tiny_data  # noqa: E402
from flagscale.data.tokenizer import train_tokenizer  # noqa: E402
from flagscale.data_inspect.answers import DocumentSpan  # noqa: E402
from flagscale.data_inspect.arguments import Blend, DataArguments  # noqa: E402
from flagscale.data_inspect.checksums import ids_crc  # noqa: E402
from flagscale.data_inspect.corpus import TrainingCorpus  # noqa: E402
from flagscale.data_inspect.excess import StepLosses  # noqa: E402
from flagscale.data_inspect.ledger import Ledger  # noqa: E402
from flagscale.data_inspect.logs import read_log  # noqa: E402
from flagscale.data_inspect.rank import rank  # noqa: E402
from flagscale.data_inspect.spikes import find_spikes  # noqa: E402

SEEDS = (0, 1, 2, 3, 4)
KINDS = ("bytes", "shuffled", "encoding", "foreign")
_EACH = 5
_SEQ_LENGTH = 256
_BATCH = 8
_DOCUMENTS, _EPOCHS = 4800, 4
_VOCAB = 1500
_TOKENS = (48, 256)  # of a document, its end included
_SCRIPTS = ((0xE01, 0xE2F), (0xAC00, 0xD7A4), (0x410, 0x450), (0x905, 0x939), (0x621, 0x64A))
_MODEL: dict[str, object] = {
    "num_layers": 2,
    "seq_length": _SEQ_LENGTH,
    "max_position_embeddings": _SEQ_LENGTH,
    "micro_batch_size": _BATCH,
    "global_batch_size": _BATCH,
    "lr": 4e-3,
    "min_lr": 4e-4,
    "lr_warmup_fraction": 0.05,
    "ledger_blocks": 64,
}
_BURST_DOCUMENTS, _BURST_STEPS, _BURST_AT = 10000, 1050, 900  # less than one epoch
_BURST_SIZE = 8


class Encoder:
    """Text to tokens, and the random numbers of a seed."""

    def __init__(self, tokenizer: Tokenizer, rng: random.Random) -> None:
        self.rng = rng
        self._tokenizer = tokenizer
        self._bytes = [tokenizer.token_to_id(sign) for sign in sorted(ByteLevel.alphabet())]

    def __call__(self, text: str) -> list[int]:
        """The text's tokens."""
        return self._tokenizer.encode(text).ids

    def random_bytes(self, size: int) -> list[int]:
        """Tokens of single bytes, as they come."""
        return self.rng.choices(self._bytes, k=size)


def tiny_data() -> Path:
    """The tiny recipe's text, made if it is not there."""
    path = ROOT / "outputs" / "tiny_data"
    if not (path / "corpus.jsonl").exists():
        prepare_tiny_data(path)
    return path / "corpus.jsonl"


def pieces(text: str, language: str, rng: random.Random) -> Iterator[str]:
    """Texts of a document's own size, cut where a line or a sentence ends."""
    ends = r"(?<=\n)" if language == "en" else r"(?<=[。!?\n])"
    low, high = (150, 700) if language == "en" else (60, 240)
    piece, size = "", rng.randint(low, high)
    for part in re.split(ends, text):
        piece += part
        if len(piece) >= size:
            yield piece
            piece, size = "", rng.randint(low, high)


def bad_ids(kind: str, number: int, texts: dict[str, list[str]], encode: Encoder) -> list[int]:
    """Tokens of a bad document, more than most documents have.

    Args:
        kind: One of four.
        number: Of the document among those of its kind, from 0: variants take turns.
        texts: Real ones, by language.
        encode: Of the seed.
    """
    rng = encode.rng
    real = {language: rng.choice(some) + rng.choice(some) for language, some in texts.items()}
    if kind == "bytes":
        return encode.random_bytes(_SEQ_LENGTH)
    if kind == "shuffled":
        words = re.split(r"(?<=\s)", real["en"]) if number % 2 else list(real["zh"])
        return encode("".join(rng.sample(words, len(words))))
    if kind == "encoding":
        raw = real["zh"].encode("gb18030") if number % 2 else real["zh"].encode()
        return encode(raw.decode("latin-1" if number % 2 else "gb18030", errors="replace"))
    if number % 2 == 0:
        return encode(base64.b64encode(rng.randbytes(1000)).decode())
    script = rng.choice(_SCRIPTS)
    return encode("".join(chr(rng.randrange(*script)) for _ in range(_SEQ_LENGTH)))


def write_world(directory: Path, seed: int) -> dict[int, str]:
    """Write the dataset of a seed; returns its bad documents' kinds by ordinal."""
    rng = random.Random(seed)
    rows = [json.loads(line) for line in tiny_data().read_text(encoding="utf-8").splitlines()]
    train_tokenizer((row["text"] for row in rows), _VOCAB, directory / "tokenizer")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer" / "tokenizer.json"))
    texts: dict[str, list[str]] = {"en": [], "zh": []}
    for row in rows:
        texts[row["language"]] += pieces(row["text"], row["language"], rng)
    encoded = [tokenizer.encode(text).ids for language in texts.values() for text in language]
    fitting = [ids for ids in encoded if _TOKENS[0] < len(ids) + 1 <= _TOKENS[1]]
    documents = rng.sample(fitting, _DOCUMENTS)
    places = rng.sample(range(_DOCUMENTS), _EACH * len(KINDS))
    planted = {place: KINDS[number % len(KINDS)] for number, place in enumerate(places)}
    encode = Encoder(tokenizer, rng)
    for number, (place, kind) in enumerate(planted.items()):
        ids = bad_ids(kind, number // len(KINDS), texts, encode)
        documents[place] = ids[: len(documents[place])]
    builder = IndexedDatasetBuilder(f"{directory / 'text_document'}.bin", dtype=np.uint16)
    for ids in documents:
        builder.add_document(torch.tensor([*ids, _VOCAB]), [len(ids) + 1])
    builder.finalize(f"{directory / 'text_document'}.idx")
    return planted


def trained(directory: Path, write: Callable[[], object], arguments: dict[str, object]) -> Any:
    """Write data and train on it, if that is not done yet; returns what the writer told."""
    if not (directory / "done").exists():
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        told = write()
        prefix = directory / "text_document"
        if "train_iters" not in arguments:
            tokens = prefix.with_suffix(".bin").stat().st_size // 2
            arguments["train_iters"] = tokens * _EPOCHS // (_SEQ_LENGTH * _BATCH)
        options = {**_MODEL, **arguments, "ledger_dir": directory / "ledger"}
        train(model_argv(prefix, **options), directory / "logs", timeout_s=3600).require_success()
        (directory / "planted.json").write_text(json.dumps(told))
        (directory / "done").touch()
    return json.loads((directory / "planted.json").read_text())


def observed(ledger: Ledger, corpus: TrainingCorpus) -> list[StepLosses]:
    """What the ledger has of each step; a mapping that is wrong by one sample ends the bench."""
    steps = []
    for step in ledger.steps():
        (row,) = step.rows.values()
        datasets, samples = corpus.locate(row.consumed_before + np.arange(len(row.sample_losses)))
        if ids_crc(datasets, samples) != row.ids_crc:
            raise RuntimeError(f"iteration {row.iteration}: the mapping is wrong")
        losses = row.sample_losses, row.block_losses
        steps.append(StepLosses(row.iteration, datasets, samples, *losses))
    return steps


def opened(directory: Path) -> tuple[Ledger, TrainingCorpus]:
    """A run's ledger, and its data."""
    ledger = Ledger(directory / "ledger")
    arguments = DataArguments.read(ledger.attempts[-1].segment["args"])
    wanted = (arguments.train_iters or 0) * arguments.global_batch_size
    return ledger, TrainingCorpus.open(arguments, wanted)


def by_step_loss(steps: Sequence[StepLosses], corpus: TrainingCorpus) -> list[int]:
    """Documents by the mean loss of the steps they were in."""
    losses: dict[int, list[float]] = {}
    for step in steps:
        loss = float(step.losses.mean())
        for spans in corpus.documents_of(step.datasets, step.samples):
            for span in spans:
                losses.setdefault(span.document, []).append(loss)
    means = {document: statistics.fmean(seen) for document, seen in losses.items()}
    return sorted(means, key=lambda document: -means[document])


def rankings(directory: Path, seed: int) -> dict[str, list[int]]:
    """Documents, those to be looked at first in front, by each way to rank them."""
    ledger, corpus = opened(directory)
    with corpus:
        steps = observed(ledger, corpus)
        found = {"step loss": by_step_loss(steps, corpus)}
        for name, blocks in (("samples", False), ("blocks", True)):
            ranking = rank(steps, corpus.documents_of, _SEQ_LENGTH, blocks=blocks, limit=None)
            found[name] = [one.document for one in ranking.hard]
    found["random"] = random.Random(seed).sample(range(_DOCUMENTS), _DOCUMENTS)
    return found


def planted(seeds: Sequence[int], work_dir: Path) -> None:
    """Train what is missing, rank, and print the table."""
    names = ("samples", "blocks", "step loss", "random")
    print(
        f"| seed | {' | '.join(f'{name}: P@20, R@40' for name in names)} | found of 5 by blocks |"
    )
    print("|" + "---|" * (len(names) + 2))
    totals: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for seed in seeds:
        directory = work_dir / f"seed-{seed}"
        told = trained(
            directory,
            partial(write_world, directory, seed),
            {"seed": seed + 1, "vocab_size": _VOCAB + 1},
        )
        bad = {int(place): kind for place, kind in told.items()}
        found = rankings(directory, seed)
        for name in names:
            first, twice = (sum(one in bad for one in found[name][:n]) for n in (20, 40))
            totals[name].append((first / 20, twice / len(bad)))
        top = [bad.get(one) for one in found["blocks"][:20]]
        kinds = ", ".join(f"{kind} {top.count(kind)}" for kind in KINDS)
        cells = " | ".join("{:.2f}, {:.2f}".format(*totals[name][-1]) for name in names)
        print(f"| {seed} | {cells} | {kinds} |", flush=True)
    means = [np.mean(totals[name], axis=0) for name in names]
    print(f"| mean | {' | '.join('{:.2f}, {:.2f}'.format(*mean) for mean in means)} | |")


def burst_documents(corpus: TrainingCorpus) -> list[DocumentSpan]:
    """Eight documents that fill half of a step, those that least reach out of it; a span each."""
    samples = (_BURST_AT - 1) * _BATCH + np.arange(_BATCH)
    spans = [span for part in corpus.documents_of(*corpus.locate(samples)) for span in part]
    inside: dict[int, int] = {}
    for span in spans:
        tokens = span.token_end - span.token_start
        inside[span.document] = inside.get(span.document, 0) + tokens
    index = corpus.dataset(0).index
    numbers = np.array(list(inside))
    outside = dict(zip(inside, index.lengths_of(numbers) - list(inside.values()), strict=True))
    half = _BATCH * _SEQ_LENGTH // 2

    def cost(chosen: tuple[int, ...]) -> tuple[bool, int]:
        filled = sum(inside[one] for one in chosen)
        return abs(filled - half) > half // 20, sum(int(outside[one]) for one in chosen)

    best = min(combinations(inside, _BURST_SIZE), key=cost)
    first = {span.document: span for span in reversed(spans)}
    for one in best:  # the inverse agrees: the document is read in that step
        if not set(corpus.find(0, one)) & set(corpus.locate(samples)[1]):
            raise RuntimeError(f"document {one}: the inverse of the mapping is wrong")
    return [first[one] for one in best]


def write_burst(directory: Path, seed: int, clean: bool) -> list[int]:
    """Write the dataset of a burst; returns the bad documents."""
    prefix = write_corpus(directory / "text_document", _BURST_DOCUMENTS, seed)
    arguments = DataArguments(
        Blend((str(prefix),), None),
        split="100,0,0",
        seed=seed + 1,
        seq_length=_SEQ_LENGTH,
        train_samples=None,
        train_iters=_BURST_STEPS,
        global_batch_size=_BATCH,
        micro_batch_size=_BATCH,
        dp_size=1,
    )
    rng = np.random.default_rng(seed)
    with TrainingCorpus.open(arguments, _BURST_STEPS * _BATCH) as corpus:
        chosen = [] if clean else burst_documents(corpus)
        lengths = {
            span.document: int(corpus.dataset(0).index.lengths_of(np.array([span.document]))[0])
            for span in chosen
        }
    with open(f"{prefix}.bin", "r+b") as stream:
        for span in chosen:
            stream.seek(span.byte_offset - 2 * span.token_start)
            stream.write(
                rng.integers(250, size=lengths[span.document] - 1, dtype=np.uint16).tobytes()
            )
    return [span.document for span in chosen]


def named_in_burst(
    steps: Sequence[StepLosses], corpus: TrainingCorpus, bad: Sequence[int]
) -> list[str]:
    """How many of the bad documents the step's ranking has among its first, by either ledger."""
    results = []
    for blocks in (False, True):
        ranking = rank(
            *(steps, corpus.documents_of, _SEQ_LENGTH),
            iterations=(_BURST_AT, _BURST_AT),
            blocks=blocks,
        )
        first = {one.document for one in ranking.hard[: len(bad)]}
        results.append(f"{len(first & set(bad))} of {ranking.documents}")
    return results


def burst(seeds: Sequence[int], work_dir: Path) -> int:
    """Train what is missing, detect and rank, and print the table; returns alarms on clean runs."""
    titles = ("seed", "alarms without", "alarm at the step", "loss there with, without")
    titles += ("other alarms: at the documents' rest, elsewhere", "named by samples, by blocks")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    false = 0
    for seed in seeds:
        found, losses, bad = {}, {}, []
        for name, clean in (("clean", True), ("burst", False)):
            directory = work_dir / f"{name}-{seed}"
            options = {"seed": seed + 1, "train_iters": _BURST_STEPS}
            bad = trained(directory, partial(write_burst, directory, seed, clean), options)
            curve = read_log(directory / "logs")
            found[name] = [spike.suspects[1] for spike in find_spikes(curve)]
            losses[name] = curve.points[_BURST_AT - 1].loss
        ledger, corpus = opened(work_dir / f"burst-{seed}")
        with corpus:
            named = named_in_burst(observed(ledger, corpus), corpus, bad)
            reads = {int(one) // _BATCH + 1 for each in bad for one in corpus.find(0, each)}
        others = [one for one in found["burst"] if one != _BURST_AT]
        rest = sum(one in reads for one in others)
        false += len(found["clean"])
        print(
            f"| {seed} | {len(found['clean'])} | {'yes' if _BURST_AT in found['burst'] else 'no'} "
            f"| {losses['burst']:.2f}, {losses['clean']:.2f} | {rest}, {len(others) - rest} "
            f"| {', '.join(named)} |",
            flush=True,
        )
    return false


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is not done yet; returns 1 if a clean run raised an alarm."""
    parser = argparse.ArgumentParser(description="Planted bad documents, found by their losses.")
    parser.add_argument("mode", nargs="?", default="planted", choices=("planted", "burst"))
    parser.add_argument("--work-dir", type=Path, default=ROOT / "outputs" / "planted")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    arguments = parser.parse_args(argv)
    os.nice(10)
    if arguments.mode == "burst":
        return 1 if burst(arguments.seeds, arguments.work_dir) else 0
    planted(arguments.seeds, arguments.work_dir)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
