"""The live page in a real headless Chromium follows a run that goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report.chromium import chromium, ready, watched
from tests.report.made_folder import make_folder

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def write_rounds(whole: Path, folder: Path, rounds: int) -> None:
    """Write the first rounds of a run, in the order in which a run writes its files."""
    for name in ("metrics", "clients", "selection"):
        rows = (whole / f"{name}.jsonl").read_text().splitlines()
        kept = [row for row in rows if json.loads(row)["round"] <= rounds]
        (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in kept))
    summary = json.loads((whole / "summary.json").read_text())
    summary |= {"rounds": rounds, "status": "running" if rounds < 5 else "completed"}
    (folder / ".summary.json.tmp").write_text(json.dumps(summary))
    (folder / ".summary.json.tmp").rename(folder / "summary.json")


def test_a_page_follows_its_run(tmp_path: Path) -> None:
    whole, folder = make_folder(tmp_path / "whole"), make_folder(tmp_path / "runs/live")
    write_rounds(whole, folder, 2)
    server = subprocess.Popen(
        [sys.executable, "-m", "layerfed.cli", "watch", str(tmp_path / "runs")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert server.stdout is not None
        address = server.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        with chromium() as browser:
            page, bad = watched(browser, own=address)
            page.goto(address)
            ready(page)
            line = page.locator("#run-list tbody tr")
            assert "2 of 5" in line.inner_text()
            assert line.locator("svg.spark path").count() == 1
            line.locator("a").click()
            ready(page)
            assert page.locator("h1 .badge").inner_text() == "running"
            assert page.locator("#round-facts h3").inner_text() == "Round 2: what was solved"
            page.locator("#round-slider").focus()

            write_rounds(whole, folder, 3)
            page.wait_for_selector("html[data-updates='1']", timeout=60_000)
            assert page.locator("#round-facts h3").inner_text() == "Round 3: what was solved"
            assert page.evaluate("document.activeElement.id") == "round-slider"
            # One who looks at an earlier round stays there.
            page.keyboard.press("Home")
            write_rounds(whole, folder, 5)
            page.wait_for_selector("html[data-updates='2']", timeout=60_000)
            assert page.locator("h1 .badge").inner_text() == "completed"
            assert page.locator("#round-facts h3").inner_text() == "Round 1: what was solved"
            assert bad == []
            page.close()
    finally:
        server.terminate()
        server.wait(30)
