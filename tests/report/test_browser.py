"""Pages in a real headless Chromium: no error, no request, every control, and the files' numbers."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

from layerfed.report import comparison_view, run_folders, run_view, sections_of, write_page
from tests.report.chromium import chromium, ready, watched
from tests.report.made_folder import EVIL, failed_at_once, make_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of runs, with run.html and comparison.html beside them."""
    root = tmp_path_factory.mktemp("pages")
    write_page(run_view(make_folder(root / "run")), root / "run.html")
    write_page(run_view(failed_at_once(root / "failed")), root / "failed.html")
    for strategy in ("ilp", "top", "random"):
        for seed in (0, 1):
            make_folder(
                root / "several" / f"{strategy}-seed{seed}",
                seed=seed,
                better=0.01 * seed * len(strategy),
                settings=[f"strategy.name={strategy}"],
            )
    sections, _ = sections_of(run_folders(root / "several"))
    view = comparison_view(f"several {EVIL}", sections, reference="random")
    write_page(view, root / "comparison.html")
    return root


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture
def run_page(browser: Browser, files: Path) -> Iterator[Page]:
    yield from _opened(browser, files / "run.html")


@pytest.fixture
def comparison_page(browser: Browser, files: Path) -> Iterator[Page]:
    yield from _opened(browser, files / "comparison.html")


def _opened(browser: Browser, file: Path) -> Iterator[Page]:
    page, bad = watched(browser)
    page.goto(file.as_uri())
    ready(page)
    yield page
    page.close()
    assert bad == []


def lines(files: Path, name: str) -> list[dict[str, object]]:
    return [json.loads(row) for row in (files / f"run/{name}.jsonl").read_text().splitlines()]


def saved(page: Page, button: str) -> Path:
    with page.expect_download() as download:
        page.locator(f"#{button}").click()
    return download.value.path()


@pytest.mark.parametrize("name", ["run", "comparison", "failed"])
@pytest.mark.parametrize(("theme", "width"), [("light", 1280), ("dark", 1280), ("light", 360)])
def test_a_page_opens_without_errors_and_fits(
    browser: Browser, files: Path, name: str, theme: str, width: int
) -> None:
    page, bad = watched(browser, color_scheme=theme, viewport={"width": width, "height": 800})
    page.goto((files / f"{name}.html").as_uri())
    ready(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("document.documentElement.dataset.theme") == theme
    # Names with markup in them stay text.
    assert "owned" not in page.title() or EVIL in page.title()
    assert page.locator("img").count() == 0
    assert page.evaluate("document.body.innerText.includes('onerror')")
    found = Axe().run(page).response["violations"]
    assert [v["id"] for v in found if v["impact"] in ("serious", "critical")] == []
    page.close()
    assert bad == []


def test_numbers_on_the_page_are_those_of_the_files(run_page: Page, files: Path) -> None:
    summary = json.loads((files / "run/summary.json").read_text())
    tiles = dict(
        zip(
            run_page.locator(".numbers dt").all_inner_texts(),
            [text.split("\n")[0] for text in run_page.locator(".numbers dd").all_inner_texts()],
            strict=True,
        )
    )
    assert tiles == {
        "test accuracy": f"{summary['accuracy']:.2%}".replace("%", " %"),
        "uplink": f"{summary['bytes_up'] / 1e3:g} kB",
        "compute": "150 GFLOPs",
        "time": f"{summary['seconds']:g} s",
        "updates": "29",
    }
    with saved(run_page, "score-csv").open() as file:
        rows = list(csv.DictReader(file))
    metrics = lines(files, "metrics")
    assert [float(row["accuracy"]) for row in rows[1:]] == [row["accuracy"] for row in metrics]
    with saved(run_page, "confusion-csv").open() as file:
        matrix = [[int(cell) for cell in row[1:]] for row in list(csv.reader(file))[1:]]
    assert matrix == json.loads((files / "run/evaluation.json").read_text())["confusion"]
    with saved(run_page, "round-map-csv").open() as file:
        trained = [[int(cell) for cell in row[3::2]] for row in list(csv.reader(file))[1:]]
    assert trained == lines(files, "selection")[-1]["masks"]
    clients = run_page.locator("#client-table tbody tr").all_inner_texts()
    assert len(clients) == 6
    assert clients[1].split("\t")[:2] == ["1", "9"]
    assert EVIL in run_page.locator("#failure-table tbody").inner_text()


def test_figures_are_saved_as_png_svg_and_csv(run_page: Page) -> None:
    figures = run_page.locator("figure").evaluate_all("all => all.map(one => one.id)")
    assert len(figures) == 16
    for name in figures:
        for ending in ("png", "svg", "csv"):
            assert run_page.locator(f"#{name}-{ending}").is_visible()
    # One of each kind of chart: Chromium asks before it saves more than ten files.
    for name in ("score", "round-map", "groups", "phases"):
        assert len(saved(run_page, f"{name}-csv").read_text().splitlines()) > 1
        root = ElementTree.parse(saved(run_page, f"{name}-svg")).getroot()
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert saved(run_page, "score-png").read_bytes().startswith(b"\x89PNG")


def test_controls_work_with_the_mouse(run_page: Page) -> None:
    run_page.get_by_text("bytes sent", exact=True).click()
    assert run_page.locator("#score h3").inner_text() == "Test accuracy by bytes sent"
    box = run_page.locator("#map-plot").bounding_box()
    assert box is not None
    # The first of five columns; the labels are left of it.
    run_page.locator("#map-plot").click(position={"x": box["width"] * 0.15, "y": box["height"] / 2})
    assert run_page.locator("#round-facts h3").inner_text() == "Round 1: what was solved"
    assert "round 1" in run_page.locator("#map-read").inner_text()
    head = run_page.locator("#client-table-sort-0")
    head.click()
    first = run_page.locator("#client-table tbody tr").first
    assert first.inner_text().startswith("5")
    assert run_page.locator("#settings tbody tr").count() == 4
    run_page.locator("#differs").click()
    assert run_page.locator("#settings tbody tr").count() > 50
    run_page.locator("#theme").select_option("dark")
    assert run_page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_controls_work_with_the_keyboard(run_page: Page) -> None:
    press = run_page.keyboard.press
    run_page.locator("#round-slider").focus()
    press("ArrowLeft")
    assert run_page.locator("#round-facts h3").inner_text() == "Round 4: what was solved"
    run_page.locator("#map-plot").focus()
    press("Home")
    press("ArrowRight")
    assert "round 2" in run_page.locator("#map-read").inner_text()
    press("Enter")
    assert run_page.locator("#round-facts h3").inner_text() == "Round 2: what was solved"
    run_page.locator("#score-plot").focus()
    press("Home")
    assert run_page.locator("#score-read").inner_text().startswith("round 0: accuracy 10.00 %")
    run_page.locator("#x-rounds").focus()
    press("ArrowRight")
    assert run_page.locator("#score h3").inner_text() == "Test accuracy by bytes sent"
    run_page.locator("#score-data-summary").focus()
    press("Enter")
    run_page.locator("#score-data table").wait_for()
    run_page.locator("#client-table-sort-0").focus()
    press("Enter")
    head = run_page.locator("#client-table th").first
    assert head.get_attribute("aria-sort") == "descending"


def test_rounding_noise_does_not_stretch_an_axis(run_page: Page) -> None:
    """E2 is 1e-16 beside an E1 of 3."""
    labels = run_page.locator("#e2-plot svg text").all_text_contents()
    assert not any("×10" in label for label in labels)
    assert "1.0" in labels


def test_the_line_of_perfect_calibration_is_drawn(run_page: Page) -> None:
    assert run_page.locator("#calibration-plot path[stroke-dasharray='4 4']").count() == 1


def test_a_page_prints_in_light_colours_without_controls(run_page: Page, tmp_path: Path) -> None:
    assert run_page.pdf(path=tmp_path / "page.pdf").startswith(b"%PDF")
    run_page.emulate_media(media="print")
    assert not run_page.locator("nav").is_visible()
    assert not run_page.locator("#score-png").is_visible()
    assert not run_page.locator("#round-slider").is_visible()
    assert run_page.locator("#client-table-sort-0").is_visible()
    assert run_page.locator("#score-plot svg").is_visible()


def test_a_comparison_sorts_and_pairs_with_the_chosen_entry(comparison_page: Page) -> None:
    page = comparison_page
    page.locator("#results-table-sort-0").click()
    names = page.locator("#results-table tbody th").all_inner_texts()
    assert names == ["ilp", "random", "top"]
    assert page.locator("#paired h3").inner_text() == "Differences to random, paired by seed"
    page.locator("#reference").select_option(label="top")
    assert page.locator("#paired h3").inner_text() == "Differences to top, paired by seed"
    with saved(page, "paired-csv").open() as file:
        rows = {(row["entry"], row["pair"]): row for row in csv.DictReader(file)}
    assert float(rows["random", "seed 1"]["difference to top"]) == pytest.approx(0.03)
    assert page.locator("#tests tbody th").all_inner_texts() == ["ilp", "random"]
    cells = page.locator("#tests tbody tr").nth(1).locator("td").all_inner_texts()
    assert cells[:3] == ["2", "+1.50", "−17.56 to +20.56"]
    page.get_by_text("bytes sent", exact=True).click()
    assert page.locator("#curve h3").inner_text() == "Test accuracy by bytes sent"
    assert "up and down, kB" in page.locator("#curve-plot").inner_text()
    for cost in ("bytes_up", "flops", "seconds"):
        assert page.locator(f"#pareto-{cost}-plot svg").is_visible()
