"""LayerFed: federated fine-tuning in which every device trains only the layers it can afford."""

from importlib.metadata import version

__version__ = version("layerfed")
