"""Table files: the shipped ones, and errors that name the file, the value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerfed.compare import is_table_file, load_plan
from layerfed.config import ConfigError

CONF = Path(__file__).parents[2] / "conf"
TABLES = CONF / "tables"

SMALL = """
title = "small"
budgets = [1, 2]
seeds = [3]

[rows]
full = {}
"every second round" = { strategy.name = "ilp", strategy.period = 2 }

[experiments.one]
conf = "base.toml"
set = { train.lr = 0.5 }

[experiments.one.paper]
full = 90
"every second round" = [nan, 80.5]

[experiments.two]
conf = "base.toml"
"""


@pytest.fixture
def table(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text("[train]\nlr = 0.25\nbatch-size = 8\n")
    file = tmp_path / "small.toml"
    file.write_text(SMALL)
    return file


def test_settings_of_the_command_line_are_on_top_and_rows_keep_theirs(table: Path) -> None:
    plan = load_plan(table, ["train.batch_size=4", "run.project=1.10"])
    one, two = plan.experiments
    assert (one.base.train.lr, two.base.train.lr) == (0.5, 0.25)
    assert one.base.train.batch_size == two.base.train.batch_size == 4
    assert one.base.run.project == "1.10"
    periods = {cell.row: cell.config.strategy.period for cell in plan.cells(Path("x"))}
    assert periods == {"full": 1, "every second round": 2}
    assert [cell.seed for cell in plan.cells(Path("x"))] == [3] * 6
    with pytest.raises(ConfigError, match=r"period = 5: rows of .* own \(every second round\)"):
        load_plan(table, ["strategy.period=5"])


def test_a_file_may_begin_with_a_mark_and_have_underscores(table: Path) -> None:
    text = table.read_text().replace("[rows]", "[set]\ntrain.local_steps = 3\n\n[rows]")
    table.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert is_table_file(table)
    assert load_plan(table).experiments[1].base.train.local_steps == 3


def test_settings_for_all_experiments_are_below_those_of_each(table: Path) -> None:
    common = "[set]\ntrain = { lr = 0.75, local-steps = 3 }\n\n[rows]"
    table.write_text(table.read_text().replace("[rows]", common))
    one, two = load_plan(table).experiments
    assert (one.base.train.lr, two.base.train.lr) == (0.5, 0.75)
    assert one.base.train.local_steps == two.base.train.local_steps == 3


def test_experiments_and_seeds_can_be_chosen(table: Path) -> None:
    plan = load_plan(table, seeds=[5, 6], only=["two"])
    assert [experiment.name for experiment in plan.experiments] == ["two"]
    assert plan.seeds == [5, 6]
    with pytest.raises(ConfigError, match=r"--only three: .* it has one, two"):
        load_plan(table, only=["three"])


def test_a_row_with_more_clients_has_them_all_in_a_round(table: Path) -> None:
    table.write_text(table.read_text().replace("strategy.period = 2", "federation.clients = 30"))
    cells = load_plan(table).cells(Path("x"))
    sizes = {(c.row, c.config.federation.clients_per_round) for c in cells}
    assert sizes == {("full", 10), ("every second round", 30)}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("seeds = [3]", "seeds = [-3]", "seeds.0 = -3 is not allowed"),
        ("seeds = [3]", "seeds = [3, 3]", "seed '3' occurs twice"),
        ("seeds = [3]", "sedes = [3]", "unknown key 'sedes'; known keys: title"),
        ("budgets = [1, 2]", "", "budgets"),
        ("budgets = [1, 2]", "budgets = []", "there is no budget to compare"),
        ("budgets = [1, 2]", 'budgets = ["normal"]', "'normal' is not allowed"),
        ('"base.toml"\nset', '"gone.toml"\nset', "experiment 'one': cannot read configuration"),
        ("train.lr = 0.5", "train.rl = 0.5", "experiment 'one': unknown key 'train.rl'"),
        ("[rows]", "set = { train.rl = 1 }\n[rows]", "experiment 'one': unknown key 'train.rl'"),
        ("train.lr = 0.5", "run.seed = 5", "experiment 'one': run.seed is decided by seeds"),
        ("strategy.period = 2", "strategy.perod = 2", "unknown key 'strategy.perod'"),
        ("strategy.period = 2", "budget.layers = 2", "budget.layers is decided by budgets"),
        ("strategy.period = 2", "task.metric = 'loss'", "has task.metric, and differences to rows"),
        ("full = {}", "fll = {}", "row 'fll': strategy.name = 'fll' is not allowed"),
        ("full = {}", 'full = {}\n"!" = {}', "row '!' needs a letter or a digit"),
        ("full = 90", "fll = 90", "experiments.one.paper: 'fll' is no row"),
        ("full = 90", "full = [90, 91]", "it should be 1 accuracies"),
        ("full = 90", "full = 900", "accuracies are between 0 and 100%"),
        ("[nan, 80.5]", "[80.5]", "it should be 2 accuracies in %"),
        ("[nan, 80.5]", "{ tflops = 1 }", "it should be 2 accuracies in %"),
        ('title = "small"', 'title = "small"\nshow = "costs"', "show = 'costs' is not allowed"),
        ('title = "small"', 'title = "small"\nshow = "cost"', "it should be a table of tflops"),
        ('title = "small"', 'title = "small"\nreference = "x"', "reference = 'x' is no row"),
    ],
)
def test_mistakes_are_named(old: str, new: str, says: str, table: Path) -> None:
    text = table.read_text()
    assert old in text
    table.write_text(text.replace(old, new, 1))
    with pytest.raises(ConfigError) as refused:
        load_plan(table).cells(Path("x"))
    assert says in str(refused.value)


def test_a_table_file_is_told_from_a_configuration(table: Path, tmp_path: Path) -> None:
    assert is_table_file(table)
    for other in ("base.toml", "nowhere.toml"):
        assert not is_table_file(tmp_path / other)


@pytest.mark.parametrize(
    ("name", "runs"), [("table1", 144), ("table2", 72), ("table3", 4), ("figure2", 54)]
)
def test_the_papers_tables_are_complete(name: str, runs: int) -> None:
    plan = load_plan(TABLES / f"{name}.toml")
    assert len(plan.cells(Path("x"))) == runs
    rows = {row.name for row in plan.rows}
    for experiment in plan.experiments:
        published = experiment.paper_costs if plan.show == "cost" else experiment.paper
        assert published.keys() == (set() if name == "figure2" else rows)


def test_no_table_runs_anew_what_another_one_ran() -> None:
    seen: dict[Path, object] = {}
    for file in sorted(TABLES.glob("*.toml")):
        for cell in load_plan(file).cells(Path("x")):
            assert seen.setdefault(cell.folder, cell.config) == cell.config
    # Table 3 adds its two cheaper selections, Figure 2 nothing.
    papers = {experiment.name for experiment in load_plan(TABLES / "table1.toml").experiments}
    assert len([folder for folder in seen if folder.parts[1] in papers]) == 144 + 72 + 2


def test_flowertunes_baseline_is_a_row_beside_chosen_adapters_and_layers() -> None:
    cells = load_plan(TABLES / "instructions.toml").cells(Path("x"))
    found = [(c.row, c.config.strategy.name, c.config.model.tuning) for c in cells if not c.seed]
    assert found == [
        ("FlowerTune", "full", "lora"),
        ("ilp, LoRA", "ilp", "lora"),
        ("top, LoRA", "top", "lora"),
        ("ilp, layers", "ilp", "layers"),
        ("full, layers", "full", "layers"),
    ]
