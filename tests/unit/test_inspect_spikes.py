"""The detector is silent on clean curves and finds what was put into them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect.baseline import SpikeSettings, median, robust_score
from flagscale.data_inspect.curve import Attempt, Curve, Point, average
from flagscale.data_inspect.spikes import Kind, Spike, find_spikes
from flagscale.errors import ConfigError

_Losses = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Run:
    """How a synthetic run behaves."""

    seed: int
    steps: int = 700
    start: float = 10.5
    floor: float = 2.1
    speed: float = 60.0
    noise: float = 0.04
    memory: float = 0.3
    batches: tuple[int, ...] = (64,)


def _losses(run: _Run) -> tuple[_Losses, list[int]]:
    """A descent by a power law, with noise that remembers a part of itself and falls with batch."""
    rng = np.random.default_rng(run.seed)
    iterations = np.arange(1, run.steps + 1)
    trend = run.floor + (run.start - run.floor) / (1 + iterations / run.speed) ** 0.9
    each = -(-run.steps // len(run.batches))
    batches = [run.batches[index // each] for index in range(run.steps)]
    noise = np.zeros(run.steps)
    for index in range(1, run.steps):
        fresh = rng.normal() * run.noise * math.sqrt(run.batches[-1] / batches[index])
        noise[index] = run.memory * noise[index - 1] + fresh
    return trend + noise * trend / run.floor, batches


def _curve(
    losses: Sequence[float] | _Losses, batches: Sequence[int] | None = None, norms: bool = True
) -> Curve:
    rng = np.random.default_rng(1)
    points = tuple(
        Point(
            iteration=index + 1,
            loss=float(loss) if math.isfinite(loss) else None,
            nan=not math.isfinite(loss),
            batch_size=batches[index] if batches else 64,
            grad_norm=float(np.exp(rng.normal(0, 0.2))) if norms else None,
            learning_rate=1e-4,
            loss_scale=1.0,
        )
        for index, loss in enumerate(losses)
    )
    return Curve(points, (Attempt(0, 1, len(points)),))


def _clean(seed: int = 0, steps: int = 700) -> tuple[_Losses, Curve]:
    losses, batches = _losses(_Run(seed, steps))
    return losses, _curve(losses, batches)


_RUNS = st.builds(
    _Run,
    seed=st.integers(0, 2**32 - 1),
    start=st.floats(3.0, 12.0),
    speed=st.floats(15.0, 300.0),
    noise=st.floats(0.002, 0.12),
    memory=st.floats(0.0, 0.6),
    batches=st.sampled_from([(64,), (16, 32, 64), (64, 16), (8, 64), (16, 24, 32, 40, 48, 56, 64)]),
)


@given(run=_RUNS, interval=st.sampled_from([1, 1, 5, 10]))
@settings(deadline=None, max_examples=60)
def test_no_alarm_on_a_clean_run(run: _Run, interval: int) -> None:
    curve = _curve(*_losses(run))
    assert find_spikes(average(curve, interval)) == ()


def test_a_slow_rise_is_no_alarm() -> None:
    losses = 2.0 + np.random.default_rng(2).normal(0, 0.02, 700)
    losses[100:] += 2e-5 * np.arange(600) ** 2
    assert find_spikes(_curve(losses)) == ()


def test_no_alarm_while_few_points_tell_the_noise() -> None:
    curves = (2.0 + np.random.default_rng(seed).normal(0, 0.05, 40) for seed in range(1500))
    assert sum(len(find_spikes(_curve(losses, norms=False))) for losses in curves) == 0


@given(run=_RUNS, where=st.floats(0, 1), interval=st.sampled_from([1, 1, 5, 10]))
@settings(deadline=None, max_examples=60)
def test_a_burst_of_one_step_is_found_where_it_is(run: _Run, where: float, interval: int) -> None:
    run = replace(run, steps=200 * interval)
    losses, batches = _losses(run)
    index = 100 * interval + int(where * 99 * interval)  # behind a full window
    noise = run.noise * losses[index] / run.floor * math.sqrt(run.batches[-1] / min(batches))
    descent = abs(losses[max(0, index - 5 * interval)] - losses[index])
    losses[index] += interval * (2 * descent + 0.6 + 14 * noise)
    (spike,) = find_spikes(average(_curve(losses, batches), interval))
    assert spike.kind is Kind.SPIKE
    assert spike.suspects[0] <= index + 1 <= spike.suspects[1]
    assert spike.suspects[1] - spike.suspects[0] == interval - 1


def test_the_burst_of_a_bad_step() -> None:
    losses, curve = _clean()
    losses[499] += 3.68 - 2.21
    (spike,) = find_spikes(_curve(losses))
    assert (spike.first_iteration, spike.last_iteration, spike.width) == (500, 500, 1)
    assert spike.suspects == (500, 500)
    assert spike.peak == losses[499]
    assert spike.baseline == pytest.approx(np.median(losses[400:499]), abs=0.15)
    assert spike.score > 10
    assert find_spikes(curve) == ()


def test_a_mean_says_what_one_step_must_have_been() -> None:
    losses = np.full(600, 2.0) + np.random.default_rng(0).normal(0, 0.02, 600)
    losses[433] = 9.0
    (spike,) = find_spikes(average(_curve(losses), 10))
    assert spike.suspects == (431, 440)
    assert spike.peak == pytest.approx(2.7, abs=0.05)
    (told,) = [text for text in spike.evidence if "mean of up to 10" in text]
    assert float(told.split("about ")[1]) == pytest.approx(9.0, abs=0.3)


def test_a_spike_that_decays_is_one_finding() -> None:
    losses, _ = _clean(3)
    losses[300:360] += 1.5 * np.exp(-np.arange(60) / 12)
    (spike,) = find_spikes(_curve(losses))
    assert spike.kind is Kind.SPIKE
    assert spike.first_iteration == 301
    assert 320 < spike.last_iteration < 360


def test_a_slow_return_is_still_one_spike() -> None:
    losses, _ = _clean(3)
    losses[300:] += 4.0 * np.exp(-np.arange(400) / 60)
    (spike,) = find_spikes(_curve(losses))
    assert spike.kind is Kind.SPIKE
    assert any("still coming back" in text for text in spike.evidence)


def test_a_new_level_is_one_finding_and_then_the_baseline() -> None:
    losses, _ = _clean(4)
    losses[300:] += 0.8
    (shift,) = find_spikes(_curve(losses))
    assert shift.kind is Kind.LEVEL_SHIFT
    assert shift.first_iteration == 301
    assert any("stays at about" in text for text in shift.evidence)
    losses[550] += 1.5
    kinds = [(spike.kind, spike.first_iteration) for spike in find_spikes(_curve(losses))]
    assert kinds == [(Kind.LEVEL_SHIFT, 301), (Kind.SPIKE, 551)]


def test_a_spike_leaves_no_shadow() -> None:
    losses, _ = _clean(5)
    losses[300:310] += 3.0
    losses[330] += 1.0
    assert [spike.first_iteration for spike in find_spikes(_curve(losses))] == [301, 331]


def test_a_log_that_ends_in_a_spike() -> None:
    losses, _ = _clean(6)
    losses[695:] += 2.0
    (spike,) = find_spikes(_curve(losses))
    assert (spike.first_iteration, spike.last_iteration) == (696, 700)
    assert any("log ends" in text for text in spike.evidence)


def test_nan_is_a_finding_from_the_first_point_on() -> None:
    losses, _ = _clean(7)
    losses[0] = math.nan
    losses[400:420] = math.inf
    spikes = find_spikes(_curve(losses))
    assert [(s.kind, s.first_iteration, s.last_iteration) for s in spikes] == [
        (Kind.NAN, 1, 1),
        (Kind.NAN, 401, 420),
    ]
    assert spikes[0].baseline is None
    assert spikes[1].peak is None
    assert spikes[1].score == math.inf
    assert find_spikes(_curve([math.nan] * 50))[0].width == 50


def test_a_step_in_which_nothing_counted_is_no_finding() -> None:
    _, curve = _clean(8)
    points = [replace(p, loss=None) if p.iteration in (1, 300, 301) else p for p in curve.points]
    assert find_spikes(replace(curve, points=tuple(points))) == ()


def test_what_a_later_start_replaced_is_not_judged() -> None:
    losses, _ = _clean(9)
    bad = losses.copy()
    bad[449] += 3.0
    first = [p for p in _curve(bad).points if p.iteration <= 460]
    second = [replace(p, attempt=1) for p in _curve(losses).points if p.iteration > 440]
    attempts = (Attempt(0, 1, 460), Attempt(1, 441, 700))
    assert find_spikes(Curve((*first, *second), attempts)) == ()
    again = [replace(p, attempt=1) for p in _curve(bad).points if p.iteration > 440]
    (spike,) = find_spikes(Curve((*first, *again), attempts))
    assert (spike.attempt, spike.suspects) == (1, (450, 450))


def _with_norm(curve: Curve, iteration: int, norm: float) -> Curve:
    points = tuple(
        replace(p, grad_norm=norm) if p.iteration == iteration else p for p in curve.points
    )
    return replace(curve, points=points)


def test_the_gradient_norm_is_evidence_and_never_an_alarm() -> None:
    losses, curve = _clean(10)
    assert find_spikes(_with_norm(curve, 500, 1e4)) == ()
    losses[499] += 2.0
    loud: tuple[Spike, ...] = find_spikes(_with_norm(_curve(losses), 500, 1e4))
    quiet = find_spikes(_curve(losses))
    assert len(loud) == len(quiet) == 1
    assert loud[0].score == quiet[0].score
    assert loud[0].grad_norm_score is not None
    assert loud[0].grad_norm_score > 20
    assert quiet[0].grad_norm_score is not None
    assert quiet[0].grad_norm_score < 4
    assert any("gradient norm 1e+04 at iteration 500" in text for text in loud[0].evidence)
    assert find_spikes(_curve(losses, norms=False))[0].grad_norm_score is None


def test_what_changed_with_it_is_told() -> None:
    losses, _ = _clean(11)
    losses[400:] += 1.0
    curve = _curve(losses)
    points = tuple(
        replace(p, learning_rate=3e-4, batch_size=32, loss_scale=0.5, skipped=1, attempt=1)
        if p.iteration > 400
        else p
        for p in curve.points
    )
    (shift,) = find_spikes(Curve(points, (Attempt(0, 1, 400), Attempt(1, 401, 700))))
    told = "; ".join(shift.evidence)
    for words in ("start 1", "batch size went from 64 to 32", "learning rate went from 0.0001"):
        assert words in told
    assert "loss scale went from 1.0 to 0.5" in told
    assert "skipped" in told


def test_the_first_line_of_a_start_is_noisier_than_a_mean() -> None:
    rng = np.random.default_rng(12)
    losses = 2.0 + rng.normal(0, 0.05, 800)
    losses[600] = 2.0 + 3.5 * 0.05  # of one step, as likely as not among 2,000
    coarse = average(_curve(losses), 10).points
    before = [p for p in coarse if p.iteration <= 600]
    after = [replace(p, attempt=1) for p in coarse if p.iteration > 600]
    out_of_turn = Point(601, loss=float(losses[600]), batch_size=64, attempt=1)
    attempts = (Attempt(0, 1, 600, 10), Attempt(1, 601, 800, 10))
    assert find_spikes(Curve((*before, out_of_turn, *after), attempts)) == ()
    unaware = replace(out_of_turn, interval=10)
    assert find_spikes(Curve((*before, unaware, *after), attempts)) != ()


def test_a_smooth_curve_does_not_alarm_at_trifles() -> None:
    losses = np.full(400, 2.0)
    losses[300] += 0.04
    curve = _curve(losses)
    assert find_spikes(curve) == ()
    # The second line of a start may average two steps, or only its own.
    doubtful = [replace(p, interval=2) if p.iteration == 301 else p for p in curve.points]
    assert find_spikes(replace(curve, points=tuple(doubtful))) == ()
    losses[300] += 0.04
    assert len(find_spikes(_curve(losses))) == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threshold", 2.0),
        ("threshold", math.nan),
        ("calm", 0.0),
        ("floor", -1.0),
        ("window", 10),
        ("short_window", 0),
        ("min_points", 1),
        ("calm_points", 0),
        ("persist", 3),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match="setting of the spike detector"):
        replace(SpikeSettings(), **{name: value})


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(-1e6, 1e6))
def test_robust_score_against_numpy(before: list[float], value: float) -> None:
    assert median(before) == float(np.median(before))
    mad = np.median(np.abs(np.array(before) - np.median(before)))
    if mad > 1e-9:
        expected = (value - np.median(before)) / (1.4826 * mad)
        assert robust_score(value, before) == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert robust_score(median(before), before) == 0.0
