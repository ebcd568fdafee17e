"""Tokens a second, model FLOPs utilisation, and the summary at the end."""

from __future__ import annotations

import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field

from flagscale.hooks import ExitEvent, Hooks, StepEvent, TrainStart
from flagscale.platforms import active_platform

__all__ = ["AQUILA_TOKENS_PER_DEVICE_SECOND", "Throughput", "add_arguments", "connect"]

AQUILA_TOKENS_PER_DEVICE_SECOND = {"Aquila2-7B": 3014, "Aquila2-34B": 535}
"""Published training speeds by the same formula: total tokens / (device hours x 3600)."""


@dataclass
class Throughput:
    """Counts steps and tokens of this attempt.

    Args:
        num_devices: Devices of the whole job.
        peak_tflops: Dense peak of one device in TFLOP/s, or ``None`` where unknown.
        clock: Seconds, monotonic.
    """

    num_devices: int
    peak_tflops: float | None
    clock: Callable[[], float] = time.perf_counter
    _start: float = field(init=False)
    _tokens: int = field(default=0, init=False)
    _interval_tokens: int = field(default=0, init=False)
    _interval_flops: float = field(default=0.0, init=False)
    _interval_seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        """The clock of the summary runs from here: build this when training is about to start."""
        self._start = self.clock()

    def add_step(self, tokens: int, flops: float, seconds: float) -> None:
        """Count one step of the whole job: its tokens, its model FLOPs, its wall seconds."""
        self._tokens += tokens
        self._interval_tokens += tokens
        self._interval_flops += flops
        self._interval_seconds += seconds

    def log_line(self, iteration: int) -> str:
        """What the steps since the last line were worth; saves and evaluations are not counted."""
        device_seconds = self._interval_seconds * self.num_devices
        speed = self._interval_tokens / device_seconds
        line = f" iteration {iteration:8d} | tokens/s/device: {speed:.1f}"
        if self.peak_tflops:
            utilisation = self._interval_flops / (device_seconds * self.peak_tflops * 1e12)
            line += f" | model FLOPs utilisation: {100 * utilisation:.2f} %"
        self._interval_tokens, self._interval_flops, self._interval_seconds = 0, 0.0, 0.0
        return line + " |"

    def summary(self) -> str:
        """Tokens and device hours of this attempt, saves and evaluations included."""
        seconds = self.clock() - self._start
        device_hours = seconds * self.num_devices / 3600
        # The figure the LLaMA 2 paper's GPU hours give for a model's training speed.
        speed = self._tokens / (device_hours * 3600) if self._tokens else 0.0
        published = ", ".join(
            f"{name} {value}" for name, value in AQUILA_TOKENS_PER_DEVICE_SECOND.items()
        )
        return (
            f"training summary: {self._tokens} tokens in {seconds:.1f} s on {self.num_devices} "
            f"device(s), {device_hours:.4f} device hours\n"
            f"  total tokens / (device hours x 3600) = {speed:.1f} tokens/s/device "
            f"(published, on A100: {published})"
        )


def add_arguments(parser: ArgumentParser) -> None:
    """``--device-peak-tflops``."""
    parser.add_argument_group(title="FlagScale: throughput").add_argument(
        "--device-peak-tflops",
        type=float,
        default=None,
        help="Dense peak of one device at the dtype trained in, in TFLOP/s, for model FLOPs "
        "utilisation; otherwise the platform's own figure.",
    )


def connect(hooks: Hooks, args: Namespace) -> None:
    """Log speed at each log interval, and the summary when the run ends without an error."""
    from megatron.core.num_microbatches_calculator import get_current_global_batch_size
    from megatron.training import print_rank_0, print_rank_last
    from megatron.training.training import num_floating_point_operations

    meters: list[Throughput] = []

    def start(_event: TrainStart) -> None:
        peak_tflops = args.device_peak_tflops or active_platform().peak_tflops(_dtype(args))
        meters.append(Throughput(args.world_size, peak_tflops))
        known = f"{peak_tflops:.3g} TFLOP/s" if peak_tflops else "unknown (--device-peak-tflops)"
        print_rank_0(f"device: {active_platform().device_name()}, peak {known}")

    def count(event: StepEvent) -> None:
        samples = get_current_global_batch_size()
        meters[-1].add_step(
            tokens=samples * args.seq_length,
            flops=num_floating_point_operations(args, samples),
            seconds=event.seconds,
        )
        if event.iteration % args.log_interval == 0:
            print_rank_last(meters[-1].log_line(event.iteration))

    def finish(event: ExitEvent) -> None:
        if meters and event.error is None:
            print_rank_last(meters[-1].summary())

    hooks.on_train_start.append(start)
    hooks.on_step_end.append(count)
    hooks.on_exit.append(finish)


def _dtype(args: Namespace) -> str:
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
