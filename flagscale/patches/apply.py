"""Put patches in place: collect everything, check everything, and only then change anything."""

from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from flagscale.errors import (
    PatchConflictError,
    PatchError,
    PatchSourceChangedError,
    PatchTargetMissingError,
)
from flagscale.patches.check import Finding, Report, Status, check, conflicts
from flagscale.patches.registry import Kind, Patch, PatchGroup
from flagscale.patches.source import ImportSite, SourceTree

__all__ = ["ActivePatch", "Applied", "active", "apply", "installed_source", "skipped"]

MARK = "__flagscale_patch__"
"""Attribute of a replacement function that holds the name of its group."""

_ABSENT = object()


@dataclass(frozen=True)
class ActivePatch:
    """One patch in place in this process.

    Args:
        group: Name of its group.
        target: What it replaces.
        why: Why the group is active.
        applied_at: Every ``module:name`` that now holds the replacement, the target first.
    """

    group: str
    target: str
    why: str
    applied_at: tuple[str, ...]


@dataclass(frozen=True)
class _Swap:
    """One replacement, ready to be put in place and taken back.

    ``before`` and ``after`` are what the owner's ``__dict__`` holds, so that a ``staticmethod``
    goes back as the very same object.
    """

    patch: Patch
    owner: Any
    attribute: str
    before: Any
    after: Any
    inherited: bool
    sites: tuple[ImportSite, ...]

    def install(self) -> None:
        setattr(self.owner, self.attribute, self.after)
        self._rebind(self.before, self.after)

    def remove(self) -> None:
        """Restore the target and every site, those imported since then included.

        Only what holds the replacement is touched: a swap that failed half-way has nothing more
        to restore, and what others have put there since is theirs.
        """
        if vars(self.owner).get(self.attribute, _ABSENT) is self.after:
            if self.inherited:
                delattr(self.owner, self.attribute)
            else:
                setattr(self.owner, self.attribute, self.before)
        self._rebind(self.after, self.before)

    def bindings(self) -> Iterator[tuple[Any, str]]:
        """Holder and name of everything that this swap writes, or has written."""
        yield self.owner, self.attribute
        for value in (self.before, self.after):
            yield from ((module, site.name) for module, site in self.bound_sites(value))

    def bound_sites(self, value: object) -> Iterator[tuple[types.ModuleType, ImportSite]]:
        """Sites in loaded modules that hold ``value``."""
        for site in self.sites:
            module = sys.modules.get(site.module)
            if module is not None and vars(module).get(site.name, _ABSENT) is value:
                yield module, site

    def _rebind(self, old: object, new: object) -> None:
        for module, site in self.bound_sites(old):
            setattr(module, site.name, new)


@dataclass(frozen=True, eq=False)
class _ActiveGroup:
    group: PatchGroup
    why: str
    swaps: tuple[_Swap, ...]


class Applied:
    """What one :func:`apply` put in place."""

    def __init__(self, groups: Iterable[_ActiveGroup]) -> None:
        self._groups = tuple(groups)

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups that this call applied, in order."""
        return tuple(entry.group.name for entry in self._groups)

    def undo(self) -> None:
        """Restore every original. A second call does nothing."""
        for entry in reversed(self._groups):
            if _ACTIVE.get(entry.group.name) is entry:
                _remove([entry])
                del _ACTIVE[entry.group.name]


# The two records below are the process's own, as what is patched is.
_ACTIVE: dict[str, _ActiveGroup] = {}
_SKIPPED: dict[str, str] = {}


def active() -> tuple[ActivePatch, ...]:
    """Every patch in place in this process, in the order applied."""
    return tuple(
        ActivePatch(
            entry.group.name,
            swap.patch.target,
            entry.why,
            (
                swap.patch.target,
                *(f"{site.module}:{site.name}" for _, site in swap.bound_sites(swap.after)),
            ),
        )
        for entry in _ACTIVE.values()
        for swap in entry.swaps
    )


def skipped() -> dict[str, str]:
    """Groups that were asked for and not applied: name to why."""
    return dict(_SKIPPED)


@functools.cache
def installed_source() -> SourceTree:
    """The installed megatron, read and parsed once in a process.

    Raises:
        PatchTargetMissingError: It is not installed.
    """
    return SourceTree.installed()


def apply(
    groups: Iterable[PatchGroup],
    *,
    tree: SourceTree | None = None,
    allow_changed: bool | frozenset[str] = False,
    disabled: frozenset[str] = frozenset(),
) -> Applied:
    """Apply groups, whole or not at all: if anything is wrong, nothing has changed.

    Groups that aim only outside the tree's package (a platform's shim) come first, before any
    module of the package is imported. Applying a group again does nothing.

    Args:
        groups: What to apply, in order.
        tree: The source to check against: the installed megatron unless told.
        allow_changed: Groups that may be applied although upstream's source has changed.
        disabled: Names of groups to leave out.

    Raises:
        PatchConflictError: Two groups claim the same target, or something else replaced one.
        PatchTargetMissingError: A target does not exist.
        PatchSourceChangedError: A target is not what its patch was written against.
        PatchError: A patch cannot work as declared.
    """
    tree = tree or installed_source()
    wanted: dict[PatchGroup, str] = {}
    left_out: dict[str, str] = {}
    for group in groups:
        if _is_in_place(group):
            continue
        enabled, why = group.enabled_if.explain()
        if group.name in disabled:
            left_out[group.name] = "disabled"
        elif not enabled:
            left_out[group.name] = why
        else:
            wanted[group] = why

    _refuse_conflicts([*(entry.group for entry in _ACTIVE.values()), *wanted])
    report = check(wanted, tree)
    _refuse_unfit(report, tree, allow_changed)

    done: list[_ActiveGroup] = []
    try:
        for outside in (True, False):
            prepared = [
                _prepare(group, why, report)
                for group, why in wanted.items()
                if _is_outside(group, tree) is outside
            ]
            _refuse_shared_bindings([*_ACTIVE.values(), *done, *prepared])
            for entry in prepared:
                done.append(entry)
                for swap in entry.swaps:
                    swap.install()
    except BaseException:  # an interrupt, too, must not leave a group half applied
        _remove(done)
        raise
    for entry in done:
        _ACTIVE[entry.group.name] = entry
        _SKIPPED.pop(entry.group.name, None)
    _SKIPPED.update(left_out)
    return Applied(done)


def _remove(entries: Sequence[_ActiveGroup]) -> None:
    for entry in reversed(entries):
        for swap in reversed(entry.swaps):
            swap.remove()


def _is_outside(group: PatchGroup, tree: SourceTree) -> bool:
    return not any(tree.contains(patch.module) for patch in group.patches)


def _is_in_place(group: PatchGroup) -> bool:
    """Whether a group is active and untouched since.

    Raises:
        PatchConflictError: It was applied, and something has replaced one of its targets since.
    """
    entry = _ACTIVE.get(group.name)
    if entry is None or entry.group != group:
        return False
    for swap in entry.swaps:
        now = vars(swap.owner).get(swap.attribute, _ABSENT)
        if now is not swap.after:
            raise PatchConflictError(
                "something else has replaced a patch since it was applied",
                where=f"group {group.name}: {swap.patch.target}",
                expected=_describe(swap.after),
                got=_describe(now),
                cure="declare the other change as a patch, or disable this group",
            )
    return True


def _prepare(group: PatchGroup, why: str, report: Report) -> _ActiveGroup:
    findings = [finding for finding in report.findings if finding.group == group.name]
    if any(finding.status is Status.CHANGED for finding in findings):
        why += "; allowed although upstream's source has changed"
    return _ActiveGroup(group, why, tuple(_plan_swap(finding) for finding in findings))


def _plan_swap(finding: Finding) -> _Swap:
    """Find the original, and make what takes its place; only imports happen here."""
    patch = finding.patch
    module, owner, attribute = _import_owner(finding)
    inherited = attribute not in vars(owner)
    before = vars(owner).get(attribute, _ABSENT)
    if inherited and patch.kind is Kind.BUILTIN and isinstance(owner, type):
        bases = (vars(base)[attribute] for base in owner.__mro__ if attribute in vars(base))
        before = next(bases, _ABSENT)
    if before is _ABSENT:
        raise _missing_at_run_time(finding)

    wrapper = type(before) if isinstance(before, (staticmethod, classmethod)) else None
    original = before if wrapper is None else before.__func__
    if patch.kind in (Kind.FUNCTION, Kind.METHOD):
        _refuse_foreign(finding, original, module)
    sites = tuple(site for site in finding.sites if _is_ours_to_rebind(finding, site, original))

    after = patch.replacement(original)
    if isinstance(after, types.FunctionType) and after is not original:
        setattr(after, MARK, finding.group)
    if wrapper is not None:
        after = wrapper(after)
    return _Swap(patch, owner, attribute, before, after, inherited, sites)


def _import_owner(finding: Finding) -> tuple[types.ModuleType, Any, str]:
    """Import a target's module; return it, the target's holder, and the name it holds it under."""
    try:
        module = importlib.import_module(finding.patch.module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{finding.patch.module}.".startswith(f"{error.name}."):
            raise  # the module is there, but something that it needs is not
        raise _missing_at_run_time(finding) from error
    owner: object = module
    *parents, attribute = finding.patch.name.split(".")
    for parent in parents:
        owner = vars(owner).get(parent)
        if not isinstance(owner, (type, types.ModuleType)):
            raise _missing_at_run_time(finding)
    return module, owner, attribute


def _is_ours_to_rebind(finding: Finding, site: ImportSite, original: object) -> bool:
    """Whether an import site holds the original, or has yet to be imported.

    Raises:
        PatchConflictError: It always imports the target, and yet holds something else.
    """
    module = sys.modules.get(site.module)
    now = _ABSENT if module is None else vars(module).get(site.name, _ABSENT)
    if now is _ABSENT or now is original:
        return True
    if site.conditional:  # upstream took another branch
        return False
    raise PatchConflictError(
        "something else has replaced a name that a patch must replace",
        where=f"group {finding.group}: {finding.patch.target}, imported as "
        f"{site.module}:{site.name}",
        expected=_describe(original),
        got=_describe(now),
        cure="apply FlagScale's patches first, or declare the other change as a patch",
    )


def _refuse_foreign(finding: Finding, original: object, module: types.ModuleType) -> None:
    """Refuse a target that is no function, or not the one that upstream's file defines."""
    if not callable(original):
        raise PatchError(
            f"a patch of {finding.patch.kind} aims at something that cannot be called",
            where=f"group {finding.group}: {finding.patch.target}",
            expected="a function, staticmethod or classmethod",
            got=_describe(original),
            cure="patch what the property calls, or the class that uses it",
        )
    code = getattr(original, "__code__", None)
    decorated = finding.definition is not None and finding.definition.decorated
    if not decorated and (code is None or code.co_filename != module.__file__):
        raise PatchConflictError(
            "something else has replaced a function that a patch must replace",
            where=f"group {finding.group}: {finding.patch.target}",
            expected=f"the function defined in {module.__file__}",
            got=_describe(original),
            cure="apply FlagScale's patches first, or declare the other change as a patch",
        )


def _refuse_conflicts(groups: Iterable[PatchGroup]) -> None:
    found = conflicts(groups)
    if found:
        raise PatchConflictError(
            "two patches claim the same target",
            where=_lines(f"{c.claim}: group {c.first} and group {c.second}" for c in found),
            cure="disable one of the groups: FLAGSCALE_DISABLE_PATCHES=NAME",
        )


def _refuse_shared_bindings(entries: Iterable[_ActiveGroup]) -> None:
    """Refuse two patches that would write the same name, one as its target, one as a site."""
    owners: dict[tuple[int, str], str] = {}
    for entry in entries:
        for swap in entry.swaps:
            party = f"group {entry.group.name}: {swap.patch.target}"
            for holder, name in swap.bindings():
                other = owners.setdefault((id(holder), name), party)
                if other is not party:
                    raise PatchConflictError(
                        "two patches replace the same name",
                        where=_lines([other, party]),
                        got=f"{getattr(holder, '__name__', holder)}.{name}",
                        cure="disable one of the groups: FLAGSCALE_DISABLE_PATCHES=NAME",
                    )


def _refuse_unfit(report: Report, tree: SourceTree, allow_changed: bool | frozenset[str]) -> None:
    missing = report.having(Status.MISSING)
    changed = [
        finding
        for finding in report.having(Status.CHANGED)
        if not (
            allow_changed if isinstance(allow_changed, bool) else finding.group in allow_changed
        )
    ]
    unfit = [*missing, *changed]
    if unfit:
        error = PatchTargetMissingError if missing else PatchSourceChangedError
        raise error(
            f"{tree.package} {tree.version or '(version unknown)'} is not what "
            f"{len(unfit)} of the patches were written for",
            where=_lines([tree.origin, *map(_party, unfit)]),
            expected=_lines(str(finding.patch.fingerprint) for finding in unfit),
            got=_lines(f.definition.fingerprint if f.definition else "missing" for f in unfit),
            cure=_lines(
                [
                    "install a megatron-core that they were written for "
                    "(`python -m flagscale.patches check` lists all of them),",
                    "or leave their groups out: FLAGSCALE_DISABLE_PATCHES=NAME,NAME",
                ]
            ),
        )


def _missing_at_run_time(finding: Finding) -> PatchTargetMissingError:
    return PatchTargetMissingError(
        "a patch's target does not exist in this process",
        where=_party(finding),
        expected=f"a {finding.patch.kind.value} of that name",
        got="nothing that can be replaced",
        cure="install the version that the patch was written for, or disable the group: "
        f"FLAGSCALE_DISABLE_PATCHES={finding.group}",
    )


def _party(finding: Finding) -> str:
    return f"group {finding.group}: {finding.patch.target}"


def _describe(value: object) -> str:
    """An object as a person would look it up: its name, and where it is defined, if known."""
    if value is _ABSENT:
        return "nothing"
    name = getattr(value, "__qualname__", None)
    text = f"{getattr(value, '__module__', '?')}.{name}" if name else repr(value)
    code = getattr(value, "__code__", None)
    return f"{text} ({code.co_filename}:{code.co_firstlineno})" if code else text


def _lines(items: Iterable[str]) -> str:
    """Several facts under one label of an error."""
    return ("\n" + 12 * " ").join(items)
