"""Models that read far keys by a method (NLPE and its relatives): its settings, both ways.

In a ``config.json`` they lie in ``rope_parameters``, whose ``rope_type`` transformers knows once
``flagattention.hf`` is imported; in a Megatron job they are the arguments ``--nlpe-...``. That
module is imported only where there is such a model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from flagscale.errors import CheckpointError

__all__ = ["ROPE_TYPE", "SPEC", "has_method", "method_arguments", "register", "with_method"]

ROPE_TYPE: Final = "flagattention_nlpe"
"""``flagattention.hf.ROPE_TYPE``, known without importing transformers."""

SPEC: Final = ("flagattention.mcore", "gpt")
"""``--spec`` of a job whose model has a method."""

_ARGUMENTS: Final = {
    "name": "nlpe_method",
    "window": "nlpe_window",
    "leak": "nlpe_leak",
    "group": "nlpe_group",
    "n_sink": "nlpe_sinks",
    "log_length": "nlpe_log_length",
}
"""Setting of a method: the argument."""


def has_method(config: Mapping[str, Any]) -> bool:
    """Whether a configuration is of a model with a method."""
    rope = config.get("rope_parameters")
    return isinstance(rope, Mapping) and rope.get("rope_type") == ROPE_TYPE


def register(config: Mapping[str, Any]) -> None:
    """Let transformers know a model with a method before it reads or builds one."""
    if has_method(config):
        import flagattention.hf  # noqa: F401


def with_method(rope: dict[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    """The ``rope_parameters`` of a job's model.

    Args:
        rope: As they are without a method.
        args: Arguments of the job.

    Raises:
        CheckpointError: The settings of the method are none.
    """
    if args.get("nlpe_method") is None:
        return rope
    from flagattention import AttentionError
    from flagattention.hf import rope_parameters
    from flagattention.nlpe import Method

    given: dict[str, Any] = {setting: args.get(dest) for setting, dest in _ARGUMENTS.items()}
    given["n_sink"] = given["n_sink"] or 0
    try:
        return rope_parameters(Method(**given), rope)
    except AttentionError as error:
        raise _as_checkpoint_error(error, "arguments") from error


def method_arguments(rope: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The converse of :func:`with_method`: the arguments, and what is left without the method.

    Raises:
        CheckpointError: The settings of the method are none.
    """
    if not has_method({"rope_parameters": rope}):
        return dict.fromkeys(_ARGUMENTS.values()), rope
    from flagattention import AttentionError
    from flagattention.hf import method_of, without_method

    try:
        method = method_of(rope)
    except AttentionError as error:
        raise _as_checkpoint_error(error, "config.json, rope_parameters") from error
    found = {dest: getattr(method, setting) for setting, dest in _ARGUMENTS.items()}
    found["nlpe_sinks"] = found["nlpe_sinks"] or None
    return found | {"spec": list(SPEC)}, without_method(rope)


def _as_checkpoint_error(error: Any, place: str) -> CheckpointError:
    return CheckpointError(
        error.what,
        where=f"{place}, {_ARGUMENTS.get(error.where, error.where)}",
        expected=error.expected,
        got=error.got,
        cure=error.cure,
    )
