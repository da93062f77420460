"""Random changes of training images: what they are, whom they reach, and that they repeat."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from layerfed.config import ConfigError
from layerfed.engine import run_on
from layerfed.runs import read_lines
from tests.task import hub
from tests.tiny_task import configured

QUICK = [
    *("task.name=cifar10", "task.alpha=5", "model.weights=random", "federation.rounds=1"),
    *("federation.clients=2", "train.local-steps=2", "train.batch-size=4", "run.device=cpu"),
]


@pytest.fixture(scope="module")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hub.cifar10(tmp_path_factory.mktemp("cifar10"), train=60)


def test_light_shifts_and_mirrors_each_image_by_itself(cifar: Path) -> None:
    task = hub.task(*QUICK, f"task.data={cifar}", "train.augment=light")
    image = hub.whole(task.test_examples())["image"][0]
    batch = {"image": image.repeat(64, 1, 1, 1), "label": torch.zeros(64, dtype=torch.int64)}
    torch.manual_seed(0)
    changed = task.augment(batch)
    assert changed["label"] is batch["label"]
    padded = np.pad(image.numpy(), ((0, 0), (4, 4), (4, 4)), mode="reflect")
    possible = {
        padded[:, y : y + 32, x : x + 32][:, :, ::step].tobytes()
        for y in range(9)
        for x in range(9)
        for step in (1, -1)
    }
    found = {one.numpy().tobytes() for one in changed["image"]}
    assert found <= possible
    assert len(found) > 20


def test_randaugment_goes_further(cifar: Path) -> None:
    task = hub.task(*QUICK, f"task.data={cifar}", "train.augment=randaugment")
    batch = hub.whole(task.test_examples())
    torch.manual_seed(0)
    changed = task.augment(batch)["image"]
    assert (changed.shape, changed.dtype) == (batch["image"].shape, torch.uint8)
    assert sum(
        torch.equal(a.sort()[0], b.sort()[0])
        for a, b in zip(changed.flatten(1), batch["image"].flatten(1), strict=True)
    ) < len(changed)


def test_training_alone_is_changed_and_a_run_repeats(cifar: Path, tmp_path: Path) -> None:
    def run(name: str, *more: str) -> tuple[list[dict[str, object]], dict[str, np.ndarray]]:
        folder = run_on(
            "inprocess",
            hub.config(
                *QUICK, f"task.data={cifar}", f"run.dir={tmp_path}", f"run.name={name}", *more
            ),
        )
        return read_lines(folder / "selection.jsonl"), load_file(folder / "final.safetensors")

    (plain, without), (first, one), (again, two) = (
        run("plain"),
        run("first", "train.augment=randaugment"),
        run("again", "train.augment=randaugment"),
    )
    # The probe of round 1 sees the images as they are.
    assert plain[0]["statistics"] == first[0]["statistics"] == again[0]["statistics"]
    assert any(not np.array_equal(without[name], one[name]) for name in one)
    for name in one:
        np.testing.assert_array_equal(one[name], two[name])


@pytest.mark.parametrize(
    ("task", "says"),
    [
        ("digits", "a mirrored digit"),
        ("tests.tiny_task:TinyTask", "its examples are no images"),
    ],
)
def test_other_tasks_refuse_it(task: str, says: str) -> None:
    with pytest.raises(ConfigError, match=f"train.augment = 'light' has no use .*{says}"):
        hub.task(f"task.name={task}", "train.augment=light")
    configured("train.augment=light")


def test_texts_refuse_it(tmp_path: Path) -> None:
    (tmp_path / "reviews.csv").write_text("text,label\n")
    with pytest.raises(ConfigError, match=r"train\.augment = 'light' has no use"):
        hub.task(
            "task.name=custom",
            f"task.data={tmp_path / 'reviews.csv'}",
            "model.name=transformers/x",
            "model.weights=random",
            "train.augment=light",
        )
