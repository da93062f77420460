"""Write the files that are generated from the typed configuration and the command.

    python -m scripts.generate      # or: make generate

Flower needs every key with its default in pyproject.toml, and readers need a table of all keys in
docs/configuration.md. Keys and defaults come from the sections of `layerfed.config` and from the
strategies' options. The words come from the comments of conf/default.toml. docs/cli.md has the help of
every command. A test fails if a file is out of date.
"""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from typer.cli import get_docs_for_click
from typer.main import get_command

from layerfed.cli import app
from layerfed.config import RunConfig, Section, flatten
from layerfed.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "examples/baselines/layer_selection"
# What a project states in place of a default: the baseline is the paper's rule, with one λ.
STATED: dict[Path, dict[str, Any]] = {
    ROOT / "pyproject.toml": {},
    BASELINE / "pyproject.toml": {"strategy.consistency": 0.1},
}
BEGIN, END = "# Made by `make generate`.\n", "# End of what is made.\n"


def sections() -> Iterator[tuple[str, str, type[Section]]]:
    """Yield every section: its name in keys, the strategy that reads it, and its class."""
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        assert isinstance(section, type)
        yield name, "", section
        if name == "strategy":
            for strategy in STRATEGIES.values():
                yield name, strategy.name, strategy.Options


def defaults() -> dict[str, Any]:
    """Return every key with its default."""
    return {
        f"{name}.{field.replace('_', '-')}": info.default
        for name, _, section in sections()
        for field, info in section.model_fields.items()
    }


def words() -> dict[str, str]:
    """Return the comment of each key in conf/default.toml."""
    said: dict[str, list[str]] = {}
    section = key = ""
    for line in (ROOT / "conf/default.toml").read_text(encoding="utf-8").splitlines():
        if header := re.match(r"\[(\w+)\]", line):
            section, key = header[1], ""
        elif setting := re.match(r"([\w-]+) = .*?(?:\s+# (.*))?$", line):
            key = f"{section}.{setting[1]}"
            said[key] = [setting[2] or ""]
        elif key and (more := re.match(r"\s+# (.*)", line)):
            said[key].append(more[1])
    return {key: " ".join(parts) for key, parts in said.items()}


def _toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value).replace("'", '"')


def _pyproject(text: str, stated: dict[str, Any]) -> str:
    lines: list[str] = []
    for key, value in (defaults() | stated).items():
        section, _, name = key.partition(".")
        if (header := f"[tool.flwr.app.config.{section}]") not in lines:
            lines += ["", header] if lines else [header]
        lines.append(f"{name} = {_toml(value)}")
    made = f"{BEGIN}{chr(10).join(lines)}\n{END}"
    return re.sub(f"{re.escape(BEGIN)}.*{re.escape(END)}", lambda _: made, text, flags=re.DOTALL)


def _table() -> str:
    said = words()
    lines = [
        "# Configuration",
        "",
        "Every key, its default and what it does. Made by `make generate`.",
    ]
    for name, reader, section in sections():
        title = f"`strategy.name = {reader}`" if reader else f"`{name}`"
        rows = []
        for field, info in section.model_fields.items():
            key = f"{name}.{field.replace('_', '-')}"
            text = said.get(key, "").replace("|", r"\|")
            rows.append(f"| `{key}` | `{_toml(info.default)}` | {text} |")
        if rows:
            lines += ["", f"## {title}", "", "| key | default | |", "|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _commands() -> str:
    """Return the help of `layerfed` and all its commands as a page."""
    command = get_command(app)
    context = command.make_context("layerfed", [], resilient_parsing=True)
    made = html.unescape(get_docs_for_click(obj=command, ctx=context, name="layerfed"))
    title = "# The command\n\nEvery command and its options. Made by `make generate`.\n\n"
    # The page has one title; the command is its first section.
    return title + re.sub(r"^#", "##", made, flags=re.MULTILINE).strip() + "\n"


def generated() -> dict[Path, str]:
    """Return the generated files with their right content."""
    projects = {f: _pyproject(f.read_text(encoding="utf-8"), own) for f, own in STATED.items()}
    return {
        **projects,
        ROOT / "docs/configuration.md": _table(),
        ROOT / "docs/cli.md": _commands(),
    }


def shipped() -> dict[str, Any]:
    """Return every key of conf/default.toml with its value."""
    return flatten(tomllib.loads((ROOT / "conf/default.toml").read_text(encoding="utf-8")))


if __name__ == "__main__":
    for file, text in generated().items():
        file.write_text(text, encoding="utf-8")
