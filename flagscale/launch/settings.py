"""What a recipe says about the job itself: restarts, spare machines, layouts, environment.

These are keys of the section ``flagscale`` that no training process sees.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import yaml

from flagscale.errors import ConfigError

__all__ = ["HEALTH_CHECKS", "SETTINGS", "LayoutChoice", "Settings", "dump_settings", "read_setting"]

HEALTH_CHECKS: Final = ("full", "nodes", "none")
"""Every machine and what connects them; every machine alone; nothing."""

_OF_A_LAYOUT: Final = frozenset(
    {
        "tensor-model-parallel-size",
        "pipeline-model-parallel-size",
        "context-parallel-size",
        "expert-model-parallel-size",
        "expert-tensor-parallel-size",
        "num-layers-per-virtual-pipeline-stage",
        "num-virtual-stages-per-pipeline-rank",
        "pipeline-model-parallel-layout",
        "decoder-first-pipeline-num-layers",
        "decoder-last-pipeline-num-layers",
        "sequence-parallel",
        "micro-batch-size",
        "recompute-granularity",
        "recompute-method",
        "recompute-num-layers",
        "recompute-modules",
        "recompute-activations",
    }
)
"""What a layout may change: none of it changes which samples a step reads."""


@dataclass(frozen=True)
class LayoutChoice:
    """A layout that the job may take when it gets so many machines.

    Args:
        nodes: Machines.
        words: Over the recipe's, as words of Megatron's command line.
        where: ``file:line``, for errors.
    """

    nodes: int
    words: tuple[str, ...] = ()
    where: str = "--nodes"

    def __str__(self) -> str:
        """The choice for people."""
        return f"{self.nodes} node{'s' * (self.nodes > 1)} {' '.join(self.words)}".rstrip()


@dataclass(frozen=True)
class Settings:
    """How the job is run.

    Args:
        max_restarts: How often it may be queued again.
        spares: Machines to ask for beyond those that are needed.
        health_check: One of :data:`HEALTH_CHECKS`.
        layouts: For fewer machines than the recipe's own.
        container: Further options for srun, such as ``--container-image=...``.
        env: Environment of the training processes; that of the launcher goes before it.
    """

    max_restarts: int = 10
    spares: int = 0
    health_check: str = "full"
    layouts: tuple[LayoutChoice, ...] = ()
    container: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)


def read_setting(
    key: str, node: yaml.Node, where: str, where_of: Callable[[yaml.Node], str]
) -> Any:
    """The value of one key of :data:`SETTINGS`.

    Args:
        key: With underscores.
        node: What the recipe gives it.
        where: The key's ``file:line``.
        where_of: The ``file:line`` of any node.

    Raises:
        ConfigError: It is of the wrong kind.
    """
    return _READERS[key](key, node, where, where_of)


def dump_settings(settings: Settings) -> dict[str, Any]:
    """The keys as a recipe has them, without those that are as they would be anyway."""
    return {key: value for key, value in _keys(settings).items() if value != _keys(Settings())[key]}


def _keys(settings: Settings) -> dict[str, Any]:
    return {
        "max-restarts": settings.max_restarts,
        "spares": settings.spares,
        "health-check": settings.health_check,
        "layouts": [_dumped(choice) for choice in settings.layouts],
        "container": [*settings.container],
        "env": dict(settings.env),
    }


def _dumped(choice: LayoutChoice) -> dict[str, Any]:
    keys: dict[str, Any] = {"nodes": choice.nodes}
    for word in choice.words:
        name, equals, value = word.removeprefix("--").partition("=")
        keys[name] = (value if value != "false" else False) if equals else True
    return keys


def _count(key: str, node: yaml.Node, where: str, _where_of: Callable[[yaml.Node], str]) -> int:
    return _whole(key, node, where, least=0)


def _whole(key: str, node: yaml.Node, where: str, least: int) -> int:
    text = node.value if isinstance(node, yaml.ScalarNode) else "a collection"
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least:
        raise ConfigError(
            f"{key.replace('_', '-')} does not take this value",
            where=where,
            expected=f"a whole number, at least {least}",
            got=text,
        )
    return int(text)


def _health_check(
    key: str, node: yaml.Node, where: str, _where_of: Callable[[yaml.Node], str]
) -> str:
    if node.value not in HEALTH_CHECKS:
        raise ConfigError(
            f"{key.replace('_', '-')} does not take this value",
            where=where,
            expected=" or ".join(HEALTH_CHECKS),
            got=node.value if isinstance(node, yaml.ScalarNode) else "a collection",
        )
    return str(node.value)


def _words(
    key: str, node: yaml.Node, where: str, _where_of: Callable[[yaml.Node], str]
) -> tuple[str, ...]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [None]
    if not all(isinstance(item, yaml.ScalarNode) for item in items):
        raise ConfigError(
            f"{key} is a list of options for srun",
            where=where,
            expected="[--container-image=IMAGE, ...]",
            got=node.value if isinstance(node, yaml.ScalarNode) else "something else",
        )
    return tuple(item.value for item in items if item is not None)


def _env(
    key: str, node: yaml.Node, where: str, where_of: Callable[[yaml.Node], str]
) -> dict[str, str]:
    pairs = _pairs(key, node, where)
    for name, value in pairs:
        if not re.fullmatch(r"[A-Za-z_]\w*", name) or not isinstance(value, yaml.ScalarNode):
            raise ConfigError(
                f"{key} is a list of variables",
                where=where_of(value),
                expected="NAME: value",
                got=name,
            )
    return {name: value.value for name, value in pairs}


def _layouts(
    key: str, node: yaml.Node, where: str, where_of: Callable[[yaml.Node], str]
) -> tuple[LayoutChoice, ...]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    return tuple(
        _layout(key, item, where_of(item) if item is not node else where) for item in items
    )


def _layout(key: str, node: yaml.Node, where: str) -> LayoutChoice:
    given = {name.replace("_", "-"): value for name, value in _pairs(key, node, where)}
    if "nodes" not in given:
        raise ConfigError(
            "a layout has no number of machines",
            where=where,
            expected="{nodes: N, tensor-model-parallel-size: T, ...}",
            got=", ".join(given) or "nothing",
        )
    nodes = _whole("nodes", given.pop("nodes"), where, least=1)
    for name in given.keys() - _OF_A_LAYOUT:
        raise ConfigError(
            "a layout cannot change this argument: the data or the model would be others",
            where=where,
            expected=", ".join(sorted(_OF_A_LAYOUT)),
            got=name,
        )
    return LayoutChoice(
        nodes, tuple(_word(name, value, where) for name, value in given.items()), where
    )


def _word(name: str, node: yaml.Node, where: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise ConfigError(f"{name} takes one value here", where=where, got="a collection")
    if node.style is None and node.value.lower() == "true":
        return f"--{name}"
    absent = node.style is None and node.value.lower() in ("false", "null", "~", "")
    return f"--{name}={'false' if absent else node.value}"


def _pairs(key: str, node: yaml.Node, where: str) -> list[tuple[str, yaml.Node]]:
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{key} takes keys and values",
            where=where,
            expected="{key: value, ...}",
            got=node.value if isinstance(node, yaml.ScalarNode) else "a list",
        )
    pairs = [(str(name.value), value) for name, value in node.value]
    _refuse_twice(key, (name for name, _ in pairs), where)
    return pairs


def _refuse_twice(key: str, names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ConfigError(f"{name} is set twice in {key}", where=where, cure="keep one of them")
        seen.add(name)


_READERS: Final[Mapping[str, Callable[..., Any]]] = {
    "max_restarts": _count,
    "spares": _count,
    "health_check": _health_check,
    "layouts": _layouts,
    "container": _words,
    "env": _env,
}
SETTINGS: Final = frozenset(_READERS)
"""The keys, with underscores."""
