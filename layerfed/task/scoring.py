"""The scores of each kind of task, added up batch by batch, and the evaluation of a model.

A `Tally` keeps sums and counts only, so the memory of an evaluation does not depend on the number of
examples. Scores of classes follow from the count of each pair of true and predicted class. They are
those of scikit-learn, whose import would take a second and 110 MB of every process that evaluates.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerfed.config import ConfigError
from layerfed.exchange.scores import ACCURACY, LOSS, Score

if TYPE_CHECKING:
    from layerfed.task.base import Batch, Examples, Task

__all__ = [
    "IGNORED",
    "CausalLM",
    "Evaluation",
    "Generation",
    "MultiLabel",
    "Regression",
    "SingleLabel",
    "Tally",
    "TokenTagging",
    "evaluate_task",
    "tallied",
]

IGNORED = -100
"""The target of a token that does not count, as in torch and transformers."""
# Bins of confidence, as in Guo et al. (2017), "On calibration of modern neural networks".
BINS = 15
# A confusion matrix of more classes is read by nobody, and its file is large.
MOST_CLASSES = 200

Reduction = Literal["mean", "sum"]


class Tally(ABC):
    """The running sums of one evaluation; a subclass is a kind of task, `Task.kind`.

    A subclass declares `scores`, adds each batch to the sums by `update`, and computes the scores from
    the sums by `values`.

    Attributes
    ----------
    scores : tuple[Score, ...]
        Its scores besides the loss. The first is the main one, unless `task.metric` says otherwise.
    sums : dict[str, Any]
        What `add` has added up: numbers, arrays or counters.
    """

    scores: ClassVar[tuple[Score, ...]]
    reads: ClassVar[str]
    """What `update` needs, for messages."""

    def __init__(self) -> None:
        self.sums: dict[str, Any] = {}

    @staticmethod
    @abstractmethod
    def loss(outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the loss of a batch, as a mean or a sum over everything that counts."""

    @abstractmethod
    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""

    @abstractmethod
    def values(self) -> Mapping[str, float]:
        """Return each score by its name; NaN for one that is undefined."""

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return what is reported of the final model besides its scores, ready for JSON."""
        return {}

    @staticmethod
    def predicted(task: Task, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Return what is predicted for each input of a batch, ready for JSON.

        Raises
        ------
        ConfigError
            If the kind does not say.
        """
        name = task.kind.__name__
        raise ConfigError(f"{name} says nothing of one input; give it a method `predicted`")

    @staticmethod
    def explained(row: dict[str, Any], means: Sequence[str | None]) -> dict[str, Any]:
        """Return a row of `predicted`, with what its outputs stand for if that is known."""
        return row

    @staticmethod
    def count(labels: np.ndarray) -> np.ndarray | None:
        """Return the number of labels of each class; None for a kind without classes."""
        return None

    def add(self, **sums: Any) -> None:
        """Add to the sums, by name."""
        for name, value in sums.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def merged(self, others: Iterable[Tally]) -> Self:
        """Add the sums of other evaluations to these; return this one."""
        for other in others:
            self.add(**other.sums)
        return self

    def found(self) -> dict[str, float | None]:
        """Return all scores and the loss; None for one that is undefined.

        Raises
        ------
        ConfigError
            If `values` returns other scores than are declared, or one outside of its bounds.
        """
        name = type(self).__name__
        if not self.sums.get("count"):
            raise ConfigError(f"no target counts for {name}; every one is {IGNORED}")
        values = dict(self.values())
        declared = {score.name: score for score in self.scores}
        if set(values) != set(declared):
            raise ConfigError(
                f"{name}.values returned the scores {', '.join(sorted(values)) or 'none'}; declared are "
                f"{', '.join(sorted(declared))} ({name}.scores)"
            )
        try:
            found = {key: score.checked(values[key]) for key, score in declared.items()}
        except ValueError as error:
            raise ConfigError(f"{error}; {name}.values returned {values}") from None
        return {**found, LOSS.name: self.mean_loss}

    @property
    def mean_loss(self) -> float:
        """The mean loss over everything that counts."""
        return float(self.sums["loss"] / self.sums["count"])

    def _add_loss(self, outputs: Tensor, targets: Tensor, count: int) -> None:
        self.add(loss=float(self.loss(outputs, targets, "sum")), count=count)

    def _require(self, fits: bool, outputs: Tensor, targets: Tensor) -> None:
        if not fits:
            name = type(self).__name__
            raise ConfigError(
                f"its kind {name} needs {self.reads}; it returned outputs of {_shown(outputs)} and "
                f"targets of {_shown(targets)}; set `kind` to another of {', '.join(KINDS)}, or mend "
                "`logits` or `targets`"
            )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    found: np.ndarray = part / np.maximum(whole, 1)
    return found


@dataclass(frozen=True)
class ClassCounts:
    """The number of examples by class, shape (C,).

    Attributes
    ----------
    right : numpy.ndarray
        Those of the class that were predicted to be of it.
    held : numpy.ndarray
        Those of the class.
    said : numpy.ndarray
        Those that were predicted to be of it.
    """

    right: np.ndarray
    held: np.ndarray
    said: np.ndarray

    @classmethod
    def of(cls, pairs: Mapping[tuple[int, int], int], classes: int = 0) -> ClassCounts:
        """Return the counts of pairs of true and predicted class, of `classes` or more."""
        true, found = np.array(list(pairs)).T
        count, size = np.array(list(pairs.values())), max(classes, true.max() + 1, found.max() + 1)
        right = np.bincount(true, count * (true == found), size)
        return cls(right, np.bincount(true, count, size), np.bincount(found, count, size))

    @property
    def precision(self) -> np.ndarray:
        """The share of the predictions of a class that were right; 0 if there was none."""
        return _share(self.right, self.said)

    @property
    def recall(self) -> np.ndarray:
        """The share of a class's examples that were found; 0 if there is none."""
        return _share(self.right, self.held)

    @property
    def f1(self) -> np.ndarray:
        """The harmonic mean of both."""
        return _share(2 * self.right, self.held + self.said)

    def rows(self, names: Sequence[str]) -> list[dict[str, Any]]:
        """Return the table by class, of the classes that have a name."""
        columns = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        return [
            {
                "class": name,
                **{key: float(column[number]) for key, column in columns.items()},
                "support": int(self.held[number]),
            }
            for number, name in enumerate(names)
        ]


class SingleLabel(Tally):
    """One class for each example: outputs (B, C), targets (B,) in 0 … C − 1."""

    scores = (
        ACCURACY,
        Score("macro_f1"),
        Score("balanced_accuracy"),
        Score("ece", higher_is_better=False),
    )
    reads = (
        "outputs (examples, classes), of at least two classes, and a class number for each example"
    )

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(outputs.float(), targets, reduction=reduction)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        fits = outputs.ndim == 2 and outputs.shape[1] > 1 and targets.shape == outputs.shape[:1]
        self._require(fits and _counts(targets, outputs.shape[1]), outputs, targets)
        self._add_loss(outputs, targets, len(targets))
        scores = outputs.float()
        found = scores.argmax(1)
        # Not all devices have float64.
        sure = scores.softmax(1).gather(1, found[:, None])[:, 0].cpu().double().numpy()
        pairs = np.stack([targets.cpu().numpy(), found.cpu().numpy()])
        bins = np.clip(np.ceil(np.nan_to_num(sure) * BINS).astype(int) - 1, 0, BINS - 1)
        hits = (pairs[0] == pairs[1]).astype(float)
        self.add(
            pairs=Counter(zip(*pairs.tolist(), strict=True)),
            # For each bin: examples, sum of confidences, examples that were right.
            bins=np.stack([np.bincount(bins, w, BINS) for w in (np.ones_like(sure), sure, hits)]),
        )

    def values(self) -> dict[str, float]:
        """Return accuracy, macro F1, balanced accuracy, and the expected calibration error."""
        counts = ClassCounts.of(self.sums["pairs"])
        examples, sure, hits = self.sums["bins"]
        return {
            "accuracy": float(counts.right.sum() / counts.held.sum()),
            "macro_f1": float(counts.f1[counts.held + counts.said > 0].mean()),
            "balanced_accuracy": float(counts.recall[counts.held > 0].mean()),
            "ece": float(np.abs(hits - sure).sum() / examples.sum()),
        }

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the table by class, the confusion matrix, and the bins of the calibration."""
        pairs = self.sums["pairs"]
        counts = ClassCounts.of(pairs, len(classes))
        count = len(classes) or len(counts.held)
        names = list(classes) or [str(number) for number in range(count)]
        report: dict[str, Any] = {
            "classes": names,
            "per_class": counts.rows(names),
        }
        if count <= MOST_CLASSES:
            rows = range(count)
            report["confusion"] = [[pairs.get((true, found), 0) for found in rows] for true in rows]
        examples, sure, hits = self.sums["bins"]
        if np.isfinite(sure).all():
            report["calibration"] = {
                "ece": float(np.abs(hits - sure).sum() / examples.sum()),
                "bins": [
                    {"confidence": s / n, "accuracy": h / n, "examples": int(n)}
                    for n, s, h in zip(examples, sure, hits, strict=True)
                    if n
                ],
            }
        return report

    @staticmethod
    def predicted(task: Task, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Return the label of each input, and the probability of each class."""
        outputs = task.logits(model, batch).float()
        names = _names(task, outputs.shape[1])
        return [
            {"label": names[best], "scores": dict(zip(names, row, strict=True))}
            for best, row in zip(
                outputs.argmax(1).tolist(), outputs.softmax(1).tolist(), strict=True
            )
        ]

    @staticmethod
    def explained(row: dict[str, Any], means: Sequence[str | None]) -> dict[str, Any]:
        """Add the answer that the label stands for."""
        return {**row, "answer": means[list(row["scores"]).index(row["label"])]} if means else row

    @staticmethod
    def count(labels: np.ndarray) -> np.ndarray | None:
        """Return the number of labels of each class."""
        whole = np.issubdtype(labels.dtype, np.integer)
        return np.bincount(labels[labels != IGNORED].ravel()) if whole else None


class TokenTagging(SingleLabel):
    """One class for each token: outputs (B, T, C), targets (B, T); `IGNORED` tokens do not count."""

    reads = (
        "outputs (examples, tokens, classes) and a class number for each token, "
        f"{IGNORED} for those that do not count"
    )

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the cross-entropy over all tokens that count."""
        return functional.cross_entropy(
            outputs.float().flatten(0, -2),
            targets.flatten(),
            reduction=reduction,
            ignore_index=IGNORED,
        )

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        if targets.ndim != 1:  # the tokens that count come back as a batch of one each
            self._require(
                outputs.ndim == 3 and targets.shape == outputs.shape[:2], outputs, targets
            )
            kept = targets != IGNORED
            outputs, targets = outputs[kept], targets[kept]
        if len(targets):
            super().update(outputs, targets)

    @staticmethod
    def predicted(task: Task, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Return the tag of each output, and its probability."""
        shares, tags = task.logits(model, batch).float().softmax(-1).max(-1)
        names = _names(task, int(tags.max()) + 1)
        return [
            {"tags": [names[tag] for tag in line], "scores": row}
            for line, row in zip(tags.tolist(), shares.tolist(), strict=True)
        ]

    @staticmethod
    def explained(row: dict[str, Any], means: Sequence[str | None]) -> dict[str, Any]:
        """Add the tokens, and leave out outputs without one."""
        kept = [n for n, token in enumerate(means) if token is not None]
        return (
            {
                "tokens": [means[n] for n in kept],
                **{key: [values[n] for n in kept] for key, values in row.items()},
            }
            if means
            else row
        )


class MultiLabel(Tally):
    """Any number of labels for each example: outputs (B, L) as logits, targets (B, L) of 0 and 1."""

    scores = (Score("macro_f1"), Score("micro_f1"), Score("exact_match"))
    reads = "outputs (examples, labels) and targets of the same shape, which are 0 or 1"

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the binary cross-entropy over all examples and labels."""
        return functional.binary_cross_entropy_with_logits(
            outputs.float(), targets.float(), reduction=reduction
        )

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch; a label is predicted if its logit is above 0."""
        fits = outputs.ndim == 2 and targets.shape == outputs.shape
        self._require(fits and bool(((targets == 0) | (targets == 1)).all()), outputs, targets)
        self._add_loss(outputs, targets, targets.numel())
        found, true = outputs > 0, targets > 0
        counts = [(true & found).sum(0), (true & ~found).sum(0), (found & ~true).sum(0)]
        self.add(
            counts=torch.stack(counts).cpu().numpy(),  # right, missed and wrong, shape (3, L)
            exact=int((found == true).all(1).sum()),
            examples=len(targets),
        )

    def _counts(self) -> ClassCounts:
        right, missed, wrong = self.sums["counts"]
        return ClassCounts(right, right + missed, right + wrong)

    def values(self) -> dict[str, float]:
        """Return macro F1, micro F1, and the share of examples with all labels right."""
        counts = self._counts()
        whole = ClassCounts(*(np.array(n.sum()) for n in (counts.right, counts.held, counts.said)))
        return {
            "macro_f1": float(counts.f1.mean()),
            "micro_f1": float(whole.f1),
            "exact_match": self.sums["exact"] / self.sums["examples"],
        }

    def details(self, classes: Sequence[str]) -> dict[str, Any]:
        """Return the table by label."""
        names = list(classes) or [str(n) for n in range(self.sums["counts"].shape[1])]
        return {"classes": names, "per_class": self._counts().rows(names)}

    @staticmethod
    def predicted(task: Task, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Return the labels of each input, those whose logit is above 0, and each one's probability."""
        outputs = task.logits(model, batch).float()
        names = _names(task, outputs.shape[1])
        return [
            {
                "labels": [name for name, logit in zip(names, logits, strict=True) if logit > 0],
                "scores": dict(zip(names, shares, strict=True)),
            }
            for logits, shares in zip(outputs.tolist(), outputs.sigmoid().tolist(), strict=True)
        ]

    @staticmethod
    def count(labels: np.ndarray) -> np.ndarray | None:
        """Return the number of examples that have each label."""
        held: np.ndarray = labels.sum(0).astype(int)
        return held


class Regression(Tally):
    """Numbers: outputs and targets of one size, (B,) or (B, D)."""

    scores = (
        Score("rmse", higher_is_better=False, high=math.inf),
        Score("mae", higher_is_better=False, high=math.inf),
        Score("r2", low=-math.inf),
    )
    reads = "an output for each number of the targets"

    @staticmethod
    def loss(outputs: Tensor, targets: Tensor, reduction: Reduction = "mean") -> Tensor:
        """Return the squared error over all numbers."""
        return functional.mse_loss(
            outputs.float().reshape(targets.shape), targets.float(), reduction=reduction
        )

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        fits = len(outputs) == len(targets) and outputs.numel() == targets.numel()
        self._require(fits, outputs, targets)
        self._add_loss(outputs, targets, targets.numel())
        true = targets.cpu().double().reshape(len(targets), -1).numpy()
        error = outputs.cpu().double().reshape(len(targets), -1).numpy() - true
        self.add(
            examples=len(true),
            true=true.sum(0),
            spread=((true - true.mean(0)) ** 2).sum(0),
            error_sq=(error**2).sum(0),
            error_abs=np.abs(error).sum(0),
        )

    def add(self, **sums: Any) -> None:
        """Add to the sums; squared distances from a mean as Chan, Golub and LeVeque (1979) do.

        A difference of two sums of squares would lose all digits of numbers far from zero.
        """
        if "spread" in sums and "spread" in self.sums:
            n, m = self.sums["examples"], sums["examples"]
            apart = sums["true"] / m - self.sums["true"] / n
            sums["spread"] = sums["spread"] + apart**2 * (n * m / (n + m))
        super().add(**sums)

    def values(self) -> dict[str, float]:
        """Return the errors' root mean square and mean, and R², the mean over outputs."""
        sums, examples = self.sums, self.sums["examples"]
        spread = sums["spread"]
        # Means of equal numbers differ by rounding.
        varies = spread > examples * (1e-12 * sums["true"] / examples) ** 2
        # Of a constant, any error explains nothing, and none explains all, as in scikit-learn.
        constant = np.where(sums["error_sq"] == 0, 1.0, 0.0)
        r2 = np.where(varies, 1 - sums["error_sq"] / np.where(varies, spread, 1), constant)
        return {
            "rmse": math.sqrt(sums["error_sq"].mean() / examples),
            "mae": float(sums["error_abs"].mean() / examples),
            "r2": float(r2.mean()) if examples > 1 else math.nan,
        }

    @staticmethod
    def predicted(task: Task, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Return the number of each input, or its numbers by name."""
        outputs = task.logits(model, batch).float()
        rows = outputs.reshape(len(outputs), -1).tolist()
        names = _names(task, len(rows[0]))
        return [
            {"value": row[0]} if len(row) == 1 else {"values": dict(zip(names, row, strict=True))}
            for row in rows
        ]


class CausalLM(Tally):
    """The next token: outputs (B, T, V), and targets (B, T) that hold at t what outputs predict at t.

    `Task.targets` shifts the tokens by one, and writes `IGNORED` where nothing is to be predicted.
    """

    scores: ClassVar[tuple[Score, ...]] = (
        Score("perplexity", higher_is_better=False, low=1.0, high=math.inf),
        Score("token_accuracy"),
    )
    reads = "outputs (examples, tokens, vocabulary) and the next token's id at each place"
    loss = staticmethod(TokenTagging.loss)

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        fits = outputs.ndim == 3 and targets.shape == outputs.shape[:2]
        kept = targets != IGNORED
        fits = fits and _counts(targets[kept], outputs.shape[-1])
        self._require(fits, outputs, targets)
        self._add_loss(outputs, targets, int(kept.sum()))
        self.add(hits=int((outputs.argmax(-1) == targets)[kept].sum()))

    def values(self) -> dict[str, float]:
        """Return the perplexity, exp of the loss, and the share of tokens that come first."""
        loss = self.mean_loss
        return {
            "perplexity": _perplexity(loss),
            "token_accuracy": self.sums["hits"] / self.sums["count"],
        }

    @staticmethod
    def predicted(task: Task, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Return the loss and the perplexity of each input: a model without answers scores texts."""
        outputs, targets = task.logits(model, batch), task.targets(batch)
        losses = (
            float(CausalLM.loss(one[None], wanted[None]))
            for one, wanted in zip(outputs, targets, strict=True)
        )
        return [{"loss": loss, "perplexity": _perplexity(loss)} for loss in losses]


class Generation(CausalLM):
    """The next token, and generated answers, which `Task.answers` returns beside the right ones."""

    scores = (Score("exact_match"), *CausalLM.scores)

    def match(self, found: Sequence[object], wanted: Sequence[object]) -> None:
        """Add a batch's answers."""
        if len(found) != len(wanted):
            raise ConfigError(
                f"`answers` returned {len(found)} generated answers and {len(wanted)} right ones; it "
                "should return one of each for each example"
            )
        right = sum(a == b for a, b in zip(found, wanted, strict=True))
        self.add(right=right, answers=len(wanted))

    def values(self) -> dict[str, float]:
        """Return the share of answers that are exactly right, and the scores of tokens."""
        answers = self.sums.get("answers", 0)
        exact = self.sums["right"] / answers if answers else math.nan
        return {"exact_match": exact, **super().values()}

    @staticmethod
    def predicted(task: Task, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        """Return the answer that is generated for each input."""
        return [{"answer": answer} for answer in task.answers(model, batch)[0]]


KINDS = ("SingleLabel", "MultiLabel", "Regression", "TokenTagging", "CausalLM", "Generation")


def _names(task: Task, count: int) -> Sequence[str]:
    return task.classes or [str(number) for number in range(count)]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _counts(targets: Tensor, classes: int) -> bool:
    """Return whether targets are class numbers."""
    if targets.dtype not in (torch.int64, torch.uint8):  # what torch takes
        return False
    return not len(targets) or (int(targets.min()) >= 0 and int(targets.max()) < classes)


def _fits_classes(outputs: Tensor, classes: Sequence[str]) -> None:
    if outputs.shape[-1] != len(classes):
        raise ConfigError(
            f"it names {len(classes)} classes, and its model has {outputs.shape[-1]} outputs; give each "
            "output a name, or none (`classes`)"
        )


def _shown(tensor: Tensor) -> str:
    kind = f"shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
    if not tensor.numel() or tensor.dtype == torch.bool:
        return kind
    return f"{kind}, from {float(tensor.min()):g} to {float(tensor.max()):g}"


# ---------------------------------------------------------------------------------- evaluation
@dataclass(frozen=True)
class Evaluation:
    """The evaluation of a model on some examples.

    Attributes
    ----------
    examples : int
    tally : Tally
    scores : Mapping[str, float | None]
        All scores and the loss by name; None for one that is undefined.
    groups : Mapping[str, Mapping[str, float | None]]
        The number of examples and the scores of each group; empty for examples without groups.
    """

    examples: int
    tally: Tally
    scores: Mapping[str, float | None]
    groups: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)


@torch.no_grad()
def tallied(
    model: nn.Module, batches: Iterable[Batch], update: Callable[[nn.Module, Batch], None]
) -> int:
    """Let `update` see each batch, with the model in evaluation mode; return the number of examples.

    Raises
    ------
    ValueError
        If there is none.
    """
    model.eval()
    examples = 0
    for batch in batches:
        update(model, batch)
        examples += len(next(iter(batch.values())))
    if not examples:
        raise ValueError("there is nothing to evaluate on")
    return examples


def evaluate_task(
    task: Task,
    model: nn.Module,
    examples: Examples,
    batch_size: int,
    device: torch.device,
    *,
    by_group: bool = False,
    logits: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> Evaluation:
    """Evaluate a model by the scores of a task, also for each group if the examples have groups.

    `logits` replaces the task's forward pass by one with equal results.

    Raises
    ------
    ConfigError
        If outputs or targets do not fit the task's kind, or a score is outside of its bounds.
    """

    def one(examples: Examples) -> tuple[int, Tally]:
        tally = task.kind()

        def update(model: nn.Module, batch: Batch) -> None:
            outputs = (logits or task.logits)(model, batch)
            if task.classes and isinstance(tally, SingleLabel | MultiLabel | TokenTagging):
                _fits_classes(outputs, task.classes)
            tally.update(outputs, task.targets(batch))
            if isinstance(tally, Generation):
                tally.match(*task.answers(model, batch))

        return tallied(model, examples.in_order(batch_size, device), update), tally

    try:
        groups = task.groups_of(examples) if by_group else {}
        if not groups:
            count, tally = one(examples)
            return Evaluation(count, tally, tally.found())
        parts = {name: one(examples.select(rows)) for name, rows in groups.items()}
        together = task.kind().merged(tally for _, tally in parts.values())
        # Of a group of texts no word may have a label.
        unknown = dict.fromkeys([*(score.name for score in task.kind.scores), LOSS.name])
        scores = {
            name: {"examples": count, **(tally.found() if tally.sums.get("count") else unknown)}
            for name, (count, tally) in parts.items()
        }
        return Evaluation(len(examples), together, together.found(), scores)
    except ConfigError as error:
        raise ConfigError(f"task.name = '{task.config.task.name}': {error}") from None
