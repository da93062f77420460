"""The ServerApp: LayerFed's own, whose settings are the run configuration."""

from layerfed.server_app import server_app as app

__all__ = ["app"]
