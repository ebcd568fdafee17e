"""Upstream's source as data: read, fingerprinted and searched without importing any of it."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import itertools
import os
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from flagscale.errors import ConfigError, PatchError, PatchTargetMissingError
from flagscale.patches.registry import Kind

__all__ = ["Definition", "ImportSite", "SourceTree", "fingerprint", "import_sites", "locate"]

_Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

_IMPORT_TEXT = re.compile(
    rb"""\bfrom (?:[ \t]|\\\r?\n)* ([.\w]+) (?:[ \t]|\\\r?\n)* import\b
         ( [ \t]* \( (?:[^)#]|\#[^\n]*)*   # to the closing parenthesis, past comments
         | (?:[^\\\n]|\\\r?\n)* )         # or to the end of the line, past continuations
    """,
    re.VERBOSE,
)
_NAME_TEXT = re.compile(rb"\w+|\*")


@dataclass(frozen=True)
class Definition:
    """Where upstream defines a target.

    Args:
        fingerprint: 16 hex digits, see :func:`fingerprint`.
        line: First line, 1-based, decorators included.
        source: The text of every statement that counts, as it stands in the file.
        decorated: Whether a decorator other than ``staticmethod`` and ``classmethod`` may have
            put another object in the place of the function.
    """

    fingerprint: str
    line: int
    source: str
    decorated: bool


@dataclass(frozen=True, order=True)
class ImportSite:
    """A module-level ``from ... import`` that binds a target under a name of its own.

    Args:
        module: The importing module.
        name: The name bound there: the alias, if it has one.
        conditional: Inside ``if``, ``try`` or the like, so another branch may bind that name.
    """

    module: str
    name: str
    conditional: bool


@dataclass(frozen=True)
class _Import:
    """One name of one ``from source import name as alias``; ``name`` may be ``*``."""

    source: str
    name: str
    alias: str
    conditional: bool


class SourceTree:
    """The Python files of one package, wherever they lie.

    Args:
        package: Top-level package, such as ``megatron``.
        origin: Where the files come from, for messages.
        paths: Relative POSIX path (``megatron/core/utils.py``) of each Python file.
        load: Returns the content of one of ``paths``.
    """

    def __init__(
        self, package: str, origin: str, paths: Iterable[str], load: Callable[[str], bytes]
    ) -> None:
        self.package = package
        self.origin = origin
        self._paths = {_module_name(path): path for path in paths}
        self._load = load
        self._raw: dict[str, bytes] = {}
        self._parsed: dict[str, ast.Module] = {}
        self._imports: dict[str, tuple[_Import, ...]] = {}

    @classmethod
    def installed(cls, package: str = "megatron") -> SourceTree:
        """The files that ``import`` would load in this interpreter; nothing is imported.

        Raises:
            PatchTargetMissingError: The package is not installed.
        """
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise PatchTargetMissingError(
                f"the package {package} is not installed",
                cure="install megatron-core in this environment, or name a wheel or source tree",
            )
        locations = [Path(location) for location in spec.submodule_search_locations]
        return cls._from_locations(package, ", ".join(map(str, locations)), locations)

    @classmethod
    def from_directory(cls, path: Path, package: str = "megatron") -> SourceTree:
        """A source checkout or a ``site-packages``: the directory that contains the package.

        Raises:
            ConfigError: It does not contain the package.
        """
        if not (path / package).is_dir():
            raise ConfigError(
                f"there is no package {package} in this directory",
                where=str(path),
                expected=f"a directory that contains {package}/",
                cure="name the root of a checkout, or a site-packages directory",
            )
        return cls._from_locations(package, str(path), [path / package])

    @classmethod
    def from_wheel(cls, path: Path, package: str = "megatron") -> SourceTree:
        """The files inside a wheel, without unpacking it.

        Raises:
            ConfigError: It cannot be read, or does not contain the package.
        """
        try:
            archive = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as error:
            raise ConfigError(
                "this wheel cannot be read", where=str(path), expected="a .whl file", got=error
            ) from error
        paths = [p for p in archive.namelist() if p.startswith(f"{package}/") and p.endswith(".py")]
        if not paths:
            raise ConfigError(
                f"there is no package {package} in this wheel",
                where=str(path),
                cure="pip download megatron-core==VERSION --no-deps",
            )
        return cls(package, str(path), paths, archive.read)

    @classmethod
    def _from_locations(cls, package: str, origin: str, locations: Iterable[Path]) -> SourceTree:
        files: dict[str, str] = {}
        claimed: set[str] = set()
        for location in locations:
            # A namespace package may be spread over several directories. As in an import, the
            # first one that has a child owns all of that child.
            children = {name.removesuffix(".py") for name in os.listdir(location)} - claimed
            claimed |= children
            for directory, _, names in os.walk(location):
                inside = directory.removeprefix(str(location)).replace(os.sep, "/")
                for name in names:
                    child = f"{inside}/{name}".split("/")[1].removesuffix(".py")
                    if name.endswith(".py") and child in children:
                        files[f"{package}{inside}/{name}"] = os.path.join(directory, name)
        return cls(package, origin, files, lambda path: _load_file(files[path]))

    @property
    def modules(self) -> tuple[str, ...]:
        """Dotted name of every module that has Python source."""
        return tuple(self._paths)

    @property
    def version(self) -> str | None:
        """Version by ``core/package_info.py``, such as ``0.19.2``; ``None`` if there is none."""
        module = f"{self.package}.core.package_info"
        if module not in self._paths:
            return None
        parts = {
            target.id: str(statement.value.value)
            for statement in self.parse(module).body
            if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        number = ".".join(parts.get(part, "?") for part in ("MAJOR", "MINOR", "PATCH"))
        return f"{number}{parts.get('PRE_RELEASE', '')}"

    def contains(self, module: str) -> bool:
        """Whether a module's name lies inside this package, present or not."""
        return module.partition(".")[0] == self.package

    def is_package(self, module: str) -> bool:
        """Whether a module is an ``__init__.py``."""
        return self._paths[module].endswith("/__init__.py")

    def read_bytes(self, module: str) -> bytes:
        """The file of a module, read once.

        Raises:
            ConfigError: It cannot be read.
        """
        if module not in self._raw:
            path = self._paths[module]
            try:
                self._raw[module] = self._load(path)
            except (OSError, zipfile.BadZipFile, zlib.error) as error:
                raise ConfigError(
                    "upstream's source cannot be read", where=f"{self.origin}: {path}", got=error
                ) from error
        return self._raw[module]

    def read(self, module: str) -> str | None:
        """The source of a module, or ``None`` if the tree does not have it."""
        if module not in self._paths:
            return None
        return self.read_bytes(module).decode("utf-8-sig", errors="replace")

    def parse(self, module: str) -> ast.Module:
        """The syntax tree of a module that the tree has, parsed once.

        Raises:
            PatchError: This Python cannot parse it.
        """
        if module not in self._parsed:
            with warnings.catch_warnings():
                # Invalid escapes and the like in upstream's source are not ours to report.
                warnings.simplefilter("ignore")
                try:
                    self._parsed[module] = ast.parse(self.read_bytes(module))
                except SyntaxError as error:
                    raise PatchError(
                        "upstream's source cannot be parsed by this Python",
                        where=f"{self.origin}: {module}, line {error.lineno}",
                        got=error.msg,
                    ) from error
        return self._parsed[module]

    def possible_importers(self, module: str, name: str) -> set[str]:
        """Modules whose text seems to import ``name`` from ``module``: what is worth parsing."""
        # `from . import x` names no module, and `import *` no name.
        keys = itertools.product((module.rpartition(".")[2], ""), (name, "*"))
        return set().union(*(self._importers.get((m.encode(), n.encode()), ()) for m, n in keys))

    @functools.cached_property
    def _importers(self) -> dict[tuple[bytes, bytes], set[str]]:
        """Modules by what their text seems to import: last part of the source, and name."""
        index: dict[tuple[bytes, bytes], set[str]] = {}
        for module in self._paths:
            for source, names in _IMPORT_TEXT.findall(self.read_bytes(module)):
                last = source.rpartition(b".")[2]
                for name in set(_NAME_TEXT.findall(names)):
                    index.setdefault((last, name), set()).add(module)
        return index

    def imports(self, module: str) -> tuple[_Import, ...]:
        """Every name that a module binds by a module-level ``from ... import``, found once."""
        if module not in self._imports:
            parent = module if self.is_package(module) else module.rpartition(".")[0]
            tree = self.parse(module)
            top = {id(statement) for statement in tree.body}
            self._imports[module] = tuple(
                _Import(
                    source=_absolute(statement, parent),
                    name=alias.name,
                    alias=alias.asname or alias.name,
                    conditional=id(statement) not in top,
                )
                for statement in _statements(tree)
                if isinstance(statement, ast.ImportFrom)
                for alias in statement.names
            )
        return self._imports[module]


def fingerprint(tree: SourceTree, target: str, kind: Kind) -> str | None:
    """Fingerprint of what a target's source means, blind to how it is written.

    Comments, formatting, docstrings and the Python version that parses do not count; decorators,
    defaults and annotations do.

    Returns:
        16 hex digits (of SHA-256), or ``None`` if upstream does not define the target.
    """
    definition = locate(tree, target, kind)
    return definition.fingerprint if definition else None


def locate(tree: SourceTree, target: str, kind: Kind) -> Definition | None:
    """Find what defines a target: see :class:`~flagscale.patches.registry.Kind`.

    A name defined more than once (overloads, branches of an ``if``) counts with all of its
    definitions, in order.

    Raises:
        PatchError: The module cannot be parsed.
    """
    module, _, name = target.partition(":")
    source = tree.read(module)
    if source is None:
        return None
    nodes: list[ast.stmt]
    if kind is Kind.VALUE:
        nodes = [node for node in tree.parse(module).body if _binds(node, name)]
    else:
        nodes = list(_definitions(tree.parse(module), name))
    if not nodes:
        return None
    canonical: list[str] = []
    _serialise(nodes, canonical)
    lines = source.split("\n")  # not splitlines(): to Python, a form feed ends no line
    spans = [(_first_line(node), node.end_lineno or node.lineno) for node in nodes]
    return Definition(
        fingerprint=hashlib.sha256("".join(canonical).encode()).hexdigest()[:16],
        line=spans[0][0],
        source="\n\n".join("\n".join(lines[first - 1 : last]) for first, last in spans) + "\n",
        decorated=any(_is_replaced_by_decorator(node) for node in nodes),
    )


def import_sites(tree: SourceTree, module: str, names: Iterable[str]) -> tuple[ImportSite, ...]:
    """Every module of the tree that binds one of ``names`` of ``module`` by a module-level import.

    Relative imports, aliases, ``import *`` and re-exports (a site that others import from) are
    followed. Imports inside functions are not sites: they look the name up when they run.

    Raises:
        PatchError: A module that may be a site cannot be parsed.
    """
    found: dict[tuple[str, str], ImportSite] = {}
    targets = [(module, name) for name in names]
    origins = list(targets)
    while origins:
        origin, name = origins.pop()
        for importer in tree.possible_importers(origin, name):
            for item in tree.imports(importer):
                if item.source != origin or item.name not in (name, "*"):
                    continue
                alias = item.alias
                if item.name == "*":
                    if not _is_exported(tree, origin, name):
                        continue
                    alias = name
                key = (importer, alias)
                if key not in found and key not in targets:
                    found[key] = ImportSite(importer, alias, item.conditional)
                    origins.append(key)
    return tuple(sorted(found.values()))


def _is_exported(tree: SourceTree, module: str, name: str) -> bool:
    """Whether ``from module import *`` binds a name: by ``__all__`` if that can be read."""
    for statement in tree.parse(module).body:
        if isinstance(statement, ast.Assign) and _binds(statement, "__all__"):
            try:
                return name in ast.literal_eval(statement.value)
            except ValueError:
                return True
    return not name.startswith("_")


def _absolute(statement: ast.ImportFrom, parent: str) -> str:
    """Absolute name of the module that a statement in package ``parent`` imports from."""
    if not statement.level:
        return statement.module or ""
    package = parent.split(".")[: len(parent.split(".")) - statement.level + 1]
    return ".".join([*package, *([statement.module] if statement.module else [])])


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements that run when a module or class body runs, blocks opened, in order."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case) and not isinstance(
            child, _Scope
        ):
            yield from _statements(child)


def _definitions(scope: ast.AST, name: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The ``def`` statements of a dotted name."""
    head, _, rest = name.partition(".")
    for statement in _statements(scope):
        if isinstance(statement, _Scope) and statement.name == head:
            if isinstance(statement, ast.ClassDef):
                yield from _definitions(statement, rest)
            elif not rest:
                yield statement


def _binds(node: ast.AST, name: str) -> bool:
    """Whether executing a statement binds ``name`` in the scope that the statement is in."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return node.name == name
        case ast.Lambda():
            return False
        case ast.Name():
            return node.id == name and isinstance(node.ctx, ast.Store)
        case ast.alias():
            return (node.asname or node.name.partition(".")[0]) == name
        case ast.comprehension():  # its target lives in a scope of its own
            return any(_binds(child, name) for child in (node.iter, *node.ifs))
        case _:
            return any(_binds(child, name) for child in ast.iter_child_nodes(node))


def _serialise(value: object, out: list[str]) -> None:
    """Append one canonical text of a syntax tree, the same under every supported Python.

    ``ast.dump`` is not: what it leaves out differs between versions, and so does ``repr`` of a
    string (by its table of printable characters). Empty fields are left out because new versions
    add fields; fields are sorted because they may come in another order.
    """
    if isinstance(value, ast.Constant):
        out.append(f"{type(value.value).__name__}:{value.value!a};")
    elif isinstance(value, ast.AST):
        out.append(f"{type(value).__name__}(")
        for field, child in sorted(ast.iter_fields(value), key=lambda item: item[0]):
            if field == "body" and isinstance(value, _Scope) and _has_docstring(value):
                child = child[1:]
            elif isinstance(value, ast.JoinedStr):
                child = list(_fstring_parts(value))
            if child is not None and child != []:
                out.append(f"{field}=")
                _serialise(child, out)
        out.append(")")
    elif isinstance(value, list):
        out.append("[")
        for child in value:
            _serialise(child, out)
        out.append("]")
    else:
        out.append(f"{value!a};")


def _fstring_parts(node: ast.JoinedStr) -> Iterator[object]:
    """Texts and fields of an f-string: 3.12 keeps empty texts that 3.13 leaves out."""
    for is_text, run in itertools.groupby(node.values, lambda part: isinstance(part, ast.Constant)):
        if not is_text:
            yield from run
        elif text := "".join(str(part.value) for part in run if isinstance(part, ast.Constant)):
            yield text


def _has_docstring(node: _Scope) -> bool:
    return ast.get_docstring(node, clean=False) is not None


def _first_line(node: ast.stmt) -> int:
    decorators = node.decorator_list if isinstance(node, _Scope) else []
    return min([node.lineno, *(decorator.lineno for decorator in decorators)])


def _is_replaced_by_decorator(node: ast.stmt) -> bool:
    return isinstance(node, _Scope) and any(
        not (isinstance(decorator, ast.Name) and decorator.id in ("staticmethod", "classmethod"))
        for decorator in node.decorator_list
    )


def _module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _load_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()
