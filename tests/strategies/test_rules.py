"""The rules that select without a solver, against masks worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

from layerfed.config import BudgetConfig, ConfigError, RunConfig, StrategyConfig
from layerfed.models.layers import LayerMap, layer_costs
from layerfed.server.budgets import Budgets
from layerfed.server.candidates import Candidates
from layerfed.server_app import build_strategy
from layerfed.strategies import (
    SNR,
    STRATEGIES,
    Both,
    Random,
    SelectiveStrategy,
    option_keys,
)
from tests.candidates import any_candidates, candidates, within_budgets
from tests.conftest import TinyNet

LAYERS = LayerMap.from_model(TinyNet())
UNIT = [1.0] * 5
RULES = ["top", "bottom", "both", "random", "cyclic", "snr", "rgn"]


def strategy(name: str) -> SelectiveStrategy:
    return STRATEGIES[name](LAYERS, budget=2)


def picks(name: str, given_candidates: Candidates) -> list[list[int]]:
    """Indices of the selected layers, client by client."""
    masks = strategy(name).select(given_candidates).masks
    return [np.flatnonzero(row).tolist() for row in masks]


def test_the_table_holds_exactly_the_strategies_a_configuration_can_name() -> None:
    assert all(cls.name == name for name, cls in STRATEGIES.items())
    assert len(set(STRATEGIES.values())) == len(STRATEGIES)


# ----------------------------------------------------------------------------------- budgets
@pytest.mark.parametrize("name", RULES)
@settings(deadline=None, max_examples=60)
@given(any_candidates())
def test_masks_stay_within_each_clients_own_budget(name: str, case: Candidates) -> None:
    """Defects 5 and 8 of the released code: it used other clients' budgets, and exceeded budgets."""
    masks = strategy(name).select(case).masks
    assert masks.shape == case.costs.shape
    assert masks.dtype == np.bool_
    assert within_budgets(case, masks)


@pytest.mark.parametrize("name", RULES)
@settings(deadline=None, max_examples=60)
@given(any_candidates())
def test_a_clients_mask_depends_on_itself_alone(name: str, case: Candidates) -> None:
    """Defect 5 of the released code: the first client's budget was everyone's."""
    together = strategy(name).select(case).masks
    for i, client in enumerate(case.clients):
        alone = Candidates(
            round=case.round,
            clients=[client],
            budgets=case.budgets[i : i + 1],
            costs=case.costs[i : i + 1],
            depth_costs=case.depth_costs[i : i + 1],
            statistics={n: rows[i : i + 1] for n, rows in case.statistics.items()},
            seed=case.seed,
        )
        np.testing.assert_array_equal(strategy(name).select(alone).masks[0], together[i])


@pytest.mark.parametrize("name", RULES)
def test_whole_budgets_of_unit_cost_are_spent_to_the_last_layer(name: str) -> None:
    """Defect 5 of the released code: each client has a budget of its own."""
    budgets = [0, 1, 2, 3, 4, 5, 9]
    scores = np.random.default_rng(0).random((len(budgets), 5)).tolist()
    table = {"grad_norm_sq": scores, "param_norm_sq": [[1.0] * 5] * len(budgets), "snr": scores}
    counts = [len(row) for row in picks(name, candidates(budgets, UNIT, table))]
    assert counts == [0, 1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("name", [*RULES])
def test_rounding_in_sums_of_costs_forbids_no_layer_that_fits(name: str) -> None:
    """0.1 + 0.2 is above 0.3 in floating point."""
    table = {key: [[1.0, 1.0]] for key in ("grad_norm_sq", "param_norm_sq", "snr")}
    assert picks(name, candidates([0.3], [0.1, 0.2], table)) == [[0, 1]]


def test_costs_may_differ_from_client_to_client() -> None:
    costs = [[1.0, 1.0, 1.0], [1.0, 1.0, 2.0], [3.0, 1.0, 3.0]]
    assert picks("top", candidates([2, 2, 2], costs)) == [[1, 2], [2], []]
    table = {"snr": [[1.0, 2.0, 3.0]] * 3}
    assert picks("snr", candidates([2, 2, 2], costs, table)) == [[1, 2], [2], [1]]


def test_reaching_down_to_the_lowest_layer_is_paid_for_once() -> None:
    """Layers above the lowest one cost nothing but themselves."""
    depth = [3.0, 2.0, 1.0, 0.0]
    table = {"snr": [[9.0, 1.0, 2.0, 3.0]] * 4}
    for name, expected in {
        "top": [[3], [3], [2, 3], [1, 2, 3]],
        "bottom": [[], [], [], [0, 1]],
        "both": [[3], [3], [3], [0, 3]],
        # The best layer alone costs 4; where it does not fit, the next best are taken.
        "snr": [[3], [3], [2, 3], [0, 3]],
    }.items():
        case = candidates([1, 2, 3, 5], [1.0] * 4, table, depth=depth)
        assert picks(name, case) == expected, name


def test_full_selects_everything_whatever_the_budget() -> None:
    assert picks("full", candidates([0, 1, 3], UNIT)) == [[0, 1, 2, 3, 4]] * 3
    assert picks("head", candidates([0, 1, 3], UNIT)) == [[]] * 3


# -------------------------------------------------------------------------------- by position
def test_top_takes_the_layers_nearest_the_output() -> None:
    assert picks("top", candidates([1, 2, 4], UNIT)) == [[4], [3, 4], [1, 2, 3, 4]]


def test_bottom_takes_the_layers_nearest_the_input() -> None:
    assert picks("bottom", candidates([1, 2, 4], UNIT)) == [[0], [0, 1], [0, 1, 2, 3]]


def test_both_halves_the_budget_and_gives_an_odd_layer_to_the_output() -> None:
    """Defect 7 of the released code: two layers were both at the input."""
    expected = [[4], [0, 4], [0, 3, 4], [0, 1, 3, 4], [0, 1, 2, 3, 4]]
    assert picks("both", candidates([1, 2, 3, 4, 5], UNIT)) == expected


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 6, 12])
def test_both_reaches_every_layer_once_for_even_and_odd_models(layers: int) -> None:
    budgets = list(range(1, layers + 1))
    for budget, row in zip(
        budgets, picks("both", candidates(budgets, [1.0] * layers)), strict=True
    ):
        top, bottom = -(-budget // 2), budget // 2
        assert row == [*range(bottom), *range(layers - top, layers)]


def test_positional_rules_stop_at_the_first_layer_that_is_too_dear() -> None:
    """They stay at their end of the model and do not skip a costly layer."""
    costs = [1.0, 5.0, 1.0, 5.0, 1.0]
    assert picks("top", candidates([3], costs)) == [[4]]
    assert picks("bottom", candidates([3], costs)) == [[0]]
    assert picks("both", candidates([3], costs)) == [[0, 4]]
    assert picks("top", candidates([6], costs)) == [[3, 4]]


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (BudgetConfig(layers=1), "budget.layers = 1"),
        (BudgetConfig(layers=1.9), "budget.layers = 1.9"),
        (BudgetConfig(kind="half-normal", min=1, max=1), "budget.max = 1"),
    ],
)
def test_both_is_refused_where_nobody_has_room_for_two_layers(
    config: BudgetConfig, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        Both(LAYERS, budget=Budgets(config, layer_costs(LAYERS), 0))
    message = str(caught.value)
    assert says in message
    assert "both" in message
    assert "room for two layers" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "config",
    [
        BudgetConfig(layers=2),
        BudgetConfig(kind="half-normal", min=1, max=4),
        BudgetConfig(kind="per-node"),
    ],
)
def test_both_is_taken_where_someone_may_have_room_for_two(config: BudgetConfig) -> None:
    assert Both(LAYERS, budget=Budgets(config, layer_costs(LAYERS), 0)).name == "both"


# ---------------------------------------------------------------------------------- by score
def test_snr_takes_the_largest_ratios() -> None:
    table = {"snr": [[0.5, 3.0, 1.0, 2.0, 0.0], [9.0, 1.0, 8.0, 2.0, 7.0]]}
    assert picks("snr", candidates([2, 3], UNIT, table)) == [[1, 3], [0, 2, 4]]
    assert STRATEGIES["snr"].statistics == ("snr",)


def test_snr_in_the_released_codes_form_ranks_by_that_statistic() -> None:
    rule = SNR(LAYERS, form="code")
    assert rule.statistics == ("snr_code",)
    table = {"snr_code": [[0.5, 3.0, 1.0, 2.0, 0.0]]}
    assert np.flatnonzero(rule.select(candidates([2], UNIT, table)).masks[0]).tolist() == [1, 3]


def test_each_strategy_takes_its_own_settings_from_the_configuration() -> None:
    changed = {
        "strategy.consistency": -2.0,
        "strategy.consistency-scale": "raw",
        "strategy.solver": "milp",
        "strategy.solver-seconds": 3.0,
        "strategy.solver-gap": 0.1,
        "strategy.solver-rounding": 0.0,
        "strategy.statistic": "grad_mean_sq",
        "strategy.penalty": "affordable",
        "strategy.switching": 0.5,
        "strategy.diversity": 2.0,
        "strategy.allocation": "bottleneck",
        "strategy.period": 4,
        "strategy.probe-batches": 3,
        "strategy.probe-examples": 5,
        "strategy.probe": "after",
        "strategy.probe-share": 0.5,
        "strategy.form": "code",
        "strategy.resample-steps": 2,
        "strategy.warmup-rounds": 5,
        "strategy.side": "client",
        "strategy.fraction": 0.25,
        "strategy.recycled": 0.75,
        "strategy.norm": "l1",
    }
    known = {f"strategy.{field.replace('_', '-')}" for field in StrategyConfig.model_fields}
    known |= set(option_keys())
    # The theory's terms need a whole probe before training.
    assert set(changed) == known - {"strategy.name", "strategy.options", "strategy.theory"}, (
        "or a setting is wired to nothing"
    )
    theory = RunConfig.from_flat({"strategy.theory": True, "strategy.name": "top"})
    assert build_strategy(theory, LAYERS).settings.theory
    budget = {"budget.layers": 2.0, "train.local-steps": 7}
    taken: dict[str, object] = {}
    for name in STRATEGIES:
        config = RunConfig.from_flat({**changed, **budget, "strategy.name": name})
        built = build_strategy(config, LAYERS)
        rounds = built.settings
        assert (rounds.period, rounds.probe_batches, rounds.probe_share) == (4, 3, 0.5)
        assert rounds.local_steps is not None
        assert rounds.local_steps(100) == 7
        taken |= vars(rounds) | built.options.model_dump()
    for key, value in changed.items():
        attribute = key.removeprefix("strategy.").replace("-", "_")
        assert taken[attribute] == value, key


def test_rgn_takes_the_largest_gradients_relative_to_the_parameters() -> None:
    # ‖g‖ / ‖θ‖ = 2, 1, 3, 0.5, 0; by the gradient alone the order would be 3, 2, 1, 0, 4.
    table = {"grad_norm_sq": [[4.0, 9.0, 36.0, 100.0, 0.0]],
             "param_norm_sq": [[1.0, 9.0, 4.0, 400.0, 1.0]]}  # fmt: skip
    assert picks("rgn", candidates([2], UNIT, table)) == [[0, 2]]
    assert picks("rgn", candidates([3], UNIT, table)) == [[0, 1, 2]]


def test_rgn_ranks_a_layer_of_zero_parameters_first_and_warns_of_nothing() -> None:
    table = {"grad_norm_sq": [[4.0, 0.0, 1.0]], "param_norm_sq": [[1.0, 0.0, 1.0]]}
    with np.errstate(all="raise"):
        assert picks("rgn", candidates([1], [1.0] * 3, table)) == [[1]]


def test_ties_go_to_the_layer_nearer_the_output_as_with_the_solvers() -> None:
    scores = [[1.0, 2.0, 1.0, 1.0, 1.0]]
    rule = picks("snr", candidates([2], UNIT, {"snr": scores}))
    ilp = picks("ilp", candidates([2], UNIT, {"grad_norm_sq": scores}))
    assert rule == ilp == [[1, 4]]


def test_a_layer_that_is_too_dear_is_passed_over_and_the_next_best_taken() -> None:
    """Defect 8 of the released code: it filled the rest of a budget beyond the budget."""
    costs, table = [1.0, 5.0, 1.0, 2.0, 1.0], {"snr": [[1.0, 9.0, 2.0, 8.0, 3.0]]}
    assert picks("snr", candidates([4], costs, table)) == [[2, 3, 4]]
    assert picks("snr", candidates([2], costs, table)) == [[3]]
    assert picks("snr", candidates([0.5], costs, table)) == [[]]


# ------------------------------------------------------------------------------------ random
def drawn(**change: int) -> np.ndarray:
    case = candidates([3] * 6, [1.0] * 12, clients=[4, 8, 15, 16, 23, 42], **change)
    return Random(LAYERS, budget=2).select(case).masks


def test_random_masks_repeat_and_do_not_depend_on_the_global_generator() -> None:
    np.random.seed(1)
    first = drawn()
    np.random.seed(2)
    np.testing.assert_array_equal(first, drawn())


def test_random_masks_vary_with_round_client_and_seed() -> None:
    first = drawn()
    assert (first != drawn(server_round=2)).any(axis=1).sum() >= 4
    assert (first != drawn(seed=1)).any(axis=1).sum() >= 4
    assert len({row.tobytes() for row in first}) >= 4


def test_random_masks_follow_the_client_and_not_its_place_in_the_round() -> None:
    one = candidates([3, 3], [1.0] * 12, clients=[4, 8])
    other = candidates([3, 3], [1.0] * 12, clients=[8, 4])
    rule = Random(LAYERS, budget=2)
    np.testing.assert_array_equal(rule.select(one).masks, rule.select(other).masks[::-1])


def test_random_draws_every_layer_equally_often() -> None:
    counts = sum(drawn(server_round=t).sum(axis=0) for t in range(200))
    share = counts / (200 * 6)
    np.testing.assert_allclose(share, 3 / 12, atol=0.06)  # over four standard deviations
