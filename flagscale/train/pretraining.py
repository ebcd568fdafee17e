"""From a command line to upstream's ``pretrain``, by its config-container path."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
from collections.abc import Iterator, Sequence

from megatron.core.enums import ModelType
from megatron.training import pretrain
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args

from flagscale.errors import ConfigError, FlagScaleError
from flagscale.hooks import HOOKS
from flagscale.plugins import Plugin, collect_pre_wrap_hooks, connect, verify_arguments
from flagscale.train import preflight
from flagscale.train.arguments import add_flagscale_arguments
from flagscale.train.data import provide_datasets
from flagscale.train.step import forward_step

__all__ = ["run"]


@contextlib.contextmanager
def _refusals_as_our_own() -> Iterator[None]:
    """Whatever upstream raises before any process group exists, it raises at the arguments."""
    try:
        yield
    except FlagScaleError:
        raise
    except Exception as error:
        raise ConfigError(
            "megatron-core refuses these arguments",
            where="command line",
            got=str(error) or traceback.extract_tb(error.__traceback__)[-1].line,
            cure="correct the arguments; the traceback in this rank's log shows upstream's check",
        ) from error


def run(plugins: Sequence[Plugin]) -> None:
    """Train by the arguments in ``sys.argv``.

    Raises:
        ConfigError: The arguments are wrong; no process group exists yet.
        PluginError: A plugin failed; no process group exists yet.
        SystemExit: Upstream ended the run by itself (a signal, ``--exit-interval``).
    """

    def add_and_verify(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # The first moment at which all options are known. What can be judged without a process
        # group is judged here, before upstream's own checks, whose assertions name neither the
        # option nor the cure.
        add_flagscale_arguments(parser, plugins)
        args = preflight.parse_arguments(parser, sys.argv[1:])
        preflight.verify_arguments(args, int(os.environ.get("WORLD_SIZE", "1")))
        verify_arguments(plugins, args)
        return parser

    with _refusals_as_our_own():
        args = parse_and_validate_args(add_and_verify)
        model_config = gpt_config_from_args(args)
        model_config.pre_wrap_hooks.extend(collect_pre_wrap_hooks(plugins, args))
        container = pretrain_cfg_container_from_args(args, model_config)
    connect(plugins, HOOKS, args)
    pretrain(container, provide_datasets, ModelType.encoder_or_decoder, forward_step)
