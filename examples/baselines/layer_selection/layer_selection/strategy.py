"""The paper's strategy, and all others by name: LayerFed's own."""

from layerfed.strategies import STRATEGIES
from layerfed.strategies.ilp import ILP

__all__ = ["ILP", "STRATEGIES"]
