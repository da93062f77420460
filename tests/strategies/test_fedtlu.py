"""FedTLU in whole rounds: the layers that move, the layers that are sent, and refused replies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

from layerfed.client.workbench import workbench
from layerfed.client_app import build_client_app
from layerfed.config import RunConfig
from layerfed.exchange import CODECS, encode
from layerfed.exchange.change_score import change_score
from layerfed.models.layers import LayerMap
from tests.fakes import Recorded
from tests.tiny_task import configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")

HEAD = "head"


def layer_map(config: RunConfig) -> LayerMap:
    return workbench(config.to_flat()).resident.layers


def sent(reply: Message, layers: LayerMap) -> set[str]:
    """Names of the layers of which a reply holds anything."""
    names = {name.removesuffix("#scale") for name in reply.content.array_records["arrays"]}
    return {layer.name for layer in layers.layers if names & set(layer.tensors)}


def scores(
    update: Mapping[str, np.ndarray], layers: LayerMap, norm: Any = "l2"
) -> dict[str, float]:
    return {
        block.name: change_score((update[p] for p in block.parameters), norm)
        for block in layers.blocks
    }


def best(found: dict[str, float], count: int) -> set[str]:
    return set(sorted(found, key=lambda name: -found[name])[:count])


def updates(grid: Recorded) -> list[tuple[int, dict[str, np.ndarray]]]:
    """d_i and Δ_i of every training reply."""
    return [
        (
            int(reply.content.metric_records["metrics"]["examples"]),
            {name: a.numpy() for name, a in reply.content.array_records["arrays"].items()},
        )
        for _, reply in grid.trained()
    ]


# ----------------------------------------------------------------------------------- the server
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize(("fraction", "count"), [(0.25, 1), (0.5, 2), (1.0, 4)])
def test_the_server_applies_the_layers_whose_mean_change_scores_highest(
    fraction: float, count: int, norm: str
) -> None:
    config = configured(
        "strategy.name=fedtlu", f"strategy.fraction={fraction}", f"strategy.norm={norm}"
    )
    grid = Recorded(config)
    result = run(config, 1, grid)
    layers = layer_map(config)

    found = updates(grid)
    assert all(set(update) == set(found[0][1]) for _, update in found), "everyone trains all"
    total = sum(d for d, _ in found)
    mean = {t: sum(d * u[t].astype(float) for d, u in found) / total for t in found[0][1]}
    applied = best(scores(mean, layers, norm), count)
    assert set(result.rounds[0].moved) == {*applied, HEAD}
    for block in layers.blocks:
        for name in block.parameters:
            if block.name in applied:
                expected = result.before[name] + mean[name]
                np.testing.assert_allclose(result.after[name], expected, rtol=1e-5, atol=1e-7)
            else:
                np.testing.assert_array_equal(result.after[name], result.before[name])


def test_a_layer_that_is_left_out_keeps_its_server_optimiser_as_it_was() -> None:
    """Momentum of a round that was not applied must not come back in a later one."""
    base = ["strategy.name=fedtlu", "strategy.fraction=0.25", "server.optimizer=momentum"]
    result = run(configured(*base), 3)
    moved = [set(record.moved) for record in result.rounds]
    assert all(len(layers) == 2 for layers in moved)
    never = {f"blocks.{i}" for i in range(4)} - set.union(*moved)
    assert never
    for name, before in result.before.items():
        if any(name.startswith(f"{layer}.") for layer in never):
            np.testing.assert_array_equal(before, result.after[name])


# ---------------------------------------------------------------------------------- the clients
def test_each_client_sends_the_layers_it_changed_most_and_they_are_averaged_by_layer() -> None:
    base = ["strategy.name=fedtlu", "strategy.fraction=0.5"]
    everything = Recorded(configured(*base))  # the same training, all of it sent
    run(configured(*base), 1, everything)
    config = configured(*base, "strategy.side=client")
    grid = Recorded(config)
    result = run(config, 1, grid)
    layers = layer_map(config)

    all_updates = {q.metadata.dst_node_id: u for (q, _), (_, u) in
                   zip(everything.trained(), updates(everything), strict=True)}  # fmt: skip
    total: dict[str, int] = {}
    for (question, reply), (d, update) in zip(grid.trained(), updates(grid), strict=True):
        whole = all_updates[question.metadata.dst_node_id]
        expected = {*best(scores(whole, layers), 2), HEAD}
        assert sent(reply, layers) == expected
        partition = question.metadata.dst_node_id - 2
        assert set(result.rounds[0].updated[partition]) == expected
        assert set(update) == {t for name in expected for t in layers[name].tensors}
        for name in expected:
            total[name] = total.get(name, 0) + d
    assert set(result.rounds[0].moved) == set(total)
    for layer in total:
        name = layers[layer].parameters[0]
        step = sum(d * u[name].astype(float) for d, u in updates(grid) if name in u)
        np.testing.assert_allclose(
            result.after[name], result.before[name] + step / total[layer], rtol=1e-5, atol=1e-7
        )
    # Half of the layers, half of the bytes.
    up = [sum(r.up for r in x.ledger.rows.values()) for x in result.rounds]
    block, head = layers.blocks[0].bytes, layers.head.bytes
    assert up == [4 * (2 * block + head)]


def test_a_node_that_affords_less_trains_and_sends_less() -> None:
    config = configured("strategy.name=fedtlu", "strategy.side=client", "budget.kind=per-node")
    grid = Recorded(config, nodes=[{"budget": 2}] * 6)
    result = run(config, 1, grid)
    layers = layer_map(config)
    assert [len(mask) for mask in result.masks(1).values()] == [2] * 4
    assert all(len(sent(reply, layers)) == 2 for _, reply in grid.trained())
    assert not result.rounds[0].failures


# ------------------------------------------------------------------------------------- forgeries
def tampered(change: Callable[[Any, LayerMap], None], codec: str) -> list[str]:
    """Return the reasons for which the server refuses changed replies, by client."""
    config = configured(
        "strategy.name=fedtlu",
        "strategy.side=client",
        "federation.min-replies=1",
        f"exchange.codec={codec}",
    )
    layers = layer_map(config)

    def mod(message: Message, context: Context, call_next: Any) -> Message:
        reply: Message = call_next(message, context)
        if message.metadata.message_type == "train" and context.node_config["partition-id"] < 2:
            change(reply.content.array_records["arrays"], layers)
        return reply

    result = run(config, 1, Recorded(config, build_client_app([mod])))
    record = result.rounds[0]
    honest = [client for client in result.masks(1) if client >= 2]
    assert record.replies == len(honest)
    assert all(np.isfinite(tensor).all() for tensor in result.after.values())
    assert len(record.failures) == 4 - len(honest) > 0
    return [failure.reason for failure in record.failures]


def without(kind: str) -> Callable[[Any, LayerMap], None]:
    def change(arrays: Any, layers: LayerMap) -> None:
        gone = {t for layer in layers.layers if layer.kind == kind for t in layer.tensors}
        for name in gone & set(arrays):
            del arrays[name]

    return change


def add_layer(arrays: Any, layers: LayerMap) -> None:
    """Send one block more than asked for."""
    codec = CODECS["float32"]
    absent = next(b for b in layers.blocks if not set(b.tensors) & set(arrays))
    for name in absent.tensors:
        kind = np.int64 if name.endswith("tracked") else np.float32
        zeros = np.zeros(layers.shapes[name], kind)
        for part, (shape, dtype) in codec.parts_of(name, zeros).items():
            arrays[part] = encode(np.zeros(shape, dtype))


def add_embedding(arrays: Any, layers: LayerMap) -> None:
    name = layers.embeddings.parameters[0]
    arrays[name] = encode(np.zeros(layers.shapes[name], np.float32))


def halve(arrays: Any, layers: LayerMap) -> None:
    """One tensor of a layer is missing: layers are whole or not there."""
    del arrays[next(name for name in arrays if name.endswith("linear.bias"))]


def empty(arrays: Any, layers: LayerMap) -> None:
    for name in list(arrays):
        del arrays[name]


def nan(arrays: Any, layers: LayerMap) -> None:
    name = next(name for name in arrays if name.endswith("linear.bias"))
    arrays[name] = encode(np.full(layers.shapes[name], np.nan, np.float32))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (add_layer, "2 of the blocks it trained and the head are due"),
        (add_embedding, "not asked to train: embed.weight"),
        (halve, "lacks tensors it was asked to train"),
        (without("head"), "2 of the blocks it trained and the head are due"),
        (without("block"), "it holds head; 2 of the blocks"),
        (empty, "it holds no layer"),
        (nan, "holds NaN or Inf"),
    ],
    ids=["more", "embedding", "part", "no head", "no block", "nothing", "nan"],
)
def test_a_reply_that_is_not_whole_layers_of_those_due_is_refused(
    change: Callable[[Any, LayerMap], None], says: str
) -> None:
    assert all(says in reason for reason in tampered(change, "float32"))


def test_a_scale_without_its_tensor_is_refused() -> None:
    def change(arrays: Any, layers: LayerMap) -> None:
        for name in [n for n in arrays if n.startswith("blocks.") and not n.endswith("#scale")]:
            del arrays[name]

    assert all("lacks tensors" in reason for reason in tampered(change, "int8"))
