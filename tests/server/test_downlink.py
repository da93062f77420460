"""Layers go to clients in a codec: all have the same, and what rounding leaves out comes later."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import nn

from layerfed.client.resident import ResidentModel
from layerfed.digests import digest
from layerfed.exchange import MemoryStore
from layerfed.models.layers import LayerMap
from layerfed.runs.records import RoundFailed
from layerfed.server.global_model import GlobalModel
from tests.conftest import TinyNet
from tests.tiny_task import check_resumed, configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")

CPU = torch.device("cpu")
CODECS = ["float16", "bfloat16", "int8"]


def build() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet()


def server(codec: str) -> GlobalModel:
    model = build()
    return GlobalModel(LayerMap.from_model(model), ArrayRecord(model.state_dict()), codec)


def move(model: GlobalModel, layer: str, seed: int) -> dict[str, np.ndarray]:
    """Move a layer by a random update and return the update."""
    rng, before = np.random.default_rng(seed), dict(model.layer(layer))
    update = {
        name: np.asarray(0.1 * rng.standard_normal(values.shape), np.float32)
        for name, values in before.items()
        if values.dtype == np.float32
    }
    model.replace(layer, {n: v + update[n] if n in update else v + 1 for n, v in before.items()})
    return update


def held(client: ResidentModel) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in client.tensors.items()}


def rounded(change: np.ndarray, codec: str) -> np.ndarray:
    """A change as it arrives, in the plain words of each format."""
    if codec == "float16":
        return change.astype(np.float16).astype(np.float64)
    if codec == "bfloat16":
        return torch.tensor(change).bfloat16().double().numpy()
    table = np.atleast_2d(change)
    step = np.abs(table).max(axis=1, keepdims=True) / 127
    return (np.round(table / step) * step).reshape(change.shape)


@pytest.mark.parametrize("codec", CODECS)
def test_it_is_error_feedback_written_out(codec: str) -> None:
    """The clients' layer gets each update, and what rounding has left out of it before."""
    model = server(codec)
    start = {name: values.astype(np.float64) for name, values in model.layer("blocks.1").items()}
    theirs, error = dict(start), {name: np.zeros_like(values) for name, values in start.items()}
    for number in range(5):
        update = move(model, "blocks.1", number)
        for name in model.layers["blocks.1"].parameters:
            wanted = theirs[name] + update[name] + error[name]
            theirs[name] = start[name] + rounded(wanted - start[name], codec)
            error[name] = wanted - theirs[name]
            sent, exact = model.sent.layer("blocks.1")[name], model.layer("blocks.1")[name]
            np.testing.assert_allclose(sent, theirs[name], atol=1e-6)
            np.testing.assert_allclose(exact - sent, error[name], atol=1e-6)
        assert max(np.abs(e).max() for e in error.values()) > 1e-6, "this codec rounds"
    for name in model.layers["blocks.1"].buffers:
        assert np.array_equal(model.sent.layer("blocks.1")[name], model.layer("blocks.1")[name])


@pytest.mark.parametrize("codec", CODECS)
def test_clients_that_were_away_or_keep_layers_have_the_model_of_the_manifest(codec: str) -> None:
    model = server(codec)
    always, away = (ResidentModel(build, LayerMap.from_model, CPU) for _ in range(2))
    fresh, store = ResidentModel(build, LayerMap.from_model, CPU), MemoryStore()
    for number, layer in enumerate(["head", "blocks.2", "head", "blocks.0", "blocks.2"]):
        move(model, layer, number)
        always.move_to(model.sent.manifest(), model.sent.payload(model.sent.changed), store)
        if number == 0:
            away.move_to(model.sent.manifest(), model.sent.payload(["head"]))
    manifest, none = model.sent.manifest(), ArrayRecord()
    away.move_to(manifest, model.sent.payload(model.sent.changed))
    fresh.move_to(manifest, none, store)
    for client in (always, away, fresh):
        now = held(client)
        assert {
            layer.name: digest({t: now[t] for t in layer.tensors}) for layer in model.layers.layers
        } == manifest.digests
        assert client._digests == manifest.digests
        assert any(not np.array_equal(now[n], v) for n, v in model.tensors.items())


def test_a_process_that_served_another_run_loads_the_base_again() -> None:
    other, model = server("float32"), server("int8")
    client = ResidentModel(build, LayerMap.from_model, CPU)
    move(other, "head", 1)
    client.move_to(other.manifest(), other.payload(other.changed))
    move(model, "head", 2)
    client.move_to(model.sent.manifest(), model.sent.payload(model.sent.changed))
    now = held(client)
    assert all(np.array_equal(now[name], values) for name, values in model.sent.tensors.items())
    client.move_to(other.manifest(), other.payload(other.changed))
    now = held(client)
    assert all(np.array_equal(now[name], values) for name, values in other.tensors.items())


def test_the_servers_own_model_is_exact_and_uncoded_runs_have_one_model_only() -> None:
    coded, plain = server("int8"), server("float32")
    for model in (coded, plain):
        move(model, "blocks.3", 7)
    assert plain.sent is plain
    assert coded.manifest() == plain.manifest()
    assert all(np.array_equal(coded.tensors[n], values) for n, values in plain.tensors.items())
    assert set(coded.changed_tensors) == set(plain.layers["blocks.3"].tensors)


def test_a_resumed_run_sends_the_same_layers_to_the_bit() -> None:
    check_resumed(configured("exchange.downlink-codec=int8", "strategy.name=random"))


def test_a_change_that_float16_cannot_hold_ends_the_run_in_one_line() -> None:
    with pytest.raises(RoundFailed, match=r"exchange\.downlink-codec to bfloat16"):
        run(configured("exchange.downlink-codec=float16", "server.lr=1e9", "strategy.name=full"))
