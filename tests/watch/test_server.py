"""The live pages: only with the token, only below the folder, only reading, and with every change."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from layerfed.report import plain, run_view
from layerfed.report.comparison_view import run_folders
from layerfed.watch.overview import mark, overview
from layerfed.watch.server import build_watch, changes
from tests.report.made_folder import make_folder

TOKEN = "secret"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_folder(tmp_path / "runs/one")
    make_folder(tmp_path / "runs/mine/two", seed=1)
    make_folder(tmp_path / "outside")
    (tmp_path / "runs/link").symlink_to(tmp_path / "outside")
    return tmp_path / "runs"


@pytest.fixture
def client(root: Path) -> TestClient:
    return TestClient(build_watch(root, TOKEN), base_url="http://127.0.0.1")


def test_the_list_has_every_run_with_its_scores(client: TestClient, root: Path) -> None:
    found = client.get(f"/{TOKEN}/data").json()
    assert [(run["name"], run["href"]) for run in found["runs"]] == [
        ("mine/two", "run/mine/two/"),
        ("one", "run/one/"),
    ]
    metrics = [json.loads(row) for row in (root / "one/metrics.jsonl").read_text().splitlines()]
    line = found["runs"][1]
    assert line["curve"] == [0.1, *(row["accuracy"] for row in metrics)]
    assert (line["round"], line["status"]) == (5, "completed")


@pytest.mark.parametrize("name", ["one", "mine/two"])
def test_a_run_has_the_page_that_report_writes(client: TestClient, root: Path, name: str) -> None:
    found = client.get(f"/{TOKEN}/run/{name}/data").json()
    view = json.loads(json.dumps(plain(run_view(root / name))))
    assert {key: found[key] for key in view} == view
    answer = client.get(f"/{TOKEN}/run/{name}/")
    assert answer.headers["cache-control"] == "no-store"
    assert "connect-src 'self'" in answer.text


def test_a_run_folder_by_itself_is_one_page(root: Path) -> None:
    client = TestClient(build_watch(root / "one", TOKEN), base_url="http://127.0.0.1")
    assert client.get(f"/{TOKEN}/data").json()["title"] == "one"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/data",
        "/wrong/",
        "/wrong/run/one/data",
        f"/{TOKEN}/run/link/",
        f"/{TOKEN}/run/..%2Foutside/",
        f"/{TOKEN}/run/%2E%2E/outside/data",
        f"/{TOKEN}/run/%2Fetc/",
        f"/{TOKEN}/run/one%00/",
        f"/{TOKEN}/run/mine/",
        f"/{TOKEN}/run/absent/events",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_other_hosts_and_methods_are_refused(client: TestClient) -> None:
    """A page of another site may know a name that leads here, but not the token or this host."""
    assert client.get(f"/{TOKEN}/", headers={"host": "evil.example"}).status_code == 400
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, f"/{TOKEN}/run/one/").status_code == 405


def test_a_damaged_run_is_one_line(client: TestClient, root: Path) -> None:
    (root / "one/config.json").write_text("{")
    answer = client.get(f"/{TOKEN}/run/one/")
    assert answer.status_code == 503
    assert "config.json is damaged" in answer.text
    assert [run["name"] for run in client.get(f"/{TOKEN}/data").json()["runs"]] == ["mine/two"]


def test_every_change_is_an_event(root: Path) -> None:
    folder = root / "one"

    async def listen() -> list[str]:
        stream = changes(lambda: mark([folder]), mark([folder]), every=0.01)
        heard = [await anext(stream)]
        summary = (folder / "summary.json").read_text()
        (folder / "summary.json").unlink()
        (folder / "summary.json").write_text(summary + "\n")
        heard.append(await asyncio.wait_for(anext(stream), 20))
        return heard

    assert asyncio.run(listen()) == ["retry: 2000\n\n", "data: changed\n\n"]


def test_a_change_before_the_question_is_an_event(root: Path) -> None:
    async def listen() -> str:
        stream = changes(lambda: mark([root / "one"]), "of an older page")
        await anext(stream)
        return await asyncio.wait_for(anext(stream), 20)

    assert asyncio.run(listen()) == "data: changed\n\n"


def test_serving_writes_nothing(client: TestClient, root: Path) -> None:
    def state() -> dict[str, bytes]:
        files = (file for file in root.rglob("*") if file.is_file())
        return {str(file): file.read_bytes() for file in files}

    before = state()
    for path in ("", "data", "run/one/", "run/one/data"):
        assert client.get(f"/{TOKEN}/{path}").status_code == 200
    assert state() == before


def test_a_folder_that_cannot_be_read_hides_no_other(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "private").mkdir()
    before, looks = len(overview(root)), Path.is_file

    def forbidden(path: Path) -> bool:
        if path.parent.name == "private":
            raise PermissionError(13, "Permission denied", str(path))
        return looks(path)

    monkeypatch.setattr(Path, "is_file", forbidden)
    assert len(overview(root)) == before
    assert root / "private" in run_folders(root)


def test_runs_come_and_go(client: TestClient, root: Path) -> None:
    shutil.rmtree(root / "mine")
    make_folder(root / "new")
    runs = client.get(f"/{TOKEN}/data").json()["runs"]
    assert [run["name"] for run in runs] == ["new", "one"]


def test_a_name_that_is_not_utf_8_does_not_hide_the_others(client: TestClient, root: Path) -> None:
    (root / "one").rename(root / os.fsdecode(b"caf\xe9"))
    found = client.get(f"/{TOKEN}/data").json()
    assert [run["name"] for run in found["runs"]] == ["caf\ufffd", "mine/two"]
    assert client.get(f"/{TOKEN}/").status_code == 200
