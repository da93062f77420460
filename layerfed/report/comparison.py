"""The tables of a comparison."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from io import StringIO

from layerfed.exchange.metrics import METRICS
from layerfed.exchange.scores import ACCURACY, LOSS, Score
from layerfed.report.figures import RunFigures, Section
from layerfed.report.markup import Table
from layerfed.report.significance import Paired, differences_by_seed, holm, paired_test

__all__ = [
    "PAPER_COSTS",
    "TESTS",
    "accuracy_table",
    "differences",
    "differences_csv",
    "measured_costs",
    "named",
    "paired_differences",
    "paired_tests",
    "paper_accounting",
    "runs_csv",
    "scores_table",
    "significance_table",
]

# Published costs of a client and round: their keys in a table file, and their columns here.
PAPER_COSTS = {
    "tflops": "TFLOPs",
    "tflops-ratio": "of full, %",
    "selection": "selection",
    "selection-ratio": "of full, %",
    "mbit-up": "Mbit up",
    "mbit-up-ratio": "of full, %",
}
NONE, PENDING = "–", "…"
# Columns of the CSV that are attributes of a run's figures; what clients stated follows.
RUN_COLUMNS = (
    "rounds",
    "accuracy",
    "best_accuracy",
    "loss",
    "bytes_up",
    "bytes_down",
    "bytes_full_up",
    "bytes_full_down",
    "updates",
    "seconds",
    "e1",
    "e2",
    "e2_masks",
    "engine",
    "device",
    "torch",
    "layerfed",
)
# The CSV's columns on hardware and software. Costs of runs that differ in them cannot be compared.
MADE_WITH = ("engine", "device", "torch", "layerfed")

PAIRED = (
    "Differences, of shares in percentage points, paired by seed: runs of one seed share partition, "
    "sampling and new weights; mean ± sample standard deviation over seeds."
)
TESTS = (
    "Tests of the differences paired by seed: mean with the 95% interval and p of the paired t-test, "
    "p corrected for the number of tests (Holm), p of the sign-flip test, which needs six "
    "seeds to be below 0.05, and the number of seeds that give the t-test 80% power at 5%, if mean and "
    "spread stay as they are."
)
SCORES = "All final scores on the test set, of the first budget a row has."
MEASURED = (
    "Measured, a client and round: FLOPs as counted, forward and backward, frozen layers included; "
    "bytes of the ledger; seconds of a step by the clients' clocks; peak memory of training (of the "
    "probe) on CUDA, of the whole process elsewhere."
)
ACCOUNTED = (
    "In the paper's accounting, a client and round: each selected layer counts as its share of the "
    "whole model, and nothing else does (`layerfed/report/paper_costs.py`). Selection is as measured."
)

Runs = Sequence[RunFigures]
Figure = Callable[[RunFigures], float]


def accuracy_table(section: Section) -> Table:
    """Return final main scores, shares in %: mean ± standard deviation over seeds, the best in bold.

    Rows without budgets do not compete for the best, as `full` does not in the paper's tables. Published
    figures and costs follow: bytes in % of full-model exchange, and TFLOPs of training and probes, at
    the first budget for which a row has runs.
    """
    best = {
        budget: section.metric.best(
            _mean(runs, _value)
            for row in section.rows
            if section.within_budget(row) and (runs := section.entry(row, budget))
        )
        for budget in section.budgets
    }

    def score(row: str, budget: str) -> str:
        runs = section.entry(row, budget)
        if runs is None:
            return NONE
        text = _spread(runs, section.seeds)
        leads = runs and section.within_budget(row) and _mean(runs, _value) == best[budget]
        return f"**{text}**" if leads else text

    published = [f"paper, {budget}" for budget in section.budgets] if section.paper else []
    header = ["strategy", *section.budgets, *published, "uplink %", "downlink %", "TFLOPs"]
    lines = []
    for row in section.rows:
        line = [row, *(score(row, budget) for budget in section.budgets)]
        if published:
            found = (section.published(row, budget) for budget in section.budgets)
            line += [NONE if figure is None else f"{figure:.2f}" for figure in found]
        runs = section.first(row)
        line += [
            _text(runs, lambda run: 100 * run.bytes_up / run.bytes_full_up, ".1f"),
            _text(runs, lambda run: 100 * run.bytes_down / run.bytes_full_down, ".1f"),
            _text(
                runs, lambda run: (run.metrics["flops"] + run.metrics["flops_probe"]) / 1e12, ".2f"
            ),
        ]
        lines.append(line)
    return Table(header, lines)


def scores_table(section: Section) -> Table:
    """Return all final scores, mean ± standard deviation over seeds; empty for accuracy and loss alone.

    Each row is shown at the first budget for which it has runs. Shares are numbers from 0 to 1.
    """
    runs = [run for row in section.rows for run in section.first(row)]
    names = list(dict.fromkeys(name for run in runs for name in run.curves))
    if set(names) <= {ACCURACY.name, LOSS.name}:
        return Table((), ())

    def cell(row: str, name: str) -> str:
        values = [run.final(name) for run in section.first(row)]
        if not values:
            return PENDING
        return _mean_spread(values, ".4f")

    lines = [[row, *(cell(row, name) for name in names)] for row in section.rows]
    return Table(["strategy", *(Score(name).title for name in names)], lines, SCORES)


def paired_differences(section: Section, reference: str) -> Table:
    """Return the differences of each row's main scores to those of one row; of shares in points.

    Runs of one seed share partition, sampling and new weights, so their difference says more than the
    difference of two means. The table has its mean ± standard deviation over seeds. It is empty if no
    seed has both runs.

    Parameters
    ----------
    section : Section
    reference : str
        The row that is subtracted.
    """

    def cell(row: str, budget: str) -> str:
        if section.entry(row, budget) is None:
            return NONE
        found = _differences(section, reference, row, budget)
        form = _form(section.metric)
        spread = f" ± {statistics.stdev(found):{form}}" if len(found) > 1 else ""
        return f"{statistics.fmean(found):+{form}}{spread}" if found else PENDING

    rows = [row for row in section.rows if row != reference]
    if not paired_tests(section, reference):
        return Table((), ())
    lines = [[row, *(cell(row, budget) for budget in section.budgets)] for row in rows]
    return Table([f"less {reference}", *section.budgets], lines, PAIRED)


def paired_tests(section: Section, reference: str) -> dict[tuple[str, str], Paired]:
    """Return the paired tests of each row and budget against a row, for entries with two pairs or more.

    p is corrected for the number of tests in the section.
    """
    found = {
        (row, budget): differences
        for row in section.rows
        for budget in section.budgets
        if row != reference
        # Two rows without budgets differ by one number, whatever the columns are.
        and (budget == section.budgets[0] or any(map(section.within_budget, (row, reference))))
        and len(differences := _differences(section, reference, row, budget)) > 1
    }
    return dict(zip(found, holm([paired_test(each) for each in found.values()]), strict=True))


def significance_table(section: Section, reference: str) -> Table:
    """Return the tests behind `paired_differences`, one line an entry; empty if no two pairs exist."""
    form = _form(section.metric)

    def chance(p: float) -> str:
        return NONE if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"

    lines = [
        [
            row,
            budget,
            str(test.seeds),
            f"{test.mean:+{form}}",
            f"{test.low:+{form}} to {test.high:+{form}}",
            *map(chance, (test.p, test.p_holm, test.p_signs)),
            NONE if test.needed is None else str(test.needed),
        ]
        for (row, budget), test in paired_tests(section, reference).items()
    ]
    header = [f"less {reference}", "budget", "seeds", "difference", "95% interval"]
    return Table([*header, "p", "p, Holm", "p, signs", "seeds for 80%"], lines, TESTS)


def differences_csv(sections: Iterable[tuple[str, Section]], reference: str) -> str:
    """Return a CSV with one line for each paired test; sections come with their experiment's name."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = [field.name for field in fields(Paired)]
    writer.writerow(["experiment", "row", "budget", "reference", "metric", "unit", *columns])
    for experiment, section in sections:
        unit = "points" if section.metric.share else ""
        for (row, budget), test in paired_tests(section, reference).items():
            of = [experiment, row, budget, reference, section.metric.name, unit]
            writer.writerow([*of, *(getattr(test, column) for column in columns)])
    return text.getvalue()


def _differences(section: Section, reference: str, row: str, budget: str) -> list[float]:
    runs, others = (section.entry(name, budget) or () for name in (row, reference))
    return differences_by_seed(runs, others)


def measured_costs(section: Section, reference: str = "") -> Table:
    """Return the measured costs of a client's round: compute, traffic, time and memory.

    Parameters
    ----------
    section : Section
        The experiment; each row is shown at the first budget for which it has runs.
    reference : str
        The row that ratios are relative to; empty for no ratios.
    """
    full = section.first(reference) if reference else ()
    header = [
        *("strategy", "TFLOPs training", "TFLOPs selection", "sum, % of full (selection)"),
        *("Mbit up", "% of full", "Mbit down", "% of full"),
        *("s a round", "s a step", "peak memory, MB (of the probe)", named(section.metric)),
    ]
    lines = []
    for row in section.rows:
        runs = section.first(row)
        selection = _ratio(runs, _selection, full, _compute)
        lines.append(
            [
                row,
                _text(runs, _training, ".3g"),
                _text(runs, _selection, ".3g"),
                f"{_ratio(runs, _compute, full, _compute)} ({selection})",
                _text(runs, _mbit_up, ",.4g"),
                _ratio(runs, _mbit_up, full, _mbit_up),
                _text(runs, _mbit_down, ",.4g"),
                _ratio(runs, _mbit_down, full, _mbit_down),
                _text(runs, lambda run: run.seconds / run.rounds, ".3g"),
                _text(runs, _step_seconds, ".3g"),
                f"{_text(runs, _peak, ',.0f')} ({_text(runs, _peak_probe, ',.0f')})",
                _spread(runs, section.seeds),
            ]
        )
    return Table(header, lines, MEASURED)


def paper_accounting(section: Section, reference: str = "") -> Table:
    """Return the costs of a client's round in the paper's accounting, beside the published figures.

    The rule is that of `paper_costs`, except that FLOPs of selection are measured. Parameters are those
    of `measured_costs`.
    """
    full = section.first(reference) if reference else ()

    def compute(run: RunFigures) -> float:
        return _accounted(run) + _selection(run)

    def mbit(run: RunFigures) -> float:
        return run.accounted.bytes_up * 8e-6

    published = [f"paper: {title}" for title in PAPER_COSTS.values()] if section.paper_costs else []
    lines = []
    for row in section.rows:
        runs = section.first(row)
        line = [
            row,
            _text(runs, compute, ".3g"),
            _ratio(runs, compute, full, compute),
            _text(runs, _selection, ".3g"),
            _ratio(runs, _selection, full, compute),
            _text(runs, mbit, ",.4g"),
            _ratio(runs, mbit, full, mbit),
        ]
        if published:
            figures = section.paper_costs.get(row, {})
            line += [f"{figures[key]:,.4g}" if key in figures else NONE for key in PAPER_COSTS]
        lines.append(line)
    return Table(["strategy", *PAPER_COSTS.values(), *published], lines, ACCOUNTED)


def runs_csv(sections: Iterable[tuple[str, Section]]) -> str:
    """Return a CSV with one line for each completed run; sections come with their experiment's name."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    rows = [
        (experiment, row, budget, run)
        for experiment, section in sections
        for (row, budget), runs in section.runs.items()
        for run in runs
    ]
    # Further columns for the scores of the runs' tasks, on the test set and on clients' own examples.
    scores = dict.fromkeys(name for *_, run in rows for name in run.curves)
    more = [name for name in scores if name not in RUN_COLUMNS]
    stated = dict.fromkeys([*METRICS, *(name for *_, run in rows for name in run.metrics)])
    columns = [*RUN_COLUMNS, *stated, "metric", "value", "best_value", *more]
    writer.writerow(["experiment", "row", "budget", "seed", "folder", *columns])
    for experiment, row, budget, run in rows:
        figures = [getattr(run, column) for column in RUN_COLUMNS]
        figures += [run.metrics.get(name, math.nan) for name in stated]
        figures += [run.metric.name, run.value, run.best_value, *map(run.final, more)]
        writer.writerow([experiment, row, budget, run.seed, run.folder.name, *figures])
    return text.getvalue()


def differences(sections: Iterable[Section]) -> str:
    """Return a warning if runs of a seed differ in their data, or any in what costs depend on."""
    sections = list(sections)
    runs = [run for section in sections for found in section.runs.values() for run in found]
    warnings = []
    data: dict[tuple[str, int], set[str]] = defaultdict(set)
    for section in sections:
        for run in (run for found in section.runs.values() for run in found if run.data):
            data[section.title, run.seed].add(run.data)
    if other := [f"{title}, seed {seed}" for (title, seed), each in data.items() if len(each) > 1]:
        warnings.append(
            f"**These runs are not of the same data** ({'; '.join(other)}): `data` in their "
            "summary.json differs, and so may their scores for this reason alone."
        )
    found = {key: sorted({getattr(run, key) for run in runs}) for key in MADE_WITH}
    apart = [f"{key} ({', '.join(values)})" for key, values in found.items() if len(values) > 1]
    if apart:
        warnings.append(
            f"**These runs differ in {' and '.join(apart)}**: their costs cannot be compared, see the "
            "CSV for which is which."
        )
    return " ".join(warnings)


def named(metric: Score) -> str:
    """Return a score's name with its unit."""
    return f"{metric.title}, %" if metric.share else metric.title


def _value(run: RunFigures) -> float:
    return run.metric.scale * run.value


def _form(metric: Score) -> str:
    return ".2f" if metric.share else ".4g"


def _training(run: RunFigures) -> float:
    """TFLOPs of a client's training in a round."""
    return run.metrics["flops"] / run.updates / 1e12


def _selection(run: RunFigures) -> float:
    """TFLOPs of a client's probe, as a mean over all rounds, also those without a probe."""
    return run.metrics["flops_probe"] / run.updates / 1e12


def _compute(run: RunFigures) -> float:
    return _training(run) + _selection(run)


def _step_seconds(run: RunFigures) -> float:
    """Seconds of a local step, by the clients' own clocks."""
    return run.metrics["train_seconds"] / run.metrics["steps"] if run.metrics["steps"] else math.nan


def _peak(run: RunFigures) -> float:
    """MB at the peak of a client's training."""
    return run.metrics["peak_memory"] / 1e6 or math.nan


def _peak_probe(run: RunFigures) -> float:
    """MB at the peak of a client's probe."""
    return run.metrics["peak_memory_probe"] / 1e6 or math.nan


def _accounted(run: RunFigures) -> float:
    return math.nan if run.accounted.flops is None else run.accounted.flops / 1e12


def _mbit_up(run: RunFigures) -> float:
    return run.bytes_up * 8e-6 / run.updates


def _mbit_down(run: RunFigures) -> float:
    return run.bytes_down * 8e-6 / run.updates


def _mean(runs: Runs, figure: Figure) -> float:
    return statistics.fmean(map(figure, runs))


def _text(runs: Runs, figure: Figure, form: str) -> str:
    """Return the mean of a figure over runs as text, or a dash if it is undefined."""
    if not runs:
        return PENDING
    mean = _mean(runs, figure)
    return NONE if math.isnan(mean) else f"{mean:{form}}"


def _ratio(runs: Runs, figure: Figure, full: Runs, whole: Figure) -> str:
    """Return a figure of some runs in % of a figure of the reference's runs."""
    if not (runs and full) or not _mean(full, whole) > 0:  # NaN included
        return NONE
    share = _mean(runs, figure) / _mean(full, whole)
    return NONE if math.isnan(share) else f"{100 * share:.1f}"


def _spread(runs: Runs, seeds: int) -> str:
    """Return mean ± standard deviation of the main score, and the number of runs if some are missing."""
    if not runs:
        return PENDING
    scores = [_value(run) for run in runs]
    known = sum(not math.isnan(score) for score in scores)
    count = f" ({known} of {seeds})" if known < seeds else ""
    return f"{_mean_spread(scores, _form(runs[0].metric))}{count}"


def _mean_spread(values: Sequence[float], form: str) -> str:
    """Return mean ± standard deviation of the values that are defined, or a dash if none is."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return NONE
    spread = f" ± {statistics.stdev(known):{form}}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):{form}}{spread}"
