"""Fingerprints say what source means, not how it is written; import sites are all found."""

from __future__ import annotations

import ast
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flagscale.errors import ConfigError, PatchError, PatchTargetMissingError
from flagscale.patches.registry import Kind
from flagscale.patches.source import SourceTree, fingerprint, import_sites, locate

# One of everything whose syntax tree has differed between Python versions, or could.
SPECIMEN = '''
import functools

try:
    from fast import Adam
except ImportError:
    Adam = None

@functools.cache
def step(a: int, /, *args: int, scale: float = 1e-3, flag=None, **kwargs: object) -> str:
    """Docstring."""
    def inner(x=(1, -2.5, 3j, b"\\x00", "é\\u2028", ...)):
        """Another."""
        return {**kwargs, "k": [*args], "n": None, "t": True}
    with open("f") as file, inner() as other:
        total = sum(value for value in args if value > 0)
    match a:
        case [1, *rest] if rest:
            return f"{a!r:>{total}}{scale=}" "tail" f"{{}}"
        case {"x": 1, **more}:
            return u"text" rf"\\d{a:}"
    return lambda *, k=1: (yield)

class Norm:
    def __new__(cls, config):
        return super().__new__(cls)

    @property
    def size(self):
        return 1

    @size.setter
    def size(self, value):
        self.value = value
'''


def tree_of(**sources: str) -> SourceTree:
    """The package ``up`` from memory; ``a__b`` is the file ``a/b.py``, ``init`` an ``__init__``."""
    files = {
        f"up/{name.replace('__', '/').replace('init', '__init__')}.py": source
        for name, source in sources.items()
    }
    return SourceTree("up", "memory", files, lambda path: files[path].encode())


def function(source: str) -> str | None:
    return fingerprint(tree_of(m=source), "up.m:f", Kind.FUNCTION)


def value(source: str, name: str = "X") -> str | None:
    return fingerprint(tree_of(m=source), f"up.m:{name}", Kind.VALUE)


@pytest.mark.parametrize(
    ("target", "kind", "expected"),
    [
        ("up.m:step", Kind.FUNCTION, "bee40c7b3cfab851"),
        ("up.m:Norm.__new__", Kind.METHOD, "4b149932af946f06"),
        ("up.m:Norm.size", Kind.METHOD, "b1c4a94e17f742e4"),
        ("up.m:Adam", Kind.VALUE, "1acc86f938d2a414"),
    ],
)
def test_fingerprints_are_the_same_in_every_python(target: str, kind: Kind, expected: str) -> None:
    # Recorded patches would all read "changed" if one of these did.
    assert fingerprint(tree_of(m=SPECIMEN), target, kind) == expected


names = st.sampled_from(["a", "b", "total", "x_1"])
constants = st.one_of(
    st.integers(0, 10**20),
    st.floats(0, 1e300),
    st.text(max_size=8),
    st.booleans(),
    st.none(),
    st.binary(max_size=4),
).map(lambda constant: ast.unparse(ast.Constant(constant)))
expressions = st.recursive(
    names | constants,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "<", "and"]), inner).map(
            lambda parts: f"({' '.join(parts)})"
        ),
        st.tuples(names, inner, inner).map(lambda parts: f"{parts[0]}({parts[1]}, k={parts[2]})"),
        inner.map(lambda part: f"[{part}]"),
    ),
    max_leaves=8,
)


@st.composite
def bodies(draw: st.DrawFn) -> list[str]:
    """Lines of a function body."""
    lines = draw(st.lists(st.tuples(names, expressions), min_size=1, max_size=4))
    return [f"{name} = {expression}" for name, expression in lines]


@given(bodies(), st.data())
def test_writing_does_not_count(body: list[str], data: st.DataObject) -> None:
    plain = "def f(a):\n" + "".join(f"    {line}\n" for line in body)
    indent = " " * data.draw(st.integers(1, 8))
    comments = st.sampled_from(["", "  # why", "\n", f"\n{indent}# why", "  ;"])
    other = f'\n\n# moved\ndef f( a ,):\n{indent}"""Docstring."""\n' + "".join(
        f"{indent}{line}{data.draw(comments)}\n" for line in body
    )
    assert function(other) == function(plain)
    assert function(ast.unparse(ast.parse(plain))) == function(plain)


@given(expressions, expressions)
def test_meaning_counts(first: str, second: str) -> None:
    same = ast.dump(ast.parse(first)) == ast.dump(ast.parse(second))
    one, other = (function(f"def f(a):\n    return {text}\n") for text in (first, second))
    assert (one == other) == same


@pytest.mark.parametrize(
    "other",
    [
        "@cache\ndef f(a, b=1):\n    return a + b",
        "async def f(a, b=1):\n    return a + b",
        "def f(a, b=2):\n    return a + b",
        "def f(a, b=True):\n    return a + b",
        "def f(a, b=1.0):\n    return a + b",
        "def f(a, c=1):\n    return a + c",
        "def f(a, *, b=1):\n    return a + b",
        "def f(a, b: int = 1):\n    return a + b",
        "def f(a, b=1):\n    return a - b",
        "def f(a, b=1):\n    'doc'\n    'not doc'\n    return a + b",
        "def f(a, b=1):\n    return a + b\ndef f(a, b=1):\n    return a + b",
    ],
)
def test_every_part_of_a_definition_counts(other: str) -> None:
    assert function(other) not in (None, function("def f(a, b=1):\n    return a + b"))


def test_text_in_an_f_string_counts() -> None:
    one, other, braces = (f"def f(a): return f'{t}'" for t in ("{a} x", "{a} y", "{{a}} x"))
    assert len({function(one), function(other), function(braces)}) == 3


@pytest.mark.parametrize(
    "statement",
    [
        "X = 1",
        "(Y, [X, *Z]) = 1, (2, 3)",
        "X: int = 1",
        "X += 1",
        "import X",
        "import X.y",
        "import y as X",
        "from y import X",
        "from y import z as X",
        "def X(): ...",
        "class X: ...",
        "for X in (): ...",
        "with y as X: ...",
        "if y:\n    pass\nelse:\n    X = 1",
        "try:\n    y\nexcept E:\n    try:\n        z\n    finally:\n        from z import X",
        "if (X := 1): ...",
        "Y = [X := y for y in z]",
    ],
)
def test_every_way_to_bind_a_value(statement: str) -> None:
    assert value(f"X = 0\n{statement}") not in (None, value("X = 0"))


@pytest.mark.parametrize(
    "statement",
    [
        "Y = X",
        "X.y = 1",
        "X[0] = 1",
        "def g():\n    X = 1",
        "class C:\n    X = 1",
        "Y = [X for X in z]",
        "Y = lambda: (X := 1)",
        "import y.X",
        "from X import y",
        "import X as y",
    ],
)
def test_what_does_not_bind_a_value(statement: str) -> None:
    assert value(f"X = 0\n{statement}") == value("X = 0")
    assert value(statement) is None


def test_a_block_that_binds_a_value_counts_whole() -> None:
    source = "try:\n    import fast\n    X = 1\nexcept ImportError:\n    X = {}"
    assert value(source.format(2)) != value(source.format(3))
    assert value(source.format(2) + "\nY = 1") == value(source.format(2))


def test_definitions_in_branches_and_nested_classes() -> None:
    source = "class A:\n    class B:\n        if x:\n            def f(self): return {}"
    tree = tree_of(m=source.format(1))
    assert fingerprint(tree, "up.m:A.B.f", Kind.METHOD) is not None
    assert fingerprint(tree, "up.m:A.f", Kind.METHOD) is None
    assert fingerprint(tree, "up.m:A.B", Kind.FUNCTION) is None
    assert fingerprint(tree, "up.m:A.B.f.x", Kind.METHOD) is None
    assert fingerprint(tree, "up.absent:A.B.f", Kind.METHOD) is None


def test_a_definition_shows_its_place_and_source() -> None:
    source = "# first\n\x0c\n@cache  # why\ndef f():\n    return 1  # so\n\nX = 1\n"
    found = locate(tree_of(m=source), "up.m:f", Kind.FUNCTION)
    assert found is not None
    assert (found.line, found.decorated) == (3, True)
    assert found.source == "@cache  # why\ndef f():\n    return 1  # so\n"


def test_source_that_this_python_cannot_parse() -> None:
    with pytest.raises(PatchError, match=r"memory: up\.m, line 1"):
        fingerprint(tree_of(m="def f(:\n"), "up.m:f", Kind.FUNCTION)


def test_upstreams_syntax_warnings_stay_quiet(recwarn: pytest.WarningsRecorder) -> None:
    assert function('def f(): return "\\d"')
    assert not recwarn.list


SITES = {
    "init": "from .owner import f\nfrom .owner import g as h\n",
    "owner": "def f(): ...\ndef g(): ...\nfrom up import f as mine\nfrom up.star import *\n",
    "plain": "from up.owner import f",
    "alias": "from up.owner import (\n    g,  # (not this)\n    f as effe,\n)",
    "relative": "from .owner import f",
    "sub__init": "from ..owner import f",
    "sub__deep": "if x:\n    try:\n        from ..owner import f\n    except E: pass",
    "reexported": "from up import f; from up import h as i",
    "dots": "from . import f",
    "star": "from up.owner import *\n",
    "starred": "from up.star import f as twice",
    "continued": "from up.owner \\\n    import \\\n    f",
    "local": "def run():\n    from up.owner import f",
    "module": "import up.owner\nfrom up import owner",
    "other": "from up.plane import f",
    "text": "'''\nfrom up.owner import f\n'''",
}


def test_every_import_site_is_found() -> None:
    sites = import_sites(tree_of(**SITES), "up.owner", ["f"])
    assert {(site.module, site.name): site.conditional for site in sites} == {
        ("up", "f"): False,
        ("up.owner", "mine"): False,
        ("up.plain", "f"): False,
        ("up.alias", "effe"): False,
        ("up.relative", "f"): False,
        ("up.sub", "f"): False,
        ("up.sub.deep", "f"): True,
        ("up.reexported", "f"): False,
        ("up.dots", "f"): False,
        ("up.star", "f"): False,
        ("up.star", "mine"): False,
        ("up.starred", "twice"): False,
        ("up.continued", "f"): False,
    }


def test_sites_follow_aliases_of_reexports() -> None:
    sites = import_sites(tree_of(**SITES), "up.owner", ["g"])
    assert [(site.module, site.name) for site in sites] == [
        ("up", "h"),
        ("up.alias", "g"),
        ("up.reexported", "i"),
        ("up.star", "g"),
    ]


@pytest.mark.parametrize(
    ("source", "name", "bound"),
    [("", "_p", False), ("__all__ = ['_p']", "_p", True), ("__all__ = ['f']", "g", False)],
)
def test_star_imports_obey_all(source: str, name: str, bound: bool) -> None:
    tree = tree_of(owner=source, star="from up.owner import *")
    assert bool(import_sites(tree, "up.owner", [name])) is bound


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)


def test_directory_wheel_and_installed_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "site"
    write(root, "spread/core/__init__.py", "")
    write(
        root, "spread/core/package_info.py", "MAJOR = 0\nMINOR = 19\nPATCH = 2\nPRE_RELEASE = 'rc1'"
    )
    write(root, "spread/one.py", "X = 1")
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        for file in sorted(root.rglob("*.py")):
            wheel.write(file, file.relative_to(root))
    monkeypatch.syspath_prepend(root)
    trees = [
        SourceTree.from_directory(root, "spread"),
        SourceTree.from_wheel(tmp_path / "w.whl", "spread"),
        SourceTree.installed("spread"),
    ]
    for tree in trees:
        assert tree.version == "0.19.2rc1"
        assert tree.read("spread.one") == "X = 1"
        assert tree.read("spread.two") is None
        assert set(tree.modules) == {"spread.core", "spread.core.package_info", "spread.one"}


def test_the_first_directory_of_a_namespace_owns_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a", "spread/core/__init__.py", "X = 'a'")
    write(tmp_path / "b", "spread/core/__init__.py", "X = 'b'")
    write(tmp_path / "b", "spread/core/only_b.py", "")
    write(tmp_path / "b", "spread/more.py", "")
    monkeypatch.syspath_prepend(tmp_path / "b")
    monkeypatch.syspath_prepend(tmp_path / "a")
    tree = SourceTree.installed("spread")
    assert tree.read("spread.core") == "X = 'a'"
    assert set(tree.modules) == {"spread.core", "spread.more"}


def test_nothing_to_read(tmp_path: Path) -> None:
    with pytest.raises(PatchTargetMissingError, match="not installed"):
        SourceTree.installed("no_such_package")
    with pytest.raises(ConfigError, match="contains megatron/"):
        SourceTree.from_directory(tmp_path)
    (tmp_path / "w.whl").write_bytes(b"not a zip file")
    with pytest.raises(ConfigError, match="cannot be read"):
        SourceTree.from_wheel(tmp_path / "w.whl")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("other/__init__.py", "")
    with pytest.raises(ConfigError, match="no package megatron"):
        SourceTree.from_wheel(tmp_path / "empty.whl")


def test_a_damaged_wheel_names_the_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.whl", "w") as wheel:
        wheel.writestr("up/m.py", "X = 1")
    data = (tmp_path / "w.whl").read_bytes()
    (tmp_path / "w.whl").write_bytes(data.replace(b"X = 1", b"X = 2", 1))
    tree = SourceTree.from_wheel(tmp_path / "w.whl", "up")
    with pytest.raises(ConfigError, match=r"up/m\.py"):
        tree.read("up.m")
