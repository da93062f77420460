"""A user's own strategy is named by module:Class; anything else is refused in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord
from typer.testing import CliRunner

from layerfed.cli import app
from layerfed.client.workbench import workbench
from layerfed.compare import load_plan
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.deploy.federation import known_to_flower
from layerfed.exchange import record_of
from layerfed.runs.records import RoundRecord
from layerfed.server.candidates import check_choice
from layerfed.strategies import SelectiveStrategy, checked, load_strategy
from tests.candidates import candidates
from tests.fakes import Recorded
from tests.strategies.own_strategy import Greedy, Middle
from tests.tiny_task import configured, run

HERE = "tests.strategies.own_strategy"
OWN = f"strategy.name={HERE}:Middle"


@pytest.mark.usefixtures("tiny_task")
def test_it_runs_with_its_own_options() -> None:
    result = run(configured(OWN, "strategy.shift=1"), 2)
    assert result.rounds[1].moved == ("blocks.3", "head")
    assert set(map(tuple, result.masks(1).values())) == {(3,)}


@pytest.mark.usefixtures("tiny_task")
def test_its_kind_of_masks_decides_whether_sums_can_be_secure() -> None:
    secure = ["secagg.enabled=true", "federation.clients-per-round=4"]
    assert run(configured(OWN, *secure)).rounds[0].replies == 4
    with pytest.raises(ConfigError, match="clients of different budgets get different layers"):
        checked(configured(f"strategy.name={HERE}:Silent", *secure, "budget.kind=half-normal"))


def test_its_options_are_filled_in_and_checked() -> None:
    assert checked(configured(OWN)).to_flat()["strategy.shift"] == 0
    with pytest.raises(ConfigError, match=r"strategy.shift = 'far' is not allowed: .* integer"):
        checked(configured(OWN, "strategy.shift=far"))
    with pytest.raises(ConfigError, match=r"'strategy.shfit'; .*did you mean strategy.shift"):
        checked(configured(OWN, "strategy.shfit=1"))
    asking = f"strategy.name={HERE}:Asking"
    with pytest.raises(ConfigError, match=r"option 'shift' needs a default .*; it has none"):
        checked(configured(asking, "strategy.shift=2"))
    # `flwr run --run-config` does not know the keys of a user's own strategy.
    assert checked(configured(OWN, "strategy.options=shift=1")).to_flat()["strategy.shift"] == 1


def test_a_deployment_hands_its_options_over_under_keys_that_flower_knows() -> None:
    config = checked(configured(OWN, "strategy.shift=1", "strategy.note=a b 'c'"))
    handed = known_to_flower(config)
    assert "strategy.shift" not in handed
    arrived = checked(RunConfig.from_flat(handed))
    assert arrived == config
    assert known_to_flower(arrived) == handed, "a resumed run hands over the same"


def test_an_option_is_given_once_and_is_one() -> None:
    with pytest.raises(ConfigError, match=r"strategy.shift = 2, and strategy.options says 1"):
        checked(configured(OWN, "strategy.shift=2", "strategy.options=shift=1"))
    for word in ("period=3", "name=top", "fraction=0.3"):
        with pytest.raises(ConfigError, match=f"unknown key 'strategy.{word.partition('=')[0]}'"):
            checked(configured(OWN, f"strategy.options={word}"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Takes", "no option can be called 'period'"),
        ("Shadows", "another strategy's, with the default 0.5"),
        ("Lists", "needs a default that is a text"),
    ],
)
def test_options_that_cannot_be_told_apart_are_refused(name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_strategy(f"{HERE}:{name}")


def test_a_row_of_a_table_file_may_be_one(tmp_path: Path) -> None:
    file = tmp_path / "own.toml"
    file.write_text(
        'title = "own"\nbudgets = [1]\nseeds = [0]\n[rows]\n'
        f'"mine" = {{ strategy.name = "{HERE}:Middle", strategy.shift = 1 }}\n'
        f"[experiments.digits]\nconf = {str(Path('conf/default.toml').resolve())!r}\n"
    )
    (cell,) = load_plan(file).cells(tmp_path)
    assert load_strategy(cell.config.strategy.name) is Middle
    assert cell.config.to_flat()["strategy.shift"] == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ilpp", ["did you mean ilp?", "module:Class"]),
        ("no_such_module:Middle", ["cannot be imported", "no_such_module"]),
        (f"{HERE}:Absent", ["cannot be imported", "Absent"]),
        (f"{HERE}:Stranger", ["is not a subclass of layerfed.strategies.SelectiveStrategy"]),
        (f"{HERE}:np", ["is not a subclass of layerfed.strategies.SelectiveStrategy"]),
        (f"{HERE}:Undecided", ["override `select`"]),
        (f"{HERE}:Unlike", ["masks = 'same' is not allowed", "within-budget"]),
        (f"{HERE}:OneText", ["should be a tuple of names"]),
        ("a:b:c", ["is not allowed"]),
    ],
)
def test_what_is_no_strategy_is_one_line(name: str, says: list[str]) -> None:
    result = CliRunner().invoke(app, ["run", f"strategy.name={name}"])
    assert result.exit_code == 2
    assert [text for text in says if text not in result.output] == []
    assert "Traceback" not in result.output


@pytest.mark.usefixtures("tiny_task")
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Silent", "'Silent' answered NoneType; a Choice with a numpy array of masks is due"),
        ("Greedy", "'Greedy' spends 4 of a client's budget of 1"),
        ("Numbers", r"'Numbers' gave masks of float64\(4, 4\); booleans of shape \(4, 4\) are due"),
        ("Fewer", r"'Fewer' gave masks of bool\(1, 4\); booleans of shape \(4, 4\) are due"),
    ],
)
def test_wrong_masks_are_refused_before_any_client_trains(name: str, says: str) -> None:
    config = configured(f"strategy.name={HERE}:{name}")
    grid = Recorded(config)
    with pytest.raises(ConfigError, match=says):
        run(config, 1, grid)
    assert not grid.trained()


def test_masks_are_held_against_budgets_and_costs_of_depth() -> None:
    """Defects 5 and 8 of the released code: it used other clients' budgets, and exceeded budgets."""
    case = candidates([2, 1], [1.0, 1.0, 1.0], depth=[1.0, 0.5, 0.0])
    choice = Greedy.select(None, case)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="spends 4 of a client's budget of 1"):
        check_choice("x", choice, case, bounded=True)
    check_choice("x", choice, case, bounded=False)
    exact = replace(choice, masks=choice.masks & [[False, True, True], [False, False, True]])
    with pytest.raises(ConfigError, match=r"spends 2.5 of a client's budget of 2"):
        check_choice("x", exact, case, bounded=True)
    fits = replace(choice, masks=choice.masks & [[False, False, True], [False, False, True]])
    check_choice("x", fits, case, bounded=True)
    # Each of the masks that a client trains in turn is held against its budget.
    union = replace(choice, masks=choice.masks & [[False, True, True], [False, False, True]])
    turns = [np.array([[False, True, False], [False, False, True]]), union.masks[1:]]
    check_choice("x", replace(union, schedules=turns), case, bounded=True)
    turns = [np.array([[False, True, True], [False, False, True]]), union.masks[1:]]
    with pytest.raises(ConfigError, match=r"spends 2.5 of a client's budget of 2"):
        check_choice("x", replace(union, schedules=turns), case, bounded=True)
    for wrong, says in (
        (turns[:1], "1 schedules; 2 are due"),
        ([turns[0][:0], turns[1]], r"a schedule of bool\(0, 3\)"),
        ([turns[0].astype(int), turns[1]], "a schedule of int64"),
        ([turns[1], turns[1]], "together are not the client's mask"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_choice("x", replace(union, schedules=wrong), case, bounded=True)


@pytest.mark.usefixtures("tiny_task")
def test_a_run_stops_after_a_round_when_asked() -> None:
    config = configured("strategy.name=top")
    resident = workbench(config.to_flat()).resident
    rounds: list[RoundRecord] = []
    strategy = load_strategy("top")(resident.layers)
    assert isinstance(strategy, SelectiveStrategy)
    strategy.start(
        Recorded(config),
        record_of(resident.base_state()),
        5,
        timeout=60,
        train_config=ConfigRecord({"lr": 0.1}),
        evaluate_fn=lambda number, arrays: rounds.append(strategy.round.record),  # type: ignore[func-returns-value]
        should_stop=lambda: len(rounds) == 3,
    )
    assert [record.round for record in rounds] == [0, 1, 2]
    assert [record.lr for record in rounds] == [None, 0.1, 0.1], (
        "unless asked for, it does not decay"
    )


def test_shipped_configurations_go_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("cifar10")).task.name == "cifar10"
    assert load_plan(Path("tables/table3")).show == "cost"
    with pytest.raises(ConfigError, match="cannot read configuration nothing"):
        load_config(Path("nothing"))


@pytest.mark.usefixtures("tiny_task")
def test_a_strategy_cannot_change_what_the_run_records() -> None:
    with pytest.raises(ValueError, match="read-only"):
        run(configured(f"strategy.name={HERE}:InPlace"))
