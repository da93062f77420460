"""Pictures and tables, made from run folders only."""

from layerfed.report.comparison import (
    PAPER_COSTS,
    accuracy_table,
    differences,
    measured_costs,
    paired_differences,
    paper_accounting,
    runs_csv,
)
from layerfed.report.comparison_plots import draw_accuracy, draw_terms, draw_uplink
from layerfed.report.figures import RunFigures, Section
from layerfed.report.plots import draw_run
from layerfed.report.tables import run_table

__all__ = [
    "PAPER_COSTS",
    "RunFigures",
    "Section",
    "accuracy_table",
    "differences",
    "draw_accuracy",
    "draw_run",
    "draw_terms",
    "draw_uplink",
    "measured_costs",
    "paired_differences",
    "paper_accounting",
    "run_table",
    "runs_csv",
]
