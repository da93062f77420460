"""Pictures and tables, made from run folders only."""

from layerfed.report.plots import draw_run
from layerfed.report.tables import run_table

__all__ = ["draw_run", "run_table"]
