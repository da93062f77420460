"""Pictures, tables and pages, made from run folders only."""

from layerfed.report.comparison import (
    PAPER_COSTS,
    accuracy_table,
    differences,
    differences_csv,
    measured_costs,
    named,
    paired_differences,
    paper_accounting,
    runs_csv,
    scores_table,
    significance_table,
)
from layerfed.report.comparison_plots import draw_accuracy, draw_terms, draw_uplink
from layerfed.report.comparison_view import comparison_view, run_folders, sections_of
from layerfed.report.figures import RunFigures, Section
from layerfed.report.page import PAGE, page, plain, write_page
from layerfed.report.plots import draw_partition, draw_run, save_picture
from layerfed.report.run_view import metric_of, run_view
from layerfed.report.tables import class_table, data_table, run_table

__all__ = [
    "PAGE",
    "PAPER_COSTS",
    "RunFigures",
    "Section",
    "accuracy_table",
    "class_table",
    "comparison_view",
    "data_table",
    "differences",
    "differences_csv",
    "draw_accuracy",
    "draw_partition",
    "draw_run",
    "draw_terms",
    "draw_uplink",
    "measured_costs",
    "metric_of",
    "named",
    "page",
    "paired_differences",
    "paper_accounting",
    "plain",
    "run_folders",
    "run_table",
    "run_view",
    "runs_csv",
    "save_picture",
    "scores_table",
    "sections_of",
    "significance_table",
    "write_page",
]
