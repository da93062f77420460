"""Ranks by budget: what a client trains, sends and is recorded with, and the mean of the products."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, RunConfig, Scalar
from layerfed.engine import run_on
from layerfed.exchange.instruction import TrainInstruction
from layerfed.models.factors import factor_pairs
from layerfed.server_app import build_strategy
from layerfed.strategies import STRATEGIES, checked
from tests.candidates import candidates
from tests.fakes import Recorded
from tests.strategies.test_compositions import Wire
from tests.tiny_task import check_resumed, configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")

# Each of the four blocks has one adapter of 4 ranks; a rank of it has 6 + 6 parameters.
RANK, ONE = 4, 4 * 12


def ranks(*settings: str) -> RunConfig:
    return configured(
        *("strategy.name=ranks", "model.tuning=lora", f"model.lora-rank={RANK}"),
        *("server.aggregation=svd", "budget.unit=parameters", "budget.kind=per-node"),
        *settings,
    )


def nodes(config: RunConfig) -> list[dict[str, Scalar]]:
    """Return budgets of 0 to 5 ranks, one parameter short of or beyond what they take."""
    found = [ONE - 1, ONE, 2 * ONE, 3 * ONE - 1, 4 * ONE, 5 * ONE]
    return [{"budget": b, "budget-unit": "parameters"} for b in found]


EXPECTED = (0, 1, 2, 2, 4, 4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_client_trains_and_sends_the_ranks_it_affords(optimizer: str) -> None:
    """Weight decay would move the other ranks too, and momentum has no part in them."""
    settings = (f"train.optimizer={optimizer}", "train.weight-decay=0.5", "train.clip-gradient=1")
    config = ranks("federation.clients-per-round=6", *settings)
    grid = Recorded(config, nodes=nodes(config))
    done = run(config, 2, grid)
    layers = workbench(config.to_flat()).resident.layers
    pairs = [pair for block in layers.blocks for pair in factor_pairs(block.parameters)]
    for record in done.rounds:
        assert record.failures == []
        assert record.selection is not None
        found = dict(zip(record.selection.clients, record.selection.choice.ranks, strict=True))
        assert found == dict(enumerate(EXPECTED))
        for client, rank in enumerate(EXPECTED):
            head = layers.head.bytes
            assert record.ledger.rows[client].up == head + 4 * ONE * rank
    for asked, reply in grid.trained():
        rank = EXPECTED[int(asked.content.config_records["config"]["client"])]
        arrays = reply.content.array_records["arrays"]
        for a, b in pairs:
            if rank == 0:
                assert a not in arrays
                continue
            assert (tuple(arrays[a].shape), tuple(arrays[b].shape)) == ((rank, 6), (6, rank))
            assert np.asarray(arrays[b].numpy()).any()


def test_the_other_ranks_are_part_of_the_model_and_of_the_product() -> None:
    """The server's adapters are the best ones for Σ p_i B_i·A_i, with all ranks of each client."""
    config = ranks("federation.clients-per-round=6")
    # After a round all ranks have an effect.
    first = run(config, 1, Recorded(config, nodes=nodes(config))).after
    grid = Recorded(config, nodes=nodes(config))
    after = run(config, 2, grid).after
    layers = workbench(config.to_flat()).resident.layers
    replies = [(m, r) for m, r in grid.trained() if r.content.config_records and _round(m) == 2]
    assert len(replies) == 6
    for block in layers.blocks:
        [(a, b)] = factor_pairs(block.parameters)
        assert first[b][:, RANK - 1].any()
        total, weight = 0.0, 0.0
        for asked, reply in replies:
            rank = EXPECTED[int(asked.content.config_records["config"]["client"])]
            if not rank:
                continue
            count = float(reply.content.metric_records["metrics"]["examples"])
            own = {name: first[name].astype(float) for name in (a, b)}
            arrays = reply.content.array_records["arrays"]
            own[a][:rank] += arrays[a].numpy()
            own[b][:, :rank] += arrays[b].numpy()
            total, weight = total + count * own[b] @ own[a], weight + count
        u, sizes, v = np.linalg.svd(total / weight)
        best = (u[:, :RANK] * sizes[:RANK]) @ v[:RANK]
        np.testing.assert_allclose(after[b] @ after[a], best, rtol=0, atol=1e-6)


def _round(message: object) -> int:
    return int(message.content.config_records["config"]["round"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_it_is_the_same_over_the_wire_and_after_a_resume(codec: str) -> None:
    settings = ("budget.kind=half-normal", f"budget.min={ONE}", f"budget.max={4 * ONE}")
    config = ranks(*settings, f"exchange.codec={codec}")
    here, there = run(config, 2), run(config, 2, Wire(config))
    assert [record.failures for record in (*here.rounds, *there.rounds)] == [[]] * 4
    assert all(np.array_equal(there.after[name], here.after[name]) for name in here.after)
    chosen = here.rounds[0].selection.choice.ranks  # type: ignore[union-attr]
    assert len(set(chosen.tolist())) > 1  # type: ignore[union-attr]
    if codec != "int8":  # whose clients remember errors
        check_resumed(config)


def test_the_run_folder_has_each_clients_rank(tmp_path: Path) -> None:
    budget = ("budget.kind=identical", f"budget.layers={2 * ONE}", "federation.rounds=1")
    folder = run_on("inprocess", ranks(*budget, f"run.dir={tmp_path}"))
    rows = [json.loads(line) for line in (folder / "clients.jsonl").read_text().splitlines()]
    assert [row["rank"] for row in rows] == [2] * 4
    [line] = [json.loads(line) for line in (folder / "selection.jsonl").read_text().splitlines()]
    assert line["ranks"] == [2] * 4


def test_a_budget_of_one_rank_is_less_than_a_layer_and_is_accepted() -> None:
    """One of the eight ranks of all four blocks costs half of what one block does."""
    settings = ("model.lora-rank=8", "budget.kind=identical")
    (record,) = run(ranks(*settings, f"budget.layers={ONE}")).rounds
    assert record.selection is not None
    assert record.selection.choice.ranks.tolist() == [1] * 4  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"47 parameters is below the least .* \(48\)"):
        run(ranks(*settings, f"budget.layers={ONE - 1}"))


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("budget.unit=layers", "r ranks do not cost r times as much as one in other units"),
        ("server.aggregation=mean", "factors of different ranks have no mean"),
    ],
)
def test_what_has_no_ranks_to_count_is_refused(setting: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        checked(ranks(setting))
    assert not STRATEGIES["ranks"].exists(ranks(setting))
    assert STRATEGIES["ranks"].exists(ranks())


@pytest.mark.parametrize("rank", [0, -1, 1.5, "all"])
def test_a_wrong_rank_is_refused_by_the_client(rank: Scalar) -> None:
    config = ranks()
    grid = Recorded(config, nodes=nodes(config))
    run(config, 1, grid)
    message = next(m for m, _ in grid.trained() if "rank" in m.content.config_records["config"])
    message.content.config_records["config"]["rank"] = rank
    with pytest.raises(ValueError, match="ranks of each adapter"):
        TrainInstruction.read(message, 4)


def test_a_skipped_block_costs_no_rank() -> None:
    rule = build_strategy(ranks(), workbench(ranks().to_flat()).resident.layers)
    case = candidates([2 * ONE], [[ONE] * 4])
    halved = case.running(np.array([[True, False, True, False]]))
    assert [rule.select(each).ranks.tolist() for each in (case, halved)] == [[2], [RANK]]
