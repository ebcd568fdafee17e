"""Writes the ledger: which samples each step read, proved by checksums, and what each cost.

The rank of the last pipeline stage whose tensor-parallel rank is 0 draws batches and knows losses;
it writes one file for its data-parallel rank, alone. Losses stay on the device until the forward
pass of a step's last micro batch, and are copied once.

The format: :mod:`flagscale.data_inspect.ledger`.
"""

from __future__ import annotations

import importlib.metadata
import os
import secrets
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import flagscale
from flagscale.data_inspect.arguments import ARGUMENT_NAMES
from flagscale.data_inspect.checksums import ids_crc, tokens_crc
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.ledger import FORMAT, Row, encode_row, encode_segment, file_name
from flagscale.errors import ConfigError, DataError
from flagscale.hooks import (
    BatchDrawn,
    DatasetsBuilt,
    ExitEvent,
    ForwardLoss,
    Hooks,
    SaveEvent,
    StepEvent,
    StepStart,
    TrainStart,
)

__all__ = ["add_arguments", "connect", "ledger_directory", "verify_arguments"]

type _Sums = np.ndarray[Any, np.dtype[np.float32]]

_VERSIONS = ("megatron-core", "torch", "numpy")
_MORE_ARGUMENTS = (
    *("load", "save", "ckpt_step", "finetune", "world_size", "tensor_model_parallel_size"),
    *("pipeline_model_parallel_size", "context_parallel_size", "tokenizer_type"),
    *("tokenizer_model", "log_interval", "padded_vocab_size"),
)


def add_arguments(parser: ArgumentParser) -> None:
    """``--no-ledger``, ``--ledger-dir`` and ``--ledger-blocks``."""
    group = parser.add_argument_group(title="FlagScale: ledger")
    group.add_argument(
        "--no-ledger",
        action="store_true",
        help="Do not write down which samples each step read, as a run that saves does otherwise.",
    )
    group.add_argument(
        "--ledger-dir", default=None, help="Where it goes; otherwise SAVE/ledger of --save."
    )
    group.add_argument(
        "--ledger-blocks",
        type=int,
        default=None,
        metavar="TOKENS",
        help="Add the mean loss of every block of this many tokens (64 serves well) to that of "
        "every sample: 2 bytes each.",
    )


def verify_arguments(args: Namespace) -> None:
    """Refuse blocks that do not fit.

    Raises:
        ConfigError: They do not divide the sequence, or context parallelism scatters them.
    """
    blocks = args.ledger_blocks
    if blocks is None:
        return
    if blocks < 1 or args.seq_length % blocks:
        raise ConfigError(
            "the blocks do not divide a sample",
            where="--ledger-blocks",
            expected=f"a divisor of --seq-length {args.seq_length}",
            got=blocks,
            cure="use 64, or another divisor",
        )
    if args.context_parallel_size > 1:
        raise ConfigError(
            "blocks of tokens are spread over ranks",
            where="--ledger-blocks, --context-parallel-size",
            expected="one of the two",
            got="both",
            cure="drop --ledger-blocks: the mean loss of each sample is recorded without it",
        )


def ledger_directory(args: Namespace) -> Path | None:
    """Where the ledger goes; ``None`` if there is none."""
    if args.no_ledger or not (args.ledger_dir or args.save):
        return None
    return Path(args.ledger_dir or Path(args.save, "ledger"))


def connect(hooks: Hooks, args: Namespace) -> None:
    """Record every step that trains."""
    directory = ledger_directory(args)
    if directory is None:
        return
    recorder = _Recorder(args, directory)
    hooks.on_datasets.append(recorder.see_datasets)
    hooks.on_train_start.append(recorder.start)
    hooks.on_step_start.append(recorder.begin_step)
    hooks.on_batch.append(recorder.see_batch)
    hooks.on_forward_loss.append(recorder.see_losses)
    hooks.on_step_end.append(recorder.end_step)
    hooks.on_save.append(recorder.flush)
    hooks.on_exit.append(recorder.finish)


class _Recorder:
    """Of one rank; does nothing on those that do not write."""

    def __init__(self, args: Namespace, directory: Path) -> None:
        self._args = args
        self._directory = directory
        self._dataset: Any = None
        self._file: _LedgerFile | None = None
        self._is_last_stage = False
        self._step: _Step | None = None
        self._finished: tuple[StepEvent, _Step] | None = None

    def see_datasets(self, event: DatasetsBuilt) -> None:
        if event.train is not None:
            self._dataset = event.train

    def start(self, event: TrainStart) -> None:
        from megatron.core import mpu

        if mpu.get_tensor_model_parallel_rank() or not mpu.is_pipeline_last_stage():
            return
        self._is_last_stage = True
        # Every context-parallel rank sums, the first writes.
        if mpu.get_context_parallel_rank() == 0:
            attempt = _agree_on_attempt()
            segment = _segment(self._args, event, attempt, self._dataset)
            path = self._directory / attempt / file_name(segment["dp_rank"])
            self._file = _LedgerFile(path, segment)

    def begin_step(self, event: StepStart) -> None:
        if self._is_last_stage:
            self._step = _Step(event, self._args.ledger_blocks)

    def see_batch(self, event: BatchDrawn) -> None:
        if self._step is not None:
            self._step.add_batch(event.batch)

    def see_losses(self, event: ForwardLoss) -> None:
        if self._step is not None:
            self._step.add_losses(event)

    def end_step(self, event: StepEvent) -> None:
        # One step late: by now the copy of the step before is there, and nothing waits for it.
        self._write()
        if self._step is not None:
            self._finished = event, self._step
            self._step = None

    def _write(self) -> None:
        if self._finished is not None and self._file is not None:
            event, step = self._finished
            self._file.append(encode_row(step.row(event)))
        self._finished = None

    def flush(self, _event: SaveEvent) -> None:
        # A checkpoint must never be ahead of the ledger of how it came to be.
        self._write()
        if self._file is not None:
            self._file.sync()

    def finish(self, _event: ExitEvent) -> None:
        self._write()
        # The step that an error has ended is the one that will be asked about.
        row = None if self._step is None else self._step.unfinished_row()
        if row is not None and self._file is not None:
            self._file.append(encode_row(row))


class _LedgerFile:
    """The one writer of a file: whole records, appended."""

    def __init__(self, path: Path, segment: Mapping[str, Any]) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        except OSError as error:
            raise self._failure(error) from error
        self.append(encode_segment(segment))

    def append(self, record: bytes) -> None:
        try:
            written = os.write(self._file, record)
        except OSError as error:
            raise self._failure(error) from error
        if written < len(record):
            raise self._failure("the disk is full")

    def sync(self) -> None:
        os.fsync(self._file)

    def _failure(self, why: object) -> DataError:
        return DataError(
            "the ledger cannot be written",
            where=str(self._path),
            got=why,
            cure="make room, name another --ledger-dir, or train with --no-ledger",
        )


class _Step:
    """One step on one rank, gathered micro batch by micro batch; a repeated pass begins anew."""

    def __init__(self, start: StepStart, block_tokens: int | None) -> None:
        self._start = start
        self._block_tokens = block_tokens
        self._drawn = 0
        self._passes = 0
        self._ids_crc = self._tokens_crc = 0
        self._sums: list[Any] = []
        self._copy: _HostCopy | None = None
        self._micro_batch_size = 0
        self._columns = 3

    def add_batch(self, batch: Mapping[str, Any]) -> None:
        if self._drawn % self._start.num_micro_batches == 0:
            self._ids_crc = self._tokens_crc = 0
            self._sums, self._copy = [], None
            self._passes += 1
        self._drawn += 1
        indices = batch["sample_index"].numpy()
        datasets = batch["dataset_id"].numpy() if "dataset_id" in batch else 0
        tokens = np.concatenate([batch["tokens"].numpy(), batch["labels"][:, -1:].numpy()], axis=1)
        self._ids_crc = ids_crc(datasets, indices, self._ids_crc)
        self._tokens_crc = tokens_crc(tokens, self._tokens_crc)
        self._micro_batch_size = len(indices)
        if self._block_tokens is not None:
            self._columns = 3 + 2 * (batch["tokens"].shape[1] // self._block_tokens)

    def add_losses(self, event: ForwardLoss) -> None:
        self._sums.append(_sums(event, self._block_tokens))
        if len(self._sums) == self._start.num_micro_batches:
            self._copy = _HostCopy(_reduced(self._sums))
            self._sums = []

    def row(self, event: StepEvent) -> Row:
        """What is written of it when it is done."""
        if self._copy is None:
            raise RuntimeError(f"iteration {event.iteration} ended before its last micro batch")
        loss = float(event.losses["lm loss"]) if "lm loss" in event.losses else float("nan")
        finite = bool(np.isfinite(loss))
        return replace(
            self._row(self._start.num_micro_batches, self._copy.wait()),
            loss=loss if finite and loss > 0 else None,  # 0: no token counted
            grad_norm=event.grad_norm,
            learning_rate=event.learning_rate,
            skipped=event.skipped,
            nan=not finite,
        )

    def unfinished_row(self) -> Row | None:
        """What is written of it if it never ends; ``None`` if nothing was drawn."""
        if not self._drawn:
            return None
        micro_batches = (self._drawn - 1) % self._start.num_micro_batches + 1
        known = self._sums_so_far()
        missing = micro_batches * self._micro_batch_size - len(known)
        sums = np.concatenate([known, np.zeros((missing, self._columns), np.float32)])
        row = self._row(micro_batches, sums)
        return replace(row, unfinished=True, nan=not np.isfinite(row.sample_losses).all())

    def _sums_so_far(self) -> _Sums:
        import torch
        from megatron.core import mpu

        if self._copy is not None:
            return self._copy.wait()
        # The other context-parallel ranks may be gone: there is no one to sum with.
        if not self._sums or mpu.get_context_parallel_world_size() > 1:
            return np.empty((0, self._columns), np.float32)
        return _HostCopy(torch.cat(self._sums)).wait()

    def _row(self, micro_batches: int, sums: _Sums) -> Row:
        blocks = (self._columns - 3) // 2
        counted, quarantined = sums[:, 1:3].sum(axis=0, dtype=np.float64)
        return Row(
            iteration=self._start.iteration,
            consumed_before=self._start.consumed_samples,
            micro_batches=micro_batches,
            micro_batch_size=self._micro_batch_size,
            loss=None,
            grad_norm=None,
            learning_rate=None,
            ids_crc=self._ids_crc,
            tokens_crc=self._tokens_crc,
            counted_tokens=int(counted),
            quarantined_tokens=int(quarantined),
            sample_losses=_means(sums[:, 0], sums[:, 1]),
            block_losses=_means(sums[:, 3 : 3 + blocks], sums[:, 3 + blocks :]),
            rerun=self._passes > 1,
        )


def _sums(event: ForwardLoss, block_tokens: int | None) -> Any:
    """Of each sample: summed loss, counted and quarantined tokens; then of its blocks the same two.

    Returns:
        [b, 3 + 2 * blocks] float32: losses of all blocks come before their counts.
    """
    import torch

    counts = event.loss_mask.float()
    losses = event.token_losses.detach().float() * counts
    quarantined = counts.new_zeros(len(counts))
    if event.quarantined is not None:
        quarantined = event.quarantined.sum(dim=1).float()
    columns = [losses.sum(dim=1), counts.sum(dim=1), quarantined]
    parts = [torch.stack(columns, dim=1)]
    if block_tokens is not None:
        shape = (len(counts), -1, block_tokens)
        parts += [losses.view(shape).sum(dim=2), counts.view(shape).sum(dim=2)]
    return torch.cat(parts, dim=1)


def _reduced(sums: list[Any]) -> Any:
    """Of all micro batches; context-parallel ranks have a part of every sample each."""
    import torch
    from megatron.core import mpu

    whole = torch.cat(sums)
    if mpu.get_context_parallel_world_size() > 1:
        torch.distributed.all_reduce(whole, group=mpu.get_context_parallel_group())
    return whole


class _HostCopy:
    """A device tensor on its way to the host, while the device works on."""

    def __init__(self, tensor: Any) -> None:
        import torch

        self._event = None
        if not tensor.is_cuda:
            self._host = tensor
            return
        self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._host.copy_(tensor, non_blocking=True)
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> _Sums:
        if self._event is not None:
            self._event.synchronize()
        array: _Sums = self._host.numpy()
        return array


def _means(sums: Any, counts: Any) -> Any:
    """-1 where nothing counts."""
    means = np.full(sums.shape, -1, np.float32)
    return np.divide(sums, counts, out=means, where=counts > 0)


def _agree_on_attempt() -> str:
    """The same name on every rank of this start, by the job's own store: no collective."""
    import torch

    mine = f"{datetime.now(UTC):%Y%m%dT%H%M%S.%f}Z-{secrets.token_hex(3)}"
    store = torch.distributed.distributed_c10d._get_default_store()
    return str(store.compare_set("flagscale/ledger-attempt", "", mine).decode())


def _segment(args: Namespace, event: TrainStart, attempt: str, dataset: Any) -> dict[str, Any]:
    from megatron.core import mpu

    blend = getattr(dataset, "datasets", None)
    datasets = [dataset] if blend is None else blend
    return {
        "format": FORMAT,
        "attempt": attempt,
        "started": datetime.now(UTC).isoformat(),
        "dp_rank": mpu.get_data_parallel_rank(),
        "dp_size": mpu.get_data_parallel_world_size(),
        "iteration": event.iteration,
        "consumed_samples": event.consumed_samples,
        "pad_token_id": int(datasets[0]._pad_token_id),
        "args": {name: getattr(args, name, None) for name in (*ARGUMENT_NAMES, *_MORE_ARGUMENTS)},
        "argv": sys.argv[1:],
        "versions": {
            "flagscale": flagscale.__version__,
            "python": sys.version.split()[0],
            **{name: importlib.metadata.version(name) for name in _VERSIONS},
        },
        "blend": None
        if blend is None
        else {"size": len(dataset), "description_hash": dataset.unique_description_hash},
        "datasets": [_describe(one) for one in datasets],
    }


def _describe(dataset: Any) -> dict[str, Any]:
    """A mid-level dataset: what decides its order, and by what its files are known again."""
    with IndexedFile(dataset.dataset_path) as indexed:
        fingerprint = indexed.fingerprint()
    return {
        "prefix": dataset.dataset_path,
        "num_samples": dataset.num_samples,
        "size": len(dataset),
        "description_hash": dataset.unique_description_hash,
        "fingerprint": fingerprint,
    }
