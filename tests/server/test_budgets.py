"""Budgets of clients, which depend on the seed and the partition alone."""

from __future__ import annotations

import numpy as np
import pytest

from layerfed.config import BudgetConfig, ConfigError
from layerfed.exchange import Description
from layerfed.models.layers import LayerMap, layer_costs
from layerfed.server.budgets import Budgets
from tests.conftest import BLOCKS, WIDTH, TinyNet

LAYERS = LayerMap.from_model(TinyNet())
UNIT = np.ones(12)


def client(partition: int, budget: float | None = None) -> Description:
    return Description(partition, 100, budget)


def half_normal(seed: int = 0, **keys: float) -> Budgets:
    return Budgets(BudgetConfig(kind="half-normal", **keys), UNIT, seed)  # type: ignore[arg-type]


def drawn(budgets: Budgets, partitions: range = range(200)) -> list[float]:
    return [budgets.of(client(p)) for p in partitions]


# -------------------------------------------------------------------------------------- costs
def test_every_layer_costs_one_where_layers_are_counted() -> None:
    assert layer_costs(LAYERS).tolist() == [1.0] * BLOCKS


def test_costs_in_parameters_and_bytes_are_those_of_the_block() -> None:
    parameters = WIDTH * WIDTH + WIDTH + 2 * WIDTH  # linear, BatchNorm's scale and shift
    buffers = 2 * WIDTH * 4 + 8  # running mean and variance, and the batch count
    assert layer_costs(LAYERS, "parameters").tolist() == [parameters] * BLOCKS
    assert layer_costs(LAYERS, "bytes").tolist() == [4 * parameters + buffers] * BLOCKS


# ---------------------------------------------------------------------------------- identical
def test_identical_budgets_are_the_same_for_all() -> None:
    budgets = Budgets(BudgetConfig(layers=2), UNIT, seed=3)
    assert set(drawn(budgets)) == {2.0}
    assert budgets.of(client(0, budget=9.0)) == 2.0, "what a node states of itself is ignored"
    assert Budgets.identical(3, LAYERS).of(client(5)) == 3
    assert Budgets.identical(3, LAYERS).costs.tolist() == [1.0] * BLOCKS


# -------------------------------------------------------------------------------- half-normal
def test_half_normal_budgets_are_whole_and_reach_both_bounds() -> None:
    assert set(drawn(half_normal(min=1, max=4))) == {1.0, 2.0, 3.0, 4.0}
    assert set(drawn(half_normal(min=3, max=3))) == {3.0}


def test_half_normal_budgets_are_more_often_small_than_large() -> None:
    counts = np.bincount(np.array(drawn(half_normal(min=1, max=4), range(2000)), dtype=int))
    assert counts[1] + counts[2] > 1.5 * (counts[3] + counts[4])
    # With σ = (4 - 1) / 2 and z standard normal, P(R = 2) = P(0.5 ≤ |z|σ < 1.5) / P(|z|σ < 3.5).
    assert counts[2] / 2000 == pytest.approx(0.43, abs=0.05)


def test_half_normal_budgets_in_other_units_are_fractions_within_the_bounds() -> None:
    config = BudgetConfig(kind="half-normal", unit="parameters", min=1.5, max=3.5)
    budgets = [Budgets(config, UNIT, 0).of(client(p)) for p in range(200)]
    assert min(budgets) >= 1.5
    assert max(budgets) <= 3.5
    assert len(set(budgets)) == 200


def test_a_clients_budget_follows_the_seed_and_its_partition_only() -> None:
    """Defect 11 of the released code: budgets were drawn before the seed was set."""
    np.random.seed(1)
    forward = drawn(half_normal(seed=7), range(30))
    np.random.seed(2)
    same = half_normal(seed=7)
    backward = {p: same.of(client(p)) for p in reversed(range(30))}
    assert forward == [backward[p] for p in range(30)]
    assert same.of(client(11)) == same.of(client(11)) == forward[11]
    assert same.of(Description(11, 5, budget=99.0, partitions=64)) == forward[11]
    assert drawn(half_normal(seed=8), range(30)) != forward


@pytest.mark.parametrize(
    ("low", "high", "key", "value"),
    [(1.5, 1.5, "min", "1.5"), (1.5, 3, "min", "1.5"), (1, 2.5, "max", "2.5")],
)
def test_whole_budgets_need_whole_bounds(low: float, high: float, key: str, value: str) -> None:
    """There is no whole number between 1.6 and 1.9, and drawing one would never end."""
    with pytest.raises(ConfigError, match=rf"budget\.{key} = {value} is no whole number"):
        half_normal(min=low, max=high)


# ----------------------------------------------------------------------------------- per node
def test_budgets_per_node_are_what_the_node_states() -> None:
    budgets = Budgets(BudgetConfig(kind="per-node"), UNIT, seed=0)
    assert budgets.of(client(3, budget=2.5)) == 2.5
    assert budgets.of(client(3, budget=0.0)) == 0.0


def test_a_node_that_states_no_budget_is_named_with_what_to_do() -> None:
    budgets = Budgets(BudgetConfig(kind="per-node"), UNIT, seed=0)
    with pytest.raises(ConfigError) as caught:
        budgets.of(client(3))
    message = str(caught.value)
    assert "partition 3 states no budget" in message
    assert '--node-config "budget=2"' in message
    assert "budget.kind = 'per-node'" in message
    assert "\n" not in message


# ------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("config", "says"),
    [
        (BudgetConfig(layers=13), ["budget.layers = 13", "12 selectable layers cost 12 layers"]),
        (BudgetConfig(kind="half-normal", max=13), ["budget.max = 13", "12 layers", "full"]),
        (
            BudgetConfig(kind="half-normal", min=13, max=14),
            ["budget.min = 13", "12 selectable layers"],
        ),
        (
            BudgetConfig(layers=0.5),
            ["budget.layers = 0.5", "below the least that a client can train (1)"],
        ),
        (BudgetConfig(layers=0), ["budget.layers = 0 layers", "below the least"]),
        (
            BudgetConfig(kind="half-normal", min=0, max=0),
            ["budget.max = 0", "below the least that a client can train"],
        ),
    ],
)
def test_impossible_budgets_name_key_and_value(config: BudgetConfig, says: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        Budgets(config, UNIT, seed=0)
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in says if text not in message] == []


def test_bounds_are_compared_in_the_unit_of_the_budget() -> None:
    costs = np.array([10.0, 40.0, 20.0])
    for accepted in (10, 70):
        Budgets(BudgetConfig(unit="parameters", layers=accepted), costs, seed=0)
    with pytest.raises(ConfigError, match=r"budget\.layers = 71 .* cost 70 parameters"):
        Budgets(BudgetConfig(unit="parameters", layers=71), costs, seed=0)
    with pytest.raises(
        ConfigError, match=r"9 parameters is below the least that a client can train \(10\)"
    ):
        Budgets(BudgetConfig(unit="parameters", layers=9), costs, seed=0)


def test_only_the_keys_of_the_chosen_kind_are_checked() -> None:
    """The default `max` of 4 must not stand in the way of identical budgets on three layers."""
    assert Budgets(BudgetConfig(layers=1), np.ones(3), seed=0).of(client(0)) == 1
    assert Budgets(BudgetConfig(kind="per-node", layers=99), np.ones(3), seed=0)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (BudgetConfig(layers=2), "2 layers each"),
        (BudgetConfig(kind="half-normal"), "half-normal on [1, 4] layers"),
        (BudgetConfig(kind="per-node", unit="bytes"), "each node's own, in bytes"),
    ],
)
def test_budgets_describe_themselves(config: BudgetConfig, text: str) -> None:
    assert str(Budgets(config, UNIT, seed=0)) == text


# ------------------------------------------------------------------------- measured on devices
@pytest.mark.parametrize("unit", ["flops", "seconds", "memory"])
def test_costs_measured_on_devices_are_those_the_client_states(unit: str) -> None:
    assert layer_costs(LAYERS, unit) is None
    budgets = Budgets(BudgetConfig(unit=unit, layers=5), None, seed=0)
    measured = Description(3, 100, costs=(1.0, 2.0), depth_costs=(4.0, 0.5))
    costs, depth = budgets.costs_of(measured)
    assert (costs.tolist(), depth.tolist()) == ([1.0, 2.0], [4.0, 0.5])
    with pytest.raises(ConfigError, match=rf"'{unit}' .* partition 7 stated no costs"):
        budgets.costs_of(client(7))


def test_costs_that_are_the_same_for_all_have_no_depth() -> None:
    costs, depth = Budgets(BudgetConfig(layers=1), UNIT, seed=0).costs_of(client(0))
    assert (costs.tolist(), depth.tolist()) == ([1.0] * 12, [0.0] * 12)


def test_a_measured_budget_is_refused_only_where_it_fits_nobody() -> None:
    slow = Description(0, 100, costs=(10.0, 10.0), depth_costs=(5.0, 2.0))  # 12 to 25
    fast = Description(1, 100, costs=(1.0, 1.0), depth_costs=(0.5, 0.5))  # 1.5 to 2.5

    def check(limit: float) -> None:
        config = BudgetConfig(unit="seconds", layers=limit)
        Budgets(config, None, seed=0).check_measured([slow, fast])

    for fits_one in (1.5, 2.5, 11, 12, 25):  # 11: nothing for the slow one, all for the fast one
        check(fits_one)
    with pytest.raises(
        ConfigError, match=r"1 seconds is below the least that a client can train \(12\)"
    ):
        check(1)
    with pytest.raises(ConfigError, match=r"budget\.layers = 26 .* cost 25 seconds"):
        check(26)


# ------------------------------------------------------------------------------ kept to or not
@pytest.mark.parametrize(
    "keys",
    [
        {"layers": 0},
        {"layers": 99},
        {"unit": "bytes", "layers": 1},
        {"kind": "half-normal", "min": 1.5, "max": 99},
    ],
)
def test_budgets_that_nobody_keeps_to_are_not_checked(keys: dict[str, object]) -> None:
    """`full` trains everything: a comparison may have budgets that mean nothing to it."""
    config = BudgetConfig(**keys)  # type: ignore[arg-type]
    costs = layer_costs(LAYERS, config.unit)
    with pytest.raises(ConfigError, match=r"budget\.(layers|min|max) = "):
        Budgets(config, costs, 0)
    Budgets(config, costs, 0, kept=False).check_measured([])
