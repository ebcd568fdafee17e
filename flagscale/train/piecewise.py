"""Long-context attention (NLPE and its relatives) in training, by its arguments ``--nlpe-...``.

The attention itself is ``flagattention.mcore``, which knows nothing of this layer. Imports neither
torch nor megatron: the launcher, too, looks at the arguments.
"""

from __future__ import annotations

from argparse import Action, ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from flagscale.layout.parallel import Problem, raise_problems

if TYPE_CHECKING:
    from flagattention import AttentionError
    from flagattention.nlpe import Method

__all__ = ["SPEC", "add_arguments", "pre_wrap_hooks", "verify_arguments"]

SPEC = ("flagattention.mcore", "gpt")
"""What ``--spec`` must be, and is where it is left out."""

_SETTINGS = {
    "window": "--nlpe-window",
    "leak": "--nlpe-leak",
    "group": "--nlpe-group",
    "n_sink": "--nlpe-sinks",
    "log_length": "--nlpe-log-length",
}
"""What a method is made from besides its name, and the options that say it."""


class _ChooseMethod(Action):
    """Stores the method, and what follows from there being one."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option: str | None = None
    ) -> None:
        """Called by argparse."""
        setattr(namespace, self.dest, values)
        if getattr(namespace, "spec", None) is None:
            namespace.spec = list(SPEC)
        # A mask [b, 1, s, s] that nobody reads, and that grows with the square of the length.
        namespace.create_attention_mask_in_dataloader = False


def add_arguments(parser: ArgumentParser) -> None:
    """``--nlpe-method`` and its settings."""
    group = parser.add_argument_group(title="Piecewise attention")
    group.add_argument(
        "--nlpe-method",
        action=_ChooseMethod,
        default=None,
        help="Score keys from --nlpe-window on by other positions: rerope (which is NLPE), "
        "leaky-rerope, self-extend or streaming. Implies --spec flagattention.mcore gpt.",
    )
    group.add_argument(
        "--nlpe-window", type=int, default=None, help="Distance from which on a key is far."
    )
    group.add_argument(
        "--nlpe-leak",
        type=float,
        default=None,
        help="leaky-rerope: distances beyond the window grow this many times slower.",
    )
    group.add_argument(
        "--nlpe-group",
        type=int,
        default=None,
        help="self-extend: so many neighbouring positions become one beyond the window.",
    )
    group.add_argument(
        "--nlpe-sinks",
        type=int,
        default=None,
        help="streaming: how many of the first keys stay visible beyond the window.",
    )
    group.add_argument(
        "--nlpe-log-length",
        type=int,
        default=None,
        help="Scale a query at position m by max(1, log(m + 1) / log(LENGTH)); the length that "
        "the model was trained at. Without it there is no scale.",
    )


def verify_arguments(args: Namespace) -> None:
    """Refuse what piecewise attention does not serve, and what only it does.

    Raises:
        ConfigError: All that is wrong.
    """
    problems = _verify_without(args) if args.nlpe_method is None else _verify_with(args)
    raise_problems(problems)


def _verify_without(args: Namespace) -> list[Problem]:
    useless = [option for option in _SETTINGS.values() if _given(args, option) is not None]
    if args.spec is not None and args.spec[0] == SPEC[0]:
        useless.append(f"--spec {' '.join(args.spec)}")
    if args.dataloader_inter_document_masking:
        # Upstream's own core attention takes no packed sequences without Transformer Engine.
        useless.append("--dataloader-inter-document-masking")
    return [
        Problem(
            f"{option} needs piecewise attention",
            option,
            "--nlpe-method as well",
            "no --nlpe-method",
            f"give --nlpe-method, or drop {option.split()[0]}",
        )
        for option in useless
    ]


def _verify_with(args: Namespace) -> list[Problem]:
    from flagattention import AttentionError
    from flagattention.mcore_refusals import refusals

    problems = []
    if tuple(args.spec) != SPEC:
        problems.append(
            Problem(
                "the layer spec is not that of piecewise attention",
                "--spec",
                " ".join(SPEC),
                " ".join(args.spec),
                "drop --spec, or --nlpe-method",
            )
        )
    try:
        _method(args)
    except AttentionError as error:
        problems.append(_as_problem(error))
    problems += map(_as_problem, refusals(args))
    if args.dataloader_inter_document_masking:
        problems += _verify_packing(args)
    return problems


def _verify_packing(args: Namespace) -> list[Problem]:
    if args.pipeline_model_parallel_size == 1 or args.micro_batch_size == 1:
        return []
    return [
        Problem(
            "pipeline stages exchange [s, b, h], which packed samples are not",
            "--dataloader-inter-document-masking, --micro-batch-size",
            "--micro-batch-size 1 under pipeline parallelism",
            str(args.micro_batch_size),
            "give --micro-batch-size 1",
        )
    ]


def pre_wrap_hooks(args: Namespace) -> list[Callable[[list[Any]], list[Any]]]:
    """What gives the model its method, and proves that its attention is ours."""
    if args.nlpe_method is None:
        return []
    from flagattention import AttentionError
    from flagattention.mcore import bind

    method = _method(args)

    def bind_method(chunks: list[Any]) -> list[Any]:
        try:
            bind(chunks, method)
        except AttentionError as error:
            raise _as_problem(error).as_error() from error
        return chunks

    return [bind_method]


def _given(args: Namespace, option: str) -> Any:
    return getattr(args, option.removeprefix("--").replace("-", "_"))


def _method(args: Namespace) -> Method:
    from flagattention.nlpe import Method

    given = {setting: _given(args, option) for setting, option in _SETTINGS.items()}
    window = given.pop("window")
    others = {setting: value for setting, value in given.items() if value is not None}
    return Method(args.nlpe_method, window, **others)


def _as_problem(error: AttentionError) -> Problem:
    options = {"name": "--nlpe-method", **_SETTINGS}
    where = str(error.where)
    return Problem(
        error.what,
        options.get(where, where),
        str(error.expected),
        str(error.got),
        error.cure or "correct it",
    )
