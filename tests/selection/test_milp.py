"""The integer program's outcomes other than a plain optimum."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from selection_cases import random_problem

from layerfed.selection import SelectionError, SelectionProblem, backends, milp, solve, solve_milp

HARD = random_problem(1, 60, 30, relative=0.6)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_time_out_keeps_incumbent_and_states_an_honest_bound(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(milp, "BUILD_SHARE", np.inf)  # on a busy machine writing it down takes long
    optimum = solve(HARD)
    assert optimum.gap <= 1e-9
    incumbent = np.zeros(HARD.values.shape, dtype=bool)
    incumbent[:, 3] = True

    selection = solve_milp(HARD, time_limit=0.5, incumbent=incumbent, backend=backend)  # type: ignore[arg-type]

    assert selection.gap > 1e-6
    assert HARD.feasible(selection.masks)
    assert HARD.objective(incumbent) <= selection.objective <= optimum.objective + 1e-6
    assert selection.bound >= optimum.objective - 1e-6
    assert selection.solver == f"milp-{backend}"


def test_a_program_too_large_to_write_down_in_time_is_an_error() -> None:
    with pytest.raises(SelectionError, match="60 clients x 30 layers is too large to write down"):
        solve_milp(HARD, time_limit=1e-3)


def test_time_out_without_masks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_run_highs", lambda *_: np.inf)  # the program stays unsolved

    with pytest.raises(SelectionError, match="no masks for 60 clients x 30 layers from highs"):
        solve_milp(HARD, backend="highs")


def test_time_out_without_masks_keeps_the_incumbent_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(backends, "_run_highs", lambda *_: np.inf)
    incumbent = np.zeros(HARD.values.shape, dtype=bool)

    with caplog.at_level(logging.WARNING):
        selection = solve_milp(HARD, incumbent=incumbent, backend="highs")

    assert not selection.masks.any()
    assert selection.bound == np.inf
    assert "no masks from highs in 10.0 s; keeping the incumbent" in caplog.text


def test_refuses_an_incumbent_over_budget() -> None:
    with pytest.raises(ValueError, match="incumbent exceeds a budget"):
        solve_milp(HARD, incumbent=np.ones(HARD.values.shape, dtype=bool))


def test_names_a_missing_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.pulp, "listSolvers", lambda **_: [])

    with pytest.raises(SelectionError, match="pip install highspy"):
        solve_milp(HARD, backend="highs")


def test_auto_falls_back_to_cbc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.pulp, "listSolvers", lambda **_: ["PULP_CBC_CMD"])

    assert solve_milp(random_problem(0, 4, 4)).solver == "milp-cbc"


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend is 'gurobi'; expected"):
        solve_milp(HARD, backend="gurobi")  # type: ignore[arg-type]


def test_an_impossible_status_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def claim_infeasible(model: backends.CountModel, *_: object) -> float:
        model.program.assignStatus(backends.pulp.constants.LpStatusInfeasible)
        return 0.0

    monkeypatch.setattr(backends, "_run_highs", claim_infeasible)

    with pytest.raises(SelectionError, match="calls the selection Infeasible"):
        solve_milp(HARD, backend="highs")


@pytest.mark.parametrize("backend", ["highs", "cbc"])
@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_magnitudes_do_not_matter(backend: str, unit: float) -> None:
    base = random_problem(3, 5, 5, cost="parameters", depth=True)
    assert base.depth_costs is not None
    scaled = SelectionProblem(
        base.values * unit,
        base.costs / unit,
        base.budgets / unit,
        base.consistency * unit,
        base.depth_costs / unit,
    )

    expected = solve_milp(base, gap=0.0)
    selection = solve_milp(scaled, gap=0.0, backend=backend)  # type: ignore[arg-type]

    assert selection.objective / unit == pytest.approx(expected.objective, rel=1e-9)
