"""The files of a comparison beside its run folders: NAME.md, NAME.csv, NAME.html and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from layerfed.compare.plan import Cell, Experiment, Plan
from layerfed.config import ConfigError
from layerfed.files import whole
from layerfed.report import (
    RunFigures,
    Section,
    accuracy_table,
    comparison_view,
    differences,
    draw_accuracy,
    draw_terms,
    draw_uplink,
    measured_costs,
    named,
    paired_differences,
    paper_accounting,
    runs_csv,
    scores_table,
    write_page,
)

__all__ = ["Output"]


class Output:
    """The tables and pictures of a comparison's completed runs.

    Parameters
    ----------
    plan : Plan
    cells : Sequence[Cell]
        All runs of the comparison.
    directory : Path
    """

    def __init__(self, plan: Plan, cells: Sequence[Cell], directory: Path) -> None:
        self._plan, self._directory = plan, directory
        self._exists = {(cell.experiment, cell.row, cell.budget) for cell in cells}
        self._runs: dict[tuple[str, str, str | None, int], RunFigures] = {}

    def add(self, cell: Cell) -> RunFigures:
        """Read a completed run.

        Raises
        ------
        ConfigError
            If its folder is damaged.
        """
        try:
            run = RunFigures.read(cell.folder)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{cell.folder} is marked as completed, but cannot be read ({type(error).__name__}: "
                f"{error}); move it away to run it again"
            ) from None
        self._runs[cell.experiment, cell.row, cell.budget, cell.seed] = run
        return run

    @property
    def sections(self) -> list[Section]:
        """The completed runs so far, as one section for each experiment."""
        return [self._section(experiment) for experiment in self._plan.experiments]

    def _section(self, experiment: Experiment) -> Section:
        plan = self._plan
        runs: dict[tuple[str, str | None], list[RunFigures]] = {}
        for row in plan.rows:
            for budget in plan.budgets if row.within_budget else [None]:
                name = budget.name if budget else None
                if (experiment.name, row.name, name) in self._exists:
                    keys = [(experiment.name, row.name, name, seed) for seed in plan.seeds]
                    runs[row.name, budget.title if budget else None] = [
                        self._runs[key] for key in keys if key in self._runs
                    ]
        return Section(
            title=experiment.title,
            rows=[row.name for row in plan.rows],
            budgets=[budget.title for budget in plan.budgets],
            runs=runs,
            seeds=len(plan.seeds),
            paper=experiment.paper,
            paper_costs=experiment.paper_costs,
        )

    def write_tables(self) -> list[Path]:
        """Write NAME.md and NAME.csv; return their paths."""
        plan, sections = self._plan, self.sections
        metrics = dict.fromkeys(named(section.metric) for section in sections)
        parts = [f"# {plan.title}", _caption(plan, " / ".join(metrics))]
        for section in sections:
            if len(sections) > 1:
                parts.append(f"## {section.title}")
            if plan.show == "accuracy":
                parts.append(accuracy_table(section))
                if plan.reference and (pairs := paired_differences(section, plan.reference)):
                    parts += [PAIRED, pairs]
                if scores := scores_table(section):
                    parts += [SCORES, scores]
            else:
                parts += [
                    MEASURED,
                    measured_costs(section, plan.reference),
                    ACCOUNTED,
                    paper_accounting(section, plan.reference),
                ]
        if warning := differences(sections):
            parts.append(warning)
        if plan.note:
            parts.append(plan.note)
        written = {
            self._file(".md"): "\n\n".join(part.strip() for part in parts) + "\n",
            self._file(".csv"): runs_csv(
                zip((e.name for e in plan.experiments), sections, strict=True)
            ),
        }
        for file, text in written.items():
            with whole(file) as beside:
                beside.write_text(text, encoding="utf-8")
        return list(written)

    def draw(self) -> list[Path]:
        """Draw accuracy by round, accuracy against uplink, the theory's terms if known, and the page."""
        if not self._runs:
            return []
        sections = self.sections
        pictures = [
            draw_accuracy(sections, self._file("-accuracy.png")),
            draw_uplink(sections, self._file("-uplink.png")),
        ]
        if any(any(run.terms.values()) for run in self._runs.values()):
            pictures.append(draw_terms(sections, self._file("-theory.png")))
        return [
            *pictures,
            write_page(comparison_view(self._plan.title, sections), self._file(".html")),
        ]

    def _file(self, ending: str) -> Path:
        return self._directory / f"{self._plan.name}{ending}"


PAIRED = (
    "Differences, of shares in percentage points, paired by seed: runs of one seed share partition, "
    "sampling and new weights; mean ± sample standard deviation over seeds."
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


def _caption(plan: Plan, metrics: str) -> str:
    seeds = len(plan.seeds)
    over = (
        f"mean ± sample standard deviation over {seeds} seeds"
        if seeds > 1
        else f"seed {plan.seeds[0]}"
    )
    text = f"Final test {metrics}; {over}"
    if plan.show == "accuracy":
        text += (
            "; the best of each budget in bold, which need not mean that it is better. Bytes (in % of "
            "full-model exchange) and TFLOPs (probe included) are of the first budget a row has"
        )
    source = f" Published figures: {plan.source}." if plan.source else ""
    return f"{text}.{source}"
