"""Training logs of every release and in every state, as curves."""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect.curve import Attempt, Curve, Point, average, surviving
from flagscale.data_inspect.logs import is_log_name, read_log
from flagscale.errors import DataError

_TODAY = (
    " [2026-11-24 06:20:34.857670] iteration      100/    1000 | consumed samples:         1600 | "
    "elapsed time per iteration (ms): 500.0 | learning rate: 1.500000E-04 | global batch size:    "
    "16 | lm loss: 2.345678E+00 | loss scale: 1.0 | grad norm: 0.312 | number of skipped "
    "iterations:   0 | number of nan iterations:   0 |"
)
_OLD = (
    " iteration      100/    1000 | consumed samples:         1600 | elapsed time per iteration "
    "(ms): 500.0 | learning rate: 1.500E-04 | global batch size:    16 | lm loss: 2.345678E+00 | "
    "loss scale: 1.0 | grad norm: 0.312 | num zeros: 0.0 | params norm: 12.250 | number of "
    "skipped iterations:   0 | number of nan iterations:   0 |"
)
_DEEPSPEED = (
    " iteration      100/    1000 | consumed samples:         1600 | consumed tokens:      3276800 "
    "| elapsed time per iteration (s): 0.50 | learning rate: 0.00015 | global batch size:    16 | "
    "lm loss: 2.345678E+00 | loss scale: 1.0 | grad norm: 0.312 | actual seqlen:  2048 | number of "
    "skipped iterations:   0 | number of nan iterations:   0 | samples per second: 2.660 | TFLOPs: "
    "108.47 | tgs (tokens/gpu/second): 353.02 time (ms)"
)
_THROUGHPUT = (
    "[2025-10-21T16:18:53+08:00] iteration      100/   1000 | consumed samples:         1600 | "
    "elapsed time per iteration (ms): 604.0/602.1 | mem usage: 153.81GB/60.09% | throughput per "
    "GPU (TFLOP/s/GPU): 567.6/568.0 | learning rate: 1.500000E-04 | global batch size:    16 | "
    "load_balancing_loss: 1.03E+00 | lm loss: 2.345678E+00 | mtp_1 loss: 3.1E+00 | loss scale: 1.0 "
    "| grad norm: 0.312 | number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def _read(tmp_path: Path, text: str | bytes, name: str = "train.log") -> Curve:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_log(path)


def _line(iteration: int, loss: str | None = "2.5", *, skipped: int = 0, more: str = "") -> str:
    return (
        f" iteration {iteration:8d}/    1000 | consumed samples: {iteration * 16:12d} |{more} "
        f"elapsed time per iteration (ms): {iteration}.5 | learning rate: 1.5E-04 | global batch "
        f"size:    16 |{f' lm loss: {loss} |' if loss else ''} loss scale: 1.0 | grad norm: 0.3 | "
        f"number of skipped iterations: {skipped:3d} | number of nan iterations:   0 |\n"
    )


@pytest.mark.parametrize(
    "line",
    [
        _TODAY,
        _OLD,
        _DEEPSPEED,
        _THROUGHPUT,
        f"[default7]:{_TODAY}",
        f"7: {_OLD}",
        f"[rank7]: {_OLD}  ",
        f"\x1b[32m20251202 09:12:08\x1b[0m INFO {_OLD}\x1b[0m",
        _OLD.replace("2.345678E+00", "\x1b[31m2.345678E+00\x1b[0m"),
        _OLD.replace("lm loss", "lm-loss"),
        _OLD.replace("lm loss", "loss"),
        f"40%|####      | 4/10\r{_OLD}",
        _OLD + "Number of parameters in billions:  6.98",
    ],
)
def test_every_form_of_the_line_reads_alike(tmp_path: Path, line: str) -> None:
    (point,) = _read(tmp_path, f"noise\n{line}\nnoise\n").points
    assert (point.iteration, point.loss, point.grad_norm) == (100, 2.345678, 0.312)
    assert (point.consumed_after, point.batch_size, point.learning_rate) == (1600, 16, 1.5e-4)
    assert (point.loss_scale, point.skipped, point.nan) == (1.0, 0, False)
    assert point.source.position == 2


@pytest.mark.parametrize(
    ("loss", "skipped", "expected", "nan"),
    [
        ("2.5E+00", 0, 2.5, False),
        (None, 0, None, True),  # upstream prints no loss that is not >= 0
        ("NAN", 0, None, True),
        ("INF", 0, None, True),
        ("0.000000E+00", 0, None, False),  # every token was masked
        ("0.000000E+00", 1, None, False),
        (None, 1, None, False),  # fp16's first steps, skipped while the loss scale falls
    ],
)
def test_a_loss_that_is_no_loss(
    tmp_path: Path, loss: str | None, skipped: int, expected: float | None, nan: bool
) -> None:
    text = _line(1) + _line(2) + _line(3, loss, skipped=skipped) + _line(4)
    point = _read(tmp_path, text).points[2]
    assert (point.iteration, point.loss, point.nan) == (3, expected, nan)


def test_a_line_damaged_where_the_loss_stands_is_not_a_nan(tmp_path: Path) -> None:
    whole = _line(3)
    for broken in (
        whole[: whole.index("lm loss") - 2] + "\n",
        whole[: whole.index("lm loss") + 12] + "\n",
        whole.replace("lm loss: 2.5", "lm lo[rank3] hello"),
        whole.replace("lm loss: 2.5", "lm los[rank3]: 7"),
        whole.replace("lm loss: 2.5", "lm l"),
        whole.replace("lm loss: 2.5", "lm lxss: 2.5"),
        whole.replace("lm loss: 2.5", "lm loss: 2.[rank3]"),
        whole.replace(" |" + whole.split("|")[5] + "| loss scale:", ""),
        whole.replace("global batch size:    16 | lm loss: 2", "global batch size:    16"),
        whole.replace("size:    16 | lm loss: 2.5", "size:    157E+00"),
        whole.replace("1.5E-04 | global batch size:    16 | lm loss: 2.5", "1."),
        whole.replace("16 | lm loss: 2.5 | loss scale: 1.0", "1.0"),
    ):
        curve = _read(tmp_path, _line(1) + _line(2) + broken + _line(4))
        assert [point.iteration for point in curve.points] == [1, 2, 4]
        assert not any(point.nan for point in curve.points)
        assert [place.position for place in curve.damaged] == [3]


def test_a_log_of_nothing_but_a_damaged_line_has_no_step(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training step is logged there"):
        _read(tmp_path, _line(3).replace("lm loss: 2.5", "lm lo[rank3] hello"))


def test_two_steps_on_one_line_and_invalid_text(tmp_path: Path) -> None:
    text = (_line(1).rstrip() + _line(2)).encode() + b"\xff\xfe\x00 iteration\n" + _line(3).encode()
    assert [point.iteration for point in _read(tmp_path, text).points] == [1, 2, 3]


def test_only_training_steps_are_points(tmp_path: Path) -> None:
    text = (
        " iteration       21 | tokens/s/device: 18970.2 | model FLOPs utilisation: 6.47 % |\n"
        " validation loss at iteration 1000 | lm loss value: 2.3E+00 | lm loss PPL: 1.0E+01 |\n"
        + _line(1)
    )
    assert [point.iteration for point in _read(tmp_path, text).points] == [1]


def test_a_log_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no training step is logged there"):
        _read(tmp_path, "epoch 1 loss 2.0\n")
    with pytest.raises(DataError, match="no training step is logged there"):
        read_log(tmp_path)
    (tmp_path / "train.log").unlink()
    with pytest.raises(DataError, match="no training step is logged there"):
        read_log(tmp_path)
    with pytest.raises(DataError, match="there is no such log"):
        read_log(tmp_path / "none.log")
    with pytest.raises(DataError, match="under a name that is not known") as caught:
        _read(tmp_path, _line(1).replace("lm loss", "sop loss"))
    assert caught.value.got == "sop loss"


def test_compressed_and_cut_off(tmp_path: Path) -> None:
    text = "".join(_line(i, f"{2 + i * 37 % 11 / 7:.6E}") for i in range(1, 400)).encode()
    packed = gzip.compress(text)
    (tmp_path / "a.log.gz").write_bytes(packed)
    assert len(read_log(tmp_path / "a.log.gz").points) == 399
    (tmp_path / "a.log.gz").write_bytes(packed[: len(packed) // 2])
    curve = read_log(tmp_path / "a.log.gz")
    assert 0 < len(curve.points) < 399
    assert len(curve.damaged) == 1
    (tmp_path / "a.log.gz").write_bytes(text)
    with pytest.raises(DataError, match="a log cannot be read"):
        read_log(tmp_path / "a.log.gz")


def test_a_folder_of_rank_logs(tmp_path: Path) -> None:
    (tmp_path / "rank_0.log").write_text(" loading checkpoint from x at iteration 3\n")
    (tmp_path / "rank_9.log").write_text(_line(1) + _line(2))
    (tmp_path / "rank_10.log").write_text(_line(2).replace("2.5", "2.6") + _line(3))
    (tmp_path / "tee.out").write_text(_line(1) + _line(2))
    (tmp_path / "notes.md").write_text(_line(700))
    curve = read_log(tmp_path)
    assert [(p.attempt, p.iteration) for p in curve.points] == [(0, 1), (0, 2), (1, 2), (1, 3)]
    assert [p.loss for p in surviving(curve).points] == [2.5, 2.6, 2.5]


def test_starts_are_ordered_by_their_times(tmp_path: Path) -> None:
    (tmp_path / "a.log").write_text(f"[2026-01-02 00:00:00] {_line(2, '7.0')}")
    (tmp_path / "b.log").write_text(f"[2026-01-01 00:00:00] {_line(1)}")
    assert [point.loss for point in read_log(tmp_path).points] == [2.5, 7.0]


def test_the_same_line_from_two_ranks_is_one_point(tmp_path: Path) -> None:
    text = "".join(
        f"[default{rank}]:" + _line(i).replace(f"{i}.5 |", f"{i}.{rank} |")
        for i in (11, 12, 13)
        for rank in (6, 7)
    )
    curve = _read(tmp_path, text)
    assert len(curve.attempts) == 1
    assert [point.iteration for point in curve.points] == [11, 12, 13]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rank_0.log", True),
        ("slurm_12.out", True),
        ("stdout", True),
        ("x.log.2.gz", True),
        ("train.log.1", True),
        ("catalog", False),
        ("latest.pt", False),
        ("events.out.tfevents.1.vm.2.0", False),
    ],
)
def test_names_of_logs(name: str, expected: bool) -> None:
    assert is_log_name(name) is expected


# --- against a loop that prints as upstream's does -------------------------------------------


@dataclass
class _Loop:
    """Upstream's sums, as ``training_log`` keeps them, and what each printed loss is a mean of."""

    interval: int
    clears: bool
    fp16: bool
    text: list[str] = field(default_factory=list)
    truth: list[tuple[int, int, list[int], bool]] = field(default_factory=list)

    def start(
        self, attempt: int, first: int, last: int, losses: Sequence[float], tell: bool
    ) -> None:
        if tell and first > 1:
            self.text.append(f" loading distributed checkpoint from /x at iteration {first - 1}\n")
        total: float | None = None
        counted: list[int] = []
        advanced = skipped = nans = 0
        printed_nan = False
        for iteration in range(first, last + 1):
            loss = losses[iteration]
            if self.fp16 and not math.isfinite(loss):
                skipped += 1
                nans += 1
                printed_nan = True
            else:
                advanced += 1
                total = (total or 0.0) + loss
                counted.append(iteration)
                printed_nan |= not math.isfinite(loss)
            is_first = iteration == first
            if iteration % self.interval and not is_first:
                continue
            mean = None if total is None else total / max(1, advanced)
            field_ = f" lm loss: {mean:.6E} |" if mean is not None and mean >= 0 else ""
            self.text.append(
                f" iteration {iteration:8d}/    1000 | consumed samples: {iteration * 16:12d} | "
                f"elapsed time per iteration (ms): {attempt}.{iteration} | learning rate: 1.0E-04 |"
                f" global batch size:    16 |{field_} loss scale: 1.0 | grad norm: 0.3 | number of "
                f"skipped iterations: {skipped:3d} | number of nan iterations: {nans:3d} |\n"
            )
            self.truth.append((attempt, iteration, list(counted), printed_nan))
            if not is_first or (self.clears and iteration % self.interval == 0):
                total, counted, printed_nan = (None if total is None else 0.0), [], False
                advanced = skipped = nans = 0


@st.composite
def _loops(draw: st.DrawFn) -> _Loop:
    interval = draw(st.sampled_from([1, 2, 5, 10]))
    loop = _Loop(interval, clears=draw(st.booleans()), fp16=draw(st.booleans()))
    if loop.clears:
        loop.text.append("  on   log-interval: always\n")
    tell = draw(st.booleans())
    first = 1
    for attempt in range(draw(st.integers(1, 3))):
        last = first + draw(st.integers(4 * interval, 60))
        chance = st.sampled_from([2.0] * 15 + [math.nan, math.inf])
        losses = [draw(chance) for _ in range(last + 1)]
        loop.start(attempt, first, last, losses, tell)
        # without a word of the checkpoint, only numbers that repeat show a start
        lowest = 1 if tell else max(1, first)
        highest = last + 1 if tell else max(lowest, last - interval)
        first = interval * (draw(st.integers(lowest, highest)) // interval) + 1
        first = min(first, highest)
    return loop


@given(loop=_loops())
@settings(deadline=None)
def test_what_each_printed_loss_is_a_mean_of(
    loop: _Loop, tmp_path_factory: pytest.TempPathFactory
) -> None:
    curve = _read(tmp_path_factory.mktemp("loop"), "".join(loop.text))
    assert [(p.attempt, p.iteration) for p in curve.points] == [t[:2] for t in loop.truth]
    assert not curve.damaged
    for point, (_, iteration, counted, nan) in zip(curve.points, loop.truth, strict=True):
        assert point.nan == nan, iteration
        if counted and not nan:
            assert point.first_iteration <= counted[0]
            assert point.interval <= max(loop.interval, len(counted)) + 1
        if loop.clears and not nan and loop.interval > 1 and point.loss is not None:
            assert point.interval == len(counted)


@settings(deadline=None)
@given(position=st.integers(0, 10**6), byte=st.integers(0, 255), cut=st.booleans())
def test_mutated_logs_give_a_curve_or_our_error(
    position: int, byte: int, cut: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray("".join(_line(i) for i in range(1, 6)).encode())
    position %= len(data)
    if cut:
        del data[position:]
    else:
        data[position] = byte
    try:
        curve = _read(tmp_path_factory.mktemp("mutated"), bytes(data))
    except DataError:
        return
    assert all(not point.nan or point.loss is None for point in curve.points)


# --- the gap of passed-over iterations, and lost lines ---------------------------------------


def test_passed_over_iterations_widen_an_interval_and_lost_lines_do_not(tmp_path: Path) -> None:
    skipping = " skipped samples:           32 |"
    text = _line(10) + _line(20) + _line(30) + _line(50, more=skipping) + _line(80, more=skipping)
    assert [point.interval for point in _read(tmp_path, text).points] == [10, 10, 10, 20, 10]


def test_the_second_line_averages_the_first_again_unless_the_log_says_otherwise(
    tmp_path: Path,
) -> None:
    text = _line(1) + _line(2) + _line(3)
    assert [point.interval for point in _read(tmp_path, text).points] == [1, 2, 1]
    clears = "  on   log-interval: always\n" + text
    assert [point.interval for point in _read(tmp_path, clears).points] == [1, 1, 1]


def test_a_log_of_a_release_that_prints_no_first_step(tmp_path: Path) -> None:
    text = _line(10) + _line(20) + _line(30) + _line(20, "3.5") + _line(30) + _line(40)
    curve = _read(tmp_path, text)
    assert [point.interval for point in curve.points] == [10] * 6
    assert curve.attempts[1].first_iteration == 11
    told = text.replace(
        _line(20, "3.5"), " loading checkpoint from x at iteration 13\n" + _line(20)
    )
    curve = _read(tmp_path, told)
    assert [point.interval for point in curve.points] == [10, 10, 10, 7, 10, 10]
    assert curve.attempts[1].first_iteration == 14


def test_a_line_out_of_turn_is_a_start(tmp_path: Path) -> None:
    text = "".join(_line(i) for i in (1, 10, 20, 30, 31, 40, 50))
    curve = _read(tmp_path, text)
    assert [(a.first_iteration, a.last_iteration) for a in curve.attempts] == [(1, 30), (31, 50)]
    assert [point.interval for point in curve.points] == [1, 10, 10, 10, 1, 10, 10]


# --- curves ----------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=6))
def test_surviving_is_the_last_word_on_each_iteration(ranges: list[tuple[int, int]]) -> None:
    attempts = [Attempt(k, first, first + n - 1) for k, (first, n) in enumerate(ranges)]
    points = [
        Point(i, loss=float(a.ordinal + 1), attempt=a.ordinal)
        for a in attempts
        for i in range(a.first_iteration, a.last_iteration + 1)
    ]
    expected: dict[int, int] = {}
    for attempt in attempts:  # a state of the run: what it remembers of each iteration
        expected = {i: k for i, k in expected.items() if i < attempt.first_iteration}
        span = range(attempt.first_iteration, attempt.last_iteration + 1)
        expected |= dict.fromkeys(span, attempt.ordinal)
    kept = surviving(Curve(tuple(points), tuple(attempts))).points
    assert {point.iteration: point.attempt for point in kept} == expected
    assert [point.iteration for point in kept] == sorted(expected)


def test_average_is_what_a_coarser_log_prints() -> None:
    points = tuple(Point(i, loss=float(i), nan=i == 25, skipped=int(i == 12)) for i in range(1, 35))
    points = tuple(p if p.iteration != 25 else Point(25, loss=None, nan=True) for p in points)
    coarse = average(Curve(points, (Attempt(0, 1, 34),)), 10)
    assert [(p.iteration, p.loss, p.nan, p.skipped) for p in coarse.points] == [
        (10, 5.5, False, 0),
        (20, 15.5, False, 1),
        (30, None, True, 0),
    ]
    assert {p.interval for p in coarse.points} == {10}
