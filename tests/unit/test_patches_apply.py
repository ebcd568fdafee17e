"""Patches go in whole and checked, come out exactly, and refuse what they were not written for."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flagscale.errors import (
    FlagScaleError,
    PatchConflictError,
    PatchError,
    PatchSourceChangedError,
    PatchTargetMissingError,
)
from flagscale.patches import apply as apply_module
from flagscale.patches.apply import Applied, active, apply, skipped
from flagscale.patches.registry import Condition, Kind, Patch, PatchGroup
from flagscale.patches.source import SourceTree, fingerprint

FILES = {
    "up/__init__.py": "from .owner import f as effe\n",
    "up/owner.py": """
import functools
import os

LIMIT = 1
FAST = True

def f(x):
    return x

def g(x):
    return f(x)

@functools.cache
def cached(x):
    return x

class Base:
    def inherited(self):
        return "base"

class C(Base):
    def __new__(cls, x=0):
        self = object.__new__(cls)
        self.x = x
        return self

    def method(self):
        return self.x

    @staticmethod
    def static(x):
        return x

    @classmethod
    def make(cls, x):
        return cls(x)

    @property
    def size(self):
        return 1
""",
    "up/site.py": "from up.owner import LIMIT, C, f\nfrom .owner import g as gee\n",
    "up/branch.py": "try:\n    from math import sqrt as f\nexcept E:\n    from .owner import f\n",
    "up/broken.py": "import no_such_module\ndef f(): ...\n",
    "side.py": "import sys\nUPSTREAM_WAS_LOADED = 'up.owner' in sys.modules\ndef now(): return 1\n",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SourceTree]:
    """A fresh package ``up`` and a module ``side`` beside it; nothing is imported yet."""
    for path, source in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield SourceTree.from_directory(tmp_path, "up")
    for name in [
        name for name in set(sys.modules) - before if name.split(".")[0] in ("up", "side")
    ]:
        del sys.modules[name]
    apply_module._ACTIVE.clear()
    apply_module._SKIPPED.clear()


def load(name: str) -> Any:
    return importlib.import_module(name)


def add(amount: object) -> Callable[[Any], Any]:
    """A replacement that adds to what the original returns."""

    def replacement(original: Any) -> Any:
        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return original(*args, **kwargs) + amount

        return wrapped

    return replacement


add_ten = add(10)


def patch(
    tree: SourceTree, name: str, kind: Kind, replacement: Callable[[Any], Any] = add_ten
) -> Patch:
    target = name if ":" in name else f"up.owner:{name}"
    recorded = None if kind is Kind.BUILTIN else fingerprint(tree, target, kind)
    return Patch(target, kind, replacement, recorded)


def group(name: str, *patches: Patch, **more: Any) -> PatchGroup:
    return PatchGroup(name, patches, "reason", "upstream", **more)


def snapshot() -> dict[str, dict[str, object]]:
    """Identity of everything in the loaded modules and in class C."""
    holders = [m for n, m in sys.modules.items() if n.split(".")[0] in ("up", "side")]
    if "up.owner" in sys.modules:
        holders.append(sys.modules["up.owner"].C)
    return {h.__name__: {k: v for k, v in vars(h).items() if k != "__builtins__"} for h in holders}


def assert_same(before: dict[str, dict[str, object]], after: dict[str, dict[str, object]]) -> None:
    assert before.keys() == after.keys()
    for name, content in before.items():
        assert content.keys() == after[name].keys()
        assert [k for k, v in content.items() if after[name][k] is not v] == []


def test_a_function_is_replaced_at_its_owner_and_every_site(tree: SourceTree) -> None:
    owner, up, branch = load("up.owner"), load("up"), load("up.branch")
    before = snapshot()
    applied = apply([group("fix", patch(tree, "f", Kind.FUNCTION))], tree=tree)
    site = load("up.site")  # imported afterwards: it finds the replacement at the owner
    assert [owner.f(1), up.effe(1), site.f(1), owner.g(1)] == [11, 11, 11, 11]
    assert branch.f(4.0) == 2.0  # another branch was taken: not ours
    assert owner.f.__flagscale_patch__ == "fix"
    assert active()[0].applied_at == ("up.owner:f", "up:effe", "up.site:f")
    applied.undo()
    assert site.f is owner.f
    del sys.modules["up.site"], up.site
    assert_same(before, snapshot())
    assert active() == ()


def test_a_value_is_replaced_like_a_function(tree: SourceTree) -> None:
    site = load("up.site")
    before = snapshot()
    applied = apply(
        [group("fix", patch(tree, "LIMIT", Kind.VALUE, lambda old: old + 1))], tree=tree
    )
    assert (load("up.owner").LIMIT, site.LIMIT) == (2, 2)
    applied.undo()
    assert_same(before, snapshot())


def test_methods_keep_their_kind(tree: SourceTree) -> None:
    owner, site = load("up.owner"), load("up.site")
    before = snapshot()

    def new(original: Any) -> Any:
        return lambda cls, x=0: original(cls, x + 100)

    fix = group(
        "fix",
        patch(tree, "C.method", Kind.METHOD),
        patch(tree, "C.static", Kind.METHOD),
        patch(tree, "C.make", Kind.METHOD, lambda original: lambda cls, x: original(cls, x + 1)),
        patch(tree, "C.__new__", Kind.METHOD, new),
    )
    applied = apply([fix], tree=tree)
    assert site.C is owner.C
    assert site.C(1).method() == 111
    assert site.C.static(1) == site.C().static(1) == 11
    assert site.C.make(1).x == 102
    assert {type(vars(owner.C)[name]) for name in ("static", "__new__")} == {staticmethod}
    assert type(vars(owner.C)["make"]) is classmethod
    applied.undo()
    assert_same(before, snapshot())
    assert site.C(1).method() == 1


def test_a_decorated_function_is_passed_on_as_it_is(tree: SourceTree) -> None:
    owner = load("up.owner")
    original = owner.cached
    applied = apply([group("fix", patch(tree, "cached", Kind.FUNCTION))], tree=tree)
    assert owner.cached(1) == 11
    applied.undo()
    assert owner.cached is original


def test_an_inherited_builtin_is_shadowed_and_laid_bare_again(tree: SourceTree) -> None:
    owner = load("up.owner")
    before = snapshot()
    fix = group("fix", patch(tree, "C.inherited", Kind.BUILTIN, add("!")))
    applied = apply([fix], tree=tree)
    assert (owner.C().inherited(), owner.Base().inherited()) == ("base!", "base")
    applied.undo()
    assert_same(before, snapshot())


def test_what_lies_outside_comes_before_the_package_is_imported(tree: SourceTree) -> None:
    seen: list[bool] = []

    def shim(original: Any) -> Any:
        seen.append("up.owner" in sys.modules)
        return original

    inside = group("inside", patch(tree, "f", Kind.FUNCTION))
    outside = group("outside", patch(tree, "side:now", Kind.BUILTIN, shim))
    applied = apply([inside, outside], tree=tree)
    assert seen == [False]
    assert load("side").UPSTREAM_WAS_LOADED is False
    assert applied.groups == ("outside", "inside")
    applied.undo()


def test_applying_again_changes_nothing(tree: SourceTree) -> None:
    fix = group("fix", patch(tree, "f", Kind.FUNCTION))
    first = apply([fix, fix], tree=tree)
    placed = load("up.owner").f
    again = apply([fix], tree=tree)
    assert again.groups == ()
    assert load("up.owner").f is placed
    again.undo()
    assert load("up.owner").f(1) == 11
    first.undo()
    first.undo()
    assert load("up.owner").f(1) == 1


def test_later_groups_join_and_leave_alone(tree: SourceTree) -> None:
    first = apply([group("first", patch(tree, "f", Kind.FUNCTION))], tree=tree)
    second = apply([group("second", patch(tree, "g", Kind.FUNCTION, add(100)))], tree=tree)
    assert [entry.group for entry in active()] == ["first", "second"]
    first.undo()
    assert load("up.owner").g(1) == 101
    second.undo()
    assert active() == ()


def test_groups_left_out_say_why(tree: SourceTree) -> None:
    off = Condition(lambda: False, when_true="on cpu", when_false="not on cpu")
    on = Condition(lambda: True, when_true="on gpu", when_false="not on gpu")
    applied = apply(
        [
            group("off", patch(tree, "f", Kind.FUNCTION), enabled_if=off),
            group("on", patch(tree, "g", Kind.FUNCTION), enabled_if=on),
            group("unwanted", patch(tree, "f", Kind.FUNCTION)),
        ],
        tree=tree,
        disabled=frozenset({"unwanted"}),
    )
    assert [(entry.group, entry.why) for entry in active()] == [("on", "on gpu")]
    assert skipped() == {"off": "not on cpu", "unwanted": "disabled"}
    applied.undo()


def refused(
    error: type[FlagScaleError], groups: list[PatchGroup], tree: SourceTree, **options: Any
) -> str:
    """Apply, see it refused with nothing changed, and return what it says."""
    for name in ("up.owner", "up.site", "side"):
        load(name)
    before, already = snapshot(), active()
    with pytest.raises(error) as caught:
        apply(groups, tree=tree, **options)
    assert type(caught.value) is error
    assert_same(before, snapshot())
    assert active() == already
    return str(caught.value)


def test_every_changed_source_is_named(tree: SourceTree) -> None:
    stale = [
        group(name, replace(patch(tree, name, Kind.FUNCTION), fingerprint="0" * 16))
        for name in ("f", "g")
    ]
    text = refused(PatchSourceChangedError, stale, tree)
    assert "group f: up.owner:f" in text
    assert "group g: up.owner:g" in text
    assert "0" * 16 in text
    assert str(fingerprint(tree, "up.owner:g", Kind.FUNCTION)) in text
    assert "FLAGSCALE_DISABLE_PATCHES" in text
    refused(PatchSourceChangedError, stale, tree, allow_changed=frozenset({"f"}))
    applied = apply(stale, tree=tree, allow_changed=True)
    assert active()[0].why == "always; allowed although upstream's source has changed"
    applied.undo()


def test_every_missing_target_is_named_and_cannot_be_allowed(tree: SourceTree) -> None:
    gone = group("gone", Patch("up.owner:h", Kind.FUNCTION, add(1), "0" * 16))
    stale = group("stale", replace(patch(tree, "f", Kind.FUNCTION), fingerprint="1" * 16))
    text = refused(PatchTargetMissingError, [gone, stale], tree)
    assert "group gone: up.owner:h" in text
    assert "group stale: up.owner:f" in text
    refused(PatchTargetMissingError, [gone], tree, allow_changed=True)


@pytest.mark.parametrize("target", ["up.owner:C.absent", "up.owner:D.x", "up.absent:f", "absent:f"])
def test_a_missing_builtin_is_seen_when_applied(tree: SourceTree, target: str) -> None:
    ghost = group("ghost", Patch(target, Kind.BUILTIN, add(1)))
    good = group("good", patch(tree, "f", Kind.FUNCTION))
    assert f"group ghost: {target}" in refused(PatchTargetMissingError, [good, ghost], tree)


def test_a_module_that_fails_to_import_speaks_for_itself(tree: SourceTree) -> None:
    fix = group("fix", patch(tree, "up.broken:f", Kind.FUNCTION))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        apply([fix], tree=tree)


@pytest.mark.parametrize("separately", [False, True])
def test_two_claims_name_both_parties(tree: SourceTree, separately: bool) -> None:
    first, second = (group(name, patch(tree, "f", Kind.FUNCTION)) for name in ("first", "second"))
    applied = apply([first] if separately else [], tree=tree)
    text = refused(PatchConflictError, [second] if separately else [first, second], tree)
    assert "up.owner:f: group first and group second" in text
    applied.undo()


@pytest.mark.parametrize("separately", [False, True])
def test_a_site_of_one_patch_may_not_be_the_target_of_another(
    tree: SourceTree, separately: bool
) -> None:
    owner = group("owner", patch(tree, "LIMIT", Kind.VALUE, lambda _: 2))
    site = group("site", patch(tree, "up.site:LIMIT", Kind.VALUE, lambda _: 3))
    load("up.site")
    applied = apply([owner] if separately else [], tree=tree)
    text = refused(PatchConflictError, [site] if separately else [owner, site], tree)
    assert "group owner: up.owner:LIMIT" in text
    assert "group site: up.site:LIMIT" in text
    assert "up.site.LIMIT" in text
    applied.undo()


def stranger(*args: Any) -> str:
    return "stranger"


@pytest.mark.parametrize("name", ["f", "C.method", "C.static"])
def test_someone_elses_replacement_is_not_wrapped(tree: SourceTree, name: str) -> None:
    kind = Kind.METHOD if "." in name else Kind.FUNCTION
    fix = group("fix", patch(tree, name, kind))
    owner = load("up.owner")
    holder, attribute = (owner.C, name[2:]) if kind is Kind.METHOD else (owner, name)
    setattr(holder, attribute, staticmethod(stranger) if name == "C.static" else stranger)
    text = refused(PatchConflictError, [fix], tree)
    assert f"group fix: up.owner:{name}" in text
    assert "stranger" in text
    assert Path(__file__).name in text


def test_someone_elses_replacement_at_a_site_is_named(tree: SourceTree) -> None:
    load("up.site").gee = stranger
    text = refused(PatchConflictError, [group("fix", patch(tree, "g", Kind.FUNCTION))], tree)
    assert "imported as up.site:gee" in text
    assert "stranger" in text


def test_a_patch_replaced_behind_our_back_is_named(tree: SourceTree) -> None:
    fix = group("fix", patch(tree, "f", Kind.FUNCTION))
    applied = apply([fix], tree=tree)
    ours = load("up.owner").f
    load("up.owner").f = stranger
    assert "stranger" in refused(PatchConflictError, [fix], tree)
    load("up.owner").f = ours
    applied.undo()


def test_two_groups_of_one_name_are_refused(tree: SourceTree) -> None:
    applied = apply([group("fix", patch(tree, "f", Kind.FUNCTION))], tree=tree)
    other = group("fix", patch(tree, "g", Kind.FUNCTION))
    assert "the group name 'fix'" in refused(PatchConflictError, [other], tree)
    applied.undo()


def test_a_property_is_refused(tree: SourceTree) -> None:
    text = refused(PatchError, [group("fix", patch(tree, "C.size", Kind.METHOD))], tree)
    assert "group fix: up.owner:C.size" in text
    assert "property" in text


def fail(_original: Any) -> Any:
    raise RuntimeError("no replacement today")


def test_a_failure_in_the_last_replacement_undoes_everything(tree: SourceTree) -> None:
    for name in ("up.owner", "up.site", "side"):
        load(name)
    before = snapshot()
    groups = [
        group("shim", patch(tree, "side:now", Kind.BUILTIN)),
        group("good", patch(tree, "f", Kind.FUNCTION), patch(tree, "C.make", Kind.METHOD)),
        group(
            "bad",
            patch(tree, "LIMIT", Kind.VALUE, lambda _: 5),
            patch(tree, "g", Kind.FUNCTION, fail),
        ),
    ]
    with pytest.raises(RuntimeError, match="no replacement today"):
        apply(groups, tree=tree)
    assert_same(before, snapshot())
    assert active() == ()


def test_a_failure_while_changing_undoes_everything(tree: SourceTree) -> None:
    owner = load("up.owner")
    before = snapshot()
    immutable = Patch("builtins:str.upper", Kind.BUILTIN, add_ten)
    with pytest.raises(TypeError, match="immutable"):
        apply([group("fix", patch(tree, "f", Kind.FUNCTION), immutable)], tree=tree)
    assert owner.f(1) == 1
    assert_same(before, snapshot())


def test_applied_is_what_apply_returns(tree: SourceTree) -> None:
    applied = apply([], tree=tree)
    assert isinstance(applied, Applied)
    assert applied.groups == ()


def test_the_installed_megatron_is_the_default() -> None:
    wrong = Patch("megatron.core.package_info:MAJOR", Kind.VALUE, fail, "0" * 16)
    with pytest.raises(PatchSourceChangedError, match=r"megatron 0\.19"):
        apply([group("wrong", wrong)])
