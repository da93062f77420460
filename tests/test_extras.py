"""Optional libraries: errors name the extra with the library, and a node does not need any."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from layerfed.config.errors import EXTRAS, MissingExtra, naming_extras

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
# What a node imports to answer messages, and to join.
NODE = ("layerfed.client_app", "layerfed.deploy.cli", "layerfed.deploy.credentials")


def test_a_missing_library_ends_in_one_line_with_the_command() -> None:
    with (
        pytest.raises(
            MissingExtra, match=r"^x needs pulp, which.*: pip install \"\.\[solvers\]\" in"
        ),
        naming_extras("x"),
    ):
        raise ModuleNotFoundError("No module named 'pulp.apis'", name="pulp.apis")


def test_a_distribution_without_metadata_counts_as_missing() -> None:
    with pytest.raises(MissingExtra, match=r"\[data\]"), naming_extras():
        raise ModuleNotFoundError(name="flwr-datasets")


def test_other_modules_are_not_ours_to_explain() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), naming_extras():
        import_module("no_such_module")


def test_every_extra_is_declared() -> None:
    assert set(EXTRAS.values()) <= PROJECT["optional-dependencies"].keys()


def test_a_node_imports_no_optional_library() -> None:
    # Of these, Flower itself needs some.
    ours = sorted(set(EXTRAS) - {"httpx", "starlette", "uvicorn"})
    script = (
        f"import sys, importlib\nfor name in {NODE!r}: importlib.import_module(name)\n"
        f"print(*(set({ours!r}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == []
