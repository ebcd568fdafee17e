"""A training split opened: its datasets, their blend, and the caches of both."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect import cache_search
from flagscale.data_inspect.answers import DocumentSpan
from flagscale.data_inspect.arguments import DataArguments
from flagscale.data_inspect.arrays import Indices
from flagscale.data_inspect.blend import BlendOrder, BlendPlan, Mix, mix_of, normalize, plan_blend
from flagscale.data_inspect.cache_search import DatasetKey
from flagscale.data_inspect.caches import CachedBlend
from flagscale.data_inspect.dataset import PROVE_BELOW, TrainingDataset
from flagscale.data_inspect.indexed import IndexedFile
from flagscale.data_inspect.order import split_range
from flagscale.errors import DataError

__all__ = ["TrainingCorpus", "batch_tokens"]

Progress = Callable[[str], None]
FILES_EACH = 7
"""Two of the dataset, three of its cache, one of its sidecar, and one to spare."""
DEFAULT_SPLIT = "969, 30, 1"
"""Of the Aquila era; written into descriptions even where datasets were not split."""
VERIFY_SAMPLES = 1 << 20


@dataclass(frozen=True)
class _Caches:
    """Where to look, and what a look found.

    Args:
        arguments: Of the run.
        keys: Of each dataset.
        aquila: Whether they are of a release of the Aquila era.
        hashes: Of each dataset's description, where a ledger knows it.
        blend_hash: Of the blend's.
        used: Whether caches are looked at.
    """

    arguments: DataArguments
    keys: tuple[DatasetKey, ...]
    aquila: bool
    hashes: tuple[str | None, ...]
    blend_hash: str | None
    used: bool

    def sequences(self, ordinal: int, num_sequences: int) -> tuple[int, int]:
        split = self.arguments.split
        if self.aquila:
            return cache_search.aquila_split_range(split, num_sequences)
        return split_range(self.keys[ordinal].split, num_sequences)

    def order(self, ordinal: int) -> tuple[Path, Path, Path] | None:
        key, folder = self.keys[ordinal], self.arguments.data_cache_path
        if not self.used:
            return None
        if self.aquila:
            return cache_search.aquila_order(key, folder)
        return cache_search.find_order(key, folder, self.hashes[ordinal])

    def blend(self, mix: Mix) -> tuple[Path, Path] | None:
        folder = self.arguments.data_cache_path
        if not self.used:
            return None
        if self.aquila:
            weights = self.arguments.blend.weights or ()
            return cache_search.aquila_blend(self.keys, weights, mix.size, folder)
        weights, recorded = mix.weights, self.blend_hash
        return cache_search.find_blend(self.keys, weights, mix.size, folder, recorded)

    def origin(self, paths: Sequence[Path] | None, recorded: str | None) -> str:
        if paths is None:
            return "computed from the arguments and the datasets as they are now"
        why = "found by its description" if recorded is None else "which the run's ledger names"
        return f"from the cache {paths[0]}, {why}"


class TrainingCorpus:
    """The training data of a run; made by :meth:`open`.

    Args:
        caches: Where orders may be cached.
        plan: What upstream's builder asks for.
        progress: Told what is about to be done, where it takes long.
    """

    def __init__(self, caches: _Caches, plan: BlendPlan, progress: Progress | None) -> None:
        self.prefixes = caches.arguments.blend.prefixes
        self._caches, self._plan, self._progress = caches, plan, progress
        self._datasets: dict[int, TrainingDataset] = {}
        self._assumptions: dict[int, str] = {}
        self._stack = ExitStack()
        self._mix: Mix | None = None
        self._blend: CachedBlend | BlendOrder | None = None

    @classmethod
    def open(
        cls,
        arguments: DataArguments,
        num_samples: int,
        *,
        hashes: Sequence[str | None] | None = None,
        blend_hash: str | None = None,
        use_caches: bool = True,
        progress: Progress | None = None,
    ) -> Self:
        """Open what a run trains on; each dataset is opened when first asked for.

        Args:
            arguments: Of the run.
            num_samples: That training asks for.
            hashes: Of each dataset's description, in the order of the blend, as a ledger knows
                them.
            blend_hash: Of the blend's.
            use_caches: ``False`` to compute every order.
            progress: Told what is about to be done, where it takes long.

        Raises:
            ConfigError: Upstream would refuse the arguments.
            DataError: A blend's cache is damaged, or several caches fit.
        """
        plan = plan_blend(arguments, num_samples)
        prefixes = arguments.blend.prefixes
        keys = tuple(
            DatasetKey(prefix, number, arguments.seq_length, arguments.seed, arguments.split)
            for prefix, number in zip(prefixes, plan.num_samples, strict=True)
        )
        known = tuple(hashes or [None] * len(prefixes))
        if len(known) != len(prefixes):
            raise DataError(
                "the ledger knows another number of datasets than the arguments",
                expected=len(prefixes),
                got=len(known),
                cure="take both from one start of the run",
            )
        caches = _Caches(arguments, keys, False, known, blend_hash, use_caches)
        if use_caches and hashes is None:
            caches, plan = _look_for_aquila(caches, plan)
        _allow_open_files(FILES_EACH * len(prefixes))
        corpus = cls(caches, plan, progress)
        try:
            corpus._open_blend()
        except BaseException:
            corpus.close()
            raise
        return corpus

    def _open_blend(self) -> None:
        if not self._plan.has_blend_layer:
            return
        lengths = None if self._plan.weights else [one.size for one in self._all()]
        self._mix = mix_of(self._plan, lengths)
        paths = self._caches.blend(self._mix)
        origin = self._caches.origin(paths, self._caches.blend_hash)
        self._assumptions[-1] = f"the blend's order is {origin}"
        built = BlendOrder(self._mix)
        if paths is None:
            self._blend = built
            return
        cached = CachedBlend(paths, self._mix.weights, self._mix.size)
        self._stack.callback(cached.close)
        self._blend = cached
        if self._mix.size < PROVE_BELOW:
            cached.verify(*built.take(0, self._mix.size))

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
        """Close all files."""
        self._stack.close()

    @property
    def size(self) -> int:
        """The length of the top dataset."""
        return self.dataset(0).size if self._mix is None else self._mix.size

    def dataset(self, ordinal: int) -> TrainingDataset:
        """One dataset of the blend.

        Raises:
            DataError: There is none of this ordinal, or its files are missing or damaged.
        """
        if ordinal not in self._datasets:
            self._datasets[ordinal] = self._open_dataset(ordinal)
        return self._datasets[ordinal]

    def _open_dataset(self, ordinal: int) -> TrainingDataset:
        if not 0 <= ordinal < len(self.prefixes):
            raise DataError(
                "no such dataset",
                where="--data-path",
                expected=f"0 <= dataset < {len(self.prefixes)}",
                got=ordinal,
                cure="check that the arguments are those of the run",
            )
        index = self._stack.enter_context(IndexedFile(self.prefixes[ordinal]))
        sequences = self._caches.sequences(ordinal, index.num_sequences)
        paths = self._caches.order(ordinal)
        key = self._caches.keys[ordinal]
        dataset = TrainingDataset(key, sequences, index, paths, self._progress)
        self._stack.callback(dataset.close)
        origin = self._caches.origin(paths, self._caches.hashes[ordinal])
        self._assumptions[ordinal] = f"the order of dataset {ordinal}, {key.prefix}, is {origin}"
        return dataset

    def _all(self) -> Iterator[TrainingDataset]:
        return map(self.dataset, range(len(self.prefixes)))

    def locate(self, indices: npt.ArrayLike) -> tuple[Indices, Indices]:
        """Where samples of the top dataset come from.

        Args:
            indices: [n] of the top dataset.

        Returns:
            [n] datasets and [n] the index of each sample in its dataset.

        Raises:
            DataError: There are no such samples, or the blend's cache is damaged there.
        """
        wanted = np.asarray(indices, np.int64)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.size):
            raise DataError(
                "the training data has no such sample",
                where="--data-path",
                expected=f"0 <= index < {self.size}",
                got=[int(wanted.min()), int(wanted.max())],
                cure="check that arguments and datasets are those of the run",
            )
        if self._blend is None:
            return np.zeros(len(wanted), np.int64), wanted
        if isinstance(self._blend, CachedBlend):
            return self._blend.locate(wanted)
        datasets, samples = self._blend.lookup(wanted)
        return datasets.astype(np.int64), samples

    def indices_of(self, dataset: int, samples: npt.ArrayLike) -> Indices:
        """The inverse of :meth:`locate`, rising; without those beyond the end of the blend.

        Raises:
            DataError: There is no such dataset, or the blend's cache is damaged there.
        """
        wanted = np.asarray(samples, np.int64)
        size = self.dataset(dataset).size
        wanted = wanted[(wanted >= 0) & (wanted < size)]
        if self._blend is None:
            return np.sort(wanted)
        if isinstance(self._blend, CachedBlend):
            return self._blend.find(dataset, wanted)
        found = self._blend.index_of(dataset, wanted)
        return np.sort(found[found >= 0])

    def documents(self, dataset: int, sample_index: int) -> tuple[DocumentSpan, ...]:
        """The parts of documents a sample is made of, in its order."""
        return self.dataset(dataset).documents([sample_index])[0]

    def documents_of(
        self, datasets: npt.ArrayLike, samples: npt.ArrayLike
    ) -> list[tuple[DocumentSpan, ...]]:
        """:meth:`documents` of [n] samples, which for a whole step is much faster."""
        which, wanted = np.asarray(datasets, np.int64), np.asarray(samples, np.int64)
        answers: list[tuple[DocumentSpan, ...]] = [()] * len(wanted)
        for ordinal in np.unique(which).tolist():
            rows = np.flatnonzero(which == ordinal)
            spans = self.dataset(ordinal).documents(wanted[rows])
            for row, answer in zip(rows.tolist(), spans, strict=True):
                answers[row] = answer
        return answers

    def tokens(self, dataset: int, sample_index: int) -> Indices:
        """[seq_length + 1] int64: a sample's tokens and the label behind the last, as drawn."""
        sample: Indices = self.dataset(dataset).tokens([sample_index])[0]
        return sample

    def tokens_of(self, datasets: npt.ArrayLike, samples: npt.ArrayLike) -> Indices:
        """:meth:`tokens` of [n] samples: [n, seq_length + 1]."""
        which, wanted = np.asarray(datasets, np.int64), np.asarray(samples, np.int64)
        tokens = np.empty((len(wanted), self._caches.arguments.seq_length + 1), np.int64)
        for ordinal in np.unique(which).tolist():
            rows = which == ordinal
            tokens[rows] = self.dataset(ordinal).tokens(wanted[rows])
        return tokens

    def find(
        self, dataset: int, document: int, token_start: int = 0, token_end: int | None = None
    ) -> Indices:
        """Every sample of a dataset that holds one of some tokens of a document.

        See :meth:`~flagscale.data_inspect.dataset.TrainingDataset.find`.
        """
        return self.dataset(dataset).find(document, token_start, token_end)

    def assumptions(self) -> list[str]:
        """Where the orders that were needed so far come from; what an answer takes for granted."""
        return [self._assumptions[ordinal] for ordinal in sorted(self._assumptions)]

    def problems(self) -> list[str]:
        """What was wrong and could be done without: a sidecar of another dataset."""
        return [problem for one in self._datasets.values() for problem in one.problems]

    def verify(self) -> None:
        """Hold every cache, whole, against what is computed anew.

        Raises:
            DataError: One is damaged, or was made from another dataset.
        """
        for dataset in self._all():
            dataset.verify()
        if isinstance(self._blend, CachedBlend) and self._mix is not None:
            built = BlendOrder(self._mix)
            for start in range(0, self._mix.size, VERIFY_SAMPLES):
                stop = min(start + VERIFY_SAMPLES, self._mix.size)
                self._blend.verify(*built.take(start, stop), start)


def batch_tokens(tokens: npt.NDArray[Any], pad_id: int | None) -> npt.NDArray[Any]:
    """What of drawn tokens reaches the model: padding ids become 0, wherever they came from.

    Args:
        tokens: Of any shape.
        pad_id: The padding id the dataset goes by; ``None`` for none.
    """
    return tokens if pad_id is None else np.where(tokens == pad_id, 0, tokens)


def _look_for_aquila(caches: _Caches, plan: BlendPlan) -> tuple[_Caches, BlendPlan]:
    """Caches and plan of the Aquila era, if each dataset has such a cache and none of today's."""
    arguments = caches.arguments
    weights = arguments.blend.weights
    if weights is None and len(caches.keys) > 1:
        return caches, plan
    requested = plan.requested
    sizes = [requested] if weights is None else cache_search.aquila_sizes(weights, requested)
    split = arguments.split or DEFAULT_SPLIT
    keys = tuple(
        replace(key, num_samples=size, split=split)
        for key, size in zip(caches.keys, sizes, strict=True)
    )
    old = replace(caches, keys=keys, aquila=True)
    found = [old.order(ordinal) for ordinal in range(len(keys))]
    if None in found:
        return caches, plan
    newer = [caches.order(ordinal) for ordinal in range(len(keys))]
    for one, other in zip(found, newer, strict=True):
        if one is not None and other is not None:
            cache_search.check_agreement(one, other)
    if None not in newer:
        return caches, plan
    shares = None if weights is None else normalize(weights)
    size = None if weights is None else sum(sizes)
    return old, BlendPlan(tuple(sizes), weights is not None, shares, size, requested)


def _allow_open_files(number: int) -> None:
    """A large blend has more files than a process may open unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256
    if soft != resource.RLIM_INFINITY and soft < wanted:
        allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
