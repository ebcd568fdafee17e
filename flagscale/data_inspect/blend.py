"""Blends: in which order the samples of several datasets are mixed.

Sample ``i`` of a blend is of the dataset that lags furthest behind its weight, the one with the
greatest ``weight * max(i, 1) - samples so far``; ties go to the first. Nobody knows a place in
that order without all before it, but a blend is the beginning of every longer one.

The loop runs in the compiled module that megatron-core ships for it, which is loaded as a file of
its own; where there is none, in Python. Both add and multiply doubles alike on x86-64. On a
processor whose compiler fuses the two (aarch64), only the compiled loop gives what was trained on.

Source: megatron-core 0.19.2, core/datasets/blended_megatron_dataset_builder.py,
blended_dataset.py and helpers.cpp.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType

import numpy as np
import numpy.typing as npt

from flagscale.data_inspect.arguments import DataArguments
from flagscale.errors import ConfigError, DataError

__all__ = [
    "BlendOrder",
    "BlendPlan",
    "Mix",
    "exhaustive_order",
    "mix_of",
    "mixing_order",
    "normalize",
    "plan_blend",
]

DatasetIndex = npt.NDArray[np.int16]
SampleIndex = npt.NDArray[np.int64]

MOST_DATASETS = 32766
MOST_SAMPLES = 2**32
"""So many are not computed in memory."""
BLOCK = 1 << 16
"""Samples from one remembered count of each dataset to the next."""


@dataclass(frozen=True)
class BlendPlan:
    """What upstream's builder asks for.

    Args:
        num_samples: Of each dataset; ``None`` for one epoch.
        has_blend_layer: Whether a blend stands above the datasets; else there is one dataset, and
            its own index is that of the top dataset.
        weights: Of each dataset, adding up to one; ``None`` if their lengths are the weights.
        size: Of the blend; ``None`` if it depends on the lengths, or if there is no blend.
        requested: Samples that training asks for.
    """

    num_samples: tuple[int | None, ...]
    has_blend_layer: bool
    weights: tuple[float, ...] | None
    size: int | None
    requested: int


@dataclass(frozen=True)
class Mix:
    """All that the order of a blend depends on.

    Args:
        weights: As the loop takes them.
        size: Samples of the blend.
    """

    weights: tuple[float, ...]
    size: int


def normalize(weights: Sequence[float]) -> tuple[float, ...]:
    """Weights that add up to one, by the division upstream makes."""
    vector = np.array(weights, np.float64)
    return tuple((vector / np.sum(vector)).tolist())


def plan_blend(args: DataArguments, num_samples: int) -> BlendPlan:
    """How many samples of each dataset upstream builds, and whether it blends them.

    Args:
        args: Of the run.
        num_samples: That training asks for; see
            :func:`~flagscale.data_inspect.steps.num_train_samples`.

    Raises:
        ConfigError: Upstream would refuse the blend.
    """
    prefixes, weights = args.blend.prefixes, args.blend.weights
    if num_samples < 1 or not 0 < len(prefixes) <= MOST_DATASETS:
        raise _blend_error("samples and datasets", (num_samples, len(prefixes)))
    # Of datasets for each split alone (no --split), one is never blended; of those that are split,
    # one is if it has a weight.
    if len(prefixes) == 1 and (weights is None or args.split is None):
        return BlendPlan((num_samples,), False, None, None, num_samples)
    if weights is None:
        return BlendPlan((None,) * len(prefixes), True, None, None, num_samples)
    if len(weights) != len(prefixes) or not all(0 < w < math.inf for w in weights):
        raise _blend_error("a positive weight for each dataset", weights)
    shares = normalize(weights)
    surplus = args.mid_level_dataset_surplus
    if not 0 <= surplus < math.inf or not math.isclose(sum(shares), 1.0, rel_tol=1e-5):
        raise _blend_error("weights and a surplus that are numbers", (weights, surplus))
    targets = [math.ceil(num_samples * share) for share in shares]
    build = tuple(math.ceil(target * (1 + surplus)) for target in targets)
    return BlendPlan(build, True, shares, sum(targets), num_samples)


def _blend_error(expected: str, got: object) -> ConfigError:
    return ConfigError(
        "upstream would not blend these datasets",
        where="--data-path, --mid-level-dataset-surplus",
        expected=expected,
        got=got,
        cure="give the arguments of the run",
    )


def mix_of(plan: BlendPlan, lengths: Sequence[int] | None = None) -> Mix:
    """The order of a planned blend.

    Args:
        plan: One with a blend layer.
        lengths: Samples of each dataset as built; needed where there are no weights.

    Raises:
        ConfigError: There is no blend layer.
        DataError: Lengths are needed and are not given, or a dataset is empty.
    """
    if not plan.has_blend_layer:
        raise _blend_error("datasets that are blended", "one that is not")
    if plan.weights is not None and plan.size is not None:
        # Upstream divides by the sum once more, and that can change the last bit.
        return Mix(normalize(plan.weights), plan.size)
    if lengths is None or len(lengths) != len(plan.num_samples) or min(lengths) < 1:
        raise DataError(
            "the lengths of the datasets are the weights of the blend",
            where="--data-path",
            expected=f"{len(plan.num_samples)} datasets of at least one sample",
            got=lengths,
            cure="open all datasets of the blend",
        )
    return Mix(normalize(lengths), min(plan.requested, sum(lengths)))


def mixing_order(
    mix: Mix, begin: int = 0, end: int | None = None, *, compiled: bool = True
) -> tuple[DatasetIndex, SampleIndex]:
    """Samples ``[begin, end)`` of a blend.

    Time grows with ``end``; memory, too: 2 bytes a sample up to it, and 8 from ``begin`` on.

    Args:
        mix: The blend.
        begin: Of the top dataset.
        end: One past the last; ``None`` for all.
        compiled: Whether to use megatron-core's loop where it is to be had.

    Returns:
        Ordinals of the datasets and indices of their samples, [end - begin] each.

    Raises:
        DataError: The blend has no such samples.
    """
    order = BlendOrder(mix, compiled=compiled)
    return order.take(begin, mix.size if end is None else end)


def exhaustive_order(
    sizes: Sequence[int], *, compiled: bool = True
) -> tuple[DatasetIndex, SampleIndex]:
    """The blend that takes all samples of each dataset (training has none such; validation may).

    Args:
        sizes: Samples of each dataset.
        compiled: Whether to use megatron-core's loop where it is to be had.
    """
    module = _compiled() if compiled else None
    total = sum(sizes)
    if module is None:
        dataset_index = _exhaustive_in_python(sizes)
        return dataset_index, _sample_index(dataset_index, np.zeros(len(sizes), np.int64))
    dataset_index = np.full(total, -1, np.int16)
    sample_index = np.zeros(total, np.int64)
    module.build_exhaustive_blending_indices(
        dataset_index, sample_index, np.array(sizes, np.int64), len(sizes)
    )
    return _written(dataset_index), sample_index


@dataclass
class BlendOrder:
    """A blend without a cache: computed as far as it was asked for, and kept.

    Args:
        mix: The blend.
        compiled: Whether to use megatron-core's loop where it is to be had.
    """

    mix: Mix
    compiled: bool = True
    _dataset_index: DatasetIndex = field(init=False, repr=False)
    _counts: npt.NDArray[np.int64] = field(init=False, repr=False)
    """Samples of each dataset before each block, [blocks + 1, datasets]."""

    def __post_init__(self) -> None:
        self._dataset_index = np.empty(0, np.int16)
        self._counts = np.zeros((1, len(self.mix.weights)), np.int64)

    def take(self, begin: int, end: int) -> tuple[DatasetIndex, SampleIndex]:
        """Samples ``[begin, end)``: ordinals of the datasets and indices of their samples.

        Raises:
            DataError: The blend has no such samples.
        """
        if not 0 <= begin <= end <= self.mix.size:
            raise DataError(
                "the blend has no such samples",
                where="--data-path",
                expected=f"up to {self.mix.size}",
                got=f"[{begin}, {end})",
                cure="check the arguments and the datasets: the run's had more samples",
            )
        self._extend_to(end)
        block = begin // BLOCK
        before = self._dataset_index[block * BLOCK : begin]
        counts = self._counts[block] + np.bincount(before, minlength=len(self.mix.weights))
        window = self._dataset_index[begin:end].copy()
        return window, _sample_index(window, counts)

    def lookup(self, indices: npt.ArrayLike) -> tuple[DatasetIndex, SampleIndex]:
        """:meth:`take` of single samples, in any order."""
        asked = np.asarray(indices, np.int64)
        datasets, samples = np.empty(asked.shape, np.int16), np.empty(asked.shape, np.int64)
        if asked.size:
            self._extend_to(min(self.mix.size, int(asked.max()) + 1))
        for block in np.unique(asked // BLOCK).tolist():
            here = asked // BLOCK == block
            first, last = int(asked[here].min()), int(asked[here].max())
            window = self.take(first, last + 1)
            datasets[here], samples[here] = (part[asked[here] - first] for part in window)
        return datasets, samples

    def index_of(self, dataset: int, samples: npt.ArrayLike) -> SampleIndex:
        """The inverse: where in the blend samples of a dataset are; -1 if it ends before.

        Args:
            dataset: Its ordinal.
            samples: Its own indices of the samples.
        """
        asked = np.asarray(samples, np.int64)
        result = np.full(asked.shape, -1, np.int64)
        if not 0 <= dataset < len(self.mix.weights) or not asked.size:
            return result
        self._extend_to_count(dataset, int(asked.max()) + 1)
        counts = self._counts[:, dataset]
        blocks = np.searchsorted(counts, asked, "right") - 1
        for block in np.unique(blocks[(asked >= 0) & (asked < counts[-1])]).tolist():
            here = blocks == block
            part = self._dataset_index[block * BLOCK : (block + 1) * BLOCK]
            places = np.flatnonzero(part == dataset)
            result[here] = block * BLOCK + places[asked[here] - counts[block]]
        return result

    def _extend_to_count(self, dataset: int, count: int) -> None:
        """Until there are so many samples of a dataset, or no more at all."""
        self._extend_to(min(self.mix.size, math.ceil(count / self.mix.weights[dataset]) + 64))
        while self._counts[-1, dataset] < count and len(self._dataset_index) < self.mix.size:
            self._extend_to(min(self.mix.size, 2 * len(self._dataset_index)))

    def _extend_to(self, end: int) -> None:
        if end <= len(self._dataset_index):
            return
        if end > MOST_SAMPLES:
            raise DataError(
                "a blend is too long to be mixed again",
                where="--data-path",
                expected=f"at most {MOST_SAMPLES} samples",
                got=end,
                cure="use the cached order (--data-cache-path)",
            )
        # The loop can only begin at the beginning: go further than asked, so as not to come back
        # for each step of a run.
        stop = min(self.mix.size, end + end // 8)
        module = _compiled() if self.compiled else None
        if module is None:
            self._dataset_index = _greedy_in_python(self.mix.weights, stop)
        else:
            self._dataset_index = _greedy_compiled(module, self.mix.weights, stop)
        datasets = len(self.mix.weights)
        counts = [np.zeros(datasets, np.int64)]
        for first in range(0, stop, BLOCK):
            part = self._dataset_index[first : first + BLOCK]
            counts.append(counts[-1] + np.bincount(part, minlength=datasets))
        self._counts = np.array(counts)


def _sample_index(window: DatasetIndex, counts: npt.NDArray[np.int64]) -> SampleIndex:
    """Each sample's index in its dataset, given how many of each dataset come before the window."""
    result = np.empty(len(window), np.int64)
    for dataset in np.unique(window):
        here = window == dataset
        result[here] = counts[dataset] + np.arange(np.count_nonzero(here))
    return result


@lru_cache(maxsize=1)
def _compiled() -> ModuleType | None:
    """megatron-core's compiled loops, without megatron; ``None`` if it brings none."""
    for path in _compiled_files():
        loader = importlib.machinery.ExtensionFileLoader("helpers_cpp", path)
        spec = importlib.util.spec_from_loader("helpers_cpp", loader)
        if spec is None:
            continue
        try:
            module = importlib.util.module_from_spec(spec)
            loader.exec_module(module)
        except ImportError:
            # Built for another interpreter.
            continue
        return module
    return None


def _compiled_files() -> list[str]:
    # Slow to import, and not needed where the order is cached.
    import importlib.metadata

    try:
        files = importlib.metadata.files("megatron-core") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    endings = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return [
        str(file.locate())
        for file in files
        if file.name.startswith("helpers_cpp.") and file.name.endswith(endings)
    ]


def _greedy_compiled(module: ModuleType, weights: Sequence[float], stop: int) -> DatasetIndex:
    dataset_index = np.full(stop, -1, np.int16)
    # The loop also writes each sample's index, which the counts give as well: all of them into the
    # same eight bytes, not eight bytes each.
    nowhere = np.lib.stride_tricks.as_strided(np.zeros(1, np.int64), (stop,), (0,))
    module.build_blending_indices(
        dataset_index, nowhere, np.array(weights, np.float64), len(weights), stop, False
    )
    return _written(dataset_index)


def _written(dataset_index: DatasetIndex) -> DatasetIndex:
    if len(dataset_index) and dataset_index.min() < 0:
        raise DataError(
            "megatron-core's compiled helper did not fill the order of a blend",
            where="megatron/core/datasets/helpers_cpp",
            cure="use a megatron-core that this release supports",
        )
    return dataset_index


def _greedy_in_python(weights: Sequence[float], stop: int) -> DatasetIndex:
    counts = [0.0] * len(weights)
    order = np.empty(stop, np.int16)
    for i in range(stop):
        at = float(max(i, 1))
        lags = [weight * at - count for weight, count in zip(weights, counts, strict=True)]
        chosen = lags.index(max(lags))
        order[i] = chosen
        counts[chosen] += 1.0
    return order


def _exhaustive_in_python(sizes: Sequence[int]) -> DatasetIndex:
    total = sum(sizes)
    left: dict[int, int] = dict(enumerate(sizes))
    order = np.empty(total, np.int16)
    for i in range(total):
        at = float(max(i, 1))
        chosen = max(left, key=lambda d: sizes[d] / total * at - float(sizes[d] - left[d]))
        order[i] = chosen
        left[chosen] -= 1
        if not left[chosen]:
            del left[chosen]
    return order
