"""Opens a file in a real browser, Debian's Chromium without a window, with no network to reach."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["OpenPage", "open_page", "screenshot", "start_browser"]

_NAMES = ("chromium", "chromium-browser", "google-chrome")


@dataclass
class OpenPage:
    """A page on show.

    Args:
        page: Playwright's.
        requests: Every address that the page asked for, its own file left out.
        errors: What the console and uncaught exceptions said.
    """

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def _chromium() -> str:
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        raise RuntimeError(
            f"no browser: none of {', '.join(_NAMES)} is on the PATH; "
            "as root: scripts/bootstrap.sh test, else: apt-get install chromium"
        )
    return found


@contextlib.contextmanager
def start_browser() -> Iterator[Any]:
    """Playwright's browser; there can be one at a time."""
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium refuses root one
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=_chromium(), args=sandbox)
        yield browser
        browser.close()


@contextlib.contextmanager
def open_page(
    browser: Any,
    path: Path,
    *,
    width: int = 1280,
    height: int = 1600,
    dark: bool = False,
    touch: bool = False,
) -> Iterator[OpenPage]:
    """Open an HTML file in a fresh session and wait until its script is done.

    Args:
        browser: A started one.
        path: The file.
        width: Of the window, in CSS pixels.
        height: Likewise.
        dark: Whether the reader prefers dark pages.
        touch: Whether there is a finger instead of a mouse.
    """
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme="dark" if dark else "light",
        has_touch=touch,
        is_mobile=touch,
        offline=True,
    )
    with contextlib.closing(context):
        opened = OpenPage(context.new_page())
        address = path.absolute().as_uri()
        _listen(opened, address)
        opened.page.goto(address)
        opened.page.wait_for_selector("body[data-ready]", timeout=30_000)
        yield opened


def _listen(opened: OpenPage, address: str) -> None:
    def hear_request(request: Any) -> None:
        if request.url != address:
            opened.requests.append(request.url)

    def hear_console(message: Any) -> None:
        if message.type in ("error", "warning"):
            opened.errors.append(message.text)

    opened.page.on("request", hear_request)
    opened.page.on("console", hear_console)
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))


def screenshot(
    html_path: Path,
    png_path: Path,
    width: int = 1280,
    height: int = 1600,
    clicks: Sequence[str] = (),
    *,
    dark: bool = False,
    full_page: bool = False,
) -> None:
    """Take a picture of a page.

    Args:
        html_path: The page.
        png_path: Where the picture goes.
        width: Of the window, in CSS pixels.
        height: Likewise; of the picture, too, unless ``full_page``.
        clicks: CSS selectors of what to click before, in order.
        dark: Whether the reader prefers dark pages.
        full_page: Show the page to its end.
    """
    with (
        start_browser() as browser,
        open_page(browser, html_path, width=width, height=height, dark=dark) as opened,
    ):
        for selector in clicks:
            opened.page.click(selector)
        opened.page.evaluate("scrollTo(0, 0)")
        opened.page.wait_for_timeout(400)  # until plotly's and the scroll's animations are over
        png_path.parent.mkdir(parents=True, exist_ok=True)
        opened.page.screenshot(path=png_path, full_page=full_page)
