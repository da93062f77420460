"""The system's Chromium, driven by playwright; nothing is downloaded."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; a machine without one fails the test, which says how to install it."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.fail("there is no Chromium: apt-get install chromium fonts-dejavu-core")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=sandbox)
        yield browser
        browser.close()


def watched(browser: Browser, own: str = "file:", **options: object) -> tuple[Page, list[str]]:
    """Return a new page, and a list of its errors and of its requests to other places than its own."""
    page = browser.new_page(accept_downloads=True, **options)  # type: ignore[arg-type]
    bad: list[str] = []

    def note(what: str, unless: bool) -> None:
        if not unless:
            bad.append(what)

    page.on("console", lambda line: note(line.text, line.type not in ("error", "warning")))
    page.on("pageerror", lambda error: note(str(error), False))
    page.on("request", lambda asked: note(asked.url, asked.url.startswith((own, "blob:", "data:"))))
    return page, bad


def ready(page: Page) -> None:
    """Wait until the page has drawn its figures."""
    page.wait_for_selector("html[data-ready]", timeout=60_000)
