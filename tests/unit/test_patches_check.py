"""Check names what upstream changed, removed, or what two patches both claim."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from flagscale.errors import PatchError
from flagscale.patches.catalogue import builtin_groups
from flagscale.patches.check import Conflict, Report, Status, check, diff
from flagscale.patches.registry import Kind, Patch, PatchGroup
from flagscale.patches.source import SourceTree, fingerprint

SOURCE = "def f(a):\n    return a\n\nclass C:\n    def m(self): return 1\n\nX = 1\n"
TARGETS = (("up.m:f", Kind.FUNCTION), ("up.m:C.m", Kind.METHOD), ("up.m:X", Kind.VALUE))


def tree_of(source: str, site: str = "from up.m import f as g") -> SourceTree:
    files = {
        "up/m.py": source,
        "up/site.py": site,
        "up/core/package_info.py": "MAJOR = 1\nMINOR = 2\nPATCH = 3\nPRE_RELEASE = ''",
    }
    return SourceTree("up", "memory", files, lambda path: files[path].encode())


def keep(original: object) -> object:
    return original


def group(name: str = "fix", *targets: tuple[str, Kind]) -> PatchGroup:
    tree = tree_of(SOURCE)
    patches = (
        Patch(target, kind, keep, fingerprint(tree, target, kind))
        for target, kind in targets or TARGETS
    )
    return PatchGroup(name, tuple(patches), "reason", "upstream")


def statuses(report: Report) -> dict[str, str]:
    return {finding.patch.target: finding.status.value for finding in report.findings}


def test_the_source_that_was_recorded_is_unchanged() -> None:
    report = check([group()], tree_of("# moved\n" + SOURCE))
    assert report.ok
    assert report.version == "1.2.3"
    assert set(statuses(report).values()) == {"unchanged"}
    function = report.findings[0]
    assert function.definition is not None
    assert function.definition.line == 2
    assert [(site.module, site.name) for site in function.sites] == [("up.site", "g")]


@pytest.mark.parametrize(
    ("old", "new", "target"),
    [
        ("return a", "return -a", "up.m:f"),
        ("return 1", "return 2", "up.m:C.m"),
        ("X = 1", "X = 2", "up.m:X"),
    ],
)
def test_a_changed_source_names_its_patch_alone(old: str, new: str, target: str) -> None:
    report = check([group()], tree_of(SOURCE.replace(old, new)))
    assert not report.ok
    assert [f.patch.target for f in report.having(Status.CHANGED)] == [target]
    assert len(report.having(Status.UNCHANGED)) == 2


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        (SOURCE.replace("def f(", "def g("), {"up.m:f"}),
        (SOURCE.replace("class C", "class D"), {"up.m:C.m"}),
        (SOURCE.replace("X = 1", "Y = 1"), {"up.m:X"}),
        ("", {"up.m:f", "up.m:C.m", "up.m:X"}),
    ],
)
def test_a_missing_target_names_its_patch(source: str, missing: set[str]) -> None:
    report = check([group()], tree_of(source))
    assert not report.ok
    assert {f.patch.target for f in report.having(Status.MISSING)} == missing


def test_builtins_are_listed_as_such_wherever_they_are() -> None:
    builtin = PatchGroup("shim", (Patch("torch.cuda:synchronize", Kind.BUILTIN, keep),), "r", "u")
    report = check([builtin], tree_of(SOURCE))
    assert report.ok
    assert statuses(report) == {"torch.cuda:synchronize": "builtin"}


def test_a_fingerprint_outside_the_package_cannot_be_checked() -> None:
    foreign = Patch("torch.cuda:synchronize", Kind.FUNCTION, keep, "0" * 16)
    with pytest.raises(PatchError, match=r"group shim: torch\.cuda:synchronize"):
        check([PatchGroup("shim", (foreign,), "r", "u")], tree_of(SOURCE))


def test_conflicts_name_both_parties() -> None:
    first, second = group("first", TARGETS[0]), group("second", TARGETS[0], TARGETS[1])
    report = check([first, second], tree_of(SOURCE))
    assert not report.ok
    assert report.conflicts == (Conflict("up.m:f", "first", "second"),)
    twins = check([first, replace(first, patches=(), reason="other")], tree_of(SOURCE))
    assert twins.conflicts == (Conflict("the group name 'first'", "first", "first"),)


def test_the_report_as_json() -> None:
    report = check([group()], tree_of(SOURCE.replace("return a", "return -a")))
    data = json.loads(json.dumps(report.to_dict()))
    assert (data["version"], data["ok"], data["conflicts"]) == ("1.2.3", False, [])
    changed = data["patches"][0]
    assert changed["expected"] != changed["got"]
    del changed["expected"], changed["got"]
    assert changed == {
        "group": "fix",
        "target": "up.m:f",
        "kind": "function",
        "status": "changed",
        "line": 1,
        "import_sites": ["up.site:g"],
    }


def test_diff_shows_what_changed_and_nothing_else() -> None:
    new = SOURCE.replace("    return a", "    # better\n    return -a").replace("X = 1", "X = (1)")
    diffs = diff([group()], tree_of(SOURCE), tree_of(new))
    assert list(diffs) == ["up.m:f"]
    assert "-    return a\n+    # better\n+    return -a\n" in diffs["up.m:f"]
    assert "up.m:f (1.2.3)" in diffs["up.m:f"]


def test_diff_of_a_target_that_is_gone() -> None:
    diffs = diff([group()], tree_of(SOURCE), tree_of(SOURCE.replace("X = 1\n", "")))
    assert "-X = 1\n" in diffs["up.m:X"]


def test_the_built_in_patches_fit_the_installed_megatron() -> None:
    report = check(builtin_groups(), SourceTree.installed())
    assert not report.having(Status.CHANGED, Status.MISSING)
    assert not report.conflicts
    assert report.having(Status.UNCHANGED)
