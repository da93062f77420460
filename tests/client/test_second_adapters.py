"""Second adapters (`model.personal-rank`): plain SGD on each client, and never averaged."""

from __future__ import annotations

from copy import deepcopy
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.client import prefix
from layerfed.client.memory import weights_in_training
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, RunConfig
from layerfed.config.seeding import Stream, generator
from layerfed.engine import run_on
from layerfed.exchange import open_store
from layerfed.export import export_run
from layerfed.export.saved import SavedRun
from layerfed.models.adapters import merge_adapters
from layerfed.models.layers import layer_costs
from layerfed.strategies import checked
from layerfed.task import load_task
from tests.client.test_personal import SECOND
from tests.conftest import BLOCKS, TinyNet
from tests.fakes import Recorded
from tests.tiny_task import configured, run

TINY = "task.name=tests.tiny_task:TinyTask"
CPU = torch.device("cpu")
SHARED, OWN, ALPHA = 2, 3, 16.0


def second(*settings: str) -> RunConfig:
    return configured(TINY, *SECOND, "task.local-test=0.3", "strategy.name=full", *settings)


class Both(nn.Module):
    """W x + (α/r)·B·A·x + (α/r')·B'·A'·x, written out."""

    def __init__(self, linear: nn.Linear, start: dict[str, np.ndarray]) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.factors = nn.ParameterDict({n: torch.tensor(x) for n, x in start.items()})

    def forward(self, x: Tensor) -> Tensor:
        f = self.factors
        shared = x @ f["a"].T @ f["b"].T * (ALPHA / SHARED)
        return self.linear(x) + shared + x @ f["a2"].T @ f["b2"].T * (ALPHA / OWN)


PEFT = {"a": "lora_A.default", "b": "lora_B.default"}
PEFT |= {"a2": "lora_A.personal", "b2": "lora_B.personal"}


def written_out(config: RunConfig) -> nn.Module:
    """Return the model as it begins, with both adapters in each block."""
    resident, model = workbench(config.to_flat()).resident, load_task(config).build_model()
    assert isinstance(model, TinyNet)
    model.requires_grad_(False)
    for i, block in enumerate(model.blocks):
        names = {short: f"blocks.{i}.linear.{n}.weight" for short, n in PEFT.items()}
        block.linear = Both(block.linear, {s: resident.values(n) for s, n in names.items()})
        block.drop = nn.Identity()
    model.norm.requires_grad_(True)
    model.head.requires_grad_(True)
    return model.eval()  # BatchNorm's statistics stay as they are


@pytest.fixture
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)


def ours(name: str) -> str:
    """Return the name that a parameter has in our model."""
    before, dot, short = name.partition(".factors.")
    return f"{before}.{PEFT[short]}.weight" if dot else name


@pytest.mark.usefixtures("without_dropout")
def test_rounds_are_those_of_both_adapters_by_hand() -> None:
    """Clients' scores are those of the averaged adapters with their own second ones."""
    config = second("federation.clients-per-round=6")
    models = {client: written_out(config) for client in range(6)}
    done, task = run(config, 3), load_task(config)
    for number, record in enumerate(done.rounds, 1):
        assert record.failures == []
        total, sums = 0, dict[str, Tensor]()
        for client, model in models.items():
            examples = task.client_examples(client)[0]
            trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
            sgd = torch.optim.SGD(trained.values(), config.train.lr)
            rng = generator(config.run.seed, Stream.TRAIN, number, client)
            batches = examples.shuffled(config.train.batch_size, CPU, rng)
            for batch in islice(batches, config.train.local_steps):
                sgd.zero_grad()
                task.loss(model, batch).backward()
                sgd.step()
            total += len(examples)
            for name, value in trained.items():
                if not name.endswith(("a2", "b2")):
                    term = len(examples) * value.detach().double()
                    sums[name] = sums.get(name, 0) + term
        for client, model in models.items():
            model.load_state_dict({n: t / total for n, t in sums.items()}, strict=False)
            held_out = task.client_examples(client)[1]
            batch = next(held_out.in_order(1000, CPU))
            stated = record.numbers.rows[client]
            with torch.no_grad():
                loss = float(task.loss(model, batch))
            assert stated["client_loss"] == pytest.approx(loss, rel=1e-4)
    moved = 0
    for name, total_of in sums.items():
        found = done.after[ours(name)]
        np.testing.assert_allclose(found, total_of / total, rtol=1e-4, atol=1e-6, err_msg=name)
        moved += not np.array_equal(found, done.before[ours(name)])
    assert moved == len(sums)
    assert not any("personal" in name for name in done.after)
    first, other = (models[client].state_dict() for client in (0, 1))
    own = [name for name in first if name.endswith(("a2", "b2"))]
    assert len(own) == 2 * BLOCKS
    assert not any(torch.equal(first[name], other[name]) for name in own)


def test_the_two_adapters_begin_differently() -> None:
    """From equal ones they would move alike."""
    factors = written_out(second()).state_dict()
    a, b = (factors[f"blocks.0.linear.factors.{name}"] for name in ("a", "a2"))
    assert not torch.equal(a, b[:SHARED])


def test_budgets_count_what_is_trained_and_bytes_what_is_sent() -> None:
    config = second()
    layers = workbench(config.to_flat()).resident.layers
    plain = workbench(second("model.personal-rank=0").to_flat()).resident
    one = 6 + 6
    costs = {unit: layer_costs(layers, unit) for unit in ("parameters", "bytes")}
    assert costs["parameters"].tolist() == [(SHARED + OWN) * one] * BLOCKS  # type: ignore[union-attr]
    assert costs["bytes"].tolist() == [4 * SHARED * one] * BLOCKS  # type: ignore[union-attr]
    model = workbench(config.to_flat()).resident.model
    chosen = ["blocks.3", "head"]
    more = weights_in_training(model, layers, chosen) - weights_in_training(
        plain.model, plain.layers, chosen
    )
    assert more == 4 * OWN * one * (BLOCKS + 1)  # held in every block, and copied in one
    assert workbench(config.to_flat()).resident.base == plain.base
    up = {row.up for row in run(config).rounds[0].ledger.rows.values()}
    assert up == {
        row.up for row in run(second("model.personal-rank=0")).rounds[0].ledger.rows.values()
    }


def test_a_second_adapter_moves_only_with_its_block() -> None:
    config = second("strategy.name=top", "budget.layers=2", "federation.clients-per-round=6")
    grid, layers = Recorded(config), workbench(config.to_flat()).resident.layers
    run(config, 2, grid)
    [token] = {m.content.config_records["config"]["run"] for m, _ in grid.trained()}
    for client in range(6):
        kept = open_store("", 10.0).recall(f"{token}/{client}/personal")
        assert kept is not None
        names = {name.partition("/")[2] for name in kept} - {""}
        assert names == {*layers["blocks.2"].own, *layers["blocks.3"].own}


def test_the_shared_part_is_exported_and_the_rest_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lora = [setting for setting in SECOND if "personal=" not in setting]
    settings = ("task.name=digits", "task.local-test=0.2", "federation.rounds=1")
    config = configured(*lora, *settings, "strategy.name=top", f"run.dir={tmp_path}")
    folder = run_on("inprocess", config)
    saved = SavedRun.open(folder)
    assert "second adapters stayed on the clients" in caplog.text
    batch = next(saved.task.test_examples().in_order(4, CPU))
    with torch.no_grad():
        before = saved.task.logits(saved.model, batch)
        merged = deepcopy(saved.model)
        for name, parameter in saved.model.named_parameters():
            if ".personal." in name:
                parameter.add_(1.0)
        assert not torch.allclose(saved.task.logits(saved.model, batch), before)
        merge_adapters(saved.model)  # without the second adapters, whatever they are
        torch.testing.assert_close(saved.task.logits(saved.model, batch), before, rtol=0, atol=1e-4)
    assert not any("lora" in name for name, _ in saved.model.named_parameters())
    assert any("lora" in name for name, _ in merged.named_parameters())
    export_run(SavedRun.open(folder), tmp_path / "out")
    assert (tmp_path / "out/model.safetensors").exists()


def test_ranks_count_bytes_beside_a_second_adapter() -> None:
    settings = ("strategy.name=ranks", "server.aggregation=svd")
    with pytest.raises(ConfigError, match=r"second ones of model\.personal-rank are trained whole"):
        checked(second(*settings, "budget.unit=parameters"))
    done = run(second(*settings, "budget.unit=bytes", f"budget.layers={4 * 12 * BLOCKS}"), 2)
    assert [record.failures for record in done.rounds] == [[], []]
    assert set(done.rounds[0].selection.choice.ranks) == {1}  # type: ignore[union-attr,arg-type]


def test_layers_names_them() -> None:
    lora = [setting for setting in SECOND if "personal=" not in setting]
    shown = CliRunner().invoke(app, ["layers", "task.name=digits", "task.local-test=0.2", *lora])
    assert shown.exit_code == 0, shown.output
    assert "selectable, with personal adapters" in " ".join(shown.output.split())


def test_outputs_of_frozen_blocks_are_not_those_of_another_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each client's second adapters are part of the blocks below the lowest one in training."""
    monkeypatch.setattr(prefix, "TYPE", torch.float32)
    monkeypatch.setattr(prefix, "LEAST", 0.0)
    settings = ("strategy.name=random", "federation.clients-per-round=6", "train.local-steps=3")
    plain, kept = run(second(*settings), 4), run(second(*settings, "train.prefix-cache=10"), 4)
    assert sum(record.metrics["prefix_hits"] or 0 for record in kept.rounds) > 0
    for record, other in zip(kept.rounds, plain.rounds, strict=True):
        for client, numbers in other.numbers.rows.items():
            found = record.numbers.rows[client]
            for name in ("train_loss", "client_loss"):
                assert found[name] == pytest.approx(numbers[name], rel=1e-5), (client, name)
