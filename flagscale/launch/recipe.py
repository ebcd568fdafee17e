"""Recipes: a YAML file of Megatron arguments in sections, and what the command line changes.

A value keeps the text it was written with (``1e-5`` stays ``1e-5``), so what the training process
gets is what the recipe says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from flagscale.errors import ConfigError
from flagscale.launch.options import Option, OptionTable
from flagscale.launch.settings import SETTINGS, Settings, dump_settings, read_setting
from flagscale.layout.parameters import aquila_ffn_hidden_size
from flagscale.layout.ramp import Ramp, format_schedule

__all__ = [
    "Entry",
    "Recipe",
    "Rule",
    "argument_values",
    "dump_recipe",
    "plan_argv",
    "read_recipe",
    "resolve_recipe",
]

LAYER_SECTION = "flagscale"
OVERRIDE_SECTION = "command_line"
_RUN_DEFAULTS = {
    "--save": "{output_dir}/checkpoints",
    "--load": "{output_dir}/checkpoints",
    "--tensorboard-dir": "{output_dir}/tensorboard",
}


@dataclass(frozen=True)
class Entry:
    """One option as a recipe or a command line gives it.

    Args:
        option: What is set.
        values: The words after the option; none for a flag. ``None`` says that it must be absent.
        section: The recipe's section.
        where: ``file:line``, for errors.
    """

    option: Option
    values: tuple[str, ...] | None
    section: str
    where: str

    @property
    def argv(self) -> list[str]:
        """The words on the training process's command line."""
        return [] if self.values is None else [self.option.name, *self.values]


@dataclass(frozen=True)
class Rule:
    """A value that follows from others, so it is computed once the command line is known.

    Args:
        key: In the layer's section, ``ramp`` or ``ffn``.
        option: What is set.
        numbers: The rule's own numbers.
        where: ``file:line``, for errors.
    """

    key: str
    option: Option
    numbers: Mapping[str, Fraction]
    where: str

    def entry(self, entries: Mapping[str, Entry]) -> Entry:
        """The entry that follows from those given, by attribute.

        Raises:
            ConfigError: What the rule is computed from is missing, or its numbers cannot be right.
        """
        kind = _RULES[self.key]
        given = entries.get(kind.depends_on)
        if given is None or not given.values or not _is_a("int", given.values[0]):
            raise ConfigError(
                f"{self.key} is computed from --{kind.depends_on.replace('_', '-')}, "
                "which is not given",
                where=self.where,
            )
        size = int(given.values[0])
        try:
            if self.key == "ramp":
                ramp = Ramp(**{name: int(number) for name, number in self.numbers.items()})
                value = format_schedule(ramp.schedule(size))
            else:
                multiple_of = int(self.numbers["multiple_of"])
                multiplier = self.numbers.get("hidden_dim_multiplier", Fraction(1))
                value = str(aquila_ffn_hidden_size(size, multiple_of, multiplier))
        except ValueError as error:
            raise ConfigError(f"{self.key} cannot be", where=self.where, got=error) from error
        return Entry(self.option, (value,), LAYER_SECTION, self.where)


@dataclass(frozen=True)
class _RuleKind:
    """What a rule sets, from which attribute, and what its numbers are called."""

    sets: str
    depends_on: str
    integers: tuple[str, ...]
    fractions: tuple[str, ...] = ()


_RULES = {
    "ramp": _RuleKind(
        "--step-batch-size-schedule", "seq_length", ("start", "end", "increment", "samples")
    ),
    "ffn": _RuleKind(
        "--ffn-hidden-size", "hidden_size", ("multiple_of",), ("hidden_dim_multiplier",)
    ),
}


@dataclass(frozen=True)
class Recipe:
    """A named list of options, each attribute at most once.

    Args:
        name: Names the run directory and the job.
        entries: The options.
        rules: What is computed from them.
        nodes: Machines it is meant for; ``None`` is this one.
        nproc: Processes a machine, one a device; ``None`` leaves it to the command line.
        settings: How the job is run.
    """

    name: str
    entries: tuple[Entry, ...]
    rules: tuple[Rule, ...] = ()
    nodes: int | None = None
    nproc: int | None = None
    settings: Settings = field(default_factory=Settings)

    @property
    def argv(self) -> list[str]:
        """The command line of the training process."""
        return [word for entry in self.entries for word in entry.argv]

    def find(self, dest: str) -> Entry | None:
        """The entry that sets an attribute, if it is given."""
        given = (e for e in self.entries if e.option.dest == dest and e.values is not None)
        return next(given, None)


def read_recipe(path: Path, options: OptionTable) -> Recipe:
    """Read and check a recipe.

    Raises:
        ConfigError: The file cannot be read, is not a recipe, names an unknown argument, gives one
            twice, or gives one a value of the wrong kind; with ``file:line``.
    """
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("the recipe cannot be read", where=str(path), got=error) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(
            "the recipe is not YAML",
            where=f"{path}:{mark.line + 1}" if mark else str(path),
            got=getattr(error, "problem", None) or error,
        ) from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(
            "the recipe has no sections",
            where=str(path),
            expected="sections (model:, optimizer:, ...) with one 'argument: value' a line",
        )
    name = path.stem
    sizes: dict[str, int] = {}
    settings: dict[str, Any] = {}
    found: dict[str, Entry | Rule] = {}
    for section, key, node in _leaves(path, root):
        where = _where(path, key)
        item: Entry | Rule
        if (section, key.value) == (LAYER_SECTION, "name"):
            name = _name(node, where)
            continue
        if section == LAYER_SECTION and key.value in ("nodes", "nproc"):
            sizes[key.value] = int(_number(node, key.value, where))
            continue
        setting = key.value.replace("-", "_")
        if section == LAYER_SECTION and setting in SETTINGS:
            settings[setting] = read_setting(setting, node, where, lambda node: _where(path, node))
            continue
        if section == LAYER_SECTION and key.value in _RULES:
            option = options.find(_RULES[key.value].sets, where)
            item = Rule(key.value, option, _rule_numbers(path, key.value, node, where), where)
        else:
            entry = Entry(options.find(key.value, where), None, section, where)
            item = replace(entry, values=_node_values(entry, node))
        earlier = found.setdefault(item.option.dest, item)
        if earlier is not item:
            raise ConfigError(
                f"{item.option.name} is set twice",
                where=where,
                got=f"{earlier.option.name} at {earlier.where}",
                cure="keep one of the two",
            )
    entries = tuple(item for item in found.values() if isinstance(item, Entry))
    rules = tuple(item for item in found.values() if isinstance(item, Rule))
    return Recipe(name, entries, rules, **sizes, settings=Settings(**settings))


def resolve_recipe(
    recipe: Recipe,
    options: OptionTable,
    overrides: Sequence[str],
    output_dir: Path,
    data_dir: Path | None = None,
    defaults: Mapping[str, str | None] | None = None,
) -> Recipe:
    """The recipe as it will run: directories filled in, the command line's options in their place.

    An override takes the place of the recipe's entry, or rule, for the same attribute, so
    ``--no-X`` replaces ``X``. ``--flag=false`` and ``--option=null`` remove one, as in a recipe.

    Args:
        recipe: As read.
        options: The known options.
        overrides: Words of Megatron's command line.
        output_dir: Replaces ``{output_dir}``; checkpoints and TensorBoard go below it by default.
        data_dir: Replaces ``{data_dir}``.
        defaults: What else is set unless the recipe or the command line speaks of it; ``None`` is
            a flag.

    Raises:
        ConfigError: An override is wrong, or a recipe needs a data directory and has none.
    """
    entries = {entry.option.dest: entry for entry in recipe.entries}
    for name, value in {**_RUN_DEFAULTS, **(defaults or {})}.items():
        option = options.find(name, "defaults")
        words = () if value is None else (value,)
        entries.setdefault(option.dest, Entry(option, words, LAYER_SECTION, "defaults"))
    for entry in _read_overrides(overrides, options):
        replaced = entries.get(entry.option.dest)
        section = replaced.section if replaced else OVERRIDE_SECTION
        entries[entry.option.dest] = replace(entry, section=section)
    for rule in recipe.rules:
        if rule.option.dest not in entries:  # else the command line says it
            entries[rule.option.dest] = rule.entry(entries)
    filled = (_fill(entry, output_dir, data_dir) for entry in entries.values())
    return replace(recipe, entries=tuple(filled), rules=())


def plan_argv(
    recipe: Recipe,
    options: OptionTable,
    overrides: Sequence[str],
    output_dir: Path,
    data_dir: Path | None = None,
) -> list[str]:
    """The training process's command line; arguments and errors as :func:`resolve_recipe`."""
    return resolve_recipe(recipe, options, overrides, output_dir, data_dir).argv


def argument_values(recipe: Recipe, options: OptionTable) -> dict[str, Any]:
    """What upstream's parser makes of the recipe, by attribute.

    Values of types of upstream's own (enumerations, patterns) stay text.
    """
    kinds: dict[str, type] = {"int": int, "float": float}
    values = options.defaults()
    for entry in recipe.entries:
        if entry.values is None:
            continue
        kind = kinds.get(entry.option.type, str)
        words = [kind(word) for word in entry.values]
        if entry.option.nargs == 0:
            values[entry.option.dest] = entry.option.const
        else:
            values[entry.option.dest] = words[0] if entry.option.nargs is None else words
    return values


def dump_recipe(recipe: Recipe) -> str:
    """A resolved recipe as YAML that :func:`read_recipe` reads back to the same command line."""
    sections: dict[str, dict[str, Any]] = {LAYER_SECTION: {"name": recipe.name}}
    cluster = {"nodes": recipe.nodes, "nproc": recipe.nproc}
    sections[LAYER_SECTION] |= {key: size for key, size in cluster.items() if size is not None}
    sections[LAYER_SECTION] |= dump_settings(recipe.settings)
    for entry in recipe.entries:
        key = entry.option.name.removeprefix("--")
        sections.setdefault(entry.section, {})[key] = _yaml_value(entry)
    # Sections in order of first use would move those of the layer's section to the front.
    order = dict.fromkeys([entry.section for entry in recipe.entries] + [LAYER_SECTION])
    text: str = yaml.safe_dump(
        {name: sections[name] for name in order}, sort_keys=False, allow_unicode=True, width=100
    )
    return text


def _leaves(path: Path, root: yaml.MappingNode) -> Iterator[tuple[str, yaml.ScalarNode, yaml.Node]]:
    """``(section, key, value)`` of every leaf, in the order of the file."""
    for section, body in root.value:
        if isinstance(body, yaml.ScalarNode) and not body.value:
            continue  # a section with nothing but comments
        if not isinstance(section, yaml.ScalarNode) or not isinstance(body, yaml.MappingNode):
            raise ConfigError(
                f"{section.value!r} is outside of any section",
                where=_where(path, section),
                expected="'section:', then indented lines of 'argument: value'",
                cure="indent it below a section",
            )
        for key, value in body.value:
            yield section.value, key, value


def _where(path: Path, node: yaml.Node) -> str:
    return f"{path}:{node.start_mark.line + 1}"


def _name(node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode) or not re.fullmatch(r"\w[\w.-]*", node.value):
        raise ConfigError(
            "the recipe's name cannot name a directory",
            where=where,
            expected="letters, digits, '_', '-' and '.'",
            got=node.value,
        )
    return str(node.value)


def _rule_numbers(path: Path, key: str, node: yaml.Node, where: str) -> dict[str, Fraction]:
    """The numbers of a rule, all that it needs and none that it does not know."""
    kind = _RULES[key]
    if not isinstance(node, yaml.MappingNode):
        node = yaml.MappingNode("", [])
    numbers = {
        name.value: _number(value, name.value, _where(path, name), name.value in kind.integers)
        for name, value in node.value
    }
    known = {*kind.integers, *kind.fractions}
    if not set(kind.integers) <= numbers.keys() <= known:
        raise ConfigError(
            f"{key} takes other numbers",
            where=where,
            expected=", ".join([*kind.integers, *(f"{name} (or none)" for name in kind.fractions)]),
            got=", ".join(numbers) or "none",
        )
    return numbers


def _number(node: yaml.Node, key: str, where: str, integer: bool = True) -> Fraction:
    """A positive number, exactly as it is written."""
    try:
        number = Fraction(node.value) if isinstance(node, yaml.ScalarNode) else Fraction(0)
    except ValueError:
        number = Fraction(0)
    if number <= 0 or (integer and number.denominator != 1):
        raise ConfigError(
            f"{key} does not take this value",
            where=where,
            expected="a whole number above 0" if integer else "a number above 0",
            got=node.value if isinstance(node, yaml.ScalarNode) else "a collection",
        )
    return number


def _node_values(entry: Entry, node: yaml.Node) -> tuple[str, ...] | None:
    """The words a YAML value stands for."""
    if isinstance(node, yaml.ScalarNode):
        # Only these words are special; YAML 1.1 would make a Boolean of 'no' and 'on' as well.
        word = node.value.lower() if node.style is None else None
        if word in ("null", "~", "", "false"):
            return None
        if word == "true":
            return _checked(entry, ())
        if entry.option.nargs != 0:
            return _checked(entry, (node.value,))
    elif (
        isinstance(node, yaml.SequenceNode)
        and entry.option.nargs != 0
        and all(isinstance(item, yaml.ScalarNode) for item in node.value)
    ):
        return _checked(entry, tuple(item.value for item in node.value))
    raise _wrong_value(entry, node.value if isinstance(node, yaml.ScalarNode) else "a collection")


def _read_overrides(words: Sequence[str], options: OptionTable) -> Iterator[Entry]:
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            groups.append([word])
        elif groups:
            groups[-1].append(word)
        else:
            raise ConfigError(
                f"{word!r} belongs to no argument",
                where="command line",
                expected="--argument value ...",
            )
    for first, *values in groups:
        name, equals, value = first.partition("=")
        entry = Entry(options.find(name, "command line"), None, OVERRIDE_SECTION, "command line")
        if equals and not values and value in ("null", "false"):
            yield entry
        elif equals:
            yield replace(entry, values=_checked(entry, (value, *values)))
        else:
            yield replace(entry, values=_checked(entry, tuple(values)))


def _checked(entry: Entry, values: tuple[str, ...]) -> tuple[str, ...]:
    """The values, if the option takes so many of this kind."""
    option, count = entry.option, len(values)
    fits = {0: count == 0, None: count == 1, "?": count <= 1, "+": count >= 1, "*": True}
    if not fits.get(option.nargs, count == option.nargs):
        raise _wrong_value(entry, " ".join(values) or "no value")
    for value in values:
        sound = _is_a(option.type, value) if option.choices is None else value in option.choices
        if not sound:
            raise _wrong_value(entry, value)
    return values


def _is_a(kind: str, value: str) -> bool:
    try:
        {"int": int, "float": float}.get(kind, str)(value)
    except ValueError:
        return False
    return True


def _wrong_value(entry: Entry, got: str) -> ConfigError:
    option = entry.option
    kind = option.type if option.type in ("int", "float") else "value"
    counts = {0: "true or false", None: f"one {kind}", "?": f"at most one {kind}"}
    counts |= {"+": f"one {kind} or more", "*": f"any number of {kind}s"}
    expected = counts.get(option.nargs, f"{option.nargs} {kind}s")
    if option.choices is not None and len(option.choices) <= 16:
        expected += f" of {', '.join(option.choices)}"
    return ConfigError(
        f"{option.name} does not take this value", where=entry.where, expected=expected, got=got
    )


def _fill(entry: Entry, output_dir: Path, data_dir: Path | None) -> Entry:
    if entry.values is None:
        return entry
    if data_dir is None and any("{data_dir}" in value for value in entry.values):
        raise ConfigError(
            f"{entry.option.name} is below the data directory, and none was given",
            where=entry.where,
            cure="--data-dir DIR, or DATA_DIR in the environment",
        )
    filled = tuple(
        value.replace("{output_dir}", str(output_dir)).replace("{data_dir}", str(data_dir))
        for value in entry.values
    )
    return replace(entry, values=filled)


def _yaml_value(entry: Entry) -> Any:
    values, nargs = entry.values, entry.option.nargs
    if nargs == 0:
        return values is not None
    if values is None:
        return None
    words = [_yaml_word(value) for value in values]
    return words[0] if nargs in (None, "?") and words else words


def _yaml_word(word: str) -> Any:
    """A number where YAML writes it with the same text, so that it needs no quotes."""
    for kind in (int, float):
        if _is_a(kind.__name__, word) and yaml.safe_dump(kind(word)).split("\n")[0] == word:
            return kind(word)
    return word
