"""Comparisons of strategies: rows by budgets by seeds, on one or more experiments, and their tables."""

from layerfed.compare.plan import Budget, Cell, Experiment, Plan, Row, parse_seeds, refuse_grid_keys
from layerfed.compare.running import Standing, compare, standing
from layerfed.compare.table_file import is_table_file, load_plan

__all__ = [
    "Budget",
    "Cell",
    "Experiment",
    "Plan",
    "Row",
    "Standing",
    "compare",
    "is_table_file",
    "load_plan",
    "parse_seeds",
    "refuse_grid_keys",
    "standing",
]
