"""From a command line to upstream's ``pretrain``, by its config-container path."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from flagscale.errors import ConfigError
from flagscale.hooks import HOOKS
from flagscale.plugins import Plugin, collect_pre_wrap_hooks, connect, verify_arguments
from flagscale.train import preflight
from flagscale.train.arguments import add_flagscale_arguments
from flagscale.train.data import provide_datasets
from flagscale.train.step import forward_step

__all__ = ["run"]


def _validated_arguments(plugins: Sequence[Plugin]) -> Any:
    """Parse ``sys.argv`` by upstream's parser and ours.

    Raises:
        ConfigError: The arguments are wrong.
    """

    def add_and_verify(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # The first moment at which all options are known. What can be judged without a process
        # group is judged here, before upstream's own checks, whose assertions name neither the
        # option nor the cure.
        add_flagscale_arguments(parser, plugins)
        argv = sys.argv[1:]
        preflight.verify_options(argv, parser._option_string_actions)
        args = parser.parse_args(argv)
        preflight.verify_arguments(args)
        verify_arguments(plugins, args)
        return parser

    try:
        return parse_and_validate_args(add_and_verify)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            "megatron-core refuses these arguments",
            got=str(error) or type(error).__name__,
            cure="correct the arguments; the traceback in this rank's log shows upstream's check",
        ) from error


def run(plugins: Sequence[Plugin]) -> None:
    """Train by the arguments in ``sys.argv``.

    Raises:
        ConfigError: The arguments are wrong; no process group exists yet.
        PluginError: A plugin failed; no process group exists yet.
        SystemExit: Upstream ended the run by itself (a signal, ``--exit-interval``).
    """
    args = _validated_arguments(plugins)
    model_config = gpt_config_from_args(args)
    model_config.pre_wrap_hooks.extend(collect_pre_wrap_hooks(plugins, args))
    container = pretrain_cfg_container_from_args(args, model_config)
    connect(plugins, HOOKS, args)
    pretrain(container, provide_datasets, ModelType.encoder_or_decoder, forward_step)
