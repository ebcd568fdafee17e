from __future__ import annotations

from collections.abc import Iterator

import pytest

from flagscale.train.throughput import Throughput


@pytest.fixture
def clock() -> Iterator[float]:
    """Training starts at 100 s, and its summary is asked for 20 s later."""
    return iter([100.0, 120.0])


def test_log_line_is_of_the_steps_since_the_last_one(clock: Iterator[float]) -> None:
    meter = Throughput(num_devices=4, peak_tflops=2.0, clock=lambda: next(clock))
    meter.add_step(tokens=1000, flops=3e12, seconds=1.5)
    meter.add_step(tokens=1000, flops=3e12, seconds=0.5)
    # 2000 tokens / (2 s x 4); 6 TFLOP / (2 s x 4 x 2 TFLOP/s).
    assert meter.log_line(2) == (
        " iteration        2 | tokens/s/device: 250.0 | model FLOPs utilisation: 37.50 % |"
    )
    meter.add_step(tokens=4000, flops=1e12, seconds=1.0)
    assert meter.log_line(3) == (
        " iteration        3 | tokens/s/device: 1000.0 | model FLOPs utilisation: 12.50 % |"
    )


def test_utilisation_is_left_out_where_the_peak_is_unknown(clock: Iterator[float]) -> None:
    meter = Throughput(num_devices=1, peak_tflops=None, clock=lambda: next(clock))
    meter.add_step(tokens=10, flops=1e12, seconds=1.0)
    assert meter.log_line(1) == " iteration        1 | tokens/s/device: 10.0 |"


def test_summary_counts_all_steps_and_all_time(clock: Iterator[float]) -> None:
    meter = Throughput(num_devices=4, peak_tflops=None, clock=lambda: next(clock))
    for iteration in (1, 2):
        meter.add_step(tokens=6000, flops=0.0, seconds=1.0)
        meter.log_line(iteration)
    # 12000 tokens in 20 s on 4 devices: 80 device seconds, so 150 a second.
    assert meter.summary() == (
        "training summary: 12000 tokens in 20.0 s on 4 device(s), 0.0222 device hours\n"
        "  total tokens / (device hours x 3600) = 150.0 tokens/s/device "
        "(published, on A100: Aquila2-7B 3014, Aquila2-34B 535)"
    )


def test_summary_of_a_run_that_had_nothing_to_do() -> None:
    assert " = 0.0 tokens/s/device" in Throughput(1, None, clock=lambda: 0.0).summary()
