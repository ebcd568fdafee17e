"""The unit of work of preprocessing: a run of whole lines, tokenised into a directory of its own.

A directory is published by renaming it, so it is there whole or not at all; what is there is the
journal a later run goes on from. For each key it holds ``<number of the key>.{bin,idx,npy}``, the
last being the rows of the sidecar, and ``counts.json`` for all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.data.output import flush_to_disk, writing_to
from flagscale.data.sidecar import ROW_DTYPE
from flagscale.data.sources import MalformedLineError, SourceFile, SourceStamp, json_texts
from flagscale.data.tokenizer import TokenizerChoice, build_tokenizer
from flagscale.errors import DataError

__all__ = ["Counts", "PreprocessSettings", "Shard", "ShardResult", "cut_shards", "shard_tokenizer"]


@dataclass(frozen=True)
class PreprocessSettings:
    """What decides the bytes of the output, beside the inputs.

    Args:
        tokenizer: What turns text into tokens.
        json_keys: The string fields of a line to tokenise, each into a dataset of its own.
        append_eod: End every document with the tokenizer's end-of-document token.
        shard_bytes: Uncompressed bytes in a shard, about: what a worker holds in memory, and the
            most it can lose when it is killed. Does not change the output.
    """

    tokenizer: TokenizerChoice
    json_keys: tuple[str, ...] = ("text",)
    append_eod: bool = False
    shard_bytes: int = 8 << 20


@dataclass
class Counts:
    """What became of the input.

    Args:
        documents: Documents written, for each key.
        empty: Documents without a single token, left out, for each key.
        tokens: Tokens written, end-of-document tokens included, for each key.
        lines: All lines.
        blank: Lines of nothing but white space.
        malformed: ``[index of the file, 1-based line, problem]`` of each malformed line.
    """

    documents: dict[str, int]
    empty: dict[str, int]
    tokens: dict[str, int]
    lines: int = 0
    blank: int = 0
    malformed: list[tuple[int, int, str]] = field(default_factory=list)

    @classmethod
    def zero(cls, keys: Sequence[str]) -> Counts:
        """Nothing yet, of any key."""
        return cls(
            documents=dict.fromkeys(keys, 0),
            empty=dict.fromkeys(keys, 0),
            tokens=dict.fromkeys(keys, 0),
        )

    @classmethod
    def read(cls, directory: Path) -> Counts:
        """The counts of a published shard."""
        return cls(**json.loads((directory / "counts.json").read_text(encoding="utf-8")))

    def add(self, other: Counts) -> None:
        """Add another shard's counts to these."""
        self.lines += other.lines
        self.blank += other.blank
        for mine, theirs in (
            (self.documents, other.documents),
            (self.empty, other.empty),
            (self.tokens, other.tokens),
        ):
            for key, number in theirs.items():
                mine[key] += number
        self.malformed.extend(other.malformed)


@dataclass(frozen=True)
class Shard:
    """A run of whole lines of one file.

    Args:
        directory: Where its result is published.
        file: Index among the inputs.
        path: The file, for messages.
        first_line: 0-based.
        first_offset: Bytes of the uncompressed stream before it.
        lines: With their ends.
        disk_bytes: Bytes read from disk for it; for progress only.
    """

    directory: Path
    file: int
    path: str
    first_line: int
    first_offset: int
    lines: list[bytes]
    disk_bytes: int


@dataclass(frozen=True)
class ShardResult:
    """What a worker answers when a shard is published."""

    disk_bytes: int
    counts: Counts


def cut_shards(stamps: Sequence[SourceStamp], journal: Path, shard_bytes: int) -> Iterator[Shard]:
    """Cut the inputs into shards; where the cuts fall depends on nothing but the bytes."""
    ordinal = count()
    for file, stamp in enumerate(stamps):
        with SourceFile(stamp.path) as source:
            disk_bytes = 0
            for first_line, first_offset, lines in _runs(source.lines(), shard_bytes):
                yield Shard(
                    directory=journal / f"{next(ordinal):08d}",
                    file=file,
                    path=stamp.path,
                    first_line=first_line,
                    first_offset=first_offset,
                    lines=lines,
                    disk_bytes=source.disk_bytes_read - disk_bytes,
                )
                disk_bytes = source.disk_bytes_read


def _runs(
    lines: Iterator[tuple[int, bytes]], run_bytes: int
) -> Iterator[tuple[int, int, list[bytes]]]:
    """``(first line, first offset, lines)`` of runs that end once they hold ``run_bytes``."""
    run: list[bytes] = []
    first_line = first_offset = size = 0
    for number, (offset, line) in enumerate(lines, start=1):
        run.append(line)
        size += len(line)
        if size >= run_bytes:
            yield first_line, first_offset, run
            run, size, first_line, first_offset = [], 0, number, offset + len(line)
    if run:
        yield first_line, first_offset, run


def shard_tokenizer(settings: PreprocessSettings) -> Callable[[Shard], ShardResult]:
    """Load the tokenizer once; the function returned tokenises and publishes one shard a call."""
    # Read by the tokenizers library at its first use. The processes are the parallelism here.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = build_tokenizer(settings.tokenizer)

    def tokenize(shard: Shard) -> ShardResult:
        with writing_to(shard.directory):
            return ShardResult(shard.disk_bytes, publish(shard))

    def publish(shard: Shard) -> Counts:
        staged = Path(tempfile.mkdtemp(prefix="working-", dir=shard.directory.parent))
        counts = _write_shard(shard, staged, settings, tokenizer)
        for path in staged.iterdir():
            flush_to_disk(path)
        try:
            staged.rename(shard.directory)
        except OSError:
            # A worker that outlived a killed run may have published the very same shard.
            if not shard.directory.is_dir():
                raise
            shutil.rmtree(staged)
        return counts

    return tokenize


def _write_shard(
    shard: Shard,
    staged: Path,
    settings: PreprocessSettings,
    tokenizer: Any,  # upstream's class is untyped
) -> Counts:
    from flagscale.data.upstream import DType, IndexedDatasetBuilder

    keys = settings.json_keys
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    builders = [IndexedDatasetBuilder(f"{staged}/{i}.bin", dtype=dtype) for i in range(len(keys))]
    rows: list[list[tuple[int, int, int, int]]] = [[] for _ in keys]
    counts = Counts.zero(keys)
    counts.lines = len(shard.lines)
    end = shard.first_offset
    for number, line in enumerate(shard.lines, start=shard.first_line):
        offset, end = end, end + len(line)
        if line.isspace():
            counts.blank += 1
            continue
        try:
            texts = json_texts(line, keys)
        except MalformedLineError as error:
            counts.malformed.append((shard.file, number + 1, str(error)))
            continue
        length = len(line.removesuffix(b"\n").removesuffix(b"\r"))
        for i, (key, text) in enumerate(zip(keys, texts, strict=True)):
            try:
                tokens = tokenizer.tokenize(text)
            except Exception as error:  # a tokenizer library raises whatever it likes
                raise DataError(
                    "the tokenizer failed on a document",
                    where=f"{shard.path}:{number + 1}",
                    got=f"{type(error).__name__}: {error}",
                    cure="remove the line, or report this to the tokenizer's authors",
                ) from error
            if not tokens:
                counts.empty[key] += 1
                continue
            if settings.append_eod:
                tokens = [*tokens, tokenizer.eod]
            builders[i].add_document(tokens, [len(tokens)])
            rows[i].append((shard.file, length, number, offset))
            counts.documents[key] += 1
            counts.tokens[key] += len(tokens)
    for i, builder in enumerate(builders):
        builder.finalize(f"{staged}/{i}.idx")
        np.save(staged / f"{i}.npy", np.array(rows[i], dtype=ROW_DTYPE))
    (staged / "counts.json").write_text(
        json.dumps(asdict(counts), ensure_ascii=False) + "\n", encoding="utf-8"
    )
    return counts
