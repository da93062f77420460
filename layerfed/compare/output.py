"""The files of a comparison beside its run folders: tables, NAME.html and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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
    differences_csv,
    draw_accuracy,
    draw_terms,
    draw_uplink,
    measured_costs,
    named,
    paired_differences,
    paper_accounting,
    runs_csv,
    scores_table,
    significance_table,
    write_page,
)
from layerfed.report.markup import Table

__all__ = ["Output"]

PREAMBLE = (
    r"% Needs \usepackage{booktabs}. Written again after each run: \input it, and do not edit it."
)


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
        """Write the tables: NAME.md, NAME.csv, NAME.tex, NAME-differences.csv; return their paths."""
        plan, sections = self._plan, self.sections
        caption = _caption(plan, " / ".join(dict.fromkeys(named(s.metric) for s in sections)))
        text, latex = [f"# {plan.title}", caption], [PREAMBLE]
        for section in sections:
            if len(sections) > 1:
                text.append(f"## {section.title}")
            for table in filter(None, self._tables(section, caption)):
                about = [table.about] if table.about != caption else []
                text += [*about, table.markdown()]
                latex.append(replace(table, about=f"{section.title}. {table.about}").latex())
        text += filter(None, (differences(sections), plan.note))
        named_sections = list(zip((e.name for e in plan.experiments), sections, strict=True))
        written = {
            ".md": "\n\n".join(part.strip() for part in text) + "\n",
            ".csv": runs_csv(named_sections),
            ".tex": "\n\n".join(latex) + "\n",
        }
        if plan.reference:
            written["-differences.csv"] = differences_csv(named_sections, plan.reference)
        for ending, content in written.items():
            with whole(self._file(ending)) as beside:
                beside.write_text(content, encoding="utf-8")
        return [self._file(ending) for ending in written]

    def _tables(self, section: Section, caption: str) -> list[Table]:
        reference = self._plan.reference
        if self._plan.show != "accuracy":
            return [measured_costs(section, reference), paper_accounting(section, reference)]
        tables = [replace(accuracy_table(section), about=caption)]
        if reference:
            tables += [
                paired_differences(section, reference),
                significance_table(section, reference),
            ]
        return [*tables, scores_table(section)]

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
            write_page(
                comparison_view(
                    self._plan.title, sections, reference=self._plan.reference or "ilp"
                ),
                self._file(".html"),
            ),
        ]

    def _file(self, ending: str) -> Path:
        return self._directory / f"{self._plan.name}{ending}"


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
