"""``--quarantine``: documents that training is to go past, with everything else as it was.

The list masks the loss of the tokens it names, in :mod:`flagscale.train.dataset`, and
:func:`flagscale.train.step.masked_loss` leaves the others the weight they had. This module imports
neither torch nor megatron: the launcher, too, looks at the arguments.
"""

from __future__ import annotations

import functools
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence

from flagscale.data_inspect.indexed import FileChange, IndexedFile
from flagscale.data_inspect.quarantine import (
    QuarantineList,
    Spans,
    read_quarantine,
    spans_by_sequence,
)
from flagscale.errors import ConfigError, DataError
from flagscale.hooks import Hooks, TrainStart
from flagscale.layout.parallel import Problem, raise_problems

__all__ = [
    "add_arguments",
    "connect",
    "quarantined_spans",
    "verify_arguments",
    "verify_ranks_agree",
]


def add_arguments(parser: ArgumentParser) -> None:
    """``--quarantine``."""
    parser.add_argument_group(title="FlagScale: quarantine").add_argument(
        "--quarantine",
        default=None,
        metavar="FILE",
        help="List of document spans, made by `python tools/inspect_data.py quarantine`, whose "
        "tokens are not to count in the training loss. The order of the data, the number of steps, "
        "checkpoints and the weight of every other token stay as they are.",
    )


def verify_arguments(args: Namespace) -> None:
    """Refuse a list that cannot be in force.

    Raises:
        ConfigError: All that is wrong.
    """
    if args.quarantine is None:
        return
    try:
        quarantine = _read(args.quarantine)
    except DataError as error:
        raise ConfigError(
            f"the quarantine list cannot be used: {error.what}",
            where=f"--quarantine, {error.where}",
            expected=error.expected,
            got=error.got,
            cure=error.cure,
        ) from error
    raise_problems(_verify_model(args) + _verify_datasets(args, quarantine))


def _verify_model(args: Namespace) -> list[Problem]:
    if not args.mtp_num_layers:
        return []
    return [
        Problem(
            "multi-token prediction divides its loss by the tokens left, so that the others would "
            "gain the weight of those quarantined",
            "--quarantine, --mtp-num-layers",
            "one of the two",
            "both",
            "drop --mtp-num-layers, or skip whole steps with --iterations-to-skip",
        )
    ]


def _verify_datasets(args: Namespace, quarantine: QuarantineList) -> list[Problem]:
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    training = blend or (blend_per_split[0] if blend_per_split else None)
    prefixes = training[0] if training else []
    unread = [name for name in quarantine.datasets if name not in prefixes]
    if not unread:
        return []
    return [
        Problem(
            "the quarantine list names a dataset that training does not read",
            f"--quarantine {args.quarantine}",
            f"of the training data: {', '.join(prefixes) or 'none'}",
            ", ".join(unread),
            "name datasets in the list as --data-path does, or give the list of this run",
        )
    ]


@functools.cache
def _read(path: str) -> QuarantineList:
    """Read once: what holds at the start holds to the end, whoever edits the file meanwhile."""
    return read_quarantine(path)


def quarantined_spans(args: Namespace) -> Mapping[str, Spans]:
    """What the training split masks, by dataset prefix; empty without a list.

    Raises:
        DataError: A dataset is not what the list was made of, or a span is not in it.
    """
    if args.quarantine is None:
        return {}
    quarantine = _read(args.quarantine)
    spans: dict[str, Spans] = {}
    for prefix in quarantine.datasets:
        with IndexedFile(prefix) as indexed:
            _refuse_another(indexed.verify_fingerprint(quarantine.fingerprints[prefix]), args)
            spans[prefix] = spans_by_sequence(quarantine.entries_of(prefix), indexed)
    return spans


def _refuse_another(changes: Sequence[FileChange], args: Namespace) -> None:
    """Refuse a dataset of other content; one that has only been copied is the same."""
    for change in changes:
        if change.kind == "changed":
            raise DataError(
                "a dataset is not the one that the quarantine list was made of",
                where=change.path,
                expected=f"as --quarantine {args.quarantine} recorded it: {dict(change.recorded)}",
                got=f"{dict(change.found)}",
                cure="restore the dataset, or find the documents again in this one",
            )


def verify_ranks_agree(args: Namespace) -> None:
    """Refuse to start where one rank has read another list than rank 0; joins a collective.

    Raises:
        ConfigError: The lists differ.
    """
    if args.quarantine is None:
        return
    import torch

    digest = _read(args.quarantine).digest()
    digests: list[str] = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, digest)
    others = [rank for rank, one in enumerate(digests) if one != digests[0]]
    if others:
        raise ConfigError(
            "the ranks have read different quarantine lists",
            where=f"--quarantine {args.quarantine}",
            expected=f"SHA-256 {digests[0]} on every rank, as on rank 0",
            got=f"{digests[others[0]]} on rank {', '.join(map(str, others[:8]))}",
            cure="give every node the same file, and leave it alone while the job starts",
        )


def connect(hooks: Hooks, args: Namespace) -> None:
    """Say in the log which list is in force."""
    if args.quarantine is None:
        return
    quarantine = _read(args.quarantine)

    def announce(_event: TrainStart) -> None:
        from megatron.training import print_rank_0

        print_rank_0(
            f"quarantine: {len(quarantine.entries)} spans of {len(quarantine.datasets)} "
            f"dataset(s) are masked in training, by {args.quarantine} "
            f"(SHA-256 {quarantine.digest()[:16]})"
        )

    hooks.on_train_start.append(announce)
