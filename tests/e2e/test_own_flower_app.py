"""A real run of the example app: a user's model and data, with LayerFed's strategy and client."""

from __future__ import annotations

import importlib
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from torch import Tensor

from layerfed.client.training import evaluate
from layerfed.engine import InProcessGrid
from layerfed.models.layers import LayerMap

EXAMPLE = Path(__file__).parents[2] / "examples/own_flower_app"
CLIENTS = 4


@dataclass
class Run:
    """The results of one run of the app: its final model, and each train message with its reply."""

    task: ModuleType
    final: dict[str, Tensor]
    trained: list[tuple[Message, Message]]
    replies: list[Message]


@dataclass
class Wire:
    """Every message that reached a client, by id, and every reply."""

    asked: dict[str, Message] = field(default_factory=dict)
    replies: list[Message] = field(default_factory=list)


class WatchedGrid(InProcessGrid):
    """A grid that keeps the messages that pass through it."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.wire = Wire()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        kept = list(messages)
        identities = list(super().push_messages(kept))
        self.wire.asked.update(zip(identities, kept, strict=True))
        return identities

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = list(super().pull_messages(message_ids))
        self.wire.replies += replies
        return replies


def run_config() -> dict[str, Any]:
    pyproject = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    return dict(pyproject["tool"]["flwr"]["app"]["config"])


def run_app(folder: Path) -> Run:
    client = importlib.import_module("own_app.client_app")
    server = importlib.import_module("own_app.server_app")
    file = folder / "model.pt"
    config = {**run_config(), "save-to": str(file)}
    grid = WatchedGrid(client.app, CLIENTS, config)
    server.app(
        grid,
        Context(
            run_id=1,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=config,
        ),
    )
    wire = grid.wire
    pairs = [(wire.asked[r.metadata.reply_to_message_id], r) for r in wire.replies]
    return Run(
        importlib.import_module("own_app.task"),
        torch.load(file),
        [(asked, reply) for asked, reply in pairs if asked.metadata.message_type == "train"],
        wire.replies,
    )


@pytest.fixture(scope="module")
def example_on_path() -> Iterator[None]:
    sys.path.insert(0, str(EXAMPLE))
    yield
    sys.path.remove(str(EXAMPLE))
    for name in [n for n in sys.modules if n.split(".")[0] == "own_app"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def run(example_on_path: None, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_app(tmp_path_factory.mktemp("own"))


def layer_map(run: Run) -> LayerMap:
    return LayerMap.from_model(run.task.build_model())


def asked_to_train(message: Message, layers: LayerMap) -> list[str]:
    mask = message.content.config_records["config"]["mask"]
    assert isinstance(mask, list)
    return [b.name for b, on in zip(layers.blocks, mask, strict=True) if on] + ["head"]


def test_accuracy_rises_well_above_the_start(run: Run) -> None:
    model = run.task.build_model()
    batches = list(run.task.loader(run.task.server_items(), 256))
    start, _ = evaluate(model, batches, run.task.logits)
    model.load_state_dict(run.final)
    end, _ = evaluate(model, batches, run.task.logits)
    assert end >= 0.9
    assert end - start > 0.2


def test_every_client_did_everything_it_was_asked(run: Run) -> None:
    assert [r.error.reason for r in run.replies if r.has_error()] == []
    assert len(run.trained) == CLIENTS * run_config()["num-server-rounds"]
    kinds = {reply.metadata.message_type for reply in run.replies}
    assert kinds == {"query.describe", "query.probe", "train", "evaluate"}


def test_replies_carry_the_trained_layers_and_nothing_else(run: Run) -> None:
    layers = layer_map(run)
    for asked, reply in run.trained:
        chosen = asked_to_train(asked, layers)
        assert len(chosen) == 1 + run_config()["budget"]
        carried = set(reply.content.array_records["arrays"])
        assert carried == {tensor for name in chosen for tensor in layers[name].tensors}


def test_layers_nobody_picked_are_bit_identical(run: Run) -> None:
    layers = layer_map(run)
    picked = {name for asked, _ in run.trained for name in asked_to_train(asked, layers)}
    untouched = [name for name in layers.names if name not in picked]
    assert "embeddings" in untouched
    assert any(block.name in untouched for block in layers.blocks)

    initial = run.task.build_model().state_dict()
    for layer in layers.layers:
        same = all(torch.equal(run.final[t], initial[t]) for t in layer.tensors)
        assert same == (layer.name in untouched), layer.name


def test_a_second_run_gives_the_same_model(run: Run, tmp_path: Path) -> None:
    again = run_app(tmp_path)
    assert again.final.keys() == run.final.keys()
    for name, tensor in run.final.items():
        assert np.array_equal(tensor.numpy(), again.final[name].numpy()), name
