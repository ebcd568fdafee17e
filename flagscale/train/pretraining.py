"""From a command line to upstream's ``pretrain``, by its config-container path."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from megatron.core.enums import ModelType
from megatron.core.num_microbatches_calculator import get_current_global_batch_size
from megatron.training import get_args, pretrain, print_rank_0, print_rank_last
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.training import num_floating_point_operations
from megatron.training.utils import is_rank0

from flagscale.errors import ConfigError
from flagscale.hooks import HOOKS, SaveEvent, StepEvent
from flagscale.patches.load_checkpoint import BEGUN_MARKER
from flagscale.platforms import Platform
from flagscale.train.arguments import add_flagscale_arguments
from flagscale.train.data import provide_datasets
from flagscale.train.preflight import verify_arguments, verify_options
from flagscale.train.step import forward_step
from flagscale.train.throughput import Throughput

__all__ = ["run"]


def _add_and_check_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Upstream's ``extra_args_provider``: the first moment at which all options are known.

    What can be judged without a process group is judged here, before upstream's own checks, whose
    assertions name neither the option nor the cure.
    """
    add_flagscale_arguments(parser)
    argv = sys.argv[1:]
    verify_options(argv, parser._option_string_actions)
    verify_arguments(parser.parse_args(argv))
    return parser


def _validated_arguments() -> Any:
    try:
        return parse_and_validate_args(_add_and_check_arguments)
    except (AssertionError, ValueError) as error:
        raise ConfigError(
            "megatron-core refuses these arguments",
            got=str(error) or type(error).__name__,
            cure="correct the arguments; the traceback in this rank's log shows upstream's check",
        ) from error


def _peak_tflops(args: Any, platform: Platform) -> float | None:
    if args.device_peak_tflops is not None:
        return float(args.device_peak_tflops)
    return platform.peak_tflops("bf16" if args.bf16 else "fp16" if args.fp16 else "fp32")


def _count_throughput(throughput: Throughput, event: StepEvent) -> None:
    args = get_args()
    samples = get_current_global_batch_size()
    throughput.add_step(
        tokens=samples * args.seq_length,
        flops=num_floating_point_operations(args, samples),
        seconds=event.seconds,
    )
    if event.iteration % args.log_interval == 0:
        print_rank_last(throughput.log_line(event.iteration))


def _mark_as_begun(event: SaveEvent) -> None:
    """From now on a start in this directory must find a checkpoint."""
    if not is_rank0():
        return
    marker = Path(get_args().save) / BEGUN_MARKER
    if not marker.exists():
        content = {"first_saved_iteration": event.iteration, "time": time.time()}
        partial = marker.with_suffix(".partial")
        partial.write_text(json.dumps(content) + "\n")
        partial.rename(marker)


def run(platform: Platform) -> None:
    """Train by the arguments in ``sys.argv``.

    Raises:
        ConfigError: The arguments are wrong; no process group exists yet.
        SystemExit: Upstream ended the run by itself (a signal, ``--exit-interval``).
    """
    args = _validated_arguments()
    model_config = gpt_config_from_args(args)
    container = pretrain_cfg_container_from_args(args, model_config)

    peak_tflops = _peak_tflops(args, platform)
    throughput = Throughput(args.world_size, peak_tflops)
    HOOKS.on_step_end.append(lambda event: _count_throughput(throughput, event))
    HOOKS.on_save.append(_mark_as_begun)
    known = f"{peak_tflops:.3g} TFLOP/s" if peak_tflops else "unknown (--device-peak-tflops)"
    print_rank_0(f"device: {platform.device_name()}, peak {known}")
    exit_request: SystemExit | None = None
    try:
        pretrain(container, provide_datasets, ModelType.encoder_or_decoder, forward_step)
    except SystemExit as error:  # upstream's way out after a signal or --exit-interval
        exit_request = error
    print_rank_last(throughput.summary())
    if exit_request is not None:
        raise exit_request
