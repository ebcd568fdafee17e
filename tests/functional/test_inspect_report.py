"""The report in a real browser: what an engineer sees and clicks."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness.browser import OpenPage, open_page, screenshot, start_browser
from harness.inspect_report import HOSTILE, make_report, make_spike

from flagscale.data_inspect.answers import SampleAnswer
from flagscale.data_inspect.report import Report, write_report

UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
FIRST, SECOND, THIRD = range(3)


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report()


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "a report.html"
    write_report(report, path)
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with start_browser() as browser:
        yield browser


@pytest.fixture
def opened(browser: Any, file: Path) -> Iterator[OpenPage]:
    """The page, freshly opened; no test may leave an error or a request behind."""
    with open_page(browser, file) as opened:
        yield opened
        assert opened.errors == []
        assert opened.requests == []


def shown(text: str) -> str:
    """A text as the page writes it out: what cannot be seen is named."""
    return UNSEEN.sub(lambda match: f"U+{ord(match[0]):04X}", text)


def heading(opened: OpenPage) -> str:
    return opened.page.inner_text("#step h2 >> nth=0")


def texts(opened: OpenPage) -> list[str]:
    return opened.page.locator("#step pre.text").evaluate_all("all => all.map(e => e.textContent)")


def marker_place(opened: OpenPage, ordinal: int) -> tuple[float, float]:
    """The middle of a spike's marker, in the window."""
    opened.page.evaluate("scrollTo(0, 0)")
    box = opened.page.locator(".curves path.point").nth(ordinal).bounding_box()
    return box["x"] + box["width"] / 2, box["y"] + box["height"] / 2


def click_cell(opened: OpenPage, row: int, column: int, **options: Any) -> None:
    opened.page.locator(".heat").scroll_into_view_if_needed()
    opened.page.wait_for_timeout(500)  # plotly takes no click before it has seen the mouse enter
    x, y = opened.page.evaluate(
        """([row, column]) => {
            const heat = document.querySelector(".heat"), box = heat.getBoundingClientRect();
            const { xaxis, yaxis } = heat._fullLayout;
            const left = box.x + xaxis._offset, top = box.y + yaxis._offset;
            return [left + xaxis.c2p(column), top + yaxis.c2p(row)];
        }""",
        [row, column],
    )
    opened.page.mouse.move(x - 2, y)
    opened.page.mouse.move(x, y)
    for key in options.get("keys", ()):
        opened.page.keyboard.down(key)
    opened.page.mouse.click(x, y)
    for key in options.get("keys", ()):
        opened.page.keyboard.up(key)


def chosen_samples(opened: OpenPage) -> set[int]:
    """Sample indices of the documents on show."""
    facts = opened.page.locator(".document .facts").all_inner_texts()
    return {int(re.search(r"sample (\d+) at token", text.replace(",", ""))[1]) for text in facts}


def sample_at(report: Report, rank: int, micro_batch: int, position: int) -> SampleAnswer:
    step = report.spikes[SECOND].step
    return next(
        s
        for s in step.samples
        if (s.rank, s.micro_batch, s.position) == (rank, micro_batch, position)
    )


# --- what is seen first ---------------------------------------------------------------------------


def test_it_opens_with_the_verdict_and_asks_nothing_of_any_network(opened: OpenPage) -> None:
    page = opened.page
    assert page.inner_text(".verdict h2") == "3 spikes, the first at iteration 250"
    assert page.title() == "aquila-7b-books <final> – loss report"
    assert "iterations 1–900 in 3 attempts, 980 logged steps (80 of them rolled back)" in (
        page.inner_text("header")
    )
    assert page.locator(".curves .scatterlayer .trace").count() == 5
    assert page.locator("button.spike").all_inner_texts() == [
        "Iteration 250loss 3.900",
        "Iteration 612–613loss 3.680",
        "Iteration 820–821NaN loss",
    ]
    assert "It is one file of 5.2 MB" in page.inner_text("main")
    names = page.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert [name for name in names if not name.startswith("data:")] == []
    assert page.locator("[src], [href]:not([href^='#'])").count() == 0


def test_nothing_offers_to_upload_the_curves(opened: OpenPage) -> None:
    opened.page.hover(".curves")
    titles = opened.page.locator(".curves .modebar-btn").evaluate_all(
        "all => all.map(e => e.dataset.title)"
    )
    assert len(titles) == 6
    assert not [t for t in titles if re.search("cloud|share|plotly|link|edit", t, re.IGNORECASE)]


def test_the_page_forbids_itself_to_fetch_or_to_run_anything_else(browser: Any, file: Path) -> None:
    with open_page(browser, file) as opened:
        reached = opened.page.evaluate(
            "fetch('data:text/plain,x').then(() => 'reached', () => 'refused')"
        )
        assert reached == "refused"
        opened.page.evaluate(
            """() => {
                const script = document.createElement("script");
                script.textContent = "window.hacked = true";
                document.body.append(script);
            }"""
        )
        assert opened.page.evaluate("window.hacked") is None
        assert len(opened.errors) >= 2
        assert all("Content Security Policy" in error for error in opened.errors)


# --- spikes ---------------------------------------------------------------------------------------


def test_a_click_on_a_marker_shows_the_step_and_its_documents(opened: OpenPage) -> None:
    assert heading(opened) == "Iteration 612"
    opened.page.mouse.click(*marker_place(opened, THIRD))
    opened.page.wait_for_selector("#step h2:text('Iteration 820')")
    pressed = opened.page.locator("button.spike").evaluate_all("all => all.map(e => e.ariaPressed)")
    assert pressed == ["false", "false", "true"]
    assert "NaN loss" in opened.page.inner_text("#step")
    assert any("the corpus and then" in text for text in texts(opened))
    assert "inspect_data.py replay outputs/aquila-7b --iteration 820" in (
        opened.page.inner_text("#step")
    )


def test_a_spike_without_samples_says_why(opened: OpenPage) -> None:
    opened.page.mouse.click(*marker_place(opened, FIRST))
    opened.page.wait_for_selector("#step h2:text('Iteration 250')")
    assert "gone_text_document.idx is missing" in opened.page.inner_text("#step")
    assert opened.page.inner_text("#step .label") == "UNKNOWN"
    assert texts(opened) == []


def test_the_keyboard_reaches_spikes_and_samples(opened: OpenPage, report: Report) -> None:
    page = opened.page
    for _ in range(12):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").startswith("Iteration 820"):
            break
    page.keyboard.press("Enter")
    assert heading(opened) == "Iteration 820"
    page.focus("button.spike >> nth=1")
    page.keyboard.press("Space")
    page.focus(".heat")
    page.keyboard.press("ArrowDown")  # chooses the worst
    step = report.spikes[SECOND].step
    worst = max((s for s in step.samples if s.loss), key=lambda s: s.loss)
    assert chosen_samples(opened) == {worst.sample_index}
    page.keyboard.press("ArrowUp")
    above = sample_at(report, worst.rank - 1, worst.micro_batch, worst.position)
    assert chosen_samples(opened) == {above.sample_index}
    page.keyboard.press("ArrowUp")  # there is no row above
    assert chosen_samples(opened) == {above.sample_index}
    page.keyboard.press("Escape")
    assert len(chosen_samples(opened)) > 1


def test_the_scale_changes_to_logarithms_and_back(opened: OpenPage) -> None:
    kinds = "document.querySelector('.curves')._fullLayout"
    for expected in ("log", "linear"):
        opened.page.click("#log-scale")
        assert opened.page.evaluate(f"[{kinds}.yaxis.type, {kinds}.yaxis2.type]") == [expected] * 2
    opened.page.click("#log-scale")
    opened.page.mouse.click(*marker_place(opened, THIRD))
    assert heading(opened) == "Iteration 820"
    assert opened.page.evaluate(f"{kinds}.yaxis.type") == "log"


def test_the_two_curves_zoom_together(opened: OpenPage) -> None:
    opened.page.evaluate(
        "Plotly.relayout(document.querySelector('.curves'), {'xaxis.range': [600, 650]})"
    )
    layout = "document.querySelector('.curves')._fullLayout"
    assert opened.page.evaluate(f"{layout}.xaxis2.range") == [600, 650]


# --- samples and documents ------------------------------------------------------------------------


def test_documents_come_worst_first_with_their_provenance(opened: OpenPage, report: Report) -> None:
    assert heading(opened) == "Iteration 612"
    first = opened.page.locator(".document").first.inner_text()
    step = report.spikes[SECOND].step
    worst = max((s for s in step.samples if s.loss), key=lambda s: s.loss)
    span = worst.documents[0]
    for fact in (
        f"sample loss {worst.loss:.3f}",
        f"document {span.document}",
        f"tokens {span.token_start}–{span.token_end}",
        f"source {span.source_file}:{span.source_line}",
        f"byte {span.byte_offset:,} of {worst.prefix}.bin",
        f"sample {worst.sample_index} at token 0",
        f"rank {worst.rank}, micro batch {worst.micro_batch}, position {worst.position}",
        "EXACT",
    ):
        assert fact in first
    losses = [
        float(text.split("loss ")[1])
        for text in opened.page.locator(".document .loss").all_inner_texts()
    ]
    assert losses == sorted(losses, reverse=True)
    before = opened.page.locator(".document").count()
    opened.page.click("#more")
    assert opened.page.locator(".document").count() == before + 24


def test_a_click_on_a_cell_shows_that_sample(opened: OpenPage, report: Report) -> None:
    click_cell(opened, 2, 4 * 3 + 1)
    wanted = sample_at(report, 2, 3, 1)
    assert chosen_samples(opened) == {wanted.sample_index}
    assert opened.page.locator(".document").count() == 2
    assert opened.page.locator(".heat .shapelayer path").count() == 1
    click_cell(opened, 0, 5, keys=["Shift"])  # one more: the sample without a loss
    silent = sample_at(report, 0, 1, 1)
    assert silent.loss is None
    assert chosen_samples(opened) == {wanted.sample_index, silent.sample_index}
    assert "no loss" in opened.page.inner_text("#documents")
    opened.page.click("#all-samples")
    assert opened.page.locator(".heat .shapelayer path").count() == 0
    opened.page.click("button.sample >> nth=0")
    assert len(chosen_samples(opened)) == 1


def test_hostile_texts_are_shown_as_they_are(opened: OpenPage, report: Report) -> None:
    page = opened.page
    wide = "\n".join(texts(opened))
    for hostile in HOSTILE:
        assert shown(hostile) in wide
    worst = page.locator("mark.worst").evaluate_all("all => all.map(e => e.textContent)")
    assert {shown(hostile) for hostile in HOSTILE} <= set(worst)
    page.locator("summary").evaluate_all("all => all.forEach(e => e.click())")
    assert shown(HOSTILE[0]) in page.inner_text("details >> nth=0")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    evil = page.locator(".unseen", has_text="U+202E").first
    follower = evil.evaluate("e => e.nextSibling.textContent")
    assert follower.startswith("evil")


def test_a_command_is_copied_exactly(opened: OpenPage, report: Report) -> None:
    page = opened.page
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    commands = report.spikes[SECOND].commands + report.commands
    assert page.locator(".copy").count() == len(commands) == 4
    for number, command in enumerate(commands):
        page.click(f".copy >> nth={number}")
        page.wait_for_function(
            "n => document.querySelectorAll('.copy')[n].textContent === 'Copied'", arg=number
        )
        assert page.evaluate("navigator.clipboard.readText()") == command.text
        written = page.locator(".command pre").nth(number).evaluate("e => e.textContent")
        assert written == shown(command.text)


def test_a_large_step_of_one_rank_wraps_and_can_be_clicked(
    browser: Any, tmp_path: Path, report: Report
) -> None:
    spike = make_spike(612, 3.68, ranks=1)
    proto, noise = spike.step.samples[0], np.random.default_rng(0)
    samples = tuple(
        dataclasses.replace(
            proto, micro_batch=i // 4, position=i % 4, sample_index=i, loss=float(noise.random())
        )
        for i in range(1024)
    )
    step = dataclasses.replace(spike.step, samples=samples)
    path = tmp_path / "large.html"
    size = write_report(
        dataclasses.replace(report, spikes=(dataclasses.replace(spike, step=step),)), path
    )
    assert size < 8e6
    with open_page(browser, path) as opened:
        click_cell(opened, 7, 33)
        assert chosen_samples(opened) == {7 * 64 + 33}
        assert opened.errors == []


# --- other readers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_only_down(browser: Any, file: Path, dark: bool) -> None:
    with open_page(browser, file, width=400, height=800, dark=dark, touch=True) as opened:
        page = opened.page
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", background)[:3])) / 3
        assert brightness < 40 if dark else brightness > 220
        axis = page.evaluate("document.querySelector('.curves')._fullLayout.font.color")
        assert axis == ("#e8eaee" if dark else "#16181d")
        page.tap("button.spike >> nth=2")
        assert heading(opened) == "Iteration 820"
        page.emulate_media(color_scheme="light" if dark else "dark")
        page.wait_for_function(
            "c => document.querySelector('.heat')._fullLayout.font.color !== c", arg=axis
        )
        assert opened.errors == []
        assert opened.requests == []


def test_a_picture_is_taken_after_the_clicks(file: Path, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "report.png"
    with ThreadPoolExecutor(1) as thread:  # of its own, for a thread can have one browser only
        thread.submit(screenshot, file, picture, 640, 480, ["button.spike >> nth=2"]).result()
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert [int.from_bytes(content[at : at + 4], "big") for at in (16, 20)] == [640, 480]
