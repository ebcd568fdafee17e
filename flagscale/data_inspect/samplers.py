"""Samplers: which samples of the top dataset each data-parallel rank draws in which micro batch.

A micro batch of all ranks takes ``micro_batch_size * dp_size`` samples: a *slice*. ``single`` reads
the dataset from end to end, slice after slice, rank after rank. ``cyclic`` shuffles it anew each
epoch, by a seed that is the epoch's number and not ``--seed``, and begins a new epoch when the old
one has no whole micro batch left. Consumed samples are those of the phase (see
:class:`~flagscale.data_inspect.steps.Phase`).

Source: megatron-core 0.19.2, training/datasets/data_samplers.py, and ``cyclic_iter`` in
training/training.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.arguments import DataArguments
from flagscale.data_inspect.randperm import Order, randperm
from flagscale.errors import ConfigError, DataError

__all__ = [
    "CyclicSampler",
    "Read",
    "Sampler",
    "ShardedCyclicSampler",
    "ShufflingSampler",
    "SingleSampler",
    "plan_sampler",
]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Read:
    """Where a sample of the top dataset is read.

    Args:
        index: Of the top dataset.
        consumed: Samples of the phase consumed before the slice of micro batches it is in. Which
            micro batch of its step that is:
            ``(consumed - consumed before the step) // (micro_batch_size * dp_size)``.
        rank: Data-parallel rank.
        position: Place in the micro batch, from 0.
    """

    index: int
    consumed: int
    rank: int
    position: int


@dataclass(frozen=True)
class Sampler(ABC):
    """The samplers of all data-parallel ranks, from one start on.

    Args:
        total_samples: Length of the top dataset.
        started_at: Samples of the phase consumed when the job started.
        micro_batch_size: Samples of a forward pass.
        dp_size: Data-parallel ranks.
    """

    total_samples: int
    started_at: int
    micro_batch_size: int
    dp_size: int

    @property
    def slice_size(self) -> int:
        """Samples that all ranks draw for one micro batch each."""
        return self.micro_batch_size * self.dp_size

    def indices(self, consumed: int, micro_batches: int) -> Indices:
        """What the next micro batches hold.

        Args:
            consumed: Samples of the phase consumed before: a whole number of slices after the
                start.
            micro_batches: On each rank.

        Returns:
            Indices into the top dataset, [dp_size, micro_batches, micro_batch_size].

        Raises:
            DataError: The job was never there.
        """
        slices, rest = divmod(consumed - self.started_at, self.slice_size)
        if slices < 0 or rest:
            raise DataError(
                "no micro batch begins at this number of consumed samples",
                where="consumed samples of the phase",
                expected=f"{self.started_at} plus a multiple of {self.slice_size} (micro batch "
                f"{self.micro_batch_size} x {self.dp_size} ranks)",
                got=consumed,
                cure="give the arguments and the start of the job that ran the step",
            )
        return self._draw(consumed + self.slice_size * np.arange(micro_batches))

    def reads(self, indices: npt.ArrayLike, begin: int, end: int) -> list[Read]:
        """All times at which samples are read; the inverse of :meth:`indices`.

        Args:
            indices: Of the top dataset.
            begin: Only slices from so many consumed samples of the phase on,
            end: and before so many.

        Returns:
            By the order in which they are read.
        """
        wanted = np.unique(np.asarray(indices, np.int64))
        wanted = wanted[(wanted >= 0) & (wanted < self.total_samples)]
        found = self._find(wanted, max(begin, self.started_at), end) if len(wanted) else iter(())
        return sorted(found, key=lambda read: (read.consumed, read.rank, read.position))

    @abstractmethod
    def _draw(self, consumed: Indices) -> Indices:
        """The slices that begin at ``consumed``, [dp_size, slices, micro_batch_size]."""

    @abstractmethod
    def _find(self, wanted: Indices, begin: int, end: int) -> Iterator[Read]:
        """Reads of samples in the slices that begin in ``[begin, end)``."""


@dataclass(frozen=True)
class SingleSampler(Sampler):
    """``--dataloader-type single``: consumed samples are indices of the top dataset."""

    def _draw(self, consumed: Indices) -> Indices:
        if len(consumed) and consumed[-1] + self.slice_size > self.total_samples:
            raise DataError(
                "the samples of the dataset run out before this step",
                where="consumed samples of the phase",
                expected=f"at most {self.total_samples - self.slice_size} at its last micro batch",
                got=int(consumed[-1]),
                cure="check the arguments and the datasets: the run's had more samples",
            )
        places = np.arange(self.slice_size).reshape(self.dp_size, 1, self.micro_batch_size)
        return consumed[:, None] + places

    def _find(self, wanted: Indices, begin: int, end: int) -> Iterator[Read]:
        for index in wanted.tolist():
            slices, place = divmod(index - self.started_at, self.slice_size)
            consumed = self.started_at + slices * self.slice_size
            if begin <= consumed < end and consumed + self.slice_size <= self.total_samples:
                yield Read(index, consumed, *divmod(place, self.micro_batch_size))


@dataclass(frozen=True)
class ShufflingSampler(Sampler):
    """What both kinds of ``cyclic`` have in common."""

    @property
    def epoch_samples(self) -> int:
        """By how many consumed samples upstream tells epochs apart: those of whole slices."""
        return self.total_samples - self.total_samples % self.slice_size

    @property
    @abstractmethod
    def shuffled(self) -> int:
        """How many elements one permutation has."""

    def _order(self, epoch: int) -> Order:
        return _permutation(self.shuffled, epoch)

    def _epochs(self, begin: int, end: int) -> range:
        """The epochs whose slices may begin in ``[begin, end)``."""
        return (
            range(max(0, begin // self.epoch_samples - 1), (end - 1) // self.epoch_samples + 1)
            if end > begin
            else range(0)
        )


@dataclass(frozen=True)
class ShardedCyclicSampler(ShufflingSampler):
    """``cyclic`` as it is by default: each rank shuffles a part of the dataset of its own."""

    @property
    def shuffled(self) -> int:
        """How many elements one permutation has."""
        return self.epoch_samples // self.dp_size

    def _draw(self, consumed: Indices) -> Indices:
        result = np.empty((self.dp_size, len(consumed), self.micro_batch_size), np.int64)
        shards = np.arange(self.dp_size)[:, None, None] * self.shuffled
        epochs, offsets = np.divmod(consumed, self.epoch_samples)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            places = offsets[here, None] // self.dp_size + np.arange(self.micro_batch_size)
            result[:, here] = shards + self._order(int(epoch))[places]
        return result

    def _find(self, wanted: Indices, begin: int, end: int) -> Iterator[Read]:
        ranks, locals_ = np.divmod(wanted, self.shuffled)
        inside = ranks < self.dp_size
        by_local: dict[int, list[int]] = {}
        for rank, local in zip(ranks[inside].tolist(), locals_[inside].tolist(), strict=True):
            by_local.setdefault(local, []).append(rank)
        for epoch in self._epochs(begin, end):
            for local, place in _places(self._order(epoch), list(by_local)):
                slices, position = divmod(place, self.micro_batch_size)
                consumed = epoch * self.epoch_samples + slices * self.slice_size
                if begin <= consumed < end:
                    for rank in by_local[local]:
                        index = rank * self.shuffled + local
                        yield Read(index, consumed, rank, position)


@dataclass(frozen=True)
class CyclicSampler(ShufflingSampler):
    """``cyclic`` with ``--no-data-sharding``: all ranks share one shuffled order, rank by rank.

    Where the order holds more than whole slices, some ranks get one micro batch more of it than
    others. They read it before they begin the next epoch, a slice late, and so leave out the first
    of it; from then on ranks can be in different epochs. So what is read depends on where the job
    started.
    """

    @property
    def shuffled(self) -> int:
        """How many elements one permutation has."""
        return self.total_samples - self.total_samples % self.micro_batch_size

    @property
    def _slices(self) -> int:
        """Whole slices of an epoch."""
        return self.epoch_samples // self.slice_size

    def _has_more(self, rank: int) -> bool:
        """Whether a rank gets one micro batch more of an epoch than there are whole slices."""
        samples = len(range(rank, self.shuffled, self.dp_size))
        return samples // self.micro_batch_size > self._slices

    def _epoch_and_slice(self, rank: int, consumed: Indices) -> tuple[Indices, Indices]:
        """In which epoch a rank is, and at which slice of it."""
        begun = self.started_at // self.epoch_samples
        late = self.slice_size if self._has_more(rank) else 0
        if late == self.epoch_samples:
            # The micro batch it has more is as long as an epoch, so it never begins every other.
            epochs = begun + (consumed // self.epoch_samples - begun) // 2 * 2
        else:
            epochs = np.maximum(begun, (consumed - late) // self.epoch_samples)
        return epochs, (consumed - epochs * self.epoch_samples) // self.slice_size

    def _draw(self, consumed: Indices) -> Indices:
        result = np.empty((self.dp_size, len(consumed), self.micro_batch_size), np.int64)
        within = np.arange(self.micro_batch_size) * self.dp_size
        for rank in range(self.dp_size):
            epochs, slices = self._epoch_and_slice(rank, consumed)
            for epoch in np.unique(epochs):
                here = epochs == epoch
                places = slices[here, None] * self.slice_size + rank + within
                result[rank, here] = self._order(int(epoch))[places]
        return result

    def _find(self, wanted: Indices, begin: int, end: int) -> Iterator[Read]:
        for epoch in self._epochs(begin, end):
            for index, place in _places(self._order(epoch), wanted.tolist()):
                slices, within = divmod(place, self.slice_size)
                position, rank = divmod(within, self.dp_size)
                consumed = epoch * self.epoch_samples + slices * self.slice_size
                there = self._epoch_and_slice(rank, np.array([consumed]))
                if begin <= consumed < end and (there[0][0], there[1][0]) == (epoch, slices):
                    yield Read(index, consumed, rank, position)


@lru_cache(maxsize=2)
def _permutation(n: int, epoch: int) -> Order:
    """An epoch's order. Two are kept: steps are asked one after another, and ranks can be apart."""
    order = randperm(n, epoch)
    order.setflags(write=False)
    return order


def _places(order: Order, wanted: list[int]) -> Iterator[tuple[int, int]]:
    """``(element, its place)`` of the elements of a permutation."""
    places = np.flatnonzero(np.isin(order, np.array(wanted, order.dtype)))
    yield from zip(order[places].tolist(), places.tolist(), strict=True)


def plan_sampler(args: DataArguments, total_samples: int, started_at: int) -> Sampler:
    """The samplers that upstream makes at a start.

    Args:
        args: Of that start.
        total_samples: Length of the top dataset.
        started_at: Samples of the phase consumed by then.

    Raises:
        ConfigError: A loader that is none of upstream's.
        DataError: Upstream could not have started there.
    """
    slice_size = args.micro_batch_size * args.dp_size
    sizes = (total_samples, started_at, args.micro_batch_size, args.dp_size)
    if args.micro_batch_size < 1 or args.dp_size < 1:
        raise _loader_error("--micro-batch-size, data-parallel size", "at least 1", sizes[2:])
    if args.dataloader_type == "single":
        if not 0 <= started_at < total_samples:
            raise _start_error(f"less than the {total_samples} samples there are", started_at)
        return SingleSampler(*sizes)
    if args.dataloader_type != "cyclic":
        raise _loader_error("--dataloader-type", "single or cyclic", args.dataloader_type)
    if total_samples < slice_size:
        raise _start_error(f"a dataset of at least {slice_size} samples", total_samples)
    if started_at < 0 or started_at % slice_size:
        raise _start_error(f"a multiple of {slice_size} consumed samples", started_at)
    return (ShardedCyclicSampler if args.data_sharding else CyclicSampler)(*sizes)


def _loader_error(where: str, expected: str, got: object) -> ConfigError:
    return ConfigError(
        "the order of the samples is not one of upstream's samplers'",
        where=where,
        expected=expected,
        got=got,
        cure="give the arguments of the run; an external loader cannot be reconstructed",
    )


def _start_error(expected: str, got: object) -> DataError:
    return DataError(
        "upstream's sampler does not start there",
        where="--micro-batch-size, data-parallel size, consumed samples of the phase",
        expected=expected,
        got=got,
        cure="give the arguments and the start of the job that ran the step",
    )
