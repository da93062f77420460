"""The ClientApp: LayerFed's own."""

from layerfed.node_app import client_app as app

__all__ = ["app"]
