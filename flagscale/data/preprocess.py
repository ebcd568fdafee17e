"""JSONL to megatron-core's .bin/.idx, through its own builder: parallel, resumable, atomic.

The input is cut into shards (:mod:`flagscale.data.shards`), each tokenised into a directory that
is published by a rename. Those directories are the journal a run goes on from after a kill -9:

    <prefix>.partial/lock
    <prefix>.partial/<digest of inputs and settings>/settings.json
                                                     00000000/  00000001/  ...

When all are there they are merged in order, so that the bytes are the same for any number of
workers, and renamed to ``<prefix>_<key>_document.*``.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import hashlib
import importlib.metadata
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.data.output import flush_to_disk, writing_to
from flagscale.data.shards import Counts, PreprocessSettings, Shard, cut_shards, shard_tokenizer
from flagscale.data.sidecar import sidecar_paths, write_sidecar
from flagscale.data.sources import SourceStamp
from flagscale.data.tokenizer import build_tokenizer
from flagscale.data.workers import run_in_order
from flagscale.errors import ConfigError, DataError

__all__ = ["PreprocessPlan", "dataset_prefix", "plan_preprocess", "preprocess"]

logger = logging.getLogger(__name__)

_LIBRARIES = ("megatron-core", "tokenizers", "transformers", "sentencepiece")


@dataclass(frozen=True)
class PreprocessPlan:
    """A job whose inputs, settings and tokenizer have been looked at; nothing is written yet.

    Args:
        inputs: The source files, in order.
        prefix: Start of the names of the output.
        settings: See :class:`~flagscale.data.shards.PreprocessSettings`.
        vocab_size: The tokenizer's true size, which also decides the dtype of the tokens.
        eod: Its end-of-document token.
        made_from: All that the output depends on: equal here is equal there.
    """

    inputs: tuple[SourceStamp, ...]
    prefix: Path
    settings: PreprocessSettings
    vocab_size: int
    eod: int
    made_from: dict[str, Any]

    @property
    def partial(self) -> Path:
        """Where unfinished work lies."""
        return Path(f"{self.prefix}.partial")

    @property
    def journal(self) -> Path:
        """Where the unfinished work of this very job lies.

        The digest in the name keeps a worker that outlived a killed run from publishing a shard
        of other settings here.
        """
        return self.partial / hashlib.sha256(json.dumps(self.made_from).encode()).hexdigest()[:16]

    def finished_shards(self) -> int:
        """Shards that an earlier run has left here."""
        return sum(1 for _ in self.journal.glob("[0-9]*"))


def dataset_prefix(prefix: Path, key: str) -> Path:
    """The name of a dataset without its ending, as upstream's ``--data-path`` takes it."""
    return Path(f"{prefix}_{key}_document")


def plan_preprocess(
    inputs: Sequence[Path], prefix: Path, settings: PreprocessSettings
) -> PreprocessPlan:
    """Look at the inputs and load the tokenizer, so that what can go wrong goes wrong early.

    Raises:
        ConfigError: The tokenizer cannot be loaded, or a number or key makes no sense.
        DataError: An input is missing.
    """
    keys = settings.json_keys
    if settings.shard_bytes < 1 or not keys or len(set(keys)) < len(keys):
        raise ConfigError(
            "the settings make no sense",
            where="--json-keys or --shard-bytes",
            expected="distinct keys, at least one; at least one byte",
            got=f"{list(keys)}, {settings.shard_bytes} bytes",
            cure="correct them",
        )
    stamps = tuple(SourceStamp.of(path) for path in inputs)
    tokenizer = build_tokenizer(settings.tokenizer)
    return PreprocessPlan(
        inputs=stamps,
        prefix=prefix,
        settings=settings,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        made_from={
            "inputs": [asdict(stamp) for stamp in stamps],
            "settings": asdict(settings),
            "tokenizer": [asdict(SourceStamp.of(path)) for path in settings.tokenizer.files()],
            "libraries": {name: _version(name) for name in _LIBRARIES},
        },
    )


def preprocess(
    plan: PreprocessPlan,
    *,
    workers: int = 1,
    skip_malformed: bool = False,
    on_progress: Callable[[int], None] = lambda disk_bytes: None,
) -> Counts:
    """Tokenise into ``<prefix>_<key>_document.{bin,idx,source.npy,source.json}``.

    A run that was killed goes on where it stopped; a changed input or setting starts afresh.

    Args:
        plan: From :func:`plan_preprocess`.
        workers: Processes; 1 works in this one.
        skip_malformed: Leave malformed lines out; they are listed in the counts and the sidecar.
        on_progress: Called with bytes of input, as they lie on disk, done since the last call.

    Returns:
        What became of the input.

    Raises:
        ConfigError: ``workers`` makes no sense.
        DataError: An input is damaged, malformed or empty, the output cannot be written, or another
            run has this prefix.
    """
    if workers < 1:
        raise ConfigError(
            "there is no process to work in",
            where="--workers",
            expected="at least 1",
            got=workers,
            cure="give the number of cores",
        )
    with writing_to(plan.partial):
        plan.partial.mkdir(parents=True, exist_ok=True)
    with _locked(plan.partial):
        _open_journal(plan)
        directories: list[Path] = []

        def unfinished() -> Iterator[Shard]:
            for shard in cut_shards(plan.inputs, plan.journal, plan.settings.shard_bytes):
                directories.append(shard.directory)
                if shard.directory.exists():
                    on_progress(shard.disk_bytes)
                else:
                    yield shard

        start = functools.partial(shard_tokenizer, plan.settings)
        for result in run_in_order(unfinished(), start, workers):
            _check_malformed(plan, result.counts, skip_malformed)
            on_progress(result.disk_bytes)

        total = Counts.zero(plan.settings.json_keys)
        for directory in directories:
            total.add(Counts.read(directory))
        _check_malformed(plan, total, skip_malformed)
        _check_inputs(plan, total)
        with writing_to(plan.prefix):
            numbers = range(len(plan.settings.json_keys))
            for files in [_merge(plan, number, directories, total) for number in numbers]:
                _publish(files)
        shutil.rmtree(plan.partial, ignore_errors=True)
    return total


@contextlib.contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Hold the prefix for this run; the lock goes with the process, however that ends."""
    with (partial / "lock").open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                "another run is writing the same output",
                where=str(partial),
                cure="wait for it, or give another --output-prefix",
            ) from error
        yield


def _open_journal(plan: PreprocessPlan) -> None:
    """Make the journal, or say what an earlier run left in it; remove those of other jobs."""
    for other in plan.partial.iterdir():
        if other.is_dir() and other != plan.journal:
            logger.warning("%s: inputs or settings have changed, starting afresh", plan.partial)
            shutil.rmtree(other)
    if finished := plan.finished_shards():
        logger.warning("%s: going on after %d finished shards", plan.partial, finished)
    plan.journal.mkdir(exist_ok=True)
    (plan.journal / "settings.json").write_text(json.dumps(plan.made_from, indent=1) + "\n")


def _check_malformed(plan: PreprocessPlan, counts: Counts, skip_malformed: bool) -> None:
    if counts.malformed and not skip_malformed:
        file, line, problem = counts.malformed[0]
        raise DataError(
            "malformed line",
            where=f"{plan.inputs[file].path}:{line}",
            expected=f"a JSON object with the string fields {', '.join(plan.settings.json_keys)}",
            got=problem,
            cure="mend the line, or give --skip-malformed to leave such lines out; work that is "
            "done is kept",
        )


def _check_inputs(plan: PreprocessPlan, counts: Counts) -> None:
    for stamp in plan.inputs:
        if (now := SourceStamp.of(stamp.path)) != stamp:
            raise DataError(
                "an input changed while it was read",
                where=stamp.path,
                expected=stamp,
                got=now,
                cure="run again when nothing writes to it any more",
            )
    for key, documents in counts.documents.items():
        if not documents:
            raise DataError(
                "there is no document in the input",
                where=", ".join(stamp.path for stamp in plan.inputs),
                expected=f"lines whose field {key!r} is not empty",
                got=f"{counts.lines} lines, {counts.empty[key]} of them with an empty text",
                cure="check the input and --json-keys",
            )


def _merge(
    plan: PreprocessPlan, number: int, directories: Sequence[Path], counts: Counts
) -> dict[Path, Path]:
    """Put the shards of one key together.

    Returns:
        Staged file -> final name, in the order to publish them.
    """
    from flagscale.data import upstream

    key = plan.settings.json_keys[number]
    final = dataset_prefix(plan.prefix, key)
    staged = plan.journal / f"merged-{number}"
    dtype = upstream.DType.optimal_dtype(plan.vocab_size)
    builder = upstream.IndexedDatasetBuilder(f"{staged}.bin", dtype=dtype)
    # add_index() collects garbage each time, which takes 0.3 s with torch loaded unless what
    # lives already is set aside.
    gc.freeze()
    with upstream.missing_rank_ignored():
        for directory in directories:
            builder.add_index(f"{directory}/{number}")
    gc.unfreeze()
    builder.finalize(f"{staged}.idx")
    staged_sidecar = sidecar_paths(staged)
    write_sidecar(
        staged_sidecar,
        prefix=final,
        documents=counts.documents[key],
        rows=(np.load(directory / f"{number}.npy") for directory in directories),
        files=plan.inputs,
        about={
            "json_key": key,
            "append_eod": plan.settings.append_eod,
            "tokenizer_type": plan.settings.tokenizer.type,
            "vocab_size": plan.vocab_size,
            "eod": plan.eod,
            "libraries": plan.made_from["libraries"],
            "counts": asdict(counts),
        },
    )
    return {
        **dict(zip(staged_sidecar, sidecar_paths(final), strict=True)),
        Path(f"{staged}.bin"): Path(f"{final}.bin"),
        Path(f"{staged}.idx"): Path(f"{final}.idx"),
    }


def _publish(files: dict[Path, Path]) -> None:
    """Rename into place, the index last: without one upstream sees no dataset at all."""
    *_, index = files.values()
    index.unlink(missing_ok=True)
    for staged, final in files.items():
        flush_to_disk(staged)
        staged.rename(final)


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
