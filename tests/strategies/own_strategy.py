"""A user's own strategy, and classes that are not usable as strategies."""

from __future__ import annotations

import numpy as np

from layerfed.config import Section
from layerfed.runs.records import Choice
from layerfed.server.candidates import Candidates
from layerfed.strategies import SelectiveStrategy


class Middle(SelectiveStrategy):
    """Every client trains the block in the middle, or one `shift` blocks above it."""

    masks = "shared"

    class Options(Section):
        """The place of the block."""

        shift: int = 0
        note: str | None = None

    options: Options

    def select(self, candidates: Candidates) -> Choice:
        masks = np.zeros(candidates.costs.shape, dtype=bool)
        masks[:, masks.shape[1] // 2 + self.options.shift] = True
        return Choice(masks)


class Asking(Middle):
    """It has an option without a default."""

    class Options(Section):
        """The place of the block."""

        shift: int


class Silent(SelectiveStrategy):
    """Its `select` returns None."""

    def select(self, candidates: Candidates) -> Choice:
        return None  # type: ignore[return-value]


class Greedy(SelectiveStrategy):
    """Its masks have all blocks, above every budget."""

    def select(self, candidates: Candidates) -> Choice:
        return Choice(np.ones(candidates.costs.shape, dtype=bool))


class Numbers(SelectiveStrategy):
    """Its masks have the wrong type."""

    def select(self, candidates: Candidates) -> Choice:
        return Choice(np.ones(candidates.costs.shape))


class Fewer(SelectiveStrategy):
    """Its masks are for fewer clients than there are."""

    def select(self, candidates: Candidates) -> Choice:
        return Choice(np.zeros((1, candidates.costs.shape[1]), dtype=bool))


class Undecided(SelectiveStrategy):
    """It has no `select`."""


class Stranger:
    """It is not a strategy."""


class Takes(Middle):
    """Has an option whose name the section has."""

    class Options(Section):
        period: int = 7


class Shadows(Middle):
    """Has an option that a built-in strategy has, with another default."""

    class Options(Section):
        fraction: float = 0.9


class Lists(Middle):
    """Has an option that no file can hold."""

    class Options(Section):
        layers_wanted: tuple[int, ...] = (1, 2)


class InPlace(Middle):
    """It changes what the run records."""

    statistics = ("grad_norm_sq",)

    def select(self, candidates: Candidates) -> Choice:
        norms = candidates.statistics["grad_norm_sq"]
        norms /= norms.sum()
        return super().select(candidates)


class Unlike(Middle):
    masks = "same"  # type: ignore[assignment]


class OneText(Middle):
    statistics = "grad_norm_sq"  # type: ignore[assignment]
