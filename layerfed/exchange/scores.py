"""The declaration of a score: its name, which way is better, and the values that it can have."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ACCURACY", "LOSS", "TAKEN", "Score", "score_of"]

# Rounding of sums may take a value this far beyond a bound.
ROUNDING = 1e-6
# How people write the parts of a name.
TITLES = {"f1": "F1", "ece": "ECE", "rmse": "RMSE", "mae": "MAE", "r2": "R²"}

# What the lines and columns of a run's and a comparison's files are called besides scores.
TAKEN = frozenset(
    {
        *("round", "rounds", "partition", "examples", "client", "group", "loss", "best_accuracy"),
        *("bytes_up", "bytes_down", "bytes_full_up", "bytes_full_down", "updates", "seconds"),
        *("e1", "e2", "e2_masks", "engine", "device", "torch", "layerfed", "metric", "value"),
        *("best_value", "experiment", "row", "budget", "seed", "folder"),
    }
)


@dataclass(frozen=True)
class Score:
    """A number that says how good a model is.

    Attributes
    ----------
    name : str
        Its name in every file, table and picture.
    higher_is_better : bool (default: True)
    low, high : float (default: 0, 1)
        The bounds of its values, which may be infinite.
    """

    name: str
    higher_is_better: bool = True
    low: float = 0.0
    high: float = 1.0

    @property
    def share(self) -> bool:
        """Whether the score is a share, which people read in %."""
        return (self.low, self.high) == (0.0, 1.0)

    @property
    def scale(self) -> float:
        """What a value is multiplied by in tables: 100 for a share, which is shown in %."""
        return 100.0 if self.share else 1.0

    @property
    def title(self) -> str:
        """The name as people read it: "macro F1"."""
        words = self.name.replace("_", " ").split()
        return " ".join(TITLES.get(word, word) for word in words)

    def checked(self, value: float | None) -> float | None:
        """Return a value, or None for one that is undefined (NaN, infinite).

        Raises
        ------
        ValueError
            If it is outside of the bounds.
        """
        value = math.nan if value is None else float(value)
        if not math.isfinite(value):
            return None
        if not self.low - ROUNDING <= value <= self.high + ROUNDING:
            raise ValueError(
                f"score '{self.name}' = {value:g} is outside of its bounds, {self.low:g} to "
                f"{self.high:g}"
            )
        return min(max(value, self.low), self.high)

    def better(self, value: float, other: float) -> bool:
        """Return whether a value is better than another one."""
        return value > other if self.higher_is_better else value < other

    def best(self, values: Iterable[float]) -> float | None:
        """Return the best of some values, without undefined ones (NaN), or None if there are none."""
        known = (value for value in values if not math.isnan(value))
        return (max if self.higher_is_better else min)(known, default=None)

    def spread(self, values: Mapping[Any, float | None]) -> dict[str, Any] | None:
        """Return the worst of several values with its name, and how far they are apart.

        Parameters
        ----------
        values : Mapping[Any, float | None]
            A value for each group or client; undefined ones are left out.

        Returns
        -------
        dict[str, Any] | None
            `worst`, `value`, `range` (largest less smallest) and `std` (of a population); None with
            fewer than two values.
        """
        known = {name: value for name, value in values.items() if value is not None}
        if len(known) < 2:
            return None
        worst = (min if self.higher_is_better else max)(known, key=known.__getitem__)
        return {
            "worst": worst,
            "value": known[worst],
            "range": max(known.values()) - min(known.values()),
            "std": statistics.pstdev(known.values()),
        }

    def text(self, value: float | None, digits: int = 2) -> str:
        """Return a value as people read it: a share in %, anything else in five digits."""
        if value is None or math.isnan(value):
            return "–"
        return f"{value:.{digits}%}" if self.share else f"{value:.5g}"

    def to_json(self) -> dict[str, Any]:
        """Return the declaration; a bound that does not exist is None."""
        low, high = (b if math.isfinite(b) else None for b in (self.low, self.high))
        return {
            "name": self.name,
            "higher_is_better": self.higher_is_better,
            "low": low,
            "high": high,
        }


ACCURACY = Score("accuracy")
LOSS = Score("loss", higher_is_better=False, low=-math.inf, high=math.inf)


def score_of(content: Mapping[str, Any] | None) -> Score:
    """Return the declaration that `Score.to_json` wrote; runs of earlier versions have accuracy."""
    if content is None:
        return ACCURACY
    low, high = content["low"], content["high"]
    return Score(
        content["name"],
        content["higher_is_better"],
        -math.inf if low is None else low,
        math.inf if high is None else high,
    )
