"""Which of upstream's saves to leave out while a batch-size schedule still rises."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from flagscale.hooks import Hooks, SaveReason, SaveRequest

__all__ = ["add_arguments", "connect"]


def add_arguments(parser: ArgumentParser) -> None:
    """``--ramp-save-interval`` and ``--save-at-batch-size-change``."""
    group = parser.add_argument_group(title="FlagScale: saving")
    group.add_argument(
        "--ramp-save-interval",
        type=int,
        default=None,
        metavar="ITERATIONS",
        help="While --step-batch-size-schedule still rises, of the saves due by --save-interval "
        "make only those at a multiple of this. Saves on a signal or at an exit are always made.",
    )
    group.add_argument(
        "--save-at-batch-size-change",
        action="store_true",
        help="Save at each change of the batch size, as upstream does by itself (the schedule of "
        "Aquila2-34B has 31 of them).",
    )


def connect(hooks: Hooks, args: Namespace) -> None:
    """Answer upstream's saves by the two arguments."""
    hooks.should_save.append(lambda request: _should_save(args, request))


def _should_save(args: Namespace, request: SaveRequest) -> bool:
    if request.reason is SaveReason.BATCH_SIZE_CHANGE:
        return bool(args.save_at_batch_size_change)
    return (
        args.ramp_save_interval is None
        or request.iteration % args.ramp_save_interval == 0
        or not _batch_size_still_rises(args)
    )


def _batch_size_still_rises(args: Namespace) -> bool:
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size

    if args.step_batch_size_schedule is None:
        return False
    # "tokens:batch tokens:batch ..."; upstream has parsed it before, so the form is right.
    last_entry = args.step_batch_size_schedule.replace(",", " ").split()[-1]
    return bool(get_current_global_batch_size() < int(last_entry.rpartition(":")[2]))
