"""The documents: the site builds and loads nothing from elsewhere, and commands are valid."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from layerfed.cli import app
from layerfed.config import load_config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")


def _commands() -> list[list[str]]:
    """Return the words of each `layerfed …` in the documents' blocks of bash."""
    blocks = [block for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]
    lines = (line for block in blocks for line in block.replace("\\\n", " ").splitlines())
    words = (shlex.split(line.partition("|")[0], comments=True) for line in lines if line)
    return [found for found in words if found[:1] == ["layerfed"]]


COMMANDS = _commands()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_a_command_exists_with_its_options(words: list[str]) -> None:
    command = get_command(app)
    for word in words[1:]:
        if inner := getattr(command, "commands", {}).get(word):
            command = inner
    assert not getattr(command, "commands", None), f"{words} names no command"
    known = {option for parameter in command.params for option in parameter.opts}
    asked = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert asked <= known | {"--help"}


@pytest.mark.parametrize("words", [words for words in COMMANDS if words[1] == "run"], ids=" ".join)
def test_the_settings_of_a_run_are_valid(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    conf = next((Path(word) for word in words if "=" not in word and word.endswith(".toml")), None)
    load_config(conf, [word for word in words if "=" in word])


def test_files_that_the_readme_links_exist() -> None:
    linked = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert [file for file in linked if "://" not in file and not (ROOT / file).exists()] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet"]
    done = subprocess.run(
        [*build, "-d", tmp_path / "trees", "docs", tmp_path / "site"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {
        page.name: page.read_text(encoding="utf-8") for page in (tmp_path / "site").glob("*.html")
    }
    assert {"index.html", "cli.html", "api.html", "security.html"} <= pages.keys()
    elsewhere = re.compile(
        r'<(?:script|img|iframe)[^>]* src="(?:https?:)?//'
        r'|<link[^>]*stylesheet[^>]* href="(?:https?:)?//'
    )
    assert [name for name, text in pages.items() if elsewhere.search(text)] == []
