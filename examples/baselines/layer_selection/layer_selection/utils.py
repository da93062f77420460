"""The page, the pictures and the tables of finished runs: LayerFed's own."""

from layerfed.report import draw_run, run_table, run_view, write_page

__all__ = ["draw_run", "run_table", "run_view", "write_page"]
