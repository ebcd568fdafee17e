"""The report as data: what stands in the file, without a browser (for that: tests/functional)."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.inspect_report import HOSTILE, make_curve, make_report, make_spike
from hypothesis import given, settings
from hypothesis import strategies as st

from flagscale.data_inspect.answers import Label, SampleAnswer
from flagscale.data_inspect.curve import Attempt, Curve, Point
from flagscale.data_inspect.report import (
    AttemptMark,
    CurveArrays,
    DocumentText,
    Highlight,
    Limits,
    Mark,
    Report,
    SpikeStep,
    render,
    verdict,
    write_report,
)
from flagscale.data_inspect.report.curves import curve_figure, thin
from flagscale.data_inspect.report.excerpt import escape, excerpt
from flagscale.data_inspect.report.heat import Grid, step_figure
from flagscale.data_inspect.report.page import MARKER, embed
from flagscale.errors import ConfigError, DataError

ANY_TEXT = st.text(st.characters()) | st.text(st.characters(categories=["Cs", "Cc", "Cf"]))


class Page(HTMLParser):
    """The elements of a page: where each text stands, and every attribute."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = ""
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self._script: dict[str, str | None] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "script":
            self._script = dict(attrs)
            self.scripts.append((self._script, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is None:
            self.text += data
        else:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    @property
    def data(self) -> Any:
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == "data"]
        return json.loads(text)


def as_utf16(text: str) -> bytes:
    """As a browser sees it, to which two halves of a surrogate pair are one character."""
    return text.encode("utf-16-le", "surrogatepass")


def joined(text: dict[str, Any]) -> str:
    return "".join(piece for piece, _ in text["pieces"])


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(make_report()))


# --- texts ----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(ANY_TEXT)
def test_any_text_is_the_same_after_a_stay_in_a_page(text: str) -> None:
    for hostile in (text, text + "</script>", "<!--<script>" + text):
        page = Page(f'<script id="data" type="application/json">{embed([hostile])}</script>end')
        assert as_utf16(page.data[0]) == as_utf16(hostile)
        assert page.text == "end"


@settings(deadline=None)
@given(ANY_TEXT)
def test_any_text_is_only_text_in_the_fixed_parts(text: str) -> None:
    page = Page(f"<p>{escape(text)}</p>")
    assert page.tags == ["p"]
    page.text.encode("utf-8")
    assert not set(page.text) & set(map(chr, [0, 7, 27, 0x202E, 0xD800]))
    if text.isprintable():
        assert page.text == text


def test_hostile_texts_stand_in_the_page_whole(page: Page) -> None:
    samples = page.data["spikes"][1]["step"]["samples"]
    texts = [joined(d["text"]) for sample in samples for d in sample["documents"]]
    for hostile in HOSTILE:
        assert any(as_utf16(hostile) in as_utf16(text) for text in texts), hostile
    assert page.tags.count("script") == 3
    assert "img" not in page.tags
    assert "aquila-7b-books <final>" in page.text


@st.composite
def some_highlights(draw: st.DrawFn) -> tuple[Highlight, ...]:
    starts = draw(st.lists(st.integers(-5, 40), max_size=6))
    return tuple(
        Highlight(start, start + draw(st.integers(0, 30)), draw(st.sampled_from(Mark)))
        for start in starts
    )


@settings(deadline=None)
@given(st.text(max_size=60) | st.just("0123456789" * 4), some_highlights(), st.integers(1, 80))
def test_an_excerpt_is_a_part_of_the_text_with_its_marks(
    text: str, highlights: tuple[Highlight, ...], characters: int
) -> None:
    shown = excerpt(DocumentText(text, highlights, before=100, after=1000), characters)
    start = shown.before - 100
    flat = [(character, mark) for piece, mark in shown.pieces for character in piece]
    assert "".join(character for character, _ in flat) == text[start : start + len(flat)]
    assert start + len(flat) + shown.after - 1000 == len(text)
    assert len(flat) == min(characters, len(text))
    for place, (_, mark) in enumerate(flat, start=start):
        covering = {h.mark for h in highlights if h.start <= place < h.end}
        expected = Mark.WORST if Mark.WORST in covering else Mark.SAMPLE if covering else None
        assert mark == expected


def test_an_excerpt_shows_the_worst_part_rather_than_the_first() -> None:
    text = DocumentText("a" * 9000, (Highlight(10, 6100), Highlight(6000, 6010, Mark.WORST)))
    shown = excerpt(text, 400)
    assert ("a" * 10, Mark.WORST) in shown.pieces
    assert shown.before == 5900


# --- figures --------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=200), st.integers(2, 50))
def test_a_thinned_curve_keeps_its_extremes(values: list[float], points: int) -> None:
    y = np.array(values)
    x, thinned = thin(np.arange(len(y)), y, points)
    assert len(x) <= max(points, 2)
    assert np.array_equal(y[x], thinned, equal_nan=True)
    assert np.all(np.diff(x) > 0)
    finite = y[np.isfinite(y)]
    if len(finite):
        assert finite.min() in thinned
        assert finite.max() in thinned


def test_what_was_rolled_back_is_a_curve_of_its_own() -> None:
    report = make_report()
    traces = {t["name"]: t for t in curve_figure(report, Limits())["data"]}
    assert set(traces) == {
        *("loss", "loss, rolled back", "gradient norm", "gradient norm, rolled back", "spikes")
    }
    lost, gaps = flat(traces["loss, rolled back"]["x"]), flat(traces["loss, rolled back"]["y"])
    assert lost.tolist() == [*range(341, 401), 681, *range(681, 701)]
    assert np.flatnonzero(np.isnan(gaps)).tolist() == [60]
    assert flat(traces["loss"]["x"]).tolist() == [*range(1, 901)]
    assert traces["spikes"]["customdata"] == [0, 1, 2]
    assert traces["spikes"]["x"] == [250, 612, 820]
    assert traces["spikes"]["marker"]["symbol"] == ["circle", "circle", "x"]


def test_each_restart_is_a_line_and_what_it_lost_a_band() -> None:
    layout = curve_figure(make_report(), Limits())["layout"]
    kinds = [(s["type"], s["x0"], s["x1"]) for s in layout["shapes"]]
    assert kinds == [
        ("line", 340.5, 340.5),
        ("line", 680.5, 680.5),
        ("rect", 340.5, 400),
        ("rect", 680.5, 700),
    ]
    assert layout["xaxis"]["matches"] == "x2"


def sample(rank: int, micro_batch: int, position: int, loss: float | None = 2.0) -> SampleAnswer:
    return SampleAnswer(rank, micro_batch, position, 0, "p%{x}<a href='http://e.org'>", 5, (), loss)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 80), st.integers(1, 20) | st.just(80))
def test_every_sample_has_a_cell_of_its_own(dp: int, micro_batches: int, size: int) -> None:
    samples = [
        sample(rank, micro_batch, position)
        for rank in range(dp)
        for micro_batch in range(micro_batches)
        for position in range(size)
    ]
    grid = Grid.of(samples)
    assert len(set(grid.places)) == len(samples)
    assert {row for row, _ in grid.places} == set(range(len(grid.rows)))
    columns = grid.micro_batches * grid.micro_batch_size
    assert columns <= max(64, size)
    assert all(0 <= column < columns for _, column in grid.places)
    for (row, _), one in zip(grid.places, samples, strict=True):
        assert grid.rows[row].split(",")[0] == f"rank {one.rank}"


def test_a_heat_map_has_losses_and_grey_cells_where_there_is_none() -> None:
    samples = [sample(0, 0, 0, 1.5), sample(0, 0, 1, None), sample(1, 0, 0, math.nan)]
    figure = step_figure(samples, Grid.of(samples))
    grey, coloured = figure["data"]
    assert decoded(coloured["z"])[0][0] == 1.5
    assert np.nansum(decoded(coloured["z"])) == 1.5
    assert [list(row == 0) for row in decoded(grey["z"])] == [[False, True], [True, False]]
    assert decoded(coloured["customdata"]).tolist() == [[0, 1], [2, -1]]
    hover = coloured["text"][0][0]
    assert "<a" not in hover
    assert "%{" not in hover


def flat(values: Any) -> Any:
    """An array as plotly's JSON has it."""
    return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"])


def decoded(values: Any) -> Any:
    """And one of two dimensions."""
    return flat(values).reshape([int(part) for part in values["shape"].split(",")])


def test_numbers_that_are_none_reach_no_json() -> None:
    spike = dataclasses.replace(
        make_spike(5, math.nan), baseline=math.inf, score=math.inf, texts={}
    )
    curve = CurveArrays(
        np.array([5]), np.array([np.nan]), np.array([np.inf]), np.array([0]), np.array([False])
    )
    report = Report("r", "r", (), (AttemptMark("a", 5, 5),), curve, (spike,))
    data = Page(render(report)).data
    assert [data["spikes"][0][name] for name in ("peak", "baseline", "score")] == [None] * 3


# --- the model ------------------------------------------------------------------------------------


def test_a_curve_that_was_read_becomes_arrays() -> None:
    points = (
        *(Point(i, 3.0 - i / 10, grad_norm=1.0, attempt=0) for i in (1, 2, 3)),
        *(Point(i, None, nan=True, attempt=1) for i in (2, 3)),
    )
    arrays = CurveArrays.of(Curve(points, (Attempt(0, 1, 3), Attempt(1, 2, 3))))
    assert arrays.iteration.tolist() == [1, 2, 3, 2, 3]
    assert arrays.superseded.tolist() == [False, True, True, False, False]
    assert np.isnan(arrays.loss).tolist() == [False, False, False, True, True]
    assert arrays.attempt.tolist() == [0, 0, 0, 1, 1]


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="differ in length"):
        dataclasses.replace(make_curve()[0], loss=np.zeros(3))


EMPTY = CurveArrays(
    np.array([], np.int64),
    np.array([], np.float64),
    np.array([], np.float64),
    np.array([], np.int64),
    np.array([], np.bool_),
)


def test_a_run_of_which_nothing_is_known_has_a_page() -> None:
    page = Page(render(Report("r", "r", (), (), EMPTY)))
    assert page.data["curves"] is None
    assert "No step was read" in page.text


# --- the verdict ----------------------------------------------------------------------------------


def test_the_verdict_counts_the_spikes_and_says_how_far_to_trust() -> None:
    headline, sentence = verdict(make_report())
    assert headline == "3 spikes, the first at iteration 250"
    assert "The loss was 3.900 where 2.600 was expected." in sentence
    assert "UNKNOWN: The dataset /data/gone_text_document.idx is missing. " in sentence
    assert sentence.endswith("Samples of all 3: 2 EXACT, 1 UNKNOWN.")


def test_the_verdict_of_one_spike() -> None:
    report = dataclasses.replace(make_report(), spikes=(make_spike(612, 3.68),))
    assert verdict(report) == (
        "1 spike, at iteration 612",
        "The loss was 3.680 where 1.980 was expected. Its samples are known: EXACT.",
    )


def test_a_step_that_is_unknown_is_never_called_known() -> None:
    spike = make_spike(612, None)
    step = dataclasses.replace(spike.step, label=Label.UNKNOWN, reasons=("no cache",), samples=())
    report = dataclasses.replace(make_report(), spikes=(dataclasses.replace(spike, step=step),))
    assert verdict(report)[1] == (
        "The loss is missing or not a number where 1.980 was expected. "
        "Its samples are UNKNOWN: no cache."
    )


def test_the_verdict_without_a_spike() -> None:
    asked = dataclasses.replace(make_spike(612, 3.68), kind="asked for", found=False)
    for spikes in ((), (asked,)):
        report = dataclasses.replace(make_report(), spikes=spikes)
        assert verdict(report) == ("No spike", "Nothing stands out in iterations 1–900.")


# --- limits ---------------------------------------------------------------------------------------


def test_what_is_cut_is_said_and_the_worst_is_kept() -> None:
    report = make_report()
    limits = Limits(points=100, steps=1, documents=3, characters=50, ranked=2)
    data = Page(render(report, limits)).data
    assert [spike["step"] is not None for spike in data["spikes"]] == [False, False, True]
    assert data["spikes"][1]["reason"]
    step = data["spikes"][2]["step"]
    with_text = [
        (sample["loss"], document)
        for sample in step["samples"]
        for document in sample["documents"]
        if document["text"]
    ]
    assert len(with_text) == 3
    losses = sorted((s["loss"] for s in step["samples"] if s["loss"]), reverse=True)
    assert {loss for loss, _ in with_text} == set(losses[:2])
    assert all(len(joined(document["text"])) <= 50 for _, document in with_text)
    cut = [d for s in step["samples"] for d in s["documents"] if d["cut"]]
    assert len(cut) == 128 - 3
    assert len(data["ranking"]) == 2
    said = " ".join(data["cut"])
    for number in (
        "50 characters",
        "980 logged steps",
        "Of 3 spikes the 1",
        "3 documents",
        "2 of 5",
    ):
        assert number in said
    whole = Page(render(report)).data["cut"]
    assert len(whole) == 1


# --- the file -------------------------------------------------------------------------------------


def test_the_page_refers_to_nothing_outside(page: Page) -> None:
    names = {name for name, _ in page.attributes}
    assert not names & {"src", "href", "action", "srcset", "data", "style"}
    assert not {"link", "img", "iframe", "a", "form", "object"} & set(page.tags)
    policy = next(value for name, value in page.attributes if value and "default-src" in value)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]


def test_a_report_replaces_a_report_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    report = dataclasses.replace(make_report(), spikes=())
    size = write_report(report, path)
    assert path.stat().st_size == size
    assert path.read_text("utf-8").splitlines()[:2] == ["<!DOCTYPE html>", MARKER]
    assert write_report(dataclasses.replace(report, title="other"), path)
    assert "<title>other" in path.read_text("utf-8")
    for precious in ("mine", "", f"mine\nmine\n{MARKER}"):
        path.write_text(precious)
        with pytest.raises(ConfigError, match="not a report") as caught:
            write_report(report, path)
        assert str(path) in str(caught.value)
        assert path.read_text() == precious
    write_report(report, path, overwrite=True)
    assert MARKER in path.read_text("utf-8")
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    report = dataclasses.replace(make_report(), spikes=())
    with pytest.raises(ConfigError, match="not a report"):
        write_report(report, tmp_path)
    missing = tmp_path / "missing" / "report.html"
    with pytest.raises(DataError, match="cannot write") as caught:
        write_report(report, missing)
    assert str(missing) in str(caught.value)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    with pytest.raises(DataError, match="cannot write"):
        write_report(report, occupied, overwrite=True)
    assert list(tmp_path.iterdir()) == [occupied]


def test_without_plotly_the_cure_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly", None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ConfigError) as caught:
        write_report(make_report(), tmp_path / "report.html")
    assert caught.value.cure == "pip install 'flagscale[report]'"
    assert not list(tmp_path.iterdir())


def test_plotly_is_imported_only_to_draw() -> None:
    code = "import sys, flagscale.data_inspect.report; sys.exit('plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_spike_without_samples_says_why(page: Page) -> None:
    first = page.data["spikes"][0]
    assert first["step"] is None
    assert first["reason"] == "The dataset /data/gone_text_document.idx is missing."
    assert SpikeStep(3, 4, None, None, None).iteration == 3
