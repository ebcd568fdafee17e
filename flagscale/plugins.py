"""Plugins: how a device vendor, a team, or this project itself adds to a training run.

A plugin is a :class:`Plugin` object that a distribution names as an entry point::

    [project.entry-points."flagscale.plugins"]
    my-plugin = "my_package.my_module:PLUGIN"

Every process of a job loads the plugins before megatron is imported, so the module that holds the
object must import neither torch nor megatron; the functions in it may. This project's own
platforms, fixes and Aquila pieces are such entry points too: what they do, any plugin can.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale.errors import FlagScaleError, PluginError
from flagscale.hooks import Hooks
from flagscale.patches.registry import PatchGroup
from flagscale.platforms import Platform, register

__all__ = [
    "ALLOW_LIST",
    "ENTRY_POINT_GROUP",
    "Plugin",
    "add_arguments",
    "collect_pre_wrap_hooks",
    "connect",
    "load_plugins",
    "verify_arguments",
]

ENTRY_POINT_GROUP = "flagscale.plugins"
ALLOW_LIST = "FLAGSCALE_PLUGINS"
"""Environment variable: comma-separated names. Unset, every installed plugin is loaded; set, only
these are, and an empty value means none. This project's own are always loaded."""

_OWN_DISTRIBUTION = "flagscale"


@dataclass(frozen=True)
class Plugin:
    """What a plugin brings; everything is optional.

    Args:
        name: For people; by habit that of its entry point.
        platforms: Device platforms.
        patch_groups: Changes to upstream.
        add_arguments: Adds command-line arguments to upstream's parser.
        verify_arguments: Called with the parsed arguments before any process group exists; raises
            :class:`flagscale.errors.ConfigError` for what cannot work.
        pre_wrap_hooks: From the arguments, functions for upstream's ``ModelConfig.pre_wrap_hooks``:
            each takes and returns the list of model chunks, before they are wrapped.
        connect: Called with the arguments once they are valid; puts listeners into the hooks.
    """

    name: str
    platforms: tuple[Platform, ...] = ()
    patch_groups: tuple[PatchGroup, ...] = ()
    add_arguments: Callable[[ArgumentParser], None] | None = None
    verify_arguments: Callable[[Namespace], None] | None = None
    pre_wrap_hooks: Callable[[Namespace], Sequence[Callable[[list[Any]], list[Any]]]] | None = None
    connect: Callable[[Hooks, Namespace], None] | None = None


def load_plugins(environ: Mapping[str, str] = os.environ) -> tuple[Plugin, ...]:
    """Load the allowed plugins and register their platforms; calling it again changes nothing.

    Returns:
        This project's own plugins first, then the others by name.

    Raises:
        PluginError: The allow-list names a plugin that is not installed, two have one name, or one
            cannot be imported.
    """
    found = sorted(
        importlib.metadata.entry_points(group=ENTRY_POINT_GROUP),
        key=lambda entry: (not _is_own(entry), entry.name),
    )
    allowed = _allowed([entry.name for entry in found if not _is_own(entry)], environ)
    plugins: dict[str, Plugin] = {}
    for entry in found:
        if _is_own(entry) or entry.name in allowed:
            if entry.name in plugins:
                raise PluginError(
                    "two installed distributions bring a plugin of the same name",
                    where=f"{entry.name}: {entry.value}",
                    cure="uninstall one of them",
                )
            plugins[entry.name] = _load(entry)
    return tuple(plugins.values())


def _is_own(entry: importlib.metadata.EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == _OWN_DISTRIBUTION


def _allowed(installed: Sequence[str], environ: Mapping[str, str]) -> frozenset[str]:
    if ALLOW_LIST not in environ:
        return frozenset(installed)
    names = frozenset(filter(None, (name.strip() for name in environ[ALLOW_LIST].split(","))))
    for name in sorted(names - set(installed)):
        near = difflib.get_close_matches(name, installed, n=1)
        raise PluginError(
            f"there is no plugin {name!r}",
            where=ALLOW_LIST,
            expected=", ".join(installed) or "nothing: no plugin is installed",
            got=environ[ALLOW_LIST],
            cure=f"did you mean {near[0]!r}?" if near else "install the distribution it comes in",
        )
    return names


def _load(entry: importlib.metadata.EntryPoint) -> Plugin:
    try:
        plugin = entry.load()
    except Exception as error:
        raise _failure(entry.name, "cannot be imported", error) from error
    if not isinstance(plugin, Plugin):
        raise PluginError(
            f"plugin {entry.name!r} is not a plugin",
            where=entry.value,
            expected="an object of flagscale.plugins.Plugin",
            got=type(plugin).__name__,
            cure="point the entry point at the Plugin object itself",
        )
    for platform in plugin.platforms:
        register(platform)
    return plugin


def add_arguments(plugins: Iterable[Plugin], parser: ArgumentParser) -> None:
    """Let every plugin add its arguments.

    Raises:
        PluginError: One failed, for example because another has the same option.
    """
    for plugin in plugins:
        _call(plugin, "add its arguments", plugin.add_arguments, parser)


def verify_arguments(plugins: Iterable[Plugin], args: Namespace) -> None:
    """Let every plugin refuse arguments that cannot work.

    Raises:
        ConfigError: A plugin refuses them.
        PluginError: A plugin failed.
    """
    for plugin in plugins:
        _call(plugin, "verify the arguments", plugin.verify_arguments, args)


def collect_pre_wrap_hooks(plugins: Iterable[Plugin], args: Namespace) -> list[Callable[..., Any]]:
    """Every plugin's functions for ``ModelConfig.pre_wrap_hooks``, in order.

    Raises:
        PluginError: A plugin failed.
    """
    hooks: list[Callable[..., Any]] = []
    for plugin in plugins:
        hooks += _call(plugin, "make its model hooks", plugin.pre_wrap_hooks, args) or []
    return hooks


def connect(plugins: Iterable[Plugin], hooks: Hooks, args: Namespace) -> None:
    """Let every plugin put its listeners into the hooks.

    Raises:
        PluginError: A plugin failed.
    """
    for plugin in plugins:
        _call(plugin, "connect its hooks", plugin.connect, hooks, args)


def _call(plugin: Plugin, purpose: str, function: Callable[..., Any] | None, *args: Any) -> Any:
    if function is None:
        return None
    try:
        return function(*args)
    except FlagScaleError:
        raise
    except Exception as error:
        raise _failure(plugin.name, f"failed to {purpose}", error) from error


def _failure(name: str, what: str, error: Exception) -> PluginError:
    return PluginError(
        f"plugin {name!r} {what}",
        where=f"entry point {name} in the group {ENTRY_POINT_GROUP}",
        got=f"{type(error).__name__}: {error}",
        cure=f"repair it, uninstall it, or leave it out: {ALLOW_LIST}=NAME,NAME without it",
    )
