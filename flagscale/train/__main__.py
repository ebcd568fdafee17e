"""``python -m flagscale.train [Megatron arguments]``: one process of a training job.

Started once a device by ``flagscale.launch``, torchrun or srun, it finds its place in the job in
``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.
"""

from __future__ import annotations

import sys

from flagscale.train import preemption

if __name__ == "__main__":
    preemption.remember(sys.argv[1:])  # before anything slow: a signal may come at any moment

import difflib
import os
import traceback
from collections.abc import Callable, Iterable, Sequence

from flagscale.errors import ConfigError, FlagScaleError
from flagscale.hooks import HOOKS, ExitEvent
from flagscale.patches.apply import active, apply, skipped
from flagscale.platforms import activate, select
from flagscale.plugins import load_plugins
from flagscale.runs.exit_codes import SAVED, SUPERSEDED
from flagscale.train.arguments import add_flagscale_arguments
from flagscale.train.failure import end_children, record_failure, superseded
from flagscale.train.preflight import ArgumentParser

DISABLE_PATCHES = "FLAGSCALE_DISABLE_PATCHES"


def main(argv: Sequence[str]) -> None:
    """Load the plugins, choose the platform, apply the patches, train."""
    plugins = load_plugins()
    early, _ = add_flagscale_arguments(
        ArgumentParser(add_help=False, allow_abbrev=False), plugins
    ).parse_known_args(argv)
    platform, chosen_by = select(early.platform)
    activate(platform)

    groups = [group for plugin in plugins for group in plugin.patch_groups]
    names = {group.name for group in groups}
    disabled = frozenset(filter(None, os.environ.get(DISABLE_PATCHES, "").split(",")))
    _refuse_unknown_groups(disabled, names, DISABLE_PATCHES)
    allowed = frozenset(early.allow_changed_patches)
    _refuse_unknown_groups(allowed, names, "--allow-changed-patches")
    apply(groups, disabled=disabled, allow_changed=allowed)
    sys.argv[1:] = [*platform.megatron_arguments, *argv]

    from flagscale.train.pretraining import run

    if os.environ.get("RANK", "0") == "0":
        print(f"platform: {platform.name} ({chosen_by}): {platform.description}")
        print("plugins:", ", ".join(plugin.name for plugin in plugins))
        print(_describe_patches(), flush=True)
    run(plugins)


def _refuse_unknown_groups(asked: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in sorted(set(asked) - set(known)):
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"there is no patch group {name!r}",
            where=where,
            expected=", ".join(sorted(known)),
            cure=f"did you mean {near[0]!r}?" if near else "see `python -m flagscale.patches list`",
        )


def _describe_patches() -> str:
    why = {patch.group: patch.why for patch in active()}
    lines = [f"  on   {group}: {reason}" for group, reason in why.items()]
    lines += [f"  off  {group}: {reason}" for group, reason in skipped().items()]
    return "\n".join(["patches (python -m flagscale.patches list):", *lines])


def guarded_main(argv: Sequence[str]) -> int:
    """Train; report a failure where people and the launcher look for it; return the exit code."""
    preemption.remember(argv)
    exit_code, error = _attempt(lambda: main(argv))
    if exit_code != SUPERSEDED and (later := superseded()) is not None:
        # With its peers gone, a rank may fail of something else before it has looked.
        exit_code, _ = _attempt(lambda: _fail(later))
    if exit_code != SUPERSEDED:  # else nobody may write their last words
        hook_exit_code, _ = _attempt(lambda: _tell_exit(ExitEvent(exit_code, error)))
        exit_code = exit_code or hook_exit_code
    if exit_code not in (0, SAVED):
        end_children()
    return exit_code


def _attempt(action: Callable[[], None]) -> tuple[int, Exception | None]:
    try:
        action()
    except SystemExit as exit_request:  # upstream's way out after a signal or --exit-interval
        code = exit_request.code if isinstance(exit_request.code, int) else 0
        return code or preemption.exit_code(), None
    except FlagScaleError as error:
        if error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        print(error, file=sys.stderr)
        record_failure(str(error), error.exit_code)
        return error.exit_code, error
    except Exception as error:
        traceback.print_exc()
        record_failure(f"{type(error).__name__}: {error}", 1)
        return 1, error
    return 0, None


def _fail(error: Exception) -> None:
    raise error


def _tell_exit(event: ExitEvent) -> None:
    for listener in HOOKS.on_exit:
        listener(event)


if __name__ == "__main__":
    status = guarded_main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    if status not in (0, SAVED):
        # With a rank gone, an orderly shutdown would wait for it in a collective.
        os._exit(status)
    raise SystemExit(status)
