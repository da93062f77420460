"""Rounds between two selections: masks are kept, newcomers get their own, and nothing is probed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layerfed.models.layers import LayerMap
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.server.memory import HELD, Memory
from layerfed.strategies import ILP, STRATEGIES
from tests.candidates import any_candidates, candidates, within_budgets
from tests.conftest import TinyNet
from tests.fakes import Recorded
from tests.strategies.test_ilp import objective
from tests.tiny_task import Run, configured, run

LAYERS = LayerMap.from_model(TinyNet())
UNIT = [1.0] * 4


def chosen(*rows: list[int]) -> Choice:
    masks = np.zeros((len(rows), 4), dtype=bool)
    for mask, row in zip(masks, rows, strict=True):
        mask[row] = True
    return Choice(masks)


def never(candidates: Candidates) -> Choice:
    raise AssertionError("nobody is new")


# ---------------------------------------------------------------------------------- whole runs
@pytest.mark.usefixtures("tiny_task")
@pytest.mark.parametrize("name", ["ilp", "rgn", "snr", "random"])
def test_masks_are_kept_between_selections_and_newcomers_get_theirs(name: str) -> None:
    """Defect 6 of the released code: a client not seen at the last selection ended the run."""
    config = configured(
        f"strategy.name={name}",
        "strategy.period=3",
        "federation.clients-per-round=3",
        "budget.kind=half-normal",
        "budget.max=3",
    )
    grid = Recorded(config)
    result = run(config, 6, grid)

    newcomers = 0
    for first in (1, 4):
        known = result.masks(first)
        for number in (first + 1, first + 2):
            for client, layers in result.masks(number).items():
                newcomers += client not in known
                assert known.setdefault(client, layers) == layers
    assert newcomers > 2, "or this test shows nothing"
    assert result.masks(4) != result.masks(1)
    probed = [number for number, kind in grid.kinds() if kind == "query.probe"]
    assert probed == ([] if name == "random" else [1, 4])
    flops = [record.metrics["flops_probe"] > 0 for record in result.rounds]
    assert flops == [number in probed for number in range(1, 7)]


@pytest.mark.usefixtures("tiny_task")
@pytest.mark.parametrize("name", STRATEGIES)
def test_budgets_belong_to_clients_and_hold_in_every_round(name: str) -> None:
    """Defect 8 of the released code: it filled the rest of a budget beyond the budget."""
    config = configured(
        f"strategy.name={name}",
        "strategy.period=2",
        "federation.clients-per-round=3",
        "budget.kind=half-normal",
        "budget.max=3",
    )
    budgets: dict[int, float] = {}
    for record in run(config, 4).rounds:
        selection = record.selection
        assert selection is not None
        for client, budget, mask in zip(
            selection.clients, selection.budgets, selection.choice.masks, strict=True
        ):
            assert budgets.setdefault(client, budget) == budget
            assert not STRATEGIES[name].within_budget or mask.sum() <= budget
    assert len(set(budgets.values())) > 1


@pytest.mark.usefixtures("tiny_task")
def test_what_led_to_the_masks_is_recorded() -> None:
    config = configured("strategy.period=2", "federation.clients-per-round=3", "run.seed=2")
    first, second = (record.selection for record in run(config, 2).rounds)
    assert first is not None
    assert second is not None
    new = set(second.clients) - set(first.clients)
    assert new
    assert first.held == []
    assert set(second.held) == set(second.clients) - new
    assert set(first.statistics) == {"grad_norm_sq"}
    assert not first.assumed
    assert not second.statistics, "nothing was measured"
    assert second.assumed["grad_norm_sq"].shape == (3, 4)


@pytest.mark.usefixtures("tiny_task")
def test_every_client_kept_needs_no_selection() -> None:
    everyone = ["federation.clients-per-round=6", "strategy.period=2"]
    result: Run = run(configured(*everyone), 2)
    selection = result.rounds[1].selection
    assert selection is not None
    assert selection.choice.solver == HELD
    assert result.masks(1) == result.masks(2)


# ------------------------------------------------------------------------------- what is assumed
def test_a_newcomers_statistics_are_its_own_last_ones_or_else_the_mean_profile() -> None:
    memory = Memory()
    one = {"grad_norm_sq": [[8.0, 0, 0, 0], [1.0, 1, 1, 1]]}
    memory.learn(candidates([1, 1], UNIT, one, clients=[7, 8]), chosen([0], [1]))
    two = {"grad_norm_sq": [[0.0, 0, 3, 1], [0.0, 200, 0, 0]]}
    memory.learn(candidates([1, 1], UNIT, two, clients=[8, 9]), chosen([0], [1]))

    found = memory.estimate([7, 8, 9, 10])["grad_norm_sq"]
    # All at the scale of the last selection's median, (4 + 200) / 2; none outweighs another.
    np.testing.assert_allclose(found.sum(axis=1), 102.0)
    np.testing.assert_allclose(found[0] / 102, [1, 0, 0, 0])
    np.testing.assert_allclose(found[1] / 102, [0, 0, 0.75, 0.25])
    np.testing.assert_allclose(found[2] / 102, [0, 1, 0, 0])
    # The mean of the profiles: the client with large gradients does not decide for the other.
    np.testing.assert_allclose(found[3] / 102, [0, 0.5, 0.375, 0.125])


def test_the_last_selection_is_each_clients_own() -> None:
    memory = Memory()
    assert memory.last([7]) is None
    one = {"grad_norm_sq": [[1.0] * 4] * 2}
    memory.learn(candidates([1, 1], UNIT, one, clients=[7, 8]), chosen([0], [1]))
    memory.learn(candidates([1, 1], UNIT, one, clients=[8, 9]), chosen([2], [3]))
    again = Memory()
    again.restore(memory.state())
    for found in (memory.last([7, 8, 9, 10]), again.last([7, 8, 9, 10])):
        assert found is not None
        # Client 10 was never selected, and gets the mean of the last selection's clients.
        expected = [[1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0.5, 0.5]]
        np.testing.assert_array_equal(found, expected)


def test_a_gradient_of_zero_is_remembered_as_such() -> None:
    memory = Memory()
    table = {"grad_norm_sq": [[0.0] * 4, [4.0, 0, 0, 0]]}
    memory.learn(candidates([1, 1], UNIT, table), chosen([0], [0]))
    found = memory.estimate([0, 1])["grad_norm_sq"]
    np.testing.assert_allclose(found, [[0, 0, 0, 0], [4, 0, 0, 0]])
    np.testing.assert_allclose(memory.estimate([9])["grad_norm_sq"], [[4, 0, 0, 0]])


def test_one_enormous_statement_decides_nothing_for_others() -> None:
    memory = Memory()
    table = {"grad_norm_sq": [[1.0, 2, 1, 0], [0.0, 3, 1, 0], [0.0, 0, 0, 1e99]]}
    memory.learn(candidates([1] * 3, UNIT, table), chosen([0], [0], [0]))
    (found,) = memory.estimate([9])["grad_norm_sq"]
    assert found.sum() == pytest.approx(4.0)
    assert found.argmax() == 1


def test_a_node_that_came_back_with_less_is_given_other_masks() -> None:
    """Its kept masks would exceed its budget, so they must never be sent to it."""
    memory = Memory()
    memory.learn(candidates([3, 3], UNIT, clients=[4, 5]), chosen([0, 1, 2], [1, 2, 3]))
    now = candidates([3, 1], UNIT, clients=[4, 5])
    after, choice = memory.complete(now, lambda c: chosen([3], [2]), bounded=True)
    assert set(after.held) == {0}
    np.testing.assert_array_equal(choice.masks, chosen([0, 1, 2], [2]).masks)
    # And it keeps those from then on.
    _, again = memory.complete(now, never, bounded=True)
    np.testing.assert_array_equal(again.masks, choice.masks)


def test_layers_that_change_within_a_round_are_kept_as_they_change() -> None:
    memory = Memory()
    schedules = [np.eye(4, dtype=bool)[:2], np.eye(4, dtype=bool)[2:3]]
    masks = np.stack([schedule.any(axis=0) for schedule in schedules])
    memory.learn(candidates([1, 1], UNIT), Choice(masks, schedules=schedules))
    # Both draws fit one after the other, though not together.
    _, choice = memory.complete(candidates([1, 1], UNIT), never, bounded=True)
    np.testing.assert_array_equal(choice.masks, masks)
    assert choice.schedules is not None
    for kept, schedule in zip(choice.schedules, schedules, strict=True):
        np.testing.assert_array_equal(kept, schedule)


@pytest.mark.parametrize(
    "part",
    [{"sent": np.eye(4, dtype=bool)[:2]}, {"ranks": np.array([2, 1])}],
    ids=["sent", "ranks"],
)
def test_a_choice_of_what_is_sent_is_made_anew_between_selections(
    part: dict[str, Any],
) -> None:
    """Masks do not say it, and clients that kept theirs would send all that they train."""
    memory, choice = Memory(), replace(chosen([0, 1, 2, 3], [0, 1, 2, 3]), **part)
    memory.learn(candidates([4, 4], UNIT), choice)
    for _ in range(2):
        now, found = memory.complete(candidates([4, 4], UNIT), lambda _: choice, bounded=True)
        assert not now.held
        for name, table in part.items():
            np.testing.assert_array_equal(getattr(found, name), table)


def test_a_skipped_block_was_not_measured_to_be_nothing() -> None:
    """A client keeps its own last share of it, or else gets the mean share; shares add up to one."""
    memory = Memory()
    first = {"g": [[2.0, 1, 1, 0], [9.0, 0, 1, 0], [9.0, 1, 1, 2]]}
    runs = np.array([[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]], dtype=bool)
    memory.learn(candidates([1] * 3, UNIT, first).running(runs), chosen([0], [2], [3]))
    found = memory.estimate([0, 1, 2, 9])["g"] / 4.0  # the median of 4, 1 and 4
    # Of blocks that ran: 1/2, (1/4 + 0 + 1/4) / 3, (1/4 + 1 + 1/4) / 3, (0 + 0 + 1/2) / 3; in all 4/3.
    mean = np.array([0.375, 0.125, 0.375, 0.125])
    rest = 1 - 0.375
    wanted = [
        [0.5, 0.25, 0.25, 0],
        [0.375, 0, rest, 0],
        [0.375, *np.array([0.25, 0.25, 0.5]) * rest],
    ]
    np.testing.assert_allclose(found, [*wanted, mean])

    again = {"g": [[7.0, 3, 3, 3], [8.0, 1, 1, 0]]}
    runs = np.array([[0, 1, 1, 1], [1, 1, 1, 1]], dtype=bool)
    memory.learn(candidates([1] * 2, UNIT, again).running(runs), chosen([1], [0]))
    shares = memory.estimate([0, 1])["g"] / 9.5  # the median of 9 and 10
    np.testing.assert_allclose(shares, [[0.5, *[0.5 / 3] * 3], [0.8, 0.1, 0.1, 0]])


# -------------------------------------------------------------------------- (P1) beside held masks
@st.composite
def partly_held(draw: st.DrawFn) -> tuple[Candidates, float]:
    n, layers = draw(st.sampled_from([(2, 4), (3, 3), (4, 2)]))
    value = st.integers(0, 50).map(float)
    row = st.lists(value, min_size=layers, max_size=layers)
    table = draw(st.lists(row, min_size=n, max_size=n))
    budgets = draw(st.lists(st.sampled_from([0, 1, 2]), min_size=n, max_size=n))
    bits = st.lists(st.booleans(), min_size=layers, max_size=layers).map(np.array)
    rows = draw(st.sets(st.integers(0, n - 1), min_size=1, max_size=n - 1))
    held = {}
    for index in rows:
        mask = draw(bits)
        mask[np.flatnonzero(mask)[int(budgets[index]) :]] = False
        held[index] = mask[None]
    case = candidates(budgets, [1.0] * layers, {"grad_norm_sq": table})
    consistency = draw(st.sampled_from([-20.0, -3.0, 0.0, 1.0, 7.0, 1e4]))
    return Candidates(**{**vars(case), "held": held}), consistency


@settings(deadline=None, max_examples=80)
@given(partly_held())
def test_newcomers_get_the_best_masks_beside_those_that_are_held(
    problem: tuple[Candidates, float],
) -> None:
    case, consistency = problem
    values, (n, layers) = case.statistics["grad_norm_sq"], case.costs.shape
    rows = [np.array(bits, dtype=bool) for bits in product((0, 1), repeat=layers)]
    options = [case.held[i].tolist() if i in case.held else rows for i in range(n)]
    every = (np.array(masks, dtype=bool) for masks in product(*options))
    best = max(objective(values, m, consistency) for m in every if within_budgets(case, m))

    choice = ILP(LAYERS, consistency=consistency, consistency_scale="raw").select(case)
    for row, masks in case.held.items():
        np.testing.assert_array_equal(choice.masks[row], masks[0])
    assert within_budgets(case, choice.masks)
    reached = objective(values, choice.masks, consistency)
    assert reached == pytest.approx(best, rel=1e-5, abs=1e-3)
    assert choice.objective == pytest.approx(reached, rel=1e-6, abs=1e-3)
    assert choice.bound is not None
    assert choice.bound == pytest.approx(best, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("name", ["ilp", "top", "bottom", "random", "cyclic", "snr", "rgn"])
@settings(deadline=None, max_examples=25)
@given(any_candidates(), any_candidates())
def test_newcomers_keep_to_budgets_whatever_was_selected_before(
    name: str, before: Candidates, now: Candidates
) -> None:
    if before.costs.shape[1] != now.costs.shape[1]:
        return
    rule, memory = STRATEGIES[name](LAYERS, budget=2), Memory()
    memory.learn(before, rule.select(before))
    _, choice = memory.complete(now, rule.select, bounded=True)
    assert within_budgets(now, choice.masks)
