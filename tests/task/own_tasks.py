"""Own tasks as users first write them: a kind that fits, and the default kind where it does not."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from layerfed.config import Section
from layerfed.config.seeding import Stream, generator
from layerfed.exchange.scores import Score
from layerfed.task import Batch, Examples, Task
from layerfed.task.scoring import MultiLabel, Regression, SingleLabel, TokenTagging


class Points(Task):
    """Points in five dimensions; a subclass says what is learned from them."""

    class Options(Section):
        noise: Annotated[float, Field(ge=0)] = 0.0
        hidden: int = 6

    width = 1

    def build_model(self) -> nn.Module:
        size = self.options.hidden
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [nn.Sequential(nn.Linear(size, size), nn.Tanh()) for _ in range(3)]
            return nn.Sequential(nn.Linear(5, size), *blocks, nn.Linear(size, self.width))

    def partition(self, partition_id: int) -> Examples:
        rng = generator(self.config.run.seed, Stream.PARTITION, partition_id)
        x = torch.tensor(rng.standard_normal((24, 5)), dtype=torch.float32)
        return Examples.of({"x": x, "label": self.label(x + self.options.noise)})

    def test_examples(self) -> Examples:
        return self.partition(99)

    def label(self, x: Tensor) -> Tensor:
        return x.sum(1, keepdim=True)

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])  # type: ignore[no-any-return]


class Unsaid(Points):
    """Regression that does not say so: it once ended with an accuracy of 0.00%."""


class Sum(Points):
    kind = Regression


class Sides(Points):
    """One label, in groups, of which the test set has a third that no client has."""

    classes = ("below", "above")
    groups = ("odd", "even")
    width = 2

    def partition(self, partition_id: int) -> Examples:
        rng = generator(self.config.run.seed, Stream.PARTITION, partition_id)
        x = torch.tensor(rng.standard_normal((24, 5)), dtype=torch.float32)
        group = torch.tensor(rng.integers(-1 if partition_id == 99 else 0, 2, 24))
        return Examples.of({"x": x, "label": (x.sum(1) > 0).long(), "group": group})


class Taken(Unsaid):
    """A score that the files would lose: their lines have a number of rounds."""

    class kind(SingleLabel):  # noqa: N801
        scores = (Score("rounds"),)


class Measured(Unsaid):
    """A score called as a number that clients state."""

    class kind(SingleLabel):  # noqa: N801
        scores = (*SingleLabel.scores, Score("flops"))


class Kappa(SingleLabel):
    """Scores of its own, of NumPy's types, one of them undefined."""

    scores = (Score("kappa", low=-1), Score("unknown"))

    def values(self) -> dict[str, Any]:
        return {"kappa": np.float32(0.25), "unknown": None}


class Agreeing(Sides):
    kind = Kappa


class Twice(Sides):
    groups = ("odd", "odd")


class Numbered(Sides):
    classes = (0, 1)  # type: ignore[assignment]


class ThreeNames(Sides):
    classes = ("below", "above", "beside")


class Untested(Sides):
    def test_examples(self) -> Examples:
        return self.partition(99).select(np.arange(0))


class Unfinished(Task):
    """It has no `logits`."""

    def build_model(self) -> nn.Module:
        return nn.Linear(1, 1)


class NoTask:
    pass


class Parts(Sides):
    """One of its groups has the name of what is in none."""

    groups = ("odd", "other")


class Lone(Points):
    """Each client has one example."""

    kind = Regression

    def partition(self, partition_id: int) -> Examples:
        return Examples.of({"x": torch.zeros(1, 5), "label": torch.zeros(1, 1)})


class Prices(Points):
    """Targets in two columns, neither of which is `label`."""

    kind, width = Regression, 2

    def partition(self, partition_id: int) -> Examples:
        x = torch.ones(24, 5)
        return Examples.of({"x": x, "low": x.sum(1), "high": x.sum(1) + 1})

    def targets(self, batch: Batch) -> Tensor:
        return torch.stack([batch["low"], batch["high"]], 1)


class Signs(Points):
    """Labels that do not exclude one another: they once ended in a traceback."""

    kind, width = MultiLabel, 5

    def label(self, x: Tensor) -> Tensor:
        return (x > 0).float()


class Tags(Points):
    """A tag for each of five tokens: the accuracy was once 390.50%."""

    kind = TokenTagging

    def build_model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]
            return nn.Sequential(nn.Linear(1, 4), *blocks, nn.Linear(4, 2))

    def label(self, x: Tensor) -> Tensor:
        return (x > 0).long()

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"][..., None])  # type: ignore[no-any-return]


class HalfTagged(Tags):
    """In one group of its test set no token counts."""

    groups = ("tagged", "bare")

    def partition(self, partition_id: int) -> Examples:
        rng = generator(self.config.run.seed, Stream.PARTITION, partition_id)
        x = torch.tensor(rng.standard_normal((24, 5)), dtype=torch.float32)
        group = torch.arange(24) % 2
        bare = (group[:, None] == 1) & (partition_id == 99)
        label = torch.where(bare, -100, self.label(x))
        return Examples.of({"x": x, "label": label, "group": group})


class UnsaidTags(Tags):
    kind = SingleLabel


class Boast(SingleLabel):
    scores = (Score("accuracy"),)

    def values(self) -> dict[str, float]:
        return {"accuracy": 3.9}


class Boasting(Tags):
    """A task whose own score breaks its bounds."""

    kind = Boast

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return super().logits(model, batch)[:, 0]

    def targets(self, batch: Batch) -> Tensor:
        return batch["label"][:, 0]
