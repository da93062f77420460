"""A node's own limits in whole runs: the server can ask for less, never for more."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import RecordDict

from layerfed.client.training import train_update
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, NodeConfig, Scalar
from layerfed.engine import run_on
from layerfed.runs import read_lines
from tests.e2e.test_inprocess import Recorded, configured, start

TWO = ["federation.clients=2", "federation.clients-per-round=2"]


def test_the_server_lowers_a_nodes_budget_and_never_raises_it(tmp_path: Path) -> None:
    settings: list[dict[str, Scalar]] = [{"budget": 1}, {"budget": 5}, {}]
    everyone = ["federation.clients=3", "federation.clients-per-round=3", "federation.rounds=1"]
    everyone += ["train.local-steps=1"]
    for kind, budgets in {"identical": [1, 3, 3], "per-node": [1, 5, 2]}.items():
        nodes = settings if kind == "identical" else [*settings[:2], {"budget": 2}]
        config = configured(
            tmp_path, *everyone, f"budget.kind={kind}", "budget.layers=3", "strategy.name=top"
        )
        (row,) = read_lines(run_on("inprocess", config, nodes=nodes) / "selection.jsonl")
        assert row["budgets"] == budgets
        assert [sum(mask) for mask in row["masks"]] == budgets


def test_a_node_refuses_a_mask_above_its_budget_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`full` asks every client for all layers; a node that allows two layers trains none."""
    trained: list[object] = []
    monkeypatch.setattr(
        "layerfed.client_app.train_update",
        lambda *a, **k: trained.append(a) or train_update(*a, **k),
    )
    everyone = [*TWO, "federation.rounds=1"]
    config = configured(tmp_path, *everyone, "strategy.name=full", "federation.min-replies=1")
    folder = run_on("inprocess", config, nodes=[{"budget": 2}])
    (row,) = read_lines(folder / "metrics.jsonl")
    assert len(trained) == row["clients"] == 1
    (failure,) = row["failure_reasons"]
    assert "asks for 12 layers that cost 12 layers; this node's own budget is 2" in str(failure)


@pytest.mark.parametrize("known", [True, False], ids=["remembered", "restarted node"])
def test_the_refusal_needs_nothing_from_the_server(known: bool, tmp_path: Path) -> None:
    """A budget in another unit than the run's is translated, and holds after a restart too."""
    config = configured(tmp_path, "strategy.name=top", "federation.clients-per-round=1")
    node = {"budget": 3e8, "budget-unit": "flops"}
    grid = Recorded(config, nodes=[node] * config.federation.clients)
    start(grid, config)
    ((question, _),) = grid.trained()
    mask = list(question.content.config_records["config"]["mask"])
    assert sum(mask) == 1
    question.content.config_records["config"]["mask"] = [1] * len(mask)
    if not known:
        grid._contexts[question.metadata.dst_node_id].state = RecordDict()
    (identity,) = grid.push_messages([question])
    (reply,) = grid.pull_messages([identity])
    assert "MaskRefused" in reply.error.reason


def test_auto_measures_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configured(
        *(tmp_path, "budget.kind=per-node", "federation.rounds=1", "train.batch-size=32"),
        *(*TWO, "train.local-steps=1"),
    )
    budgets = []
    for free in (4e6, 5e7, 1e12):
        monkeypatch.setattr("layerfed.client.workbench.free_memory", lambda device, free=free: free)
        nodes: list[dict[str, Scalar]] = [{"budget": "auto"}] * config.federation.clients
        (row,) = read_lines(run_on("inprocess", config, nodes=nodes) / "selection.jsonl")
        assert len(set(row["budgets"])) == 1
        budgets.append(row["budgets"][0])
    assert budgets[0] < budgets[1] < budgets[2] == 12


def test_a_node_slower_than_it_allows_is_left_out(tmp_path: Path) -> None:
    config = configured(tmp_path, "strategy.name=top", *TWO)
    grid = Recorded(config, nodes=[{"max-step-seconds": 1e-9}])
    start(grid, config)
    errors = [r.error.reason for _, r in grid.trained() if r.has_error()]
    assert len(errors) == 1
    assert "StepTooSlow: training step 2 took" in errors[0]


def test_a_nodes_own_path_reaches_its_task(tmp_path: Path) -> None:
    node = NodeConfig.read({"partition-id": 0, "data": "/srv/rows"})
    with pytest.raises(ConfigError, match=r"task\.data = '/srv/rows' has no use for .* 'digits'"):
        workbench(configured(tmp_path).to_flat(), node)
