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


def watched(browser: Browser, **options: object) -> tuple[Page, list[str]]:
    """Return a new page, and a list that fills with what it must not do: errors and requests."""
    page = browser.new_page(accept_downloads=True, **options)  # type: ignore[arg-type]
    bad: list[str] = []
    page.on(
        "console", lambda note: bad.append(note.text) if note.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: bad.append(str(error)))
    page.on(
        "request",
        lambda asked: (
            None if asked.url.startswith(("file:", "blob:", "data:")) else bad.append(asked.url)
        ),
    )
    return page, bad


def ready(page: Page) -> None:
    """Wait until the page has drawn its figures."""
    page.wait_for_selector("html[data-ready]", timeout=60_000)
