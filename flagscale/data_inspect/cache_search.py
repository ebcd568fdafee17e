"""Which of upstream's caches belongs to a run.

Today's are named by a hash of a description that lies beside them; a run's own ledger knows the
hash, without it the description that says what the arguments say is looked for. In releases of
the Aquila era (megatron before core 0.5) the description holds nothing but arguments, so that its
hash can be computed.

Source: megatron-core 0.19.2, core/datasets/{megatron,gpt,blended}_dataset.py; for the Aquila era
FlagScale of 2023, megatron/data/{gpt,blendable}_dataset.py and dataset_utils.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from flagscale.data_inspect.arrays import open_binary, sampled_crc
from flagscale.data_inspect.order import split_matrix
from flagscale.errors import ConfigError, DataError

__all__ = [
    "DatasetKey",
    "aquila_blend",
    "aquila_order",
    "aquila_sizes",
    "aquila_split_range",
    "check_agreement",
    "find_blend",
    "find_order",
]

LARGEST_DESCRIPTION = 1 << 26
ORDER_PARTS = ("document_index", "sample_index", "shuffle_index")
BLEND_PARTS = ("dataset_index", "dataset_sample_index")
OLD_ORDER_PARTS = ("doc_idx", "sample_idx", "shuffle_idx")
OLD_BLEND_PARTS = ("index", "sample_index")


@dataclass(frozen=True)
class DatasetKey:
    """What decides a dataset's order, beside its own content.

    Args:
        prefix: As ``--data-path`` names it.
        num_samples: Samples asked of it; ``None`` for one epoch.
        seq_length: ``--seq-length``.
        seed: ``--seed``.
        split: ``--split``; ``None`` where training has datasets of its own.
    """

    prefix: str
    num_samples: int | None
    seq_length: int
    seed: int
    split: str | None

    def describes(self, identifiers: Any) -> bool:
        """Whether a description of upstream's is of this dataset's training order."""
        if not isinstance(identifiers, dict):
            return False
        path = identifiers.get("dataset_path")
        expected = {
            "class": "GPTDataset",
            "num_samples": self.num_samples,
            "index_split": "train",
            "random_seed": self.seed,
            "sequence_length": self.seq_length,
            "split": self.split,
            "split_matrix": _as_json(split_matrix(self.split)),
        }
        found = {name: identifiers.get(name) for name in expected}
        return isinstance(path, str) and _same_file(path, self.prefix) and found == expected


def _as_json(value: object) -> object:
    return json.loads(json.dumps(value))


def _same_file(one: str, other: str) -> bool:
    return one == other or os.path.abspath(one) == os.path.abspath(other)


def find_order(
    key: DatasetKey, cache_path: str | None, recorded: str | None = None
) -> tuple[Path, Path, Path] | None:
    """Today's cached order of a dataset.

    Args:
        key: The dataset.
        cache_path: ``--data-cache-path``.
        recorded: The hash that the run's ledger knows.

    Returns:
        Document, sample and shuffle index; ``None`` where there is none.

    Raises:
        DataError: Several fit, and they differ.
    """
    folder = Path(cache_path or f"{key.prefix}/cache/GPTDataset_indices")
    found = _find(folder, "GPTDataset", ORDER_PARTS, key.describes, recorded)
    return None if found is None else (found[0], found[1], found[2])


def find_blend(
    keys: Sequence[DatasetKey],
    weights: Sequence[float],
    size: int,
    cache_path: str | None,
    recorded: str | None = None,
) -> tuple[Path, Path] | None:
    """Today's cached order of a blend; without ``--data-cache-path`` none is written.

    Args:
        keys: The datasets.
        weights: Of the datasets, adding up to one.
        size: Samples of the blend.
        cache_path: ``--data-cache-path``.
        recorded: The hash that the run's ledger knows.

    Returns:
        Dataset index and dataset sample index; ``None`` where there is none.

    Raises:
        DataError: Several fit, and they differ.
    """
    if cache_path is None:
        return None

    def describes(identifiers: Any) -> bool:
        if not isinstance(identifiers, dict):
            return False
        datasets = identifiers.get("datasets")
        return (
            isinstance(datasets, list)
            and len(datasets) == len(keys)
            and all(key.describes(one) for key, one in zip(keys, datasets, strict=True))
            and (identifiers.get("split"), identifiers.get("size")) == ("train", size)
            and identifiers.get("weights") == list(weights)
        )

    found = _find(Path(cache_path), "BlendedDataset", BLEND_PARTS, describes, recorded)
    return None if found is None else (found[0], found[1])


def _find(
    folder: Path,
    kind: str,
    parts: Sequence[str],
    describes: Callable[[Any], bool],
    recorded: str | None,
) -> list[Path] | None:
    names = _matching(folder, kind, describes) if recorded is None else [recorded]
    paths = [[folder / f"{name}-{kind}-train-{part}.npy" for part in parts] for name in names]
    whole = [files for files in paths if all(map(os.path.isfile, files))]
    for other in whole[1:]:
        check_agreement(whole[0], other)
    return whole[0] if whole else None


def _matching(folder: Path, kind: str, describes: Callable[[Any], bool]) -> Iterator[str]:
    """The hashes of the descriptions in a folder that fit, and are as they were written."""
    ending = f"-{kind}-train-description.txt"
    try:
        names = sorted(name for name in os.listdir(folder) if name.endswith(ending))
    except OSError:
        return
    for name in names:
        path, named = folder / name, name.removesuffix(ending)
        try:
            stat = path.stat()
        except OSError:
            continue
        if describes(_read_description(path, named, stat.st_size, stat.st_mtime_ns)):
            yield named


@lru_cache(maxsize=4096)
def _read_description(path: Path, named: str, size: int, mtime_ns: int) -> Any:
    """What a description says; ``None`` if it is not as it was written. Kept: many look for one.

    Args:
        path: The file.
        named: The hash in its name.
        size: In bytes.
        mtime_ns: When it was written: a rewritten one is read anew.
    """
    if size > LARGEST_DESCRIPTION:
        return None
    try:
        text = path.read_bytes()
        if hashlib.md5(text, usedforsecurity=False).hexdigest() != named:
            return None
        return json.loads(text)
    except (OSError, ValueError, RecursionError):
        return None


def check_agreement(one: Sequence[Path], other: Sequence[Path]) -> None:
    """See that two caches which both fit are the same, as far as sampled blocks tell.

    Raises:
        DataError: They differ.
    """
    for first, second in zip(one, other, strict=True):
        if _sampled(first) != _sampled(second):
            raise DataError(
                "two caches fit the arguments, and differ",
                where=f"{first}, {second}",
                expected="one, or the same order in both",
                cure="keep the run's own, which its time tells; or give the ledger, which knows it",
            )


def _sampled(path: Path) -> tuple[int, int]:
    with open_binary(path, "a cached index") as stream:
        size = os.fstat(stream.fileno()).st_size
        return size, sampled_crc(stream.fileno(), size, str(path))


def aquila_split_range(split: str | None, num_sequences: int) -> tuple[int, int]:
    """``(first, one past the last)`` training sequence, as the Aquila era rounded it.

    Raises:
        ConfigError: It is not a split.
    """
    if split is None:
        return 0, num_sequences
    try:
        shares = [float(part) for part in split.replace("/", ",").split(",")][:3]
        ends = [round(share / sum(shares) * float(num_sequences)) for share in shares]
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(
            "the split is not one",
            where="--split",
            expected="up to three numbers, as in 98,1,1",
            got=split,
            cure="give the argument of the run",
        ) from error
    # What rounding left over was taken from every bound.
    return 0, ends[0] - (sum(ends) - num_sequences)


def aquila_sizes(weights: Sequence[float], num_samples: int) -> list[int]:
    """Samples built of each dataset of a blend, which held as many as all of them together."""
    total = sum(weights)
    return [math.ceil(num_samples * (weight / total) * 1.005) for weight in weights]


def _aquila_description(key: DatasetKey) -> str:
    return (
        f"GPT Dataset\n\nData prefix {key.prefix}\nDataset name train\n"
        f"Number of samples {key.num_samples}\nSequence length {key.seq_length}\n"
        f"Random seed {key.seed}\nSplit {key.split}\n"
    )


def _md5(text: str) -> str:
    return hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def aquila_order(key: DatasetKey, cache_path: str | None) -> tuple[Path, Path, Path] | None:
    """The Aquila era's cached order of a dataset; beside the dataset it was looked for first.

    Args:
        key: The dataset.
        cache_path: ``--data-cache-path``.

    Returns:
        Document, sample and shuffle index; ``None`` where there is none.
    """
    folders = [Path(key.prefix).parent / "index-cache"]
    folders += [] if cache_path is None else [Path(cache_path)]
    name = _md5(_aquila_description(key))
    for folder in folders:
        paths = [folder / f"{name}_{part}.npy" for part in OLD_ORDER_PARTS]
        if all(map(os.path.isfile, [*paths, folder / f"{name}.dsc"])):
            return paths[0], paths[1], paths[2]
    return None


def aquila_blend(
    keys: Sequence[DatasetKey], weights: Sequence[float], size: int, cache_path: str | None
) -> tuple[Path, Path] | None:
    """The Aquila era's cached order of a blend; without ``--data-cache-path`` none was written."""
    if cache_path is None:
        return None
    normalised = np.array(weights, np.float64)
    # Twice, as it was done: the last bit is part of the text.
    normalised = normalised / float(sum(weights))
    normalised /= np.sum(normalised)
    text = "Blendable dataset\n\nDatasets:\n"
    text += "".join(f"{_aquila_description(key)}\n\n" for key in keys)
    text += f"Weights: {normalised}\nSize: {size}\n"
    paths = [Path(cache_path) / f"{_md5(text)}_{part}.npy" for part in OLD_BLEND_PARTS]
    return (paths[0], paths[1]) if all(map(os.path.isfile, paths)) else None
