"""The options a training process accepts, known without importing what defines them.

The table is taken from the real parser, once, in a process of its own (importing megatron takes
seconds): ``python -m flagscale.launch.options FILE``. It is kept as JSON in the user's cache
directory.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import enum
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flagscale
from flagscale.errors import ConfigError

__all__ = ["Option", "OptionTable", "known_options"]


@dataclass(frozen=True)
class Option:
    """One option string of the parser.

    Args:
        name: The string itself, ``--lr``.
        dest: The attribute it sets; several options may set the same one.
        nargs: As in argparse; 0 is a flag.
        const: What a flag sets; ``None`` for an option with values.
        type: ``int`` or ``float`` where a value must be one, else another name.
        choices: The allowed values; ``None`` when there is no such list.
        default: The value without the option, as JSON can hold it.
    """

    name: str
    dest: str
    nargs: int | str | None
    const: bool | None
    type: str
    choices: tuple[str, ...] | None
    default: Any


class OptionTable:
    """All options of the parser, found by name whether written with hyphens or underscores."""

    def __init__(self, options: Iterable[Option]) -> None:
        self._by_key = {_key(option.name): option for option in options}

    def __iter__(self) -> Iterator[Option]:
        """All options, in the parser's order."""
        return iter(self._by_key.values())

    def find(self, name: str, where: str) -> Option:
        """The option called ``name``, with or without leading dashes.

        Raises:
            ConfigError: There is none; the error names the nearest.
        """
        option = self._by_key.get(_key(name))
        if option is None:
            near = difflib.get_close_matches(_key(name), self._by_key, n=1)
            raise ConfigError(
                f"unknown argument {name!r}",
                where=where,
                cure=f"did you mean {near[0]!r}?" if near else "look it up in docs/launch.md",
            )
        return option

    def defaults(self) -> dict[str, Any]:
        """The value of every attribute when nothing is said."""
        # Where options share an attribute, argparse takes the default of the first.
        return {option.dest: option.default for option in reversed(self._by_key.values())}


def known_options() -> OptionTable:
    """The options of the installed megatron and of this layer, from the cache where possible.

    Raises:
        ConfigError: megatron-core is not installed, or its parser cannot be built.
    """
    cache = _cache_file()
    # Absent or broken: build it again.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        return _from_json(cache.read_text())
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, "options.json")
        child = subprocess.run(
            [sys.executable, "-m", __name__, str(fresh)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode:
            raise ConfigError(
                "the argument parser of megatron-core cannot be built",
                where=sys.executable,
                got="\n".join(child.stderr.splitlines()[-5:]),
                cure="install what constraints.txt names into this Python",
            )
        text = fresh.read_text()
    with contextlib.suppress(OSError):  # without a cache it works too, only later
        cache.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=cache.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, cache)
    return _from_json(text)


def _key(name: str) -> str:
    return name.removeprefix("--").replace("_", "-")


def _cache_file() -> Path:
    """The cache of exactly these sources: any change of them has another name."""
    spec = importlib.util.find_spec("megatron")
    roots = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    upstream = [root / "training" / "arguments.py" for root in roots]
    if not any(path.exists() for path in upstream):
        raise ConfigError(
            "megatron-core is not installed",
            where=sys.executable,
            expected="a package megatron.training",
            cure="pip install -c constraints.txt -e .",
        )
    ours = sorted((Path(flagscale.__file__).parent / "train").glob("*.py"))
    identity = [flagscale.__version__, sys.version, Path(__file__).read_text()]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from a source tree
        identity.append(importlib.metadata.version("megatron-core"))
    for path in [*upstream, *ours]:
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            identity.append(f"{path} {stat.st_mtime_ns} {stat.st_size}")
    # Plugins add options too; which of them are loaded is for the environment to say.
    identity.append(os.environ.get("FLAGSCALE_PLUGINS", "all"))
    for plugin in sorted(importlib.metadata.entry_points(group="flagscale.plugins")):
        version = plugin.dist.version if plugin.dist else ""
        identity.append(f"{plugin.name} {plugin.value} {version}")
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "flagscale", f"options-{digest}.json")


def _from_json(text: str) -> OptionTable:
    rows = json.loads(text)
    return OptionTable(
        Option(**row | {"choices": row["choices"] and tuple(row["choices"])}) for row in rows
    )


def _read_parser(parser: argparse.ArgumentParser) -> list[Option]:
    """The options of a parser, one for each option string, without ``--help``."""
    options = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        for name in action.option_strings:
            const = action.const
            if isinstance(action, argparse.BooleanOptionalAction):
                const = not name.startswith("--no-")
            options.append(
                Option(
                    name=name,
                    dest=action.dest,
                    nargs=action.nargs,
                    const=const,
                    type=getattr(action.type, "__name__", "str"),
                    choices=tuple(str(_plain(c)) for c in action.choices)
                    if action.choices
                    else None,
                    default=_plain(action.default),
                )
            )
    return options


def _plain(value: Any) -> Any:
    """A default or choice as JSON can hold it: enumerations by name."""
    if isinstance(value, enum.Enum):
        return value.name
    return value if isinstance(value, bool | int | float | str | list | None) else str(value)


def main(argv: list[str]) -> int:
    """Write the table of the real parser to a file.

    Upstream is named by strings: it is imported in this process, never in the launcher.
    """
    parser = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module("megatron.training.arguments").add_megatron_arguments(parser)
    if importlib.util.find_spec("flagscale.train.arguments"):
        ours = importlib.import_module("flagscale.train.arguments")
        ours.add_flagscale_arguments(parser)
    Path(argv[0]).write_text(json.dumps([asdict(option) for option in _read_parser(parser)]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
