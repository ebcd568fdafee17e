"""Orders that upstream wrote to its cache, looked up there without loading them.

    ..._document_index.npy         [positions] int32        sequence at each position
    ..._sample_index.npy           [samples + 1, 2]         position and token where a piece begins
    ..._shuffle_index.npy          [samples]                piece that each sample is
    ..._dataset_index.npy          [blend]                  dataset of each sample of a blend
    ..._dataset_sample_index.npy   [blend]                  sample index in that dataset

Nothing read here is trusted: each number is held against the size of what it points into, and what
lies next to it. That finds damage and caches of other data; where only the content of a dataset
changed, a cache cannot tell.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.arrays import DiskArray, Indices, open_binary, read_exactly
from flagscale.data_inspect.order import BuiltOrder, OrderPlan, find_between, find_in
from flagscale.errors import DataError

__all__ = ["CachedBlend", "CachedOrder", "NpyFile"]

HEAD = re.compile(
    rb"\{'descr': '([<|][iu][1248])', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}),(?: (\d{1,18}))?\), \} *\n"
)
"""As numpy writes it. Its own parser accepts more, and fails in more ways."""
MAGIC = b"\x93NUMPY\x01\x00"
ASIDE = "move the cache aside: the order is then computed anew from the dataset"


class NpyFile:
    """A ``.npy`` file whose elements are read where they lie.

    Args:
        path: The file.
        columns: Of a row; ``None`` if it has one dimension.
        dtypes: What its elements may be.

    Raises:
        DataError: It is missing, cut short, or of another kind.
    """

    def __init__(self, path: Path, columns: int | None, dtypes: Sequence[str]) -> None:
        self.path = path
        self._stream: BinaryIO = open_binary(path, "a cached index")
        try:
            self.array = self._parse(columns, dtypes)
        except BaseException:
            self.close()
            raise

    def _parse(self, columns: int | None, dtypes: Sequence[str]) -> DiskArray:
        file, size = self._stream.fileno(), os.fstat(self._stream.fileno()).st_size
        head = read_exactly(file, min(size, 512), 0, str(self.path))
        start = 10 + int.from_bytes(head[8:10], "little")
        found = HEAD.fullmatch(head[10:start]) if head.startswith(MAGIC) else None
        if found is None:
            raise self._refused("a header as numpy writes it", head[:80])
        dtype = np.dtype(found[1].decode())
        shape = (int(found[2]),) if found[3] is None else (int(found[2]), int(found[3]))
        expected = start + dtype.itemsize * int(np.prod(shape, dtype=object))
        if dtype not in map(np.dtype, dtypes) or shape[1:] != (
            () if columns is None else (columns,)
        ):
            raise self._refused(
                f"{' or '.join(dtypes)}, columns {columns}", f"{dtype}, shape {shape}"
            )
        if size != expected:
            raise self._refused(f"{expected} bytes", f"{size} bytes")
        return DiskArray(file, start, dtype, shape, str(self.path))

    def _refused(self, expected: object, got: object) -> DataError:
        return DataError(
            "a cached index is damaged, or of another kind",
            where=str(self.path),
            expected=expected,
            got=got,
            cure=ASIDE,
        )

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


class _Files:
    """Several ``.npy`` files, closed together."""

    def __init__(self) -> None:
        self._opened: list[NpyFile] = []

    def _add(self, path: Path, columns: int | None, dtypes: Sequence[str]) -> DiskArray:
        try:
            self._opened.append(NpyFile(path, columns, dtypes))
        except BaseException:
            self.close()
            raise
        return self._opened[-1].array

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files."""
        for file in self._opened:
            file.close()


class CachedOrder(_Files):
    """An order in upstream's cache; looks like :class:`~flagscale.data_inspect.order.Order`.

    Args:
        paths: Of document index, sample index and shuffle index.
        sequences: ``(first, one past the last)`` that the split chose.
        plan: What the arguments and the dataset ask for.
        seq_length: Tokens a sample, the extra one not counted.
        extra: Whether a sample is read with the token behind it.

    Raises:
        DataError: A file is damaged, or the cache is not of this dataset and plan.
    """

    def __init__(
        self,
        paths: tuple[Path, Path, Path],
        sequences: tuple[int, int],
        plan: OrderPlan,
        seq_length: int,
        extra: int = 1,
    ) -> None:
        super().__init__()
        self.plan, self.seq_length, self.extra = plan, seq_length, extra
        self.first, self.stop = sequences
        self._document = self._add(paths[0], None, ["<i4"])
        self._sample = self._add(paths[1], 2, ["<i4", "<i8"])
        self._shuffle = self._add(paths[2], None, ["<u4", "<i8"])
        self.num_samples, self.num_positions = plan.num_samples_total, len(self._document)
        try:
            self._check_sizes()
        except BaseException:
            self.close()
            raise

    def _check_sizes(self) -> None:
        expected = (
            self.plan.num_epochs * (self.stop - self.first),
            self.num_samples + 1,
            self.num_samples,
        )
        arrays = (self._document, self._sample, self._shuffle)
        if tuple(map(len, arrays)) != expected:
            raise DataError(
                "a cached order is not of this dataset as it is now, or of other arguments",
                where=self._document.name,
                expected=f"{expected} positions, boundaries and samples",
                got=tuple(map(len, arrays)),
                cure="find out whether the dataset was rewritten after the run: then no order "
                f"computed now is the run's. If it was not, {ASIDE}",
            )
        start = self.boundaries(np.array([0, self.num_samples], np.int64))
        if (start[0][0], start[1][0]) != (0, 0):
            raise self._damaged(self._sample, "a first piece at 0, 0", start)

    def shuffle(self, samples: Indices) -> Indices:
        """The piece of the stream that each sample is."""
        return self._checked(self._shuffle, self._shuffle.take(samples), 0, self.num_samples)

    def unshuffle(self, pieces: Indices) -> Indices:
        """All samples that are one of these pieces, rising."""
        return find_in(self._shuffle.chunks(), pieces)

    def boundaries(self, pieces: Indices) -> tuple[Indices, Indices]:
        """``(position, token in its sequence)`` where each piece begins; piece n is the end."""
        rows = self._sample.take(pieces).astype(np.int64)
        positions = self._checked(self._sample, rows[:, 0], 0, self.num_positions)
        return positions, self._checked(self._sample, rows[:, 1], 0, 1 << 31)

    def sequences(self, positions: Indices) -> Indices:
        """The sequence at each position."""
        values = self._document.take(positions)
        return self._checked(self._document, values, self.first, self.stop)

    def positions(self, first: int, stop: int) -> Indices:
        """All positions that hold a sequence in ``[first, stop)``, rising."""
        return find_between(self._document.chunks(), first, stop)

    def pieces_at(self, positions: Indices, offsets: Indices) -> Indices:
        """The last piece that begins at or before each token."""
        low = np.zeros(len(positions), np.int64)
        high = np.full(len(positions), self.num_samples + 1, np.int64)
        while (high - low > 1).any():
            middle = (low + high) // 2
            position, offset = self.boundaries(middle)
            before = (position < positions) | ((position == positions) & (offset <= offsets))
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        return low

    def _checked(self, array: DiskArray, values: Any, low: int, high: int) -> Indices:
        numbers: Indices = values.astype(np.int64)
        if numbers.size and (numbers.min() < low or numbers.max() >= high):
            raise self._damaged(array, f"{low} <= value < {high}", [numbers.min(), numbers.max()])
        return numbers

    def _damaged(self, array: DiskArray, expected: object, got: object) -> DataError:
        return DataError(
            "a cached order is damaged, or not of this dataset",
            where=array.name,
            expected=expected,
            got=got,
            cure=f"find out what changed it; {ASIDE}",
        )

    def verify(self, built: BuiltOrder) -> None:
        """Hold all of it against the order computed anew.

        Raises:
            DataError: They differ.
        """
        self._compare(self._document, built.document_index)
        self._compare(self._shuffle, built.shuffle_index)
        for start in range(0, self.num_samples + 1, VERIFY_ROWS):
            pieces = np.arange(start, min(start + VERIFY_ROWS, self.num_samples + 1))
            cached, computed = self.boundaries(pieces), built.boundaries(pieces)
            same = (cached[0] == computed[0]) & (cached[1] == computed[1])
            if start == 0:
                # Upstream begins at the first sequence, even if that has no tokens.
                same[0] = (cached[0][0], cached[1][0]) == (0, 0)
            if not same.all():
                at = int(np.argmin(same))
                raise self._damaged(
                    self._sample,
                    f"piece {pieces[at]} at {computed[0][at]}, {computed[1][at]}",
                    f"{cached[0][at]}, {cached[1][at]}",
                )

    def _compare(self, array: DiskArray, computed: Any) -> None:
        start = 0
        for chunk in array.chunks():
            same = chunk == computed[start : start + len(chunk)]
            if not same.all():
                at = int(np.argmin(same))
                raise self._damaged(
                    array, f"{computed[start + at]} at {start + at}", chunk[at].item()
                )
            start += len(chunk)


VERIFY_ROWS = 1 << 14


class CachedBlend(_Files):
    """A blend's order in upstream's cache.

    Args:
        paths: Of dataset index and dataset sample index.
        weights: Of the datasets, adding up to one.
        size: Samples of the blend.

    Raises:
        DataError: A file is damaged, or the cache is of another blend.
    """

    def __init__(self, paths: tuple[Path, Path], weights: Sequence[float], size: int) -> None:
        super().__init__()
        self.size = size
        self._weights = np.array(weights)
        self._dataset = self._add(paths[0], None, ["<i2", "|u1", "<i8"])
        self._sample = self._add(paths[1], None, ["<i8"])
        if (len(self._dataset), len(self._sample)) != (size, size):
            self.close()
            raise self._damaged(f"{size} samples", [len(self._dataset), len(self._sample)])

    def locate(self, indices: Indices) -> tuple[Indices, Indices]:
        """``(dataset, its sample index)`` of each index of the blend.

        Raises:
            DataError: There is no such index, or the cache is damaged there.
        """
        datasets = self._dataset.take(indices).astype(np.int64)
        samples = self._sample.take(indices).astype(np.int64)
        if datasets.size == 0:
            return datasets, samples
        if datasets.min() < 0 or datasets.max() >= len(self._weights):
            raise self._damaged(f"0 <= dataset < {len(self._weights)}", datasets.tolist()[:8])
        # Filling up whatever is furthest behind never lets a dataset get one sample ahead of its
        # share, nor further behind it than the others can be ahead together.
        behind = self._weights[datasets] * indices - samples
        if samples.min() < 0 or behind.min() < -1.01 or behind.max() > len(self._weights) + 1:
            at = int(np.argmax(np.abs(behind)))
            raise self._damaged("each dataset's share of the samples before", samples[at].item())
        return datasets, samples

    def find(self, dataset: int, samples: Indices) -> Indices:
        """The indices of the blend, rising, that are one of these samples of a dataset.

        Raises:
            DataError: The cache is damaged there.
        """
        weight, slack = float(self._weights[dataset]), len(self._weights) + 2
        found = [np.empty(0, np.int64)]
        for sample in samples.tolist():
            low = min(self.size, max(0, int((sample - 2) / weight)))
            window = np.arange(low, min(self.size, int((sample + slack) / weight) + 2))
            mine = self._dataset.take(window) == dataset
            hits = window[mine & (self._sample.take(window) == sample)]
            if len(hits) > 1 or (not len(hits) and len(window) and window[-1] < self.size - 1):
                raise self._damaged(f"sample {sample} of dataset {dataset} once", hits.tolist())
            found.append(hits)
        return np.sort(np.concatenate(found))

    def verify(self, datasets: npt.NDArray[Any], samples: Indices, start: int = 0) -> None:
        """Hold a part of it against the order computed anew.

        Raises:
            DataError: They differ.
        """
        stop = start + len(datasets)
        same = (self._dataset.read(start, stop) == datasets) & (
            self._sample.read(start, stop) == samples
        )
        if not same.all():
            at = int(np.argmin(same))
            raise self._damaged(
                f"sample {samples[at]} of dataset {datasets[at]} at {start + at}", "another"
            )

    def _damaged(self, expected: object, got: object) -> DataError:
        return DataError(
            "a cached blend is damaged, or of another run",
            where=self._dataset.name,
            expected=expected,
            got=got,
            cure=ASIDE,
        )
