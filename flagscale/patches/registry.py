"""What a patch is: frozen data. Nothing here imports torch or megatron, or changes anything."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Condition", "Kind", "Patch", "PatchGroup", "always"]


class Kind(enum.Enum):
    """How a target is found, fingerprinted and replaced."""

    FUNCTION = "function"
    """A module-level ``def``. Replaced in its module and in every module of the same package that
    imported it by name; the fingerprint is that of the definition, without docstrings."""
    METHOD = "method"
    """A function in a class body. Replaced on the class, so importing the class by name elsewhere
    does no harm; ``staticmethod`` and ``classmethod`` survive."""
    VALUE = "value"
    """A module variable. Replaced like a function; the fingerprint is that of every module-level
    statement that binds the name (a whole ``try``/``except`` counts as one statement)."""
    BUILTIN = "builtin"
    """A function with no source to fingerprint (C code) or one replaced whole whose body does not
    matter (most of ``torch.cuda`` on a CPU). Only its presence is checked, when it is applied."""


@dataclass(frozen=True)
class Patch:
    """One replacement of one upstream name.

    Args:
        target: ``"package.module:name"`` or ``"package.module:Class.name"``.
        kind: See :class:`Kind`.
        replacement: Called with the original object, returns what takes its place. It may import
            torch and megatron; the module that declares the patch must not.
        fingerprint: What :func:`flagscale.patches.source.fingerprint` gave for the source this
            patch was written against; ``None`` only for ``Kind.BUILTIN``.
    """

    target: str
    kind: Kind
    replacement: Callable[[Any], Any]
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        """Refuse a declaration that could never be checked."""
        module, _, name = self.target.partition(":")
        if not module or not name:
            raise ValueError(f"patch target {self.target!r} is not of the form 'module:name'")
        in_class = "." in name
        if self.kind is not Kind.BUILTIN and in_class != (self.kind is Kind.METHOD):
            raise ValueError(f"patch target {self.target!r} cannot be of {self.kind}")
        if (self.fingerprint is None) != (self.kind is Kind.BUILTIN):
            raise ValueError(
                f"patch of {self.target}: a fingerprint is required, except for {Kind.BUILTIN}"
            )

    @property
    def module(self) -> str:
        """The module part of the target."""
        return self.target.partition(":")[0]

    @property
    def name(self) -> str:
        """The part after the colon, with dots for class attributes."""
        return self.target.partition(":")[2]


@dataclass(frozen=True)
class Condition:
    """Whether a group is active in this process, and why; the answer is given when asked."""

    test: Callable[[], bool]
    when_true: str
    when_false: str

    def explain(self) -> tuple[bool, str]:
        """``(active, why)``."""
        active = self.test()
        return active, self.when_true if active else self.when_false


always = Condition(lambda: True, "always", "never")


@dataclass(frozen=True)
class PatchGroup:
    """Patches that only make sense together: applied whole or not at all.

    Args:
        name: Short, unique; the name users switch it off by.
        patches: Applied in this order.
        reason: What goes wrong without it, in one line.
        upstream: Where upstream stands: issue, pull request, or the version looked at.
        enabled_if: When the group is active.
    """

    name: str
    patches: tuple[Patch, ...]
    reason: str
    upstream: str
    enabled_if: Condition = always
