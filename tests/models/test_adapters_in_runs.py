"""Adapters under what a run can ask for: strategies, codecs, privacy, sums, stores and resuming."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.client.workbench import forget_workbenches, workbench
from layerfed.config import RunConfig
from layerfed.engine import run_on
from layerfed.exchange import CODECS
from layerfed.models.stored import Quantised, Stored
from layerfed.runs import latest_checkpoint, read_lines
from layerfed.strategies import STRATEGIES
from tests.fakes import Recorded
from tests.strategies.test_compositions import Wire
from tests.tiny_task import Run, check_resumed, configured, run

TINY = "task.name=tests.tiny_task:TinyTask"
RULES = ("mean", "svd", "stack")


def lora(*settings: str) -> RunConfig:
    tuning = ("model.tuning=lora", "model.lora-rank=2")
    return configured(TINY, *tuning, "strategy.name=top", "budget.layers=2", *settings)


def learned(done: Run, config: RunConfig) -> None:
    """Expect that nothing failed, and that adapters of selected blocks and the head moved, no others."""
    layers = workbench(config.to_flat()).resident.layers
    assert all(record.failures == [] for record in done.rounds)
    moved = {layer for record in done.rounds for layer in record.moved}
    assert "head" in moved
    for layer in layers.layers:
        same = all(np.array_equal(done.before[t], done.after[t]) for t in layer.tensors)
        assert same is (layer.name not in moved), layer.name


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_trains_adapters(name: str) -> None:
    unit = ("budget.unit=parameters", "budget.layers=48")
    config = lora(f"strategy.name={name}", *unit, "strategy.theory=true")
    done = run(config, 2)
    learned(done, config)
    moved = {layer for record in done.rounds for layer in record.moved}
    assert (len(moved) > 1) == (name != "head")
    for record in done.rounds:
        assert record.selection is not None
        if STRATEGIES[name].within_budget and name != "ranks":
            spent = record.selection.costs * record.selection.choice.masks
            assert (spent.sum(axis=1) <= 48).all()
            assert spent.any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_carries_factors(codec: str, rule: str) -> None:
    """Over the wire; and a coded update is that of float32 to the codec's precision."""
    config = lora(f"exchange.codec={codec}", f"server.aggregation={rule}")
    done, exact = run(config, 2, Wire(config)), run(lora(f"server.aggregation={rule}"), 2)
    learned(done, config)
    up = {c: row.up for c, row in done.rounds[0].ledger.rows.items()}
    wide = {c: row.up for c, row in exact.rounds[0].ledger.rows.items()}
    share = {"float32": 1.0, "float16": 0.5, "bfloat16": 0.5}.get(codec)
    for client, size in up.items():
        assert size < 0.6 * wide[client] if share is None else size == share * wide[client]
    for name, value in done.after.items():
        if rule == "mean" and ("lora_" in name or name.startswith("head")):
            np.testing.assert_allclose(value, exact.after[name], rtol=0, atol=0.01, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_factors_are_private_on_the_client(rule: str) -> None:
    """A client's whole update has the norm of the clip, and noise moves it."""
    settings = ("privacy.mode=local", "privacy.clip=0.01", f"server.aggregation={rule}")
    config = lora(*settings)
    grid = Recorded(config)
    learned(run(config, 1, grid), config)
    for _, reply in grid.trained():
        arrays = [a.numpy().astype(float) for a in reply.content.array_records["arrays"].values()]
        assert np.sqrt(sum((a**2).sum() for a in arrays)) == pytest.approx(0.01, rel=1e-4)
    noisy = lora(*settings, "privacy.noise=1.0")
    learned(run(noisy, 2), noisy)


def test_factors_are_private_on_the_server() -> None:
    config = lora("privacy.mode=central", "privacy.clip=0.01", "privacy.noise=1e-6")
    done = run(config, 1)
    learned(done, config)
    change = [done.after[n].astype(float) - done.before[n] for n in done.before]
    assert 0 < np.sqrt(sum((c**2).sum() for c in change)) <= 0.01 * (1 + 1e-3)


def test_a_secure_sum_of_factors_is_their_mean() -> None:
    config, plain = lora("secagg.enabled=true"), lora()
    done, exact = run(config, 2), run(plain, 2)
    learned(done, config)
    for name, value in done.after.items():
        np.testing.assert_allclose(value, exact.after[name], rtol=0, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("rule", RULES)
def test_a_node_that_keeps_adapters_is_not_sent_them_again(rule: str, tmp_path: Path) -> None:
    """And a node that was restarted meanwhile reads them from its store."""
    config = lora(
        "strategy.name=full", "federation.clients-per-round=6", f"server.aggregation={rule}"
    )
    nodes = [{"store": str(tmp_path / f"node{client}")} for client in range(6)]
    grid = Restarting(config, nodes=nodes)
    done = run(config, 3, grid)
    learned(done, config)
    layers = workbench(config.to_flat()).resident.layers
    changed = sum(layer.bytes for layer in (*layers.blocks, layers.head))
    for record, expected in zip(done.rounds, (0, changed, changed), strict=True):
        assert {row.down for row in record.ledger.rows.values()} == {expected}
    same = run(config, 3)
    for name, value in done.after.items():
        np.testing.assert_array_equal(value, same.after[name], err_msg=name)


class Restarting(Recorded):
    """Nodes whose processes end after each phase."""

    def push_messages(self, messages):  # type: ignore[no-untyped-def]
        forget_workbenches()
        return super().push_messages(messages)


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_ends_the_same(rule: str, tmp_path: Path) -> None:
    check_resumed(lora("strategy.name=ilp", f"server.aggregation={rule}"))
    settings = (f"run.dir={tmp_path}", f"server.aggregation={rule}", "strategy.name=ilp")
    whole = run_on("inprocess", lora(*settings, "run.name=whole", "federation.rounds=3"))
    part = lora(*settings, "run.name=part", "federation.rounds=2")
    folder = run_on("inprocess", part)
    forget_workbenches()
    more = part.federation.model_copy(update={"rounds": 3})
    resume = part.run.model_copy(update={"resume": str(folder)})
    run_on("inprocess", part.model_copy(update={"federation": more, "run": resume}))
    first, second = (latest_checkpoint(f) for f in (whole, folder))
    assert first is not None
    assert second is not None
    assert any("lora_" in name for name in first.layers)
    assert ("base_layer" in "".join(first.layers)) is (rule == "stack")
    for name, value in first.layers.items():
        np.testing.assert_array_equal(value, second.layers[name], err_msg=name)
    scores = [[row["accuracy"] for row in read_lines(f / "metrics.jsonl")] for f in (whole, folder)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("storage", ["int8", "4bit", "bfloat16"])
def test_adapters_train_over_quantised_weights(storage: str) -> None:
    """The base takes less memory, stays what it is, and is the same model to the server."""
    settings = ("task.name=digits", "model.lora-rank=2", "model.tuning=lora", "strategy.name=top")
    quick = ("federation.clients-per-round=2", "train.local-steps=2")
    plain = configured(*settings, *quick)
    config = configured(*settings, *quick, f"model.storage={storage}")
    resident = workbench(config.to_flat()).resident
    before = resident.base_state()
    done = run(config, 2)
    learned(done, config)
    held = resident.tensors["blocks.0.attn.qkv.base_layer.weight"].data
    assert isinstance(held, Stored)
    assert isinstance(held.held, Quantised) is (storage != "bfloat16")
    whole = workbench(plain.to_flat()).resident
    assert resident.base == whole.base
    assert resident.nbytes < whole.nbytes * {"int8": 0.4, "4bit": 0.3, "bfloat16": 0.6}[storage]
    for name, value in done.before.items():
        np.testing.assert_array_equal(value, before[name])
    exact = run(plain, 2)
    loss, other = (r.rounds[-1].metrics["train_loss"] for r in (done, exact))
    # Four bits are coarse for a model of 80 channels.
    assert loss == pytest.approx(other, rel={"4bit": 0.3}.get(storage, 0.1))


def test_layers_prints_adapters_and_their_memory() -> None:
    settings = ["task.name=digits", "model.tuning=lora", "model.lora-rank=2"]
    shown = CliRunner().invoke(app, ["layers", *settings])
    assert shown.exit_code == 0, shown.output
    layers = workbench(configured(*settings).to_flat()).resident.layers
    for layer in layers.layers:
        rows = [line for line in shown.output.splitlines() if f" {layer.name} " in line]
        assert f" {layer.elements:,} " in rows[0]
    assert "all weights of the blocks but their adapters" in " ".join(shown.output.split())
    assert "memory" in shown.output
    # What travels to clients, with the weights that stacking changes.
    stacked = CliRunner().invoke(app, ["layers", *settings, "server.aggregation=stack"])
    [first] = [line for line in stacked.output.splitlines() if " blocks.0 " in line][:1]
    weights = 4 * 12 * 80 * 80
    assert f" {(4 * layers['blocks.0'].elements + weights) / 1e6:.3f} " in first


def test_a_run_folder_says_what_was_sent(tmp_path: Path) -> None:
    folder = run_on("inprocess", lora(f"run.dir={tmp_path}", "federation.rounds=1"))
    rows = json.loads((folder / "layers.json").read_text())["layers"]
    sizes = {row["name"]: row["bytes"] for row in rows}
    [line] = read_lines(folder / "ledger.jsonl")
    assert set(line["bytes_up"]) == {sizes["blocks.2"] + sizes["blocks.3"] + sizes["head"]}
