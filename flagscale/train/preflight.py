"""What can be known to be wrong before any process group exists. Imports no megatron."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from flagscale.errors import ConfigError
from flagscale.launch.paths import input_paths, output_paths, verify_inputs, verify_outputs
from flagscale.layout.arguments import verify_arguments as verify_layout_arguments
from flagscale.layout.parallel import Problem, raise_problems

__all__ = ["ArgumentParser", "parse_arguments", "verify_arguments"]


class ArgumentParser(argparse.ArgumentParser):
    """Reports mistakes as the project's own errors, where argparse prints and exits."""

    def error(self, message: str) -> NoReturn:
        """Called by argparse.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(message, where="command line", cure="see --help")


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """What a parser, upstream's for example, makes of a command line.

    Raises:
        ConfigError: An option is unknown, with the nearest one that is not, or a value is wrong.
    """
    known = parser._option_string_actions
    for word in argv:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            raise ConfigError(
                f"there is no option {option}",
                where="command line",
                got=word,
                cure=f"did you mean {near[0]}?" if near else "see --help",
            )
    _make_help_printable(parser)
    strict = ArgumentParser(prog=parser.prog, parents=[parser], add_help=False, allow_abbrev=False)
    return strict.parse_args(argv)


def _make_help_printable(parser: argparse.ArgumentParser) -> None:
    """Escape per cent signs that upstream's help texts leave bare: ``--help`` dies of one."""
    for action in parser._actions:
        try:
            (action.help or "") % {**vars(action), "prog": parser.prog}
        except (KeyError, TypeError, ValueError):
            action.help = (action.help or "").replace("%", "%%")


def verify_arguments(args: argparse.Namespace, world_size: int) -> None:
    """Refuse what cannot train: unsupported data modes, misfit layouts, missing files.

    Args:
        args: As parsed, before upstream has completed them.
        world_size: Ranks in all.

    Raises:
        ConfigError: All that is wrong.
    """
    values = vars(args)
    problems = _verify_data_mode(values)
    if not args.use_checkpoint_args:  # then only the checkpoint knows the sizes
        problems += verify_layout_arguments(values, world_size)
    problems += verify_inputs(input_paths(values))
    problems += verify_outputs(output_paths(values))
    raise_problems(problems)


# The forward step here feeds dense [b, s] batches; each of these asks for something else, and
# training on without it would be a silent fallback.
_UNSUPPORTED = {
    "mock_data": "--mock-data",
    "sft": "--sft",
    "fim_data": "--fim-data",
    "hybrid_context_parallel": "--hybrid-context-parallel",
    "perform_rl_step": "--perform-rl-step",
    "vision_pretraining": "--vision-pretraining",
    "per_dataset_sequences_path": "--per-dataset-sequences-path",
    "yaml_cfg": "--yaml-cfg",
}


def _verify_data_mode(values: Mapping[str, Any]) -> list[Problem]:
    return [
        Problem(
            f"{option} is not supported by this pretraining entry",
            option,
            "GPT models on dense, packed sequences",
            str(values[attribute]),
            "drop it",
        )
        for attribute, option in _UNSUPPORTED.items()
        if values.get(attribute)
    ]
