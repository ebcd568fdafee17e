"""The seam for heterogeneous hardware: choose a device platform before megatron is imported.

A vendor's device plugin brings a :class:`Platform` and calls :func:`register`; from then on
``--platform NAME`` and detection know it like the built-in ``cuda`` and ``cpu``.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping

from flagscale.errors import PlatformError
from flagscale.platforms.platform import Platform

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Platform",
    "activate",
    "active_platform",
    "platforms",
    "register",
    "select",
]

ENVIRONMENT_VARIABLE = "FLAGSCALE_PLATFORM"

_REGISTERED: dict[str, Platform] = {}
_ACTIVE: list[Platform] = []


def register(platform: Platform) -> None:
    """Make a platform known. Registering the same object twice is harmless.

    Raises:
        PlatformError: Another platform has that name.
    """
    known = _REGISTERED.setdefault(platform.name, platform)
    if known is not platform:
        raise PlatformError(
            f"two device platforms call themselves {platform.name!r}",
            where=f"{known.description} / {platform.description}",
            cure="remove one of the plugins from FLAGSCALE_PLUGINS",
        )


def platforms() -> tuple[Platform, ...]:
    """Every known platform, the one that detection would prefer first."""
    return tuple(sorted(_REGISTERED.values(), key=lambda p: -p.priority))


def select(
    name: str | None = None, environ: Mapping[str, str] = os.environ
) -> tuple[Platform, str]:
    """Choose: by name, else by environment variable, else by detection.

    Returns:
        The platform, and how it was chosen.

    Raises:
        PlatformError: The name is unknown, or nothing is detected.
    """
    chosen_by = "--platform"
    if name is None and environ.get(ENVIRONMENT_VARIABLE):
        name, chosen_by = environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if name is not None:
        if name not in _REGISTERED:
            near = difflib.get_close_matches(name, _REGISTERED, n=1)
            raise PlatformError(
                f"there is no device platform {name!r}",
                where=chosen_by,
                expected=" or ".join(sorted(_REGISTERED)),
                got=name,
                cure=f"did you mean {near[0]!r}?" if near else "install the plugin that brings it",
            )
        return _REGISTERED[name], chosen_by
    for platform in platforms():
        if platform.detect():
            return platform, "detected"
    raise PlatformError(
        "no device platform was detected",
        expected=" or ".join(sorted(_REGISTERED)),
        cure=f"name one with --platform or {ENVIRONMENT_VARIABLE}",
    )


def activate(platform: Platform) -> None:
    """Make a platform the one of this process; must come before megatron is imported.

    Raises:
        PlatformError: Megatron was imported first, another platform is active, or the device
            cannot be used.
    """
    if _ACTIVE:
        if _ACTIVE[0] is platform:
            return
        raise PlatformError(
            "a process has one device platform",
            expected=_ACTIVE[0].name,
            got=platform.name,
            cure="start another process",
        )
    early = sorted(m for m in sys.modules if m.startswith(("megatron.core", "megatron.training")))
    if early:
        raise PlatformError(
            "megatron was imported before the device platform was chosen",
            where=early[0],
            expected=f"flagscale.platforms.activate({platform.name!r}) before any megatron import",
            cure="import megatron after flagscale.train, and only inside functions of plugins",
        )
    for variable, value in platform.environment.items():
        os.environ.setdefault(variable, value)
    problem = platform.verify()
    if problem is not None:
        raise PlatformError(
            f"the device platform {platform.name!r} cannot be used here",
            where="--platform",
            got=problem,
            cure="choose another with --platform, or repair the driver",
        )
    _ACTIVE.append(platform)


def active_platform() -> Platform:
    """The active platform, or the one that would be chosen now.

    Raises:
        PlatformError: None is active, and none can be chosen.
    """
    return _ACTIVE[0] if _ACTIVE else select()[0]
