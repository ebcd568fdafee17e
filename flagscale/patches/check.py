"""Hold patches against a source tree: pure, so it works on any wheel without installing it."""

from __future__ import annotations

import difflib
import enum
from collections.abc import Iterable
from dataclasses import dataclass

from flagscale.errors import PatchError
from flagscale.patches.registry import Kind, Patch, PatchGroup
from flagscale.patches.source import Definition, ImportSite, SourceTree, import_sites, locate

__all__ = ["Conflict", "Finding", "Report", "Status", "check", "conflicts", "diff"]


class Status(enum.Enum):
    """What a source tree says of one patch."""

    UNCHANGED = "unchanged"
    CHANGED = "changed"
    MISSING = "missing"
    BUILTIN = "builtin"
    """Not looked at: there is no source to compare."""


@dataclass(frozen=True)
class Finding:
    """One patch held against the tree.

    Args:
        group: Name of the patch's group.
        patch: The patch.
        status: Whether upstream is what the patch was written for.
        definition: Where the target is defined; ``None`` if it is missing or builtin.
        sites: Modules that import the target by name, for functions and values.
    """

    group: str
    patch: Patch
    status: Status
    definition: Definition | None
    sites: tuple[ImportSite, ...]

    def to_dict(self) -> dict[str, object]:
        """Plain types, for JSON."""
        return {
            "group": self.group,
            "target": self.patch.target,
            "kind": self.patch.kind.value,
            "status": self.status.value,
            "expected": self.patch.fingerprint,
            "got": self.definition.fingerprint if self.definition else None,
            "line": self.definition.line if self.definition else None,
            "import_sites": [f"{site.module}:{site.name}" for site in self.sites],
        }


@dataclass(frozen=True)
class Conflict:
    """Two groups that claim the same thing: a target, or a group's name."""

    claim: str
    first: str
    second: str


@dataclass(frozen=True)
class Report:
    """All findings of one check."""

    version: str | None
    findings: tuple[Finding, ...]
    conflicts: tuple[Conflict, ...]

    @property
    def ok(self) -> bool:
        """Whether every patch may be applied."""
        return not self.conflicts and not self.having(Status.CHANGED, Status.MISSING)

    def having(self, *statuses: Status) -> tuple[Finding, ...]:
        """The findings with one of these statuses."""
        return tuple(finding for finding in self.findings if finding.status in statuses)

    def to_dict(self) -> dict[str, object]:
        """Plain types, for JSON."""
        return {
            "version": self.version,
            "ok": self.ok,
            "patches": [finding.to_dict() for finding in self.findings],
            "conflicts": [
                {"claim": conflict.claim, "groups": [conflict.first, conflict.second]}
                for conflict in self.conflicts
            ],
        }


def check(groups: Iterable[PatchGroup], tree: SourceTree) -> Report:
    """Compare every patch with the tree's source. Imports nothing of it, changes nothing.

    Raises:
        PatchError: A patch has a fingerprint but aims outside the tree's package, or a module of
            the tree cannot be parsed.
    """
    groups = tuple(groups)
    findings = (_find(group.name, patch, tree) for group in groups for patch in group.patches)
    return Report(tree.version, tuple(findings), conflicts(groups))


def conflicts(groups: Iterable[PatchGroup]) -> tuple[Conflict, ...]:
    """Every target claimed by two patches, and every name borne by two groups."""
    names: dict[str, PatchGroup] = {}
    targets: dict[str, str] = {}
    found = []
    for group in groups:
        if names.setdefault(group.name, group) != group:
            found.append(Conflict(f"the group name {group.name!r}", group.name, group.name))
        for patch in group.patches:
            if patch.target in targets:
                found.append(Conflict(patch.target, targets[patch.target], group.name))
            targets.setdefault(patch.target, group.name)
    return tuple(found)


def diff(groups: Iterable[PatchGroup], base: SourceTree, new: SourceTree) -> dict[str, str]:
    """How the source of each target differs between two trees.

    Returns:
        Unified diff by target, for the targets whose fingerprints differ, in order.
    """
    diffs = {}
    for group in groups:
        for patch in group.patches:
            if patch.kind is Kind.BUILTIN:
                continue
            before = locate(base, patch.target, patch.kind)
            after = locate(new, patch.target, patch.kind)
            if _fingerprint(before) != _fingerprint(after):
                diffs[patch.target] = "".join(
                    difflib.unified_diff(
                        before.source.splitlines(keepends=True) if before else [],
                        after.source.splitlines(keepends=True) if after else [],
                        f"{patch.target} ({base.version})",
                        f"{patch.target} ({new.version})",
                    )
                )
    return diffs


def _find(group: str, patch: Patch, tree: SourceTree) -> Finding:
    if patch.kind is Kind.BUILTIN:
        return Finding(group, patch, Status.BUILTIN, None, ())
    if not tree.contains(patch.module):
        raise PatchError(
            f"a patch with a fingerprint must aim inside {tree.package}",
            where=f"group {group}: {patch.target}",
            got=patch.kind,
            cure=f"declare it {Kind.BUILTIN}: only its presence can be checked",
        )
    definition = locate(tree, patch.target, patch.kind)
    if definition is None:
        return Finding(group, patch, Status.MISSING, None, ())
    changed = definition.fingerprint != patch.fingerprint
    status = Status.CHANGED if changed else Status.UNCHANGED
    by_name = patch.kind in (Kind.FUNCTION, Kind.VALUE)
    sites = import_sites(tree, patch.module, [patch.name]) if by_name else ()
    return Finding(group, patch, status, definition, sites)


def _fingerprint(definition: Definition | None) -> str | None:
    return definition.fingerprint if definition else None
