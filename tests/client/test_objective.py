"""The training loss with class weights and label smoothing, and runs that train with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from layerfed.client.local_optimizers import LocalSGD
from layerfed.client.objective import balanced, objective
from layerfed.client.probe import probe_layers
from layerfed.client.training import Step, train_layers, train_update
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError
from layerfed.task import Examples
from layerfed.task.base import Batch
from layerfed.task.scoring import IGNORED, CausalLM
from tests.conftest import CLASSES
from tests.tiny_task import TinyTask, configured, run

TASK = "task.name=tests.tiny_task:TinyTask"
HERE = "task.name=tests.client.test_objective"


class OwnLoss(TinyTask):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.logits(model, batch).square().mean()


class Shifted(TinyTask):
    """A task whose targets are not the column `label`."""

    def targets(self, batch: Batch) -> Tensor:
        return (batch["label"] + 1) % CLASSES


class NextWords(TinyTask):
    """Texts without a column `label`, since each word is the target of the one before."""

    kind = CausalLM

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
            return nn.Sequential(nn.Embedding(7, 4), *blocks, nn.Linear(4, 7))

    def partition(self, partition_id: int) -> Examples:
        words = torch.randint(1, 7, (4, 6), generator=torch.Generator().manual_seed(partition_id))
        words[2:, 2:] = 0
        return Examples.of({"x": words})

    def targets(self, batch: Batch) -> Tensor:
        following = nn.functional.pad(batch["x"][:, 1:], (0, 1))
        return torch.where(following == 0, IGNORED, following)


def by_hand(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray, smooth: float) -> float:
    """Weighted cross-entropy against smoothed labels, as torch's documentation defines it."""
    classes = scores.shape[1]
    logs = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    own = -(logs[np.arange(len(labels)), labels] * weights[labels]).sum()
    all_ = -(logs * weights).sum()
    return float(((1 - smooth) * own + smooth / classes * all_) / weights[labels].sum())


@pytest.mark.parametrize(
    ("settings", "weights", "smooth"),
    [
        (["train.label-smoothing=0.2"], lambda labels, k: np.ones(k), 0.2),
        (["train.class-weights=1, 2.5, 4"], lambda labels, k: np.array([1, 2.5, 4]), 0.0),
        (
            ["train.class-weights=balanced", "train.label-smoothing=0.1"],
            lambda labels, k: len(labels) / (k * np.bincount(labels, minlength=k)),
            0.1,
        ),
    ],
)
def test_the_loss_is_that_of_the_formula(
    settings: list[str], weights: Callable[[np.ndarray, int], np.ndarray], smooth: float
) -> None:
    bench = workbench(configured(TASK, *settings).to_flat())
    examples, _ = bench.examples(1)
    batch = next(examples.in_order(8, torch.device("cpu")))
    bench.resident.model.eval()
    labels = examples.column("label")
    scores = bench.task.logits(bench.resident.model, batch).detach().double().numpy()
    expected = by_hand(
        scores, batch["label"].numpy(), weights(labels, scores.shape[1]).astype(float), smooth
    )
    found = bench.loss(1)(bench.resident.model, batch)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert found.item() != pytest.approx(bench.task.loss(bench.resident.model, batch).item())


@pytest.mark.parametrize(
    ("setting", "weights", "smooth"),
    [
        ("train.label-smoothing=0.2", [1.0, 1.0, 1.0], 0.2),
        ("train.class-weights=1, 2.5, 4", [1.0, 2.5, 4.0], 0.0),
    ],
)
def test_the_loss_is_against_a_tasks_own_targets(
    setting: str, weights: list[float], smooth: float
) -> None:
    bench = workbench(configured(f"{HERE}:Shifted", setting).to_flat())
    batch = next(bench.examples(1)[0].in_order(8, torch.device("cpu")))
    model, loss = bench.resident.model.eval(), bench.loss(1)
    scores = bench.task.logits(model, batch).detach().double().numpy()
    targets = (batch["label"].numpy() + 1) % CLASSES
    expected = by_hand(scores, targets, np.array(weights), smooth)
    assert loss(model, batch).item() == pytest.approx(expected, rel=1e-5)
    parts = Step(micro_batch=3).parts(batch, loss)
    assert len(parts) == 3
    assert sum(share * loss(model, part).item() for part, share in parts if share) == pytest.approx(
        expected, rel=1e-5
    )


def test_balanced_weights_count_a_tasks_own_targets() -> None:
    bench = workbench(configured(f"{HERE}:Shifted", "train.class-weights=balanced").to_flat())
    examples = bench.examples(1)[0]
    targets = (examples.column("label") + 1) % CLASSES
    counts = np.bincount(targets)
    batch = next(examples.in_order(len(targets), torch.device("cpu")))
    model, loss = bench.resident.model.eval(), bench.loss(1)
    scores = bench.task.logits(model, batch).detach().double().numpy()
    assert len({*counts}) > 1
    expected = by_hand(scores, targets, len(targets) / (CLASSES * counts), 0.0)
    assert loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_targets_that_are_no_column_count_in_parts() -> None:
    """A mean of parts' means would count the words of short texts like several of long ones."""
    bench = workbench(configured(f"{HERE}:NextWords").to_flat())
    batch = next(bench.examples(0)[0].in_order(4, torch.device("cpu")))
    model = bench.task.build_model()
    gradients = []
    for size in (0, 2):
        model.zero_grad()
        for part, share in Step(micro_batch=size).parts(batch, bench.loss(0)):
            (bench.loss(0)(model, part) * (share or 1.0)).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("size", [1, 4])
def test_a_batch_in_which_no_target_counts_makes_no_step(size: int) -> None:
    """Its mean loss is 0 / 0; the same texts in one batch were trained."""
    bench = workbench(configured(f"{HERE}:NextWords").to_flat())
    layers, loss = bench.resident.layers, bench.loss(0)
    words = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 1], [2, 0, 0]])
    batches = [{"x": words[i : i + size]} for i in range(0, 4, size)]
    model = bench.task.build_model()
    mask, sgd = [True] * layers.num_blocks, partial(LocalSGD, lr=0.1)
    result = train_layers(model, layers, mask, batches, loss, sgd)
    assert result.steps == 4 // size if size > 1 else 2
    assert np.isfinite(result.loss)
    statistics, _ = probe_layers(model, layers, batches, loss, ["grad_norm_sq"])
    kept = [b for b in batches if (b["x"][:, 1] > 0).any()]
    assert statistics == probe_layers(model, layers, kept, loss, ["grad_norm_sq"])[0]
    for work in (
        lambda none: train_layers(model, layers, mask, none, loss, sgd),
        lambda none: probe_layers(model, layers, none, loss, ["grad_norm_sq"]),
    ):
        with pytest.raises(ValueError, match=r"no batch to .* in which a target counts"):
            work([{"x": words[1:2]}])


def test_a_schedule_ends_with_the_batches_in_which_a_target_counts() -> None:
    """The masks after them train nothing; the round was lost with the first of these."""
    bench = workbench(configured(f"{HERE}:NextWords").to_flat())
    words = torch.tensor([[1, 2, 3], [4, 0, 0], [5, 6, 1], [2, 0, 0]])
    batches = [{"x": row[None]} for row in words]
    masks = [[i == j for j in range(bench.resident.layers.num_blocks)] for i in range(3)]
    update, result = train_update(
        bench.resident,
        [True] * 3,
        batches,
        bench.loss(0),
        partial(LocalSGD, lr=0.1),
        schedule=[(mask, 1) for mask in masks],
    )
    assert result.steps == 2
    moved = {bench.resident.layers.layer_of(name).name for name in update if np.any(update[name])}
    assert moved == {"blocks.0", "blocks.1", "head"}


def test_without_settings_the_loss_is_the_tasks() -> None:
    bench = workbench(configured(TASK).to_flat())
    batch = next(bench.examples(0)[0].in_order(8, torch.device("cpu")))
    model = bench.resident.model.eval()
    expected = nn.functional.cross_entropy(bench.task.logits(model, batch), batch["label"])
    assert torch.equal(bench.loss(0)(model, batch), expected)


def test_classes_that_occur_have_equal_weight_together() -> None:
    labels = np.array([0] * 6 + [2] * 2)
    weights = np.array(balanced(labels, 4))
    assert weights[labels][labels == 0].sum() == pytest.approx(4)
    assert weights[labels][labels == 2].sum() == pytest.approx(4)
    assert weights[[1, 3]].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("task", "setting", "says"),
    [
        ("TinyTask", "train.class-weights=1,2", "has 2 numbers, and the task has 3 classes"),
        ("OwnLoss", "train.class-weights=balanced", "train.class-weights = balanced has no use"),
        ("OwnLoss", "train.label-smoothing=0.1", "train.label-smoothing = 0.1 has no use"),
    ],
)
def test_what_does_not_fit_the_task_is_refused(task: str, setting: str, says: str) -> None:
    place = {"TinyTask": "tests.tiny_task", "OwnLoss": "tests.client.test_objective"}[task]
    bench = workbench(configured(f"task.name={place}:{task}", setting).to_flat())
    with pytest.raises(ConfigError, match=says):
        objective(bench.task, bench.resident.model, bench.task.test_examples())


def test_clients_train_and_probe_with_it() -> None:
    plain = run(configured(TASK))
    for setting in ("train.label-smoothing=0.3", "train.class-weights=balanced"):
        found = run(configured(TASK, setting)).rounds[0]
        assert found.metrics["train_loss"] != plain.rounds[0].metrics["train_loss"]
        assert found.selection is not None
        assert plain.rounds[0].selection is not None
        mine, theirs = (
            x.statistics["grad_norm_sq"] for x in (found.selection, plain.rounds[0].selection)
        )
        assert not np.array_equal(mine, theirs)


def test_a_clipped_step_moves_a_client_by_the_rate_times_the_bound() -> None:
    found = run(configured(TASK, "train.clip-gradient=0.01", "federation.clients-per-round=1"))
    moved = sum(
        np.square(found.after[name] - tensor, dtype=np.float64).sum()
        for name, tensor in found.before.items()
        if "running" not in name and "tracked" not in name
    )
    # Two steps of rate 0.1, nearly in the same direction.
    assert 0.8 * 2 * 0.1 * 0.01 < moved**0.5 <= 2 * 0.1 * 0.01 * 1.001


def test_the_servers_rate_follows_its_schedule() -> None:
    found = run(configured(TASK, "server.lr-decay=0.5", "server.lr=0.8", "federation.rounds=3"), 3)
    assert [record.server_lr for record in found.rounds] == [0.8, 0.4, 0.2]
    half = run(configured(TASK, "server.lr=0.5", "train.momentum=0.1"))
    warm = run(configured(TASK, "server.lr-warmup=1", "train.momentum=0.1"))
    for name, tensor in half.after.items():
        np.testing.assert_array_equal(tensor, warm.after[name], err_msg=name)
