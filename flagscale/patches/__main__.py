"""Show the built-in patches, and hold them against any megatron-core, without importing it.

Usage:
    python -m flagscale.patches list
    python -m flagscale.patches check --wheel megatron_core-0.18.2-cp312-....whl
    python -m flagscale.patches diff --source ~/Megatron-LM

Exit code 0: nothing to report; 1: something has changed, is missing or conflicts; 2: the question
cannot be answered.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from flagscale.errors import ConfigError, FlagScaleError, PatchSourceChangedError
from flagscale.patches.catalogue import RECORDED_FROM
from flagscale.patches.check import Finding, Report, Status, check, diff
from flagscale.patches.registry import PatchGroup
from flagscale.patches.source import SourceTree
from flagscale.plugins import load_plugins

_WIDTH = 100


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except FlagScaleError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flagscale.patches",
        description="Show FlagScale's patches and hold them against any megatron-core.",
    )
    commands = parser.add_subparsers(required=True, metavar="{list,check,diff}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON instead of text")
    shared.add_argument("--group", metavar="NAME", help="only this group")
    source = argparse.ArgumentParser(add_help=False)
    new = source.add_mutually_exclusive_group()
    new.add_argument("--wheel", metavar="FILE", type=Path, help="look at a megatron-core wheel")
    new.add_argument(
        "--source", metavar="DIR", type=Path, help="look at a checkout or site-packages"
    )

    for name, run, parents, text in (
        ("list", _list, [shared], "each patch, whether it would be active here, and why"),
        ("check", _check, [shared, source], "is upstream what the patches were written for?"),
        ("diff", _diff, [shared, source], "what changed upstream, as a unified diff"),
    ):
        command = commands.add_parser(name, parents=parents, help=text, description=text)
        command.set_defaults(run=run)
        if run is _diff:
            command.add_argument(
                "--base",
                metavar="FILE|DIR",
                type=Path,
                help="what to compare with: a wheel or directory (default: the installed one)",
            )
    return parser


def _list(arguments: argparse.Namespace) -> int:
    rows = [(group, *group.enabled_if.explain()) for group in _groups(arguments.group)]
    if arguments.json:
        print(json.dumps([_group_as_dict(*row) for row in rows], indent=2))
        return 0
    print("\n\n".join(_describe(*row) for row in rows))
    return 0


def _check(arguments: argparse.Namespace) -> int:
    report = check(_groups(arguments.group), _tree(arguments))
    print(json.dumps(report.to_dict(), indent=2) if arguments.json else _table(report))
    return 0 if report.ok else 1


def _diff(arguments: argparse.Namespace) -> int:
    groups = _groups(arguments.group)
    base = _open(arguments.base) if arguments.base else SourceTree.installed()
    unlike = check(groups, base).having(Status.CHANGED, Status.MISSING)
    if unlike:
        raise PatchSourceChangedError(
            f"the base is not what {len(unlike)} of the patches were written for",
            where=f"{base.origin}, version {base.version}",
            got=", ".join(finding.patch.target for finding in unlike),
            cure=f"pip download megatron-core=={RECORDED_FROM} --no-deps, then --base that wheel",
        )
    new = _tree(arguments)
    diffs = diff(groups, base, new)
    if arguments.json:
        print(json.dumps(diffs, indent=2))
    else:
        print("\n".join(diffs.values()))
        print(f"targets that differ between {base.version} and {new.version}: {len(diffs)}")
    return 1 if diffs else 0


def _groups(name: str | None) -> tuple[PatchGroup, ...]:
    groups = {group.name: group for plugin in load_plugins() for group in plugin.patch_groups}
    if name is None:
        return tuple(groups.values())
    if name not in groups:
        near = difflib.get_close_matches(name, groups, n=1)
        raise ConfigError(
            f"there is no patch group {name!r}",
            where="--group",
            expected=", ".join(groups),
            cure=f"did you mean {near[0]!r}?" if near else None,
        )
    return (groups[name],)


def _tree(arguments: argparse.Namespace) -> SourceTree:
    if arguments.wheel:
        return SourceTree.from_wheel(arguments.wheel)
    if arguments.source:
        return SourceTree.from_directory(arguments.source)
    return SourceTree.installed()


def _open(path: Path) -> SourceTree:
    return SourceTree.from_directory(path) if path.is_dir() else SourceTree.from_wheel(path)


def _describe(group: PatchGroup, is_active: bool, why: str) -> str:
    return "\n".join(
        [
            f"{group.name}: {'active' if is_active else 'not active'} ({why})",
            _wrap("reason", group.reason),
            _wrap("upstream", group.upstream),
            *(_target(patch.kind.value, patch.target) for patch in group.patches),
        ]
    )


def _table(report: Report) -> str:
    lines = []
    for group, findings in itertools.groupby(report.findings, lambda finding: finding.group):
        lines.append(group)
        builtins = 0
        for finding in findings:
            if finding.status is Status.BUILTIN:
                builtins += 1
            else:
                lines.append(_row(finding))
        if builtins:
            lines.append(_wrap("builtin", f"{builtins}; their presence is checked when applied"))
    lines += [f"CONFLICT: {c.claim}, by {c.first} and by {c.second}" for c in report.conflicts]
    count = {status: len(report.having(status)) for status in Status}
    lines.append(
        f"{len(report.findings) - count[Status.BUILTIN]} patches: "
        f"{count[Status.UNCHANGED]} unchanged, {count[Status.CHANGED]} changed, "
        f"{count[Status.MISSING]} missing against megatron-core {report.version}"
    )
    return "\n".join(lines)


def _row(finding: Finding) -> str:
    if finding.status is Status.UNCHANGED:
        return _target("unchanged", finding.patch.target)
    row = _target(finding.status.value.upper(), finding.patch.target)
    if finding.definition is None:
        return row
    detail = f"expected {finding.patch.fingerprint}, got {finding.definition.fingerprint}"
    return f"{row}\n{_wrap('', f'line {finding.definition.line}: {detail}')}"


def _target(label: str, target: str) -> str:
    """One labelled target; one too long for the line is broken after its module."""
    line = f"  {label:<11}{target}"
    if len(line) > _WIDTH:
        line = line.replace(":", f":\n{'':<15}", 1)
    return line


def _wrap(label: str, text: str) -> str:
    return textwrap.fill(text, _WIDTH, initial_indent=f"  {label:<11}", subsequent_indent=" " * 13)


def _group_as_dict(group: PatchGroup, is_active: bool, why: str) -> dict[str, object]:
    return {
        "group": group.name,
        "active": is_active,
        "why": why,
        "reason": group.reason,
        "upstream": group.upstream,
        "patches": [{"target": p.target, "kind": p.kind.value} for p in group.patches],
    }


if __name__ == "__main__":
    raise SystemExit(main())
