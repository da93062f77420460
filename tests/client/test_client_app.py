"""A round of each experiment on a tiny model: probe, selection, masked training, evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from layerfed.client.local_optimizers import LocalSGD
from layerfed.client.workbench import workbench
from layerfed.config import RunConfig, load_config
from layerfed.engine import run_on
from layerfed.runs import read_lines
from layerfed.task import load_task
from tests.made_up import final_tensors
from tests.task import hub
from tests.task.hub import WORDS, whole

ROOT = Path(__file__).parents[2]
FEW = [
    "federation.clients=3",
    "federation.clients-per-round=3",
    "federation.rounds=1",
    "run.device=cpu",
]


def cifar10(root: Path) -> list[str]:
    data, weights = hub.cifar10(root / "cifar10"), hub.clip(root / "clip")
    return [f"task.data={data}", f"model.weights={weights}", "task.alpha=5"]


def domainnet(root: Path) -> list[str]:
    names = [f"{d}/{c}" for d in ("clipart", "real", "sketch") for c in ("bird", "zebra")]
    data, weights = hub.image_files(root / "domainnet", names, 12), hub.timm_vit(root / "timm")
    chosen = ["task.groups=clipart,real,sketch", "task.classes=bird,zebra", "task.image-size=40"]
    return [
        f"task.data={data}",
        *chosen,
        "model.name=timm/vit_tiny_patch16_224",
        f"model.weights={weights}",
    ]


def xglue_nc(root: Path) -> list[str]:
    for split in ("validation", "test"):
        for language in ("de", "en", "es"):
            made = hub.news(WORDS, 30, 3)
            columns = {"news_title": ["w1"] * 30, "news_body": made["text"]}
            columns["news_category"] = [f"class {y}" for y in made["label"]]
            hub.parquet(root / f"nc/{split}.{language}-00000-of-00001.parquet", columns)
    weights = hub.xlm_roberta(root / "xlm-r")
    return [f"task.data={root / 'nc'}", "task.groups=de,en,es", f"model.weights={weights}"]


def qa(root: Path) -> list[str]:
    data, weights = hub.questions(root / "qa"), hub.llama(root / "llama")
    chosen = ["task.groups=sciq,piqa,arc-challenge", "train.precision=float32"]
    return [f"task.data={data}", f"model.weights={weights}", *chosen]


def custom(root: Path) -> list[str]:
    data = hub.image_files(root / "images", ["cat", "dog"], 40)
    return [f"task.data={data}", "task.image-size=32", "task.alpha=5"]


EXPERIMENTS: dict[str, Callable[[Path], list[str]]] = {
    "cifar10": cifar10,
    "domainnet": domainnet,
    "xglue_nc": xglue_nc,
    "qa": qa,
    "custom": custom,
}


@pytest.fixture(scope="module", params=EXPERIMENTS)
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path]:
    """One round from the experiment's own file, on tiny data and weights."""
    root = tmp_path_factory.mktemp(request.param)
    given = EXPERIMENTS[request.param](root)
    quick = [
        *FEW,
        "train.lr=0.05",
        "train.batch-size=8",
        f"run.dir={root / 'runs'}",
        "run.name=one",
    ]
    config = load_config(ROOT / f"conf/{request.param}.toml", [*quick, *given])
    return config, run_on("inprocess", config)


def test_a_round_moves_the_selected_layers_and_the_head_alone(
    finished: tuple[RunConfig, Path],
) -> None:
    config, folder = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
    [selection] = read_lines(folder / "selection.jsonl")
    masks = np.array(selection["masks"], dtype=bool)
    assert masks.sum(1).tolist() == [1] * 3
    norms = np.array(selection["statistics"]["grad_norm_sq"])
    assert np.isfinite(norms).all()
    assert (norms > 0).all()
    resident = workbench(config.to_flat()).resident
    before, after = resident.base_state(), final_tensors(folder)
    chosen = {b.name for b, on in zip(resident.layers.blocks, masks.any(0), strict=True) if on}
    for layer in resident.layers.layers:
        moved = any(not np.array_equal(before[t], after[t]) for t in layer.tensors)
        assert moved == (layer.name in {*chosen, "head"}), layer.name
        assert all(np.isfinite(after[t]).all() for t in layer.tensors)


def test_accuracy_is_that_of_the_saved_model_on_the_test_set(
    finished: tuple[RunConfig, Path],
) -> None:
    config, folder = finished
    task = load_task(config)
    model = task.build_model().eval()
    state = {n: torch.from_numpy(t) for n, t in load_file(folder / "final.safetensors").items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    batch = whole(task.test_examples())
    with torch.no_grad():
        hits = (task.logits(model, batch).argmax(1) == batch["label"]).float().mean()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["accuracy"] == pytest.approx(float(hits), abs=1e-6)


def test_a_run_needs_no_second_look_at_the_data(finished: tuple[RunConfig, Path]) -> None:
    """Clients of a process share the store that the server evaluates from, or its sibling."""
    bench = workbench(finished[0].to_flat())
    stores = {id(bench.examples(client)[0].store) for client in range(3)}
    assert len(stores) == 1


# ------------------------------------------------------------------------- steps and their rate
class Steps(LocalSGD):
    """Remembers the rate of every step."""

    seen_rates: list[float]

    def step(self) -> None:
        self.seen_rates.append(self.lr)
        super().step()


@pytest.fixture
def seen_rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    Steps.seen_rates = []
    monkeypatch.setattr("layerfed.client_app.LocalSGD", Steps)
    return Steps.seen_rates


def test_the_decayed_rate_reaches_the_local_step(seen_rates: list[float], tmp_path: Path) -> None:
    quick = [
        "federation.rounds=3",
        "train.local-steps=2",
        "strategy.name=top",
        f"run.dir={tmp_path}",
    ]
    config = hub.config(
        *quick, "federation.clients-per-round=2", "train.lr=0.08", "train.lr-decay=0.5"
    )
    run_on("inprocess", config)
    assert seen_rates == [0.08] * 4 + [0.04] * 4 + [0.02] * 4


def test_a_local_epoch_is_one_pass_over_a_clients_examples(
    seen_rates: list[float], tmp_path: Path
) -> None:
    quick = [
        "federation.rounds=1",
        "strategy.name=top",
        f"run.dir={tmp_path}",
        "train.batch-size=50",
    ]
    config = hub.config(*quick, "train.local-steps=0", "train.local-epochs=2")
    run_on("inprocess", config)
    task = load_task(config)
    assert len(seen_rates) == sum(2 * -(-len(task.partition(i)) // 50) for i in range(10))
