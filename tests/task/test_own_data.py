"""A node with its own data: all of them are its examples, with the classes of the run."""

from __future__ import annotations

import shutil
from pathlib import Path

import datasets
import pyarrow.parquet
import pytest
import torch
from datasets import ClassLabel

from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, NodeConfig
from layerfed.engine import run_on
from layerfed.runs import read_lines
from layerfed.task import Batch, Task
from tests.task import hub
from tests.task.hub import WORDS, whole

SMALL = ["task.name=custom", "task.image-size=8"]


def own(*overrides: str) -> Task:
    """Build the task of a node whose `own-data` is `task.data`."""
    task = hub.task(*overrides)
    task.own_data = True
    return task


def labels(task: Task, client: int = 7) -> list[int]:
    """Return the labels of a client's training examples; its partition id is only a name."""
    examples, held_out = task.client_examples(client)
    assert len(held_out) == 0
    return sorted(whole(examples)["label"].tolist())


def test_all_images_are_the_nodes_whatever_the_number_of_clients(tmp_path: Path) -> None:
    """The node lacks a class of the run, and its labels still have the run's order."""
    hub.image_files(tmp_path, ["zebra", "cat"], 3)
    classes = "task.classes=zebra,dog,cat"
    assert labels(own(*SMALL, f"task.data={tmp_path}", classes)) == [0] * 3 + [2] * 3


def test_what_is_for_testing_stays_out(tmp_path: Path) -> None:
    hub.image_files(tmp_path / "train", ["cat", "dog"], 4)
    hub.image_files(tmp_path / "test", ["cat", "dog"], 9)
    assert labels(own(*SMALL, f"task.data={tmp_path}", "task.classes=cat,dog")) == [0] * 4 + [1] * 4


def test_groups_are_the_nodes_affair(tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["attic/bird", "cellar/zebra"], 3)
    chosen = ["task.classes=bird,zebra", "task.image-size=8", "model.weights=random"]
    domain = own("task.name=domainnet", f"task.data={tmp_path}", *chosen)
    assert labels(domain) == [0] * 3 + [1] * 3


def test_a_share_can_be_kept_for_evaluation_on_the_node(tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["cat", "dog"], 10)
    settings = [*SMALL, f"task.data={tmp_path}", "task.classes=cat,dog", "task.local-test=0.25"]
    examples, held_out = own(*settings).client_examples(0)
    assert (len(examples), len(held_out)) == (15, 5)


def test_another_class_than_the_runs_is_named(tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["Cat", "dog"], 2)
    found = own(*SMALL, f"task.data={tmp_path}", "task.classes=cat,dog")
    with pytest.raises(ConfigError) as caught:
        found.client_examples(0)
    for said in (str(tmp_path), "examples of class Cat", "the run's classes are cat, dog"):
        assert said in str(caught.value)


def test_a_run_that_names_no_classes_is_refused(tmp_path: Path) -> None:
    hub.image_files(tmp_path, ["cat", "dog"], 2)
    for more in ([], ["task.classes=all"]):
        with pytest.raises(ConfigError, match="the run has to name them: set task"):
            own(*SMALL, f"task.data={tmp_path}", *more).client_examples(0)


def test_names_of_classes_without_examples_do_no_harm(tmp_path: Path) -> None:
    """A table may declare more classes than the run has, as long as no row is of one."""
    names = [*hub.CIFAR, "unicorn"]
    columns = {"img": [hub.noise(i) for i in range(6)], "label": [9, 9, 9, 0, 0, 1]}
    kinds = {"img": hub.Image(), "label": ClassLabel(names=names)}
    hub.parquet(tmp_path / "train.parquet", columns, **kinds)
    found = own("task.name=cifar10", f"task.data={tmp_path}", "model.weights=random")
    assert labels(found) == [0, 0, 1, 9, 9, 9]
    columns["label"] = [10, 9, 9, 0, 0, 1]
    hub.parquet(tmp_path / "other/train.parquet", columns, **kinds)
    with pytest.raises(ConfigError, match="examples of class unicorn; the run's classes are airpl"):
        labels(own("task.name=cifar10", f"task.data={tmp_path / 'other'}", "model.weights=random"))


def test_a_table_of_text(tmp_path: Path) -> None:
    model = hub.xlm_roberta(tmp_path / "model")
    file = tmp_path / "reviews.csv"
    file.write_text("text,stars\n" + "".join(f"w{i} w2,{i % 3 + 1}\n" for i in range(9)))
    text = ["task.name=custom", f"task.data={file}", "task.label-column=stars"]
    transformer = ["model.name=transformers/tiny", f"model.weights={model}"]
    classes = "task.classes=1,2,3,4,5"
    assert labels(own(*text, *transformer, classes)) == [0] * 3 + [1] * 3 + [2] * 3


def test_a_row_without_a_label_is_refused_also_among_numbers(tmp_path: Path) -> None:
    """A column of numbers has NaN where a cell is empty, which is no class."""
    model = hub.xlm_roberta(tmp_path / "model")
    columns = {"text": ["w1", "w2", "w3"], "label": [0.0, float("nan"), 1.0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "rows.parquet")
    text = ["task.name=custom", f"task.data={tmp_path / 'rows.parquet'}"]
    with pytest.raises(ConfigError, match=r"row 1: label = nan is not allowed: .* 0.0, 1.0"):
        hub.task(*text, "model.name=transformers/tiny", f"model.weights={model}").client_examples(0)


def test_a_path_is_that_path(tmp_path: Path) -> None:
    """Not a pattern, of which the data of another node on the machine are the first match."""
    model = hub.xlm_roberta(tmp_path / "model")
    for node, count in (("x1", 3), ("x[12]", 5)):
        (tmp_path / node).mkdir()
        for name in ("reviews.csv", "folder/train.csv"):
            (tmp_path / node / name).parent.mkdir(exist_ok=True)
            (tmp_path / node / name).write_text("text,label\n" + "w1,a\n" * count)
    text = ["task.name=custom", "task.classes=a,b", "model.name=transformers/tiny"]
    for name in ("reviews.csv", "folder"):
        data = f"task.data={tmp_path / 'x[12]' / name}"
        assert labels(own(*text, data, f"model.weights={model}")) == [0] * 5


def test_news_of_one_language(tmp_path: Path) -> None:
    made = hub.news(WORDS, 12, 3)
    columns = {"news_title": ["w1"] * 12, "news_body": made["text"]}
    columns["news_category"] = [f"class {y}" for y in made["label"]]
    hub.parquet(tmp_path / "nc/validation.ru-00000-of-00001.parquet", columns)
    model = ["model.name=transformers/x", f"model.weights={hub.xlm_roberta(tmp_path / 'model')}"]
    classes = "task.classes=class 0,class 1,class 2"
    found = own("task.name=xglue_nc", f"task.data={tmp_path / 'nc'}", classes, *model)
    assert labels(found) == sorted(made["label"])


def test_questions_of_the_sets_that_are_there(tmp_path: Path) -> None:
    data = hub.questions(tmp_path / "qa", count=6)
    for other in ("sciq", "openbookqa", "piqa", "ai2_arc/ARC-Easy"):
        (data / other).rename(tmp_path / other.replace("/", "-"))
    model = ["model.name=transformers/x", f"model.weights={hub.llama(tmp_path / 'model')}"]
    assert labels(own("task.name=qa", f"task.data={data}", *model)) == [0, 0, 1, 1, 2, 2]
    (data / "ai2_arc/ARC-Challenge").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="holds no examples"):
        labels(own("task.name=qa", f"task.data={data}", *model))


@pytest.mark.parametrize("layout", ["hub", "files", "saved"])
def test_questions_of_a_set_without_other_subsets(layout: str, tmp_path: Path) -> None:
    """As `hf download` leaves it, with a folder `data` and one of its own; or its bare files."""
    data = hub.questions(tmp_path / "qa", count=6)
    own_folder = tmp_path / "own/sciq"
    if layout == "hub":
        shutil.copytree(data / "sciq", own_folder)
    elif layout == "files":
        shutil.copytree(data / "sciq/data", own_folder)
    else:
        rows = datasets.load_dataset(str(data / "sciq/data"), split="train")
        rows.save_to_disk(str(own_folder))
    # A subset that the task does not read.
    (tmp_path / "own/openbookqa/additional").mkdir(parents=True)
    (data / "openbookqa/main/train-00000-of-00001.parquet").rename(
        tmp_path / "own/openbookqa/additional/train.parquet"
    )
    model = ["model.name=transformers/x", f"model.weights={hub.llama(tmp_path / 'model')}"]
    task = own("task.name=qa", f"task.data={tmp_path / 'own'}", *model)
    assert len(labels(task)) == 6
    assert task.groups == ("sciq",)  # type: ignore[attr-defined]


def test_folders_of_one_name_with_a_card_are_kept_apart(tmp_path: Path) -> None:
    """Nodes that share a machine, and its cache, have their own examples nevertheless."""
    model = ["model.name=transformers/x", f"model.weights={hub.xlm_roberta(tmp_path / 'model')}"]
    for node, label in (("one", "a"), ("two", "b")):
        folder = tmp_path / node / "reviews"
        hub.parquet(folder / "data/train-0.parquet", {"text": ["w1"] * 3, "label": [label] * 3})
        card = "configs: [{config_name: default, data_files: data/train-*}]"
        (folder / "README.md").write_text(f"---\n{card}\n---\n")
    for node, expected in (("one", 0), ("two", 1)):
        given = ["task.name=custom", f"task.data={tmp_path / node / 'reviews'}", "task.classes=a,b"]
        assert labels(own(*given, *model)) == [expected] * 3


def test_digits_take_none() -> None:
    node = NodeConfig.read({"partition-id": 0, "own-data": "/srv/digits"})
    with pytest.raises(ConfigError, match=r"'/srv/digits' has no use for task\.name = 'digits'"):
        workbench(hub.config().to_flat(), node)


def test_a_task_of_ones_own_says_whether_it_takes_any() -> None:
    class Given(Task):
        settings = frozenset({"data"})

        def build_model(self) -> torch.nn.Module:
            raise NotImplementedError

        def partition(self, partition_id: int) -> object:
            raise NotImplementedError

        def test_examples(self) -> object:
            raise NotImplementedError

        def logits(self, model: torch.nn.Module, batch: Batch) -> torch.Tensor:
            raise NotImplementedError

    task = Given(hub.config("task.data=/srv/rows"))
    task.own_data = True
    with pytest.raises(ConfigError, match=r"own-data = '/srv/rows': .* takes no data"):
        task.client_examples(0)


def test_a_round_of_nodes_with_their_own_images(tmp_path: Path) -> None:
    """One node has only cats and one only dogs; the server has a test set, and no one has all data."""
    hub.image_files(tmp_path / "server", ["cat", "dog"], 30)
    nodes = []
    for name, count in (("cat", 5), ("dog", 11)):
        hub.image_files(tmp_path / name, [name], count)
        nodes.append({"own-data": str(tmp_path / name), "store": "memory"})
    settings = [
        *SMALL,
        f"task.data={tmp_path / 'server'}",
        "task.classes=cat,dog",
        *("federation.clients=2", "federation.clients-per-round=2", "federation.rounds=1"),
        *("strategy.name=top", "train.local-steps=0", "train.local-epochs=1", "train.batch-size=1"),
        *("run.device=cpu", f"run.dir={tmp_path / 'runs'}"),
    ]
    folder = run_on("inprocess", hub.config(*settings), nodes=nodes)
    (row,) = read_lines(folder / "metrics.jsonl")
    assert (row["clients"], row["failures"]) == (2, 0)
    # An epoch is a step an example, so the work tells how many each had.
    alone = [
        read_lines(
            run_on("inprocess", hub.config(*settings, "federation.min-replies=1"), nodes=pair)
            / "metrics.jsonl"
        )[0]["flops"]
        for pair in ([nodes[0], nodes[0]], [nodes[1], nodes[1]])
    ]
    assert alone[1] / alone[0] == pytest.approx(11 / 5)
    assert row["flops"] == pytest.approx(sum(alone) / 2)
