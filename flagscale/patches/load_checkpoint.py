"""A load that fails, fails: upstream ends some with exit code 0, or trains on from random."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from flagscale.errors import CheckpointError
from flagscale.patches.registry import Kind, Patch, PatchGroup
from flagscale.runs.complete import BEGUN_MARKER

__all__ = ["GROUP"]


def _raise_for_exit(exit_request: SystemExit, directory: str | None) -> NoReturn:
    frame = traceback.extract_tb(exit_request.__traceback__)[-1]
    cause = exit_request.__context__
    raise CheckpointError(
        f"upstream could not load the checkpoint and wanted to exit with code "
        f"{exit_request.code or 0}",
        where=f"{directory} (megatron {Path(frame.filename).name}:{frame.lineno}, {frame.name})",
        got=f"{type(cause).__name__}: {cause}" if cause else "see upstream's message above",
        cure=(
            "check latest_checkpointed_iteration.txt and the iteration's directory; a legacy "
            "checkpoint loads only at the tensor and pipeline parallel sizes it was saved with; "
            "--ckpt-step N loads an older iteration"
        ),
    ) from (cause or exit_request)


def _refuse_a_start_from_random(args: Any, load_arg: str) -> None:
    directory = getattr(args, load_arg)
    if directory != args.save:
        what = f"--{load_arg.replace('_', '-')} names a directory that holds no checkpoint"
        cure = "correct the path, or drop the option to train from random on purpose"
    elif (Path(directory) / BEGUN_MARKER).exists():
        what = "this run has saved checkpoints before, and now none is found"
        cure = (
            "restore latest_checkpointed_iteration.txt (it holds the iteration's number), or use "
            f"a new directory; delete {BEGUN_MARKER} only to give up what was trained"
        )
    else:
        return
    raise CheckpointError(
        what,
        where=str(directory),
        expected="latest_checkpointed_iteration.txt and the iteration it names",
        got="no tracker file",
        cure=cure,
    )


def _fail_when_nothing_was_loaded(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_checkpoint(
        ddp_model: Any,
        optimizer: Any,
        opt_param_scheduler: Any,
        load_arg: str = "load",
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        from megatron.training import get_args
        from megatron.training.checkpointing import get_loaded_iteration

        args = get_args()
        try:
            loaded = original(ddp_model, optimizer, opt_param_scheduler, load_arg, *rest, **kwargs)
        except SystemExit as exit_request:
            _raise_for_exit(exit_request, getattr(args, load_arg))
        # Release and fine-tuning loads start at iteration 0 too, but read a tracker; a load of a
        # non-persistent checkpoint may read none, but starts later.
        if loaded[0] == 0 and get_loaded_iteration() in (None, -1):
            _refuse_a_start_from_random(args, load_arg)
        return loaded

    return load_checkpoint


def _fail_on_exit(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load_args_from_checkpoint(args: Any, load_arg: str = "load", **kwargs: Any) -> Any:
        try:
            return original(args, load_arg, **kwargs)
        except SystemExit as exit_request:
            _raise_for_exit(exit_request, getattr(args, load_arg))

    return load_args_from_checkpoint


GROUP = PatchGroup(
    name="load-checkpoint",
    patches=(
        Patch(
            target="megatron.training.checkpointing:load_checkpoint",
            kind=Kind.FUNCTION,
            replacement=_fail_when_nothing_was_loaded,
            fingerprint="a6e586eeba0a270c",
        ),
        Patch(
            target="megatron.training.checkpointing:load_args_from_checkpoint",
            kind=Kind.FUNCTION,
            replacement=_fail_on_exit,
            fingerprint="05d89b09cea3bf70",
        ),
    ),
    reason="failed loads end with exit code 0, and a missing checkpoint trains from random",
    upstream=(
        "megatron-core 0.19.2, training/checkpointing.py:367, 1458, 1467, 1697, 1743, 2487, 2693"
    ),
)
