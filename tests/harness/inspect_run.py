"""A run's directory without a run: upstream's own datasets say what its ranks drew.

Two datasets in a blend, with documents of several sequences and padding tokens; a first start of
two ranks, that was killed, and a second of four, that went on from the checkpoint before. Beside
the ledger there are a log, an event file, caches and sidecars.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.data.sidecar import ROW_DTYPE, sidecar_paths, write_sidecar
from flagscale.data.sources import SourceStamp
from flagscale.data_inspect.checksums import ids_crc, tokens_crc
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.ledger import FORMAT, Row, encode_row, encode_segment, file_name
from harness.upstream_data import StubTokenizer, build_upstream, write_documents

__all__ = ["LAST", "WrittenRun", "write_run"]

SEQ_LENGTH, BLOCKS, BATCH, LAST, SAVED = 32, 4, 8, 24, 10
SEED = 1234
WEIGHTS = (0.7, 0.3)


@dataclass(frozen=True)
class _Start:
    attempt: str
    iteration: int
    last: int
    dp_size: int
    micro_batch_size: int


STARTS = (
    _Start("20260101T000000.000000Z-aaaaaa", 0, 14, 2, 2),
    _Start("20260102T000000.000000Z-bbbbbb", SAVED, LAST, 4, 1),
)


@dataclass(frozen=True)
class WrittenRun:
    """Where things are, and what was drawn.

    Args:
        directory: The run's directory.
        prefixes: Of the datasets.
        cache: Upstream's cached indices.
        drawn: By iteration and data-parallel rank, the ``(dataset, sample index)`` in the order
            drawn.
        tokens: The tokens of each sample, before padding is replaced.
    """

    directory: Path
    prefixes: tuple[Path, Path]
    cache: Path
    drawn: dict[int, dict[int, list[tuple[int, int]]]]
    tokens: dict[tuple[int, int], np.ndarray[Any, Any]]

    def files(self, kind: str) -> list[Path]:
        """The files of a kind: ledger, idx, bin, cache, description, sidecar, log or events."""
        patterns = {
            "ledger": (self.directory, "checkpoints/ledger/*/*.ledger"),
            "idx": (self.prefixes[0].parent, "*.idx"),
            "bin": (self.prefixes[0].parent, "*.bin"),
            "cache": (self.cache, "*.npy"),
            "description": (self.cache, "*.txt"),
            "sidecar": (self.prefixes[0].parent, "*.source.*"),
            "log": (self.directory, "logs/*"),
            "events": (self.directory, "tensorboard/*"),
        }
        folder, pattern = patterns[kind]
        return sorted(path for path in folder.glob(pattern) if path.is_file())


def write_run(folder: Path) -> WrittenRun:
    """Write a run below a folder that is there."""
    data, cache, run = folder / "data", folder / "cache", folder / "run"
    data.mkdir()
    rng = np.random.default_rng(0)
    prefixes = data / "web", data / "books"
    for number, (prefix, documents) in enumerate(zip(prefixes, (40, 15), strict=True)):
        shapes = [rng.integers(1, 60, rng.integers(1, 4)).tolist() for _ in range(documents)]
        write_documents(prefix, shapes, seed=number)
        _write_sidecar(prefix, documents)
    blend = [str(prefix) for prefix in prefixes], list(WEIGHTS)
    upstream = build_upstream(
        blend, LAST * BATCH, split="100,0,0", seed=SEED, seq_length=SEQ_LENGTH, cache=cache
    )
    written = WrittenRun(run, prefixes, cache, {}, {})
    for start in STARTS:
        _write_attempt(written, start, upstream)
    _write_log(written)
    _write_events(written)
    return written


def _write_sidecar(prefix: Path, documents: int) -> None:
    """Lines of two source files, of which the first ends with a blank one."""
    sources, rows = [], []
    for number, count in enumerate((documents // 2, documents - documents // 2)):
        source = Path(f"{prefix}-{number}.jsonl")
        lines = [json.dumps({"text": f"document {number} {i}" * (i % 5)}) for i in range(count)]
        source.write_text("\n".join([*lines, ""]) + "\n" * (number == 0))
        sources.append(SourceStamp.of(source))
        offset = 0
        for i, line in enumerate(lines):
            rows.append((number, len(line), i, offset))
            offset += len(line) + 1
    staged = sidecar_paths(prefix)
    packed = [np.array(rows, ROW_DTYPE)]
    write_sidecar(staged, prefix, documents, packed, sources, {"vocab_size": 1000})


def _write_attempt(written: WrittenRun, start: _Start, upstream: Any) -> None:
    rng = np.random.default_rng(start.iteration)
    folder = written.directory / "checkpoints" / "ledger" / start.attempt
    folder.mkdir(parents=True)
    files = {rank: [encode_segment(_segment(written, start, rank, upstream))]
             for rank in range(start.dp_size)}  # fmt: skip
    for iteration in range(start.iteration + 1, start.last + 1):
        written.drawn[iteration] = {}
        for rank in range(start.dp_size):
            drawn = list(_drawn(start, iteration, rank, upstream))
            written.drawn[iteration][rank] = drawn
            for dataset, sample in drawn:
                tokens = upstream.datasets[dataset]._query_document_sample_shuffle_indices(sample)
                written.tokens[dataset, sample] = tokens[0]
            files[rank].append(encode_row(_row(written, start, iteration, drawn, rng)))
    for rank, records in files.items():
        (folder / file_name(rank)).write_bytes(b"".join(records))
    (written.directory / "checkpoints" / "latest_checkpointed_iteration.txt").write_text(str(SAVED))


def _drawn(start: _Start, iteration: int, rank: int, upstream: Any) -> Iterator[tuple[int, int]]:
    """By the definition of upstream's sequential sampler."""
    size = start.micro_batch_size
    for slice_begin in range((iteration - 1) * BATCH, iteration * BATCH, size * start.dp_size):
        for index in range(slice_begin + rank * size, slice_begin + (rank + 1) * size):
            yield int(upstream.dataset_index[index]), int(upstream.dataset_sample_index[index])


def _row(
    written: WrittenRun,
    start: _Start,
    iteration: int,
    drawn: Sequence[tuple[int, int]],
    rng: np.random.Generator,
) -> Row:
    datasets, samples = np.array(drawn).T
    tokens = np.stack([written.tokens[one] for one in drawn]).astype(np.int64)
    tokens[tokens == StubTokenizer.pad] = 0
    blocks = rng.normal(2.5, 0.1, (len(drawn), BLOCKS)).astype(np.float32)
    return Row(
        iteration=iteration,
        consumed_before=(iteration - 1) * BATCH,
        micro_batches=len(drawn) // start.micro_batch_size,
        micro_batch_size=start.micro_batch_size,
        loss=9.5 if iteration == LAST - 1 else 2.5 + 0.01 * (iteration % 3),
        grad_norm=1.0,
        learning_rate=1e-3,
        ids_crc=ids_crc(datasets, samples),
        tokens_crc=tokens_crc(tokens),
        counted_tokens=len(drawn) * SEQ_LENGTH,
        quarantined_tokens=0,
        sample_losses=blocks.mean(axis=1),
        block_losses=blocks,
    )


def _arguments(written: WrittenRun, start: _Start) -> dict[str, Any]:
    web, books = map(str, written.prefixes)
    return {
        "seed": SEED,
        "seq_length": SEQ_LENGTH,
        "split": "100,0,0",
        "data_path": [str(WEIGHTS[0]), web, str(WEIGHTS[1]), books],
        "train_iters": LAST,
        "train_samples": None,
        "global_batch_size": BATCH,
        "micro_batch_size": start.micro_batch_size,
        "data_parallel_size": start.dp_size,
        "dataloader_type": "single",
        "data_sharding": True,
        "mid_level_dataset_surplus": 0.005,
        "data_cache_path": str(written.cache),
        "tokenizer_type": "NullTokenizer",
        "padded_vocab_size": 1024,
    }


def _segment(written: WrittenRun, start: _Start, rank: int, upstream: Any) -> dict[str, Any]:
    datasets = []
    for dataset, prefix in zip(upstream.datasets, written.prefixes, strict=True):
        with IndexedFile(prefix) as index:
            fingerprint = index.fingerprint()
        datasets.append(
            {
                "prefix": str(prefix),
                "num_samples": dataset.num_samples,
                "size": len(dataset),
                "description_hash": dataset.unique_description_hash,
                "fingerprint": fingerprint,
            }
        )
    return {
        "format": FORMAT,
        "attempt": start.attempt,
        "started": "2026-01-01T00:00:00+00:00",
        "dp_rank": rank,
        "dp_size": start.dp_size,
        "iteration": start.iteration,
        "consumed_samples": start.iteration * BATCH,
        "pad_token_id": StubTokenizer.pad,
        "args": _arguments(written, start),
        "argv": [],
        "versions": {},
        "blend": {
            "size": len(upstream),
            "description_hash": upstream.unique_description_hash,
        },
        "datasets": datasets,
    }


def _write_log(written: WrittenRun) -> None:
    """As rank 0 prints its arguments and the last rank its steps, in one file."""
    (written.directory / "logs").mkdir()
    lines: list[str] = []
    for start in STARTS:
        lines.append("------------------------ arguments ------------------------")
        lines += [f"  {k} {'.' * (46 - len(k))} {v}" for k, v in _arguments(written, start).items()]
        lines.append("-------------------- end of arguments ---------------------")
        if start.iteration:
            lines.append(f"  successfully loaded checkpoint from x at iteration {start.iteration}")
        for i in range(start.iteration + 1, start.last + 1):
            lines.append(
                f" [2026-01-0{1 + start.dp_size // 4} 00:00:{i:02d}.000000] iteration {i:8d}/ "
                f"{LAST:7d} | consumed samples: {i * BATCH:12d} | elapsed time per iteration (ms): "
                f"1.0 | learning rate: 1.000000E-03 | global batch size: {BATCH:5d} | lm loss: "
                f"{2.5 + 0.01 * (i % 3):.6E} | loss scale: 1.0 | grad norm: 1.000 | number of "
                "skipped iterations:   0 | number of nan iterations:   0 |"
            )
    (written.directory / "logs" / "rank_0.log").write_text("\n".join(lines) + "\n")


def _write_events(written: WrittenRun) -> None:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder = written.directory / "tensorboard"
    folder.mkdir()
    with (folder / "events.out.tfevents.1.vm.1.0").open("wb") as stream:
        writer = RecordWriter(stream)
        for i in range(1, LAST + 1):
            for tag, value in (("lm loss", 2.5), ("batch-size", BATCH), ("grad-norm", 1.0)):
                summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
                event = Event(wall_time=1000.0 + i, step=i, summary=summary)
                writer.write(event.SerializeToString())
        writer.flush()
