"""What people take home from a run: the whole model in its library's own form, and its predictions."""

from layerfed.export.model import ExportFormat, export_run
from layerfed.export.predict import predictions, write_rows
from layerfed.export.saved import SavedRun

__all__ = ["ExportFormat", "SavedRun", "export_run", "predictions", "write_rows"]
