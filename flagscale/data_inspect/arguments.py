"""The arguments that decide which sample is read when."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from flagscale.errors import DataError

__all__ = ["ARGUMENT_NAMES", "Blend", "DataArguments", "parse_blend"]

ARGUMENT_NAMES = (
    *("seed", "seq_length", "split", "data_path", "data_args_path", "train_data_path"),
    *("per_split_data_args_path", "train_iters", "train_samples", "global_batch_size"),
    *("micro_batch_size", "data_parallel_size", "dataloader_type", "data_sharding"),
    *("step_batch_size_schedule", "rampup_batch_size", "decrease_batch_size_if_needed"),
    *("iterations_to_skip", "phase_transition_iterations", "mid_level_dataset_surplus"),
    *("data_cache_path", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
)
"""Upstream's names, as ``vars(args)`` has them, of all that :meth:`DataArguments.read` looks at and
of what decides a mask."""


@dataclass(frozen=True)
class Blend:
    """The datasets of one split.

    Args:
        prefixes: As ``--data-path`` names them.
        weights: One each, as given, not normalised; ``None`` where no weights were given.
    """

    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class DataArguments:
    """What upstream's builder, samplers and loop go by when they read training data.

    Args:
        blend: The training datasets.
        split: ``--split``; ``None`` where training has datasets of its own
            (``--train-data-path``), all of which is then used.
        seed: ``--seed``.
        seq_length: Tokens a sample, the label behind the last not counted.
        train_samples: ``--train-samples``, ``None`` if training is counted in iterations.
        train_iters: ``--train-iters``.
        global_batch_size: Samples a step, without a schedule.
        micro_batch_size: Samples of a forward pass.
        dp_size: Data-parallel ranks.
        dataloader_type: ``single`` or ``cyclic``.
        data_sharding: Of ``cyclic``: whether each rank shuffles a part of its own.
        step_batch_size_schedule: As given.
        rampup_batch_size: Start, increment, samples; None also where the release ignores it: since
            0.18.0, the first that has ``--step-batch-size-schedule``.
        decrease_batch_size_if_needed: Whether a batch is rounded down to whole micro batches.
        iterations_to_skip: 1-based iterations that are read and thrown away.
        phase_transition_iterations: Iterations after which the datasets are built anew.
        mid_level_dataset_surplus: Samples of each dataset built beyond those a blend needs.
        data_cache_path: Where indices are cached; ``None``: beside each dataset.
    """

    blend: Blend
    split: str | None
    seed: int
    seq_length: int
    train_samples: int | None
    train_iters: int | None
    global_batch_size: int
    micro_batch_size: int
    dp_size: int
    dataloader_type: str = "single"
    data_sharding: bool = True
    step_batch_size_schedule: str | None = None
    rampup_batch_size: tuple[int, int, int] | None = None
    decrease_batch_size_if_needed: bool = False
    iterations_to_skip: tuple[int, ...] = ()
    phase_transition_iterations: tuple[int, ...] = ()
    mid_level_dataset_surplus: float = 0.005
    data_cache_path: str | None = None

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> DataArguments:
        """From upstream's arguments by name, those of any release.

        Args:
            values: As ``vars(args)``; what a release did not have may be missing.

        Raises:
            DataError: An argument that decides the order is missing.
        """
        _verify_types(values)
        _verify_seed(values.get("seed"))
        blend, split = _training_blend(values)
        rampup = values.get("rampup_batch_size")
        if "step_batch_size_schedule" in values:
            rampup = None
        surplus = values.get("mid_level_dataset_surplus")
        return cls(
            blend=blend,
            split=split,
            seed=_required(values, "seed"),
            seq_length=_required(values, "seq_length"),
            train_samples=values.get("train_samples"),
            train_iters=values.get("train_iters"),
            global_batch_size=_required(values, "global_batch_size"),
            micro_batch_size=_required(values, "micro_batch_size"),
            dp_size=_required(values, "data_parallel_size"),
            dataloader_type=values.get("dataloader_type") or "single",
            data_sharding=values.get("data_sharding", True),
            step_batch_size_schedule=values.get("step_batch_size_schedule"),
            rampup_batch_size=None if rampup is None else _three(rampup),
            decrease_batch_size_if_needed=bool(values.get("decrease_batch_size_if_needed")),
            iterations_to_skip=tuple(sorted(values.get("iterations_to_skip") or ())),
            phase_transition_iterations=tuple(values.get("phase_transition_iterations") or ()),
            mid_level_dataset_surplus=0.005 if surplus is None else surplus,
            data_cache_path=values.get("data_cache_path"),
        )


_TYPES: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("train_samples", "train_iters"), (int,)),
    **dict.fromkeys(("data_sharding", "decrease_batch_size_if_needed"), (bool,)),
    **dict.fromkeys(("split", "dataloader_type", "step_batch_size_schedule"), (str,)),
    **dict.fromkeys(("data_cache_path", "data_args_path", "per_split_data_args_path"), (str,)),
    "mid_level_dataset_surplus": (int, float),
}
_LISTS: Final[dict[str, tuple[type, ...]]] = {
    **dict.fromkeys(("data_path", "train_data_path"), (str,)),
    **dict.fromkeys(("iterations_to_skip", "phase_transition_iterations"), (int,)),
    "rampup_batch_size": (int, str),
}


def _verify_types(values: Mapping[str, Any]) -> None:
    """Refuse arguments of types that upstream's parser would not make."""
    for name, kinds in (_TYPES | _LISTS).items():
        value = values.get(name)
        items = [value]
        if name in _LISTS and value is not None:
            items = list(value) if isinstance(value, list | tuple | set) else [None]
        if value is not None and not all(isinstance(item, kinds) for item in items):
            several = "a list of " if name in _LISTS else ""
            raise DataError(
                "an argument is not of its type",
                where=f"--{name.replace('_', '-')}",
                expected=several + " or ".join(kind.__name__ for kind in kinds),
                got=repr(value)[:100],
                cure="give the arguments of the run",
            )
        if any(isinstance(item, str) and "\0" in item for item in items):
            raise DataError(
                "an argument holds a null character, as none of a command line can",
                where=f"--{name.replace('_', '-')}",
                got=repr(value)[:100],
                cure="give the arguments of the run",
            )


def _verify_seed(seed: Any) -> None:
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise DataError(
            "no generator of upstream's takes this seed",
            where="--seed",
            expected="0 to 2**32 - 1",
            got=seed,
            cure="give the arguments of the run",
        )


def _required(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int):
        raise DataError(
            "an argument that decides the order of the data is missing",
            where=f"--{name.replace('_', '-')}",
            expected="a whole number",
            got=value,
            cure="give the arguments of the run",
        )
    return value


def _three(rampup: Sequence[Any]) -> tuple[int, int, int]:
    try:
        start, increment, samples = (int(part) for part in rampup)
    except ValueError as error:
        raise DataError(
            "an argument is not of its type",
            where="--rampup-batch-size",
            expected="start, increment and samples",
            got=rampup,
            cure="give the arguments of the run",
        ) from error
    return start, increment, samples


def _training_blend(values: Mapping[str, Any]) -> tuple[Blend, str | None]:
    """The training datasets, and the split that applies to them."""
    if values.get("data_path"):
        return parse_blend(values["data_path"]), values.get("split")
    if values.get("data_args_path"):
        return parse_blend(_read(values["data_args_path"]).split()), values.get("split")
    if values.get("train_data_path"):
        return parse_blend(values["train_data_path"]), None
    if values.get("per_split_data_args_path"):
        train = json.loads(_read(values["per_split_data_args_path"]))["train"]
        return parse_blend(train.split() if isinstance(train, str) else train), None
    raise DataError(
        "the arguments name no training data",
        where="--data-path",
        expected="--data-path, --data-args-path, --train-data-path or --per-split-data-args-path",
        cure="give the arguments of the run",
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(
            "the file that lists the datasets cannot be read",
            where=path,
            got=str(error),
            cure="restore it: only it says which datasets were blended",
        ) from error


def parse_blend(words: Sequence[str]) -> Blend:
    """``PREFIX ...`` or ``WEIGHT PREFIX ...``, as upstream tells them apart.

    Raises:
        DataError: Some have a weight and some have none.
    """
    if len(words) % 2 == 0:
        weights = [_weight(word) for word in words[::2]]
        if all(weight is not None for weight in weights):
            prefixes = tuple(word.strip() for word in words[1::2])
            return Blend(prefixes, tuple(w for w in weights if w is not None))
        if any(weight is not None for weight in weights):
            raise DataError(
                "some datasets have a weight and some have none",
                where="--data-path",
                got=" ".join(words),
                cure="give all of them weights, or none",
            )
    return Blend(tuple(word.strip() for word in words), None)


def _weight(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None
