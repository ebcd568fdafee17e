"""Rules of the house that no linter knows, read from the syntax trees of the two packages."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("flagscale", "flagattention")

# Modules of flagscale/patches that are imported only once torch is there.
MAY_IMPORT_TORCH = ("flagscale/patches/fused_adam.py",)

# Where another distribution looks for what others bring: by file, what may be changed.
REGISTRIES = {"flagattention/hf.py": {"RotaryEmbeddingConfigMixin"}}


def find_problems(path: str, source: str) -> list[str]:
    """Every breach of a rule in one file.

    Args:
        path: Relative to the project's root, with forward slashes; decides which rules hold.
        source: The text of the file.
    """
    tree = ast.parse(source)
    rules = [undeclared_names(tree)]
    if not path.endswith("/__main__.py"):
        rules += [program_habits(tree), missing_all(tree)]
    if not path.startswith("flagscale/patches/"):
        rules += [stray_patches(tree, REGISTRIES.get(path, set()))]
    elif not path.startswith(MAY_IMPORT_TORCH):
        rules += [early_imports(tree)]
    return [f"{path}:{line}: {problem}" for rule in rules for line, problem in rule]


def stray_patches(tree: ast.Module, allowed: set[str]) -> Iterator[tuple[int, str]]:
    """Attributes set on, or taken from, what another distribution (or Python) brought in."""
    foreign = {
        (alias.asname or alias.name).partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if not is_ours(node, alias)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=target, ctx=ast.Store() | ast.Del()):
                pass
            case ast.Subscript(value=target, ctx=ast.Store() | ast.Del()):
                if ast.unparse(target) != "sys.modules":
                    continue
            case ast.Call(func=ast.Name("setattr" | "delattr"), args=[target, *_]):
                pass
            case _:
                continue
        if root_name(target) in foreign and ast.unparse(target) not in allowed:
            yield target.lineno, f"changes {ast.unparse(target)} outside flagscale.patches"


def is_ours(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> bool:
    module = alias.name if isinstance(node, ast.Import) else node.module
    return module is None or module.partition(".")[0] in PACKAGES


def root_name(node: ast.expr) -> str | None:
    """``a`` of ``a.b[0].c``; None of what a call returns."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


def early_imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Imports of torch or megatron that run when the module is imported."""
    for node in module_level(tree.body):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        else:
            continue
        for module in modules:
            if module.partition(".")[0] in {"torch", "megatron"}:
                yield (
                    node.lineno,
                    f"imports {module} at module level: patches are listed without it",
                )


def module_level(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    """What runs on import, down to ``if``, ``try`` and ``with`` but not ``if TYPE_CHECKING``."""
    for node in statements:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for holder in (node, *getattr(node, "handlers", [])):
            for block in ("body", "orelse", "finalbody"):
                yield from module_level(getattr(holder, block, []))


def program_habits(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """What a program may do and a library may not: print, exit, assert."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "assert in a library: raise an error of flagscale.errors"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in {"print", "exit", "quit", "sys.exit"}:
                yield node.lineno, f"{called}() in a library"


def bound_names(tree: ast.Module) -> dict[str, ast.stmt]:
    """The names a module defines or imports at its top level, with the statements that do."""
    names: dict[str, ast.stmt] = {}
    for node in module_level(tree.body):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names[node.name] = node
            case ast.Import() | ast.ImportFrom():
                names |= {alias.asname or alias.name: node for alias in node.names}
            case ast.Assign() | ast.AnnAssign() | ast.TypeAlias():
                stored = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
                names |= {n.id: node for n in stored if isinstance(n.ctx, ast.Store)}
    return names


def undeclared_names(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names that ``__all__`` promises and the module does not have."""
    names = bound_names(tree)
    declaration = names.get("__all__")
    if isinstance(declaration, ast.Assign | ast.AnnAssign) and declaration.value is not None:
        for name in ast.literal_eval(declaration.value):
            if name not in names:
                yield declaration.lineno, f"__all__ promises {name}, which does not exist"


def missing_all(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """A module with public functions or classes says which it means to offer."""
    names = bound_names(tree)
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    public = [name for name in names if isinstance(names[name], definitions) and name[0] != "_"]
    if public and "__all__" not in names:
        yield names[public[0]].lineno, f"defines {public[0]} but no __all__"


def test_the_packages_keep_the_rules() -> None:
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > len(PACKAGES)
    problems = [
        problem
        for file in files
        for problem in find_problems(file.relative_to(ROOT).as_posix(), file.read_text("utf-8"))
    ]
    assert not problems, "\n" + "\n".join(problems)


def test_every_folder_of_modules_is_a_package() -> None:
    """A folder without ``__init__.py`` works in a checkout and is left out of a wheel."""
    folders = {file.parent for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("flagscale/a.py", "import torch\ntorch.load = 1", "changes torch "),
        ("flagscale/a.py", "import torch.cuda\ntorch.cuda.x += 1", "changes torch.cuda "),
        ("flagscale/a.py", "from m.core import A as B\ndel B.f", "changes B "),
        ("flagscale/a.py", "def _f():\n import m\n setattr(m.n, 'f', 1)", "changes m.n "),
        ("flagscale/a.py", "import sys\nsys.modules['apex'] = 1", "changes sys.modules "),
        ("flagattention/a.py", "import os\nos.environ = {}", "changes os "),
        ("flagscale/patches/a.py", "import torch", "imports torch at module level"),
        ("flagscale/patches/a.py", "try: ...\nexcept E:\n from torch import x", "imports torch at"),
        ("flagscale/patches/a.py", "if 1:\n from megatron.core import x", "imports megatron.core"),
        ("flagscale/a.py", "assert 1", "assert in a library"),
        ("flagscale/a.py", "print(1)", "print() in a library"),
        ("flagscale/a.py", "import sys\nsys.exit()", "sys.exit() in a library"),
        ("flagscale/a.py", "__all__ = ['a']", "promises a"),
        ("flagscale/b/__main__.py", "__all__: list[str] = ['a']", "promises a"),
        ("flagscale/a.py", "def f(): ...", "defines f but no __all__"),
    ],
)
def test_a_breach_is_found(path: str, source: str, problem: str) -> None:
    problems = find_problems(path, source)
    assert len(problems) == 1, problems
    assert problem in problems[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("flagscale/a.py", "import os\nos.environ['X'] = '1'"),
        ("flagscale/a.py", "import m\nx = m.f()\nx.y = m.g"),
        ("flagscale/a.py", "from flagscale import hooks\nhooks.x = 1"),
        ("flagscale/patches/a.py", "def _f():\n import torch\n torch.load = 1"),
        ("flagscale/patches/a.py", "if TYPE_CHECKING:\n import torch"),
        ("flagscale/patches/fused_adam.py", "import torch"),
        ("flagscale/b/__main__.py", "def main(): print(1)"),
        ("flagscale/a.py", "with w():\n from m import x\n__all__ = ['a', 'b', 'x']\na, b = 1, 2"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str) -> None:
    assert find_problems(path, source) == []
