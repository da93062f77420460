"""Half the budget at the output, half at the input."""

from __future__ import annotations

from layerfed.config import ConfigError, RunConfig
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies.base import SelectiveStrategy
from layerfed.strategies.ranking import by_order


def alternating(num_blocks: int) -> list[int]:
    """Return layer indices as output, input, next output, next input, ..."""
    top, bottom = list(range(num_blocks))[::-1], list(range(num_blocks))
    pairs = [layer for pair in zip(top, bottom, strict=True) for layer in pair]
    return pairs[:num_blocks]


class Both(SelectiveStrategy):
    """Each client trains layers from both ends [S, section V].

    An odd budget spends its last layer at the output. A client with room for one layer only trains the
    one at the output. Budgets that never hold two of the cheapest layers are refused. Where they may,
    and every client draws room for one, or the layer at the input costs too much, all train as `top`.
    """

    name = "both"

    @classmethod
    def exists(cls, config: RunConfig) -> bool:
        """Return False if every client has a budget below two layers."""
        budget = config.budget
        return not (budget.kind == "identical" and budget.unit == "layers" and budget.layers < 2)

    def check(self) -> None:
        """Refuse budgets with which no client has room for two layers."""
        if self.budgets.costs is None:
            return  # measured on devices, so unknown until they are connected
        config, cheapest = self.budgets.config, self.budgets.costs.min()
        key = {"identical": "layers", "half-normal": "max"}.get(config.kind)
        if key and (highest := getattr(config, key)) < 2 * cheapest:
            raise ConfigError(
                f"strategy.name = 'both' is undefined for budget.{key} = {highest:g}: it needs "
                "room for two layers; raise the budget, or use 'top' or 'bottom'"
            )

    def select(self, candidates: Candidates) -> Choice:
        """Take layers from either end in turn, the output first, while the budget lasts."""
        return by_order(candidates, alternating(candidates.costs.shape[1]))
