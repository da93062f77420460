"""What PyPI and Flower's hub get: links that work, a package without its data, the baseline."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.models.image import build_image_classifier
from layerfed.node_app import client_app
from layerfed.server_app import server_app
from layerfed.task import load_task
from scripts.dist import RELATIVE, absolute_links
from scripts.generate import BASELINE, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_relative_links_become_absolute_and_others_stay() -> None:
    text = "[a](docs/a.md#b) ![p](docs/p.png) [x](https://x.org/y) [h](#here)"
    assert absolute_links(text, "https://r", "1.0") == (
        "[a](https://r/blob/v1.0/docs/a.md#b) ![p](https://r/raw/v1.0/docs/p.png) "
        "[x](https://x.org/y) [h](#here)"
    )


def test_files_that_the_readme_links_to_exist() -> None:
    targets = {found[2].partition("#")[0] for found in RELATIVE.finditer(README)}
    assert len(targets) > 10
    assert [name for name in targets if not (ROOT / name).exists()] == []


def test_without_the_package_of_data_one_line_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "layerfed_assets", None)
    with pytest.raises(ConfigError, match=r"digits\.npz.*pip install layerfed"):
        load_task(RunConfig())
    model = RunConfig().model
    with pytest.raises(ConfigError, match=r"layerfed/vit.*pip install layerfed"):
        build_image_classifier(model, 2, 0)


def test_without_the_weights_digits_can_still_be_trained_from_random_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = importlib.import_module("layerfed_assets")
    # As Flower's hub leaves it: code and text, no weights.
    for name in ("vit.py", "digits.npz"):
        (tmp_path / name).write_bytes(Path(str(here.__file__)).with_name(name).read_bytes())
    monkeypatch.setattr(here, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ConfigError, match=r"vit_cifar100\.safetensors"):
        load_task(RunConfig()).build_model()
    load_task(load_config(None, ["model.weights=random"])).build_model()


def test_export_needs_no_shipped_package() -> None:
    code = "import sys; sys.modules['layerfed_assets'] = None; import layerfed.export"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_baseline_is_layerfed_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BASELINE))
    assert importlib.import_module("layer_selection.server_app").app is server_app
    assert importlib.import_module("layer_selection.client_app").app is client_app
    # The files that Flower's dev/test-baseline-structure.sh asks for.
    for name in ("dataset", "model", "strategy", "utils"):
        module = importlib.import_module(f"layer_selection.{name}")
        assert all(hasattr(module, each) for each in module.__all__)
    ours, app = (
        tomllib.loads((place / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
        for place in (ROOT, BASELINE)
    )
    # The baseline is the paper's rule, with one λ for all rounds.
    assert app["config"].pop("strategy") == ours["config"].pop("strategy") | {"consistency": 0.1}
    assert app["config"] == ours["config"]
    assert sum(f.stat().st_size for f in BASELINE.rglob("*.*") if f.is_file()) < 1e6


def test_the_baselines_readme_has_the_parts_that_flower_wants() -> None:
    _, front, text = (BASELINE / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(front)
    assert fields.keys() == {"title", "url", "labels", "dataset"}
    assert 4 <= len(fields["labels"]) <= 10
    heads = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert heads == [
        "About this baseline",
        "Experimental Setup",
        "Environment Setup",
        "Running the Experiments",
    ]
