"""One start of a run, opened: from its iterations to samples, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.checksums import ids_crc, tokens_crc
from flagscale.data_inspect.corpus import TrainingCorpus, batch_tokens
from flagscale.data_inspect.indexed import FileChange, IndexedFile
from flagscale.data_inspect.ledger import Row
from flagscale.data_inspect.run import StartRecord
from flagscale.data_inspect.samplers import Read, Sampler, plan_sampler
from flagscale.data_inspect.steps import StepRange, phase_of, plan_schedule

__all__ = ["Drawn", "Mismatch", "StartMapping"]

Progress = Callable[[str], None]
Indices = npt.NDArray[np.int64]
_TOKENS_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Drawn:
    """What the ranks draw in some micro batches of a step.

    Args:
        datasets: [dp_size, micro_batches, micro_batch_size] ordinals in the blend.
        samples: The same shape: indices in each sample's own dataset.
    """

    datasets: Indices
    samples: Indices

    def first(self, micro_batches: int) -> Drawn:
        """Of the first micro batches only."""
        return Drawn(self.datasets[:, :micro_batches], self.samples[:, :micro_batches])


@dataclass(frozen=True)
class Mismatch:
    """A row that does not agree with what is computed.

    Args:
        rank: Data-parallel rank.
        what: ``ids`` or ``tokens``.
        recorded: The checksum in the ledger.
        computed: That of what is computed here.
    """

    rank: int
    what: str
    recorded: int
    computed: int

    def __str__(self) -> str:
        """For people."""
        return (
            f"the checksum of the {self.what} of rank {self.rank} is {self.recorded:08x} in the "
            f"ledger, and {self.computed:08x} of what is computed here"
        )


class StartMapping:
    """A start, with its data opened.

    Args:
        record: The start.
        use_caches: Whether to trust upstream's cached indices.
        progress: Told what is about to be done, where it takes long.

    Raises:
        ConfigError: Upstream would have refused the arguments.
        DataError: Data or caches are missing or damaged.
    """

    def __init__(
        self, record: StartRecord, *, use_caches: bool = True, progress: Progress | None = None
    ) -> None:
        self.record = record
        self.schedule = plan_schedule(record.args)
        self.phase = phase_of(record.args, record.start)
        hashes, blend_hash = _description_hashes(record)
        self.corpus = TrainingCorpus.open(
            record.args,
            self.phase.num_samples,
            hashes=hashes,
            blend_hash=blend_hash,
            use_caches=use_caches,
            progress=progress,
        )
        try:
            started_at = record.start.consumed - self.phase.samples_before
            self.sampler: Sampler = plan_sampler(record.args, self.corpus.size, started_at)
        except BaseException:
            self.corpus.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.corpus.close()

    def step_range(self, iteration: int) -> StepRange:
        """What an iteration reads.

        Raises:
            ConfigError: The batch size there is none.
            DataError: This start does not run it.
        """
        return self.schedule.step_range(self.record.start, iteration)

    def drawn(self, consumed_before: int, micro_batches: int) -> Drawn:
        """What the ranks draw from a number of consumed samples on.

        Raises:
            DataError: There are no such samples, or a cache is damaged.
        """
        consumed = consumed_before - self.phase.samples_before
        indices = self.sampler.indices(consumed, micro_batches)
        datasets, samples = self.corpus.locate(indices.ravel())
        return Drawn(datasets.reshape(indices.shape), samples.reshape(indices.shape))

    def mismatches(self, drawn: Drawn, rank: int, row: Row) -> list[Mismatch]:
        """Where a rank's row disagrees with what is computed; the ids come first.

        Raises:
            DataError: Order and datasets do not fit.
        """
        datasets, samples = drawn.datasets[rank].ravel(), drawn.samples[rank].ravel()
        ids = ids_crc(datasets, samples)
        if ids != row.ids_crc:
            return [Mismatch(rank, "ids", row.ids_crc, ids)]
        pad = self.record.pad_token_id
        crc = 0
        at_once = max(1, _TOKENS_AT_ONCE // (self.record.args.seq_length + 1))
        for begin in range(0, len(samples), at_once):
            part = slice(begin, begin + at_once)
            tokens = self.corpus.tokens_of(datasets[part], samples[part])
            crc = tokens_crc(batch_tokens(tokens, pad), crc)
        if crc != row.tokens_crc:
            return [Mismatch(rank, "tokens", row.tokens_crc, crc)]
        return []

    @cached_property
    def changes(self) -> list[FileChange]:
        """Which files of the datasets are not what the ledger says they were at this start.

        Raises:
            DataError: A dataset is missing or damaged, or the ledger is.
        """
        found: list[FileChange] = []
        if self.record.attempt is not None:
            for dataset in self.record.attempt.segment["datasets"]:
                with IndexedFile(dataset["prefix"]) as indexed:
                    found += indexed.verify_fingerprint(dataset.get("fingerprint", {}))
        return found

    def reads(self, dataset: int, samples: npt.ArrayLike, begin: int, end: int) -> list[Read]:
        """When samples of a dataset are read, in order.

        Args:
            dataset: Its ordinal in the blend.
            samples: Its own indices of them.
            begin: Only from so many consumed samples of the job on,
            end: and before so many.

        Raises:
            DataError: There is no such dataset, or a cache is damaged.
        """
        before = self.phase.samples_before
        indices = self.corpus.indices_of(dataset, samples)
        return self.sampler.reads(indices, begin - before, end - before)

    def consumed_of(self, read: Read) -> int:
        """Samples the whole job has consumed before the micro batches that a read is in."""
        return read.consumed + self.phase.samples_before

    def iteration_of(self, read: Read) -> int:
        """The iteration that a read is in."""
        return self.schedule.iteration_of(self.record.start, self.consumed_of(read))


def _description_hashes(record: StartRecord) -> tuple[list[str | None] | None, str | None]:
    """By which upstream's caches of each dataset, and of the blend, are found."""
    if record.attempt is None:
        return None, None
    segment = record.attempt.segment
    blend = segment.get("blend") or {}
    return [one.get("description_hash") for one in segment["datasets"]], blend.get(
        "description_hash"
    )
