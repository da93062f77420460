"""Digits: every client always has the same share of the data, and the backbone loads."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from layerfed.client.training import evaluate
from layerfed.config import ConfigError, load_config
from layerfed.task import TASKS, Batch, Examples, load_task, task_named
from layerfed.task.digits import Digits
from layerfed.task.partition import MIN_EXAMPLES, partition_indices
from layerfed_assets import BACKBONE

TRAIN, TEST = 1437, 360
KINDS = ["task.partition=dirichlet", "task.partition=iid"]


def task(*overrides: str) -> Digits:
    found = load_task(load_config(None, overrides))
    assert isinstance(found, Digits)
    return found


def rows(examples: Examples) -> list[bytes]:
    """Each image as bytes; digits of the bundled set are all different."""
    return [image.numpy().tobytes() for image in whole(examples)["image"]]


def whole(examples: Examples) -> Batch:
    return next(examples.in_order(len(examples), torch.device("cpu")), {"image": []})


def shares(of: Digits, clients: int = 10) -> list[list[bytes]]:
    return [rows(of.partition(i)) for i in range(clients)]


def labels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 10, size=TRAIN)


def cut(*overrides: str) -> list[np.ndarray]:
    return partition_indices(labels(), load_config(None, overrides))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("clients", [1, 3, 10])
def test_partitions_are_disjoint_and_cover_the_training_set(kind: str, clients: int) -> None:
    """Defect 9 of the released code: every client saw the whole training set."""
    counts = [f"federation.clients={clients}", "federation.clients-per-round=1"]
    found = cut(kind, *counts)
    assert len(found) == clients
    assert sorted(np.concatenate(found)) == list(range(TRAIN))
    assert min(map(len, found)) >= MIN_EXAMPLES
    if clients > 1:
        assert max(map(len, found)) < TRAIN


def test_clients_of_the_task_share_no_image_with_each_other_or_with_the_test_set() -> None:
    """Defect 9 of the released code."""
    digits = task()
    clients = [image for share in shares(digits) for image in share]
    test = rows(digits.test_examples())
    assert (len(clients), len(test)) == (TRAIN, TEST)
    assert len(set(clients)) == len(clients)
    assert not set(clients) & set(test)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_load_gives_the_same_partitions_whatever_was_drawn_before(kind: str) -> None:
    """Defects 10 and 11 of the released code: re-shuffled on every load, seed set too late."""
    np.random.seed(1)  # the global state is what is tested
    torch.manual_seed(1)
    first = cut(kind)
    np.random.seed(2)
    torch.manual_seed(2)
    again = cut(kind)
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))


def test_two_processes_worth_of_tasks_agree_in_any_order_of_asking() -> None:
    """Defect 10 of the released code: server and clients each build a task of their own."""
    one, other = task(), task()
    backwards = {i: rows(other.partition(i)) for i in reversed(range(10))}
    assert shares(one) == [backwards[i] for i in range(10)]
    assert shares(one) == shares(one)


@pytest.mark.parametrize("kind", KINDS)
def test_the_partition_follows_the_seed_and_nothing_of_the_training(kind: str) -> None:
    first = cut(kind, "run.seed=1")
    other = cut(kind, "run.seed=2")
    same = cut(kind, "run.seed=1", "train.lr=9.0", "strategy.name=top", "budget.layers=3")
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(first, same, strict=True))


def skew(found: list[np.ndarray]) -> float:
    """Mean share of a client's most frequent class."""
    y = labels()
    return float(np.mean([np.bincount(y[index]).max() / len(index) for index in found]))


def test_iid_clients_are_equal_in_size_and_mixed_and_dirichlet_clients_are_not() -> None:
    iid, mild, strong = cut(KINDS[1]), cut("task.alpha=5"), cut("task.alpha=0.1")
    assert {len(index) for index in iid} == {143, 144}
    assert skew(iid) < 0.2 < skew(strong)
    assert skew(iid) < skew(mild) < skew(strong)


@pytest.mark.parametrize("kind", KINDS)
def test_more_clients_than_examples_are_refused_in_one_line(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cut(kind, "federation.clients=2000")
    message = str(caught.value)
    assert "\n" not in message
    assert "federation.clients = 2000" in message
    assert "1437 training examples" in message


@pytest.mark.parametrize("kind", KINDS)
def test_more_clients_than_the_smallest_share_allows_are_refused_in_one_line(kind: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cut(kind, "federation.clients=1000")
    message = str(caught.value)
    assert "\n" not in message
    assert "federation.clients = 1000" in message
    assert "fewer than 8 of 1437 examples" in message
    assert ("task.alpha" in message) == (kind == KINDS[0])


def test_an_impossible_skew_names_alpha() -> None:
    with pytest.raises(ConfigError, match=r"task\.alpha = 0\.0001 .* raise task\.alpha") as caught:
        cut("task.alpha=0.0001")
    assert "\n" not in str(caught.value)


def test_the_test_set_is_the_same_for_every_seed_and_holds_every_class() -> None:
    first, other = task("run.seed=1").test_examples(), task("run.seed=2").test_examples()
    assert rows(first) == rows(other)
    assert torch.equal(whole(first)["label"], whole(other)["label"])
    assert len(first) == TEST
    assert torch.bincount(whole(first)["label"]).min() >= 34


def test_images_are_in_the_range_the_backbone_was_trained_on() -> None:
    image = whole(task().test_examples())["image"]
    assert image.shape == (TEST, 1, 32, 32)
    assert image.min() == -1
    assert image.max() == 1


# --------------------------------------------------------------------------- held-out examples
def test_local_test_examples_are_apart_from_the_training_ones() -> None:
    digits = task("task.local-test=0.25")
    for client in range(10):
        everything = rows(digits.partition(client))
        train, test = (rows(part) for part in digits.client_examples(client))
        assert len(test) == max(1, int(0.25 * len(everything)))
        assert not set(train) & set(test)
        assert sorted(train + test) == sorted(everything)
        assert rows(digits.client_examples(client)[1]) == test


def test_without_local_test_nothing_is_held_out() -> None:
    digits = task()
    train, test = digits.client_examples(3)
    assert rows(train) == rows(digits.partition(3))
    assert len(test) == 0


def test_the_local_test_split_follows_the_seed_only() -> None:
    torch.manual_seed(1)
    first = task(
        "task.local-test=0.5",
        "task.partition=iid",
        "federation.clients=1",
        "federation.clients-per-round=1",
    )
    torch.manual_seed(2)
    other = task(
        "task.local-test=0.5",
        "task.partition=iid",
        "federation.clients=1",
        "federation.clients-per-round=1",
        "run.seed=1",
    )
    assert rows(first.client_examples(0)[1]) == rows(first.client_examples(0)[1])
    assert rows(first.client_examples(0)[1]) != rows(other.client_examples(0)[1])


# ----------------------------------------------------------------------------------- the model
def state(*overrides: str) -> dict[str, Tensor]:
    return task(*overrides).build_model().state_dict()


def test_the_head_follows_the_seed_and_not_the_global_generator() -> None:
    """Defect 11 of the released code: the head was drawn before the seed was set."""
    torch.manual_seed(1)
    first = state("run.seed=5")
    after_first = torch.rand(1)
    torch.manual_seed(2)
    same, other = state("run.seed=5"), state("run.seed=6")
    assert torch.equal(first["head.weight"], same["head.weight"])
    assert not torch.equal(first["head.weight"], other["head.weight"])
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_first), "building drew from the global generator"


def test_the_shipped_weights_are_what_is_loaded() -> None:
    shipped, loaded, random = load_file(BACKBONE), state(), state("model.weights=random")
    assert BACKBONE.stat().st_size <= 4e6
    assert set(loaded) - set(shipped) == {"head.weight", "head.bias"}
    for name, tensor in shipped.items():
        assert torch.equal(loaded[name], tensor.float()), name
    assert loaded.keys() == random.keys()
    different = [
        n for n in loaded if n.endswith("qkv.weight") and torch.equal(loaded[n], random[n])
    ]
    assert different == []
    assert torch.equal(loaded["head.weight"], random["head.weight"]), "the same head, to compare"


def test_the_model_scores_ten_classes_and_splits_into_twelve_blocks() -> None:
    digits = task()
    model = digits.build_model()
    layers = digits.layers(model)
    batch = next(digits.test_examples().in_order(4, torch.device("cpu")))
    assert digits.logits(model, batch).shape == (4, 10)
    assert digits.loss(model, batch).ndim == 0
    assert layers.num_blocks == 12
    assert {"head.weight", "head.bias"} <= set(layers.head.parameters)
    accuracy, _ = evaluate(model, [batch], digits.logits)
    assert 0 <= accuracy <= 1


@pytest.mark.parametrize("name", TASKS)
def test_every_task_of_the_table_is_there(name: str) -> None:
    assert callable(task_named(name))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("digit", "did you mean digits?"),
        ("nothing:Task", "cannot be imported"),
        ("layerfed.task.digits:Absent", "cannot be imported"),
    ],
)
def test_a_task_that_is_not_there_is_named(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        task_named(name)
    assert says in str(caught.value)


# ------------------------------------------------------------------------------------ batches
def test_shuffled_batches_show_each_example_once_a_pass() -> None:
    examples = Examples.of({"x": torch.arange(10)})
    stream = examples.shuffled(4, torch.device("cpu"), np.random.default_rng(0))
    passes = [[next(stream)["x"] for _ in range(3)] for _ in range(2)]
    for batches in passes:
        assert [len(batch) for batch in batches] == [4, 4, 2]
        assert sorted(torch.cat(batches).tolist()) == list(range(10))
    assert not torch.equal(torch.cat(passes[0]), torch.cat(passes[1]))


def test_batches_in_order_keep_names_together_and_end() -> None:
    examples = Examples.of({"x": torch.arange(5), "label": torch.arange(5) * 2})
    batches = list(examples.in_order(2, torch.device("cpu")))
    assert [batch["x"].tolist() for batch in batches] == [[0, 1], [2, 3], [4]]
    assert all(torch.equal(batch["label"], 2 * batch["x"]) for batch in batches)
