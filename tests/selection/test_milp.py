"""The integer program: results other than a plain optimum, and side effects that it must not have."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from selection_cases import random_problem

from layerfed.selection import SelectionError, SelectionProblem, milp, solve, solve_milp

HARD = random_problem(1, 60, 30, relative=0.6)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give building the program any time, since it takes seconds on a busy machine."""
    monkeypatch.setattr(milp, "BUILD_SHARE", np.inf)


def test_the_smallest_program_can_be_written_and_solved() -> None:
    """PuLP 4 builds no expression from a list of terms, which PuLP 3 did."""
    problem = SelectionProblem([[1.0], [1.0]], [1.0], [1.0, 1.0], 0.1)

    selection = solve(problem, solver="milp")

    assert selection.masks.tolist() == [[True], [True]]
    assert selection.solver == "milp-highs"


@pytest.mark.parametrize("solver", ["auto", "lagrangian", "milp"])
def test_standard_output_holds_only_what_the_program_prints(solver: str) -> None:
    """HiGHS prints a banner once a process, in C: `sys.stdout` never sees it."""
    script = (
        "import json, layerfed.selection as s\n"
        "problem = s.SelectionProblem([[2.0, 1.0], [1.0, 2.0]], [1.0, 1.0], [1.0, 1.0], 0.1)\n"
        "print('before')\n"
        f"print(json.dumps(s.solve(problem, solver='{solver}').to_json()))"
    )

    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )

    before, answer = done.stdout.splitlines()
    assert before == "before"
    assert json.loads(answer)["gap"] <= 1e-6


def test_standard_output_is_given_back(capfd: pytest.CaptureFixture[str]) -> None:
    with milp._nothing_on_stdout():
        subprocess.run(["echo", "from a child"], check=True)
    subprocess.run(["echo", "afterwards"], check=True)

    assert capfd.readouterr() == ("afterwards\n", "from a child\n")


@pytest.mark.usefixtures("unhurried")
def test_time_out_states_an_honest_bound() -> None:
    optimum = solve(HARD)
    assert optimum.gap <= 1e-9

    selection = solve_milp(HARD, time_limit=4.0)

    assert selection.gap > 1e-6
    assert HARD.feasible(selection.masks)
    assert selection.objective <= optimum.objective + 1e-6
    assert selection.bound >= optimum.objective - 1e-6
    assert selection.solver == "milp-highs"


def test_a_program_too_large_to_write_down_in_time_is_an_error() -> None:
    with pytest.raises(SelectionError, match="60 clients x 30 layers is too large to build"):
        solve_milp(HARD, time_limit=1e-3)


@pytest.mark.usefixtures("unhurried")
def test_time_out_without_masks_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milp, "_run", lambda *_: (False, np.inf))

    with pytest.raises(SelectionError, match="no masks for 60 clients x 30 layers from HiGHS"):
        solve_milp(HARD)


@pytest.mark.usefixtures("unhurried")
def test_auto_keeps_its_masks_where_the_program_finds_none(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    problem = random_problem(2, 8, 8, relative=-1.0, cost="parameters")  # leaves a gap
    monkeypatch.setattr(milp, "_run", lambda *_: (False, np.inf))

    with caplog.at_level(logging.WARNING):
        selection = solve(problem)

    assert selection.solver == "lagrangian"
    assert selection.gap > 1e-4
    assert "the integer program could not close the gap: no masks" in caplog.text


def test_names_a_missing_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(milp.pulp.HiGHS, "available", lambda *_: False)

    with pytest.raises(SelectionError, match="pip install highspy"):
        solve_milp(random_problem(0, 4, 4))


def test_an_impossible_status_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    add_budget = milp._Model._add_budget

    def impossible(model: milp._Model, client: int) -> None:
        add_budget(model, client)
        model.program += milp.weighted_sum((pick, 1.0) for pick in model.picks.values()) <= -1.0

    monkeypatch.setattr(milp._Model, "_add_budget", impossible)

    with pytest.raises(SelectionError, match="ends with kInfeasible, which is wrong"):
        solve_milp(random_problem(0, 4, 4))


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_magnitudes_do_not_matter(unit: float) -> None:
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
    selection = solve_milp(scaled, gap=0.0)

    assert selection.objective / unit == pytest.approx(expected.objective, rel=1e-9)
