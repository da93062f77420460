"""The ilp strategy's masks are optimal on small rounds, by comparison with all masks."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.client.statistics import SEVERAL_PASSES, STATISTICS
from layerfed.config import ConfigError, load_config
from layerfed.models.layers import LayerMap
from layerfed.server.candidates import Candidates
from layerfed.strategies import ILP, checked
from layerfed.strategies.ilp import LADDER
from tests.candidates import any_candidates, candidates, within_budgets
from tests.conftest import TinyNet
from tests.tiny_task import check_resumed, configured, run

LAYERS = LayerMap.from_model(TinyNet())


def objective(values: np.ndarray, masks: np.ndarray, consistency: float) -> float:
    """(P1) as the paper writes it, pair by pair."""
    dissent = sum(int((a != b).sum()) for a, b in combinations(masks, 2))
    return float((values * masks).sum() - consistency * dissent)


def best(case: Candidates, consistency: float) -> float:
    """Return the optimum by enumeration of all masks."""
    values = case.statistics["grad_norm_sq"]
    n, layers = case.costs.shape
    every_row = [np.array(bits, dtype=bool) for bits in product((0, 1), repeat=layers)]
    every_mask = (np.stack(rows) for rows in product(every_row, repeat=n))
    return max(
        objective(values, masks, consistency) for masks in every_mask if within_budgets(case, masks)
    )


@st.composite
def small(draw: st.DrawFn) -> tuple[Candidates, float]:
    n, layers = draw(st.sampled_from([(1, 6), (2, 4), (3, 3), (4, 2)]))
    value = st.integers(0, 50).map(float)
    table = draw(
        st.lists(st.lists(value, min_size=layers, max_size=layers), min_size=n, max_size=n)
    )
    costs = draw(st.lists(st.sampled_from([1.0, 1.5, 2.0]), min_size=layers, max_size=layers))
    step = draw(st.sampled_from([0.0, 0.5]))
    depth = [step * (layers - layer) for layer in range(layers)]
    budgets = draw(st.lists(st.sampled_from([0, 1, 1.5, 2, 3.5]), min_size=n, max_size=n))
    consistency = draw(st.sampled_from([-20.0, -3.0, 0.0, 1.0, 7.0, 40.0, 1e4]))
    return candidates(budgets, costs, {"grad_norm_sq": table}, depth=depth), consistency


def raw(consistency: float) -> ILP:
    return ILP(LAYERS, consistency=consistency, consistency_scale="raw")


@settings(deadline=None, max_examples=60)
@given(small())
def test_no_other_masks_are_better(problem: tuple[Candidates, float]) -> None:
    case, consistency = problem
    choice = raw(consistency).select(case)

    assert within_budgets(case, choice.masks)
    optimum = best(case, consistency)
    reached = objective(case.statistics["grad_norm_sq"], choice.masks, consistency)
    assert reached == pytest.approx(optimum, rel=1e-5, abs=1e-6)
    assert choice.objective == pytest.approx(reached, rel=1e-9, abs=1e-6)
    assert choice.bound is not None
    assert choice.bound >= optimum - 1e-6 * max(1.0, abs(optimum))
    assert choice.gap is not None
    assert choice.gap <= 1e-6
    assert choice.solver


@settings(deadline=None, max_examples=40)
@given(any_candidates(), st.sampled_from([0.0, 0.5, 5.0]))
def test_masks_stay_within_each_clients_own_budget(case: Candidates, consistency: float) -> None:
    """Defect 8 of the released code: it filled the rest of a budget beyond the budget."""
    masks = ILP(LAYERS, consistency=consistency).select(case).masks
    assert masks.dtype == np.bool_
    assert within_budgets(case, masks)


VALUES = [
    [9.0, 1.0, 2.0, 3.0],
    [1.0, 8.0, 2.0, 3.0],
    [1.0, 2.0, 7.0, 6.0],
]


def test_without_consistency_each_client_takes_its_own_best_layers() -> None:
    case = candidates([1, 2, 2], [1.0] * 4, {"grad_norm_sq": VALUES})
    for scale in ("raw", "relative"):
        masks = ILP(LAYERS, consistency=0.0, consistency_scale=scale).select(case).masks
        assert [np.flatnonzero(row).tolist() for row in masks] == [[0], [1, 3], [2, 3]]


@pytest.mark.parametrize("solver", ["auto", "lagrangian", "milp"])
def test_with_overwhelming_consistency_all_clients_take_the_same_layers(solver: str) -> None:
    case = candidates([1, 2, 3], [1.0] * 4, {"grad_norm_sq": VALUES})
    masks = ILP(LAYERS, consistency=1e4, solver=solver).select(case).masks
    # The tightest budget affords one layer; 3 + 3 + 6 is the largest column sum.
    assert [np.flatnonzero(row).tolist() for row in masks] == [[3]] * 3


def test_more_consistency_never_means_more_dissent() -> None:
    values = np.random.default_rng(3).random((5, 6)).tolist()
    case = candidates([2, 1, 2, 3, 2], [1.0] * 6, {"grad_norm_sq": values})
    dissent = []
    for consistency in (0.0, 0.05, 0.1, 0.2, 0.5, 2.0):
        masks = raw(consistency).select(case).masks
        dissent.append(sum(int((a != b).sum()) for a, b in combinations(masks, 2)))
    assert dissent == sorted(dissent, reverse=True)
    assert dissent[0] > 10
    assert dissent[-1] == 0


def test_negative_consistency_spreads_choices() -> None:
    same = [[3.0, 2.9, 2.8, 2.7]] * 4
    case = candidates([1] * 4, [1.0] * 4, {"grad_norm_sq": same})
    together, apart = raw(0.0).select(case).masks, raw(-1.0).select(case).masks
    assert together.sum(axis=0).tolist() == [4, 0, 0, 0]
    assert apart.sum(axis=0).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e6])
def test_a_relative_consistency_means_the_same_at_any_gradient_scale(factor: float) -> None:
    values = np.random.default_rng(5).random((5, 6))
    cases = [
        candidates([2, 1, 2, 3, 2], [1.0] * 6, {"grad_norm_sq": table.tolist()})
        for table in (values, values * factor)
    ]
    masks = [ILP(LAYERS, consistency=0.3).select(case).masks for case in cases]
    np.testing.assert_array_equal(masks[0], masks[1])
    # Or the test could not fail: this λ lies between no consistency and a lot of it.
    free = ILP(LAYERS, consistency=0.0).select(cases[0]).masks
    tied = ILP(LAYERS, consistency=100.0).select(cases[0]).masks
    assert not np.array_equal(masks[0], free)
    assert not np.array_equal(masks[0], tied)


def test_a_raw_consistency_does_not_scale_with_the_gradients() -> None:
    values = np.random.default_rng(5).random((5, 6))
    cases = [
        candidates([2, 1, 2, 3, 2], [1.0] * 6, {"grad_norm_sq": table.tolist()})
        for table in (values, values * 1e6)
    ]
    small_scale, large_scale = (raw(0.5).select(case).masks for case in cases)
    free = raw(0.0).select(cases[1]).masks
    np.testing.assert_array_equal(large_scale, free)
    assert not np.array_equal(small_scale, free)


def test_gradients_of_zero_select_nothing() -> None:
    case = candidates([1, 2], [1.0] * 3, {"grad_norm_sq": [[0.0] * 3] * 2})
    assert not ILP(LAYERS).select(case).masks.any()


def test_a_relative_consistency_spans_independent_to_identical_despite_a_huge_claim(
    caplog: pytest.LogCaptureFixture,
) -> None:
    values = np.random.default_rng(5).random((5, 6)) + 0.1
    values[2] *= 1e13
    case = candidates([2] * 5, [1.0] * 6, {"grad_norm_sq": values.tolist()})

    free = ILP(LAYERS, consistency=0.0).select(case).masks
    tied = ILP(LAYERS, consistency=1e6).select(case).masks

    np.testing.assert_array_equal(
        np.sort(np.argsort(values)[:, -2:]), np.nonzero(free)[1].reshape(5, 2)
    )
    assert (tied == tied[0]).all()
    assert tied[0].sum() == 2
    assert "client of partition 2 claims gains" in caplog.text


def test_measured_costs_are_rounded_and_the_choice_says_so() -> None:
    rng = np.random.default_rng(0)
    table = {"grad_norm_sq": rng.lognormal(size=(6, 24)).tolist()}
    noisy = (1 + 0.05 * rng.standard_normal((6, 24))).tolist()
    case = candidates([3.0] * 6, noisy, table)

    rounded = ILP(LAYERS, consistency=0.1).select(case)
    exact = ILP(LAYERS, consistency=0.1, solver_rounding=0.0).select(case)

    assert 0.0 < rounded.rounding <= 0.02
    assert exact.rounding == 0.0
    assert within_budgets(case, rounded.masks)
    assert rounded.gap is not None
    assert rounded.gap <= 1e-6


# ------------------------------------------------------------------------- beyond the paper's program
def test_lambda_is_found_where_the_predicted_floor_is_lowest() -> None:
    """With updates that agree, masks may differ; where they disagree, a common mask is better."""
    rng = np.random.default_rng(0)
    norms = rng.lognormal(sigma=1.0, size=(6, 4))
    case = candidates([1] * 6, [1.0] * 4, {"grad_norm_sq": norms.tolist()})
    strategy = ILP(LAYERS, consistency="auto")
    for disagreement in (0.0, 0.3, 1.0):
        strategy.kept["disagreement"] = np.asarray(disagreement)
        choice = strategy.select(case)
        floors = {}
        for value in LADDER:
            masks = ILP(LAYERS, consistency=value).select(case).masks
            shares, moved = masks.mean(axis=0), masks.any(axis=0)
            mean = norms.mean(axis=0)
            e2 = sum((1 / p - 1) * g for p, g in zip(shares[moved], mean[moved], strict=True))
            floors[value] = mean[~moved].sum() + disagreement * e2
        assert choice.consistency == min(LADDER, key=lambda value: floors[value])
        fixed = ILP(LAYERS, consistency=choice.consistency).select(case)
        np.testing.assert_array_equal(choice.masks, fixed.masks)
        assert choice.objective == fixed.objective
    assert len({tuple(mask) for mask in choice.masks}) == 1


def test_lambda_is_found_where_few_clients_afford_a_layer() -> None:
    """Those that afford none do not count, or the theory would say that nobody should train."""
    norms = np.random.default_rng(0).lognormal(sigma=0.3, size=(10, 4)).tolist()
    case = candidates([1] * 4 + [0] * 6, [1.0] * 4, {"grad_norm_sq": norms})
    choice = ILP(LAYERS, consistency="auto").select(case)
    assert choice.masks.any(axis=1).tolist() == [True] * 4 + [False] * 6


def test_masks_that_train_nothing_are_the_last_resort() -> None:
    """Where updates disagree wholly, a layer for a third of the clients costs twice what it gives."""
    norms = [[9.0, 0.1, 0.1, 0.1], [0.1, 9.0, 0.1, 0.1], [0.1, 0.1, 9.0, 0.1], *[[0.1] * 4] * 3]
    case = candidates([1] * 3 + [0] * 3, [1.0] * 4, {"grad_norm_sq": norms})
    assert not ILP(LAYERS, consistency=3.0).select(case).masks.any()
    assert ILP(LAYERS, consistency="auto").select(case).masks.sum(axis=0).tolist() == [1, 1, 1, 0]
    zeros = candidates([0] * 6, [1.0] * 4, {"grad_norm_sq": norms})
    assert ILP(LAYERS, consistency="auto").select(zeros).consistency == 0.0


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-6])
def test_of_equal_floors_the_smallest_lambda_is_found(scale: float) -> None:
    """Half of the clients train it, or nobody does: the theory says the same of both."""
    norms = scale * np.array([[6.06, 3.73, 1.43, 0.3], [1.0, 1.93, 0.28, 1.48]])
    case = candidates([1, 0], [1.0] * 4, {"grad_norm_sq": norms.tolist()})
    assert ILP(LAYERS, consistency="auto").select(case).consistency == 0.0


def test_noise_may_take_the_floor_below_zero() -> None:
    """The norms of private clients have noise."""
    norms = [[-3.0, -1.0, 2.0, -4.0], [-2.0, -5.0, 1.0, -1.0]]
    case = candidates([1, 1], [1.0] * 4, {"grad_norm_sq": norms})
    assert ILP(LAYERS, consistency="auto").select(case).consistency in LADDER


def test_lambda_is_not_found_by_what_stays_on_clients() -> None:
    """Block 0 in common or a block each: the first is better only if block 0 counts."""
    norms = [[9.0, 10.0, 1.0, 1.0], [9.0, 1.0, 10.0, 1.0], [9.0, 1.0, 1.0, 10.0]]
    case = candidates([1] * 3, [1.0] * 4, {"grad_norm_sq": norms})
    found = []
    for personal in (frozenset[str](), frozenset({LAYERS.blocks[0].name})):
        strategy = ILP(replace(LAYERS, personal=personal), consistency="auto")
        strategy.kept["disagreement"] = np.asarray(0.3)
        found.append(strategy.select(case).masks.sum(axis=0).tolist())
    assert found == [[3, 0, 0, 0], [0, 1, 1, 1]]


@pytest.mark.usefixtures("tiny_task")
def test_a_run_finds_and_records_lambda_and_resumes_alike() -> None:
    settings = ["strategy.consistency=auto", "budget.kind=half-normal", "budget.max=3"]
    result = run(configured(*settings), 3)
    for record in result.rounds:
        assert record.selection is not None
        choice = record.selection.choice
        assert choice.consistency in LADDER
        assert choice.disagreement is not None
    # In the first round nothing is known of updates.
    assert result.rounds[0].selection.choice.disagreement == 1.0  # type: ignore[union-attr]
    assert 0.0 < result.rounds[1].selection.choice.disagreement < 1.0  # type: ignore[union-attr]
    check_resumed(configured(*settings, "strategy.switching=0.3"))


def test_the_penalty_on_what_is_affordable_lets_the_rich_have_more() -> None:
    norms = [[1.0, 2.0, 9.0, 3.0], [8.0, 7.0, 1.0, 6.0]]
    case = candidates([1, 3], [1.0] * 4, {"grad_norm_sq": norms})
    both = [
        ILP(LAYERS, consistency=50.0, penalty=penalty).select(case).masks.astype(int).tolist()
        for penalty in ("paper", "affordable")
    ]
    assert both[0] == [[0, 0, 1, 0], [0, 0, 1, 0]]
    assert both[1][1] == [1, 1, 0, 1] or sum(both[1][1]) == 3
    assert all(rich >= poor for poor, rich in zip(*both[1], strict=True))


def test_switching_keeps_the_layers_of_the_last_selection_while_they_are_nearly_as_good() -> None:
    last = np.array([[0.0, 1.0, 0.0]] * 2)
    for gain, kept in ((1.2, True), (3.0, False)):
        norms = [[0.1, 1.0, gain]] * 2
        case = replace(candidates([1, 1], [1.0] * 3, {"grad_norm_sq": norms}), last=last)
        rule = ILP(LAYERS, consistency=0.0, consistency_scale="raw", switching=0.5)
        choice = rule.select(case)
        assert choice.masks[:, 1].all() == kept
        assert choice.objective == pytest.approx(2.0 if kept else 2 * gain - 2 * 2 * 0.5)
        assert choice.gap == 0.0
        first = rule.select(replace(case, last=None))
        assert first.masks[:, 2].all()


@pytest.mark.usefixtures("tiny_task")
def test_a_large_charge_on_switching_keeps_the_first_selection_for_good() -> None:
    settings = ["federation.clients-per-round=3", "budget.layers=1", "strategy.consistency=10"]
    free, bound = (
        run(configured(*settings, f"strategy.switching={cost}", "train.lr=1.0"), 5)
        for cost in (0, 1e6)
    )
    first = set(map(tuple, bound.masks(1).values()))
    assert all(set(map(tuple, bound.masks(n).values())) == first for n in range(2, 6))
    assert any(free.masks(n) != free.masks(1) for n in range(2, 6)), "or this test shows nothing"


@pytest.mark.usefixtures("tiny_task")
@pytest.mark.parametrize("name", [*STATISTICS, *SEVERAL_PASSES, "tests.client.test_probe:largest"])
def test_any_statistic_can_be_the_gain(name: str) -> None:
    result = run(configured(f"strategy.statistic={name}", "budget.layers=2"), 2)
    for record in result.rounds:
        assert not record.failures
        assert record.selection is not None
        # The norms are what λ is found by.
        assert list(record.selection.statistics) == list(dict.fromkeys([name, "grad_norm_sq"]))
        assert record.metrics["flops_probe"] > 0 or name == "param_norm_sq"


def test_options_that_mean_nothing_together_are_refused() -> None:
    for given_settings, says in (
        (["strategy.consistency=auto", "strategy.consistency-scale=raw"], "relative values"),
        (["strategy.consistency=often"], "strategy.consistency = 'often'"),
        (["strategy.statistic=gradnorm"], "unknown statistic 'gradnorm'; known: grad_norm_sq"),
        (["strategy.penalty=none"], "strategy.penalty = 'none'"),
        (
            ["strategy.penalty=affordable", "strategy.consistency=0.1", "train.skip=substack"],
            r"strategy\.penalty = 'affordable' does not go with train\.skip = 'substack'",
        ),
        (["strategy.consistency=true"], "it should be a number, or auto"),
        (
            ["strategy.consistency=nan"],
            "^strategy.consistency = nan is not allowed: it should be text, a finite number, true",
        ),
        (["train.skip=random"], r"'auto' does not go with train\.skip = 'random'"),
        (["strategy.switching=-1"], "strategy.switching = -1"),
        (
            ["strategy.consistency=auto", "secagg.enabled=true"],
            "different layers|own layers|secagg",
        ),
    ):
        with pytest.raises(ConfigError, match=says):
            checked(load_config(None, given_settings))


def test_a_clients_claims_are_bounded_by_those_of_the_median_client() -> None:
    rows = [[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [4.0, 0.0], [60.0, 40.0], [0.0, 0.0]]
    case = candidates([1] * 6, [1, 1], {"fisher": rows})
    expected = [*rows[:4], [5.4, 3.6], rows[5]]  # 3 × 3 in all; a client without any does not count
    np.testing.assert_allclose(case.bounded("fisher"), expected)
    none = candidates([1], [1, 1], {"fisher": [[0.0, 0.0]]})
    np.testing.assert_array_equal(none.bounded("fisher"), [[0.0, 0.0]])


def test_one_client_does_not_decide_the_consistency_that_is_found() -> None:
    """Nor by norms of another size, nor by a number of examples above `federation.max-examples`."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        norms, found = rng.lognormal(0, 1.2, (8, 6)), []
        for factor in (1e6, 1e12):
            rule = ILP(LAYERS, consistency="auto")
            rule.kept["disagreement"] = np.asarray(0.6)
            rows = np.concatenate([norms[:-1], factor * norms[-1:]])
            case = candidates([2] * 8, [1] * 6, {"grad_norm_sq": rows.tolist()})
            stated = np.array([1] * 7 + [2**29]) if factor > 1e6 else np.ones(8)
            found.append(rule.select(replace(case, examples=stated)).consistency)
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("options", "masks"),
    [
        ({"consistency": 0.1}, "shared"),
        ({"consistency": 0.1, "penalty": "affordable"}, "within-budget"),
        ({"consistency": 0.0}, "own"),
        ({}, "own"),
        ({"penalty": "affordable"}, "own"),
    ],
)
def test_what_its_masks_are_like_follows_from_its_options(
    options: dict[str, object], masks: str
) -> None:
    assert ILP.masks_with(ILP.Options(**options)) == masks  # type: ignore[arg-type]


def test_a_solver_that_is_not_installed_is_refused_before_any_client_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pulp.HiGHS.available", lambda *_: False)
    ILP(LAYERS)
    with pytest.raises(ConfigError, match=r"strategy.solver = 'milp': .*pip install highspy"):
        ILP(LAYERS, solver="milp")


@pytest.mark.usefixtures("tiny_task")
def test_an_integer_program_without_an_answer_does_not_end_the_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = configured("strategy.solver=milp", "strategy.solver-seconds=1e-6")
    (record,) = run(config, 1).rounds
    assert record.selection is not None
    assert record.selection.choice.solver == "lagrangian"
    assert "too large to build in time" in caplog.text
