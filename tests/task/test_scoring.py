"""The scores of each kind of task, against scikit-learn on all examples at once."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn import metrics
from torch import Tensor

from layerfed.config import ConfigError
from layerfed.exchange.scores import Score
from layerfed.task.scoring import (
    IGNORED,
    CausalLM,
    Generation,
    MultiLabel,
    Regression,
    SingleLabel,
    Tally,
    TokenTagging,
)


def tally(kind: type[Tally], outputs: Tensor, targets: Tensor, size: int = 7) -> Tally:
    """Evaluate in batches, as two parts that are put together."""
    parts = [kind(), kind()]
    for number, start in enumerate(range(0, len(outputs), size)):
        parts[number % 2].update(outputs[start : start + size], targets[start : start + size])
    return kind().merged(parts)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_class_numbers_of_a_byte_count_as_others() -> None:
    outputs, labels = drawn(1, 12, 3), torch.arange(12) % 3
    found = [tally(SingleLabel, outputs, kind).found() for kind in (labels, labels.byte())]
    assert found[0] == found[1]


@pytest.mark.parametrize("classes", [2, 5])
def test_scores_of_classes_are_those_of_scikit_learn(classes: int) -> None:
    outputs = 2 * drawn(0, 60, classes + 1)  # the last class never occurs
    labels = torch.randint(classes, (60,), generator=torch.Generator().manual_seed(1))
    found = tally(SingleLabel, outputs, labels).found()
    predicted = outputs.argmax(1)
    with pytest.warns(UserWarning, match="y_pred"):
        balanced = metrics.balanced_accuracy_score(labels, predicted)
    assert found == {
        "accuracy": metrics.accuracy_score(labels, predicted),
        "macro_f1": pytest.approx(metrics.f1_score(labels, predicted, average="macro")),
        "balanced_accuracy": pytest.approx(balanced),
        "ece": pytest.approx(error_of_confidence(outputs, labels)),
        "loss": pytest.approx(float(torch.nn.functional.cross_entropy(outputs, labels))),
    }


def error_of_confidence(outputs: Tensor, labels: Tensor) -> float:
    """The formula of Guo et al. (2017), equation 3, with a loop over 15 bins."""
    sure, predicted = (x.numpy() for x in outputs.softmax(1).max(1))
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (sure > low) & (sure <= low + 1 / 15)
        if inside.any():
            right = (predicted == labels.numpy())[inside].mean()
            error += inside.mean() * abs(right - sure[inside].mean())
    return error


def test_the_table_by_class_and_the_confusion_matrix_are_those_of_scikit_learn() -> None:
    outputs = drawn(2, 40, 3)
    labels = torch.randint(3, (40,), generator=torch.Generator().manual_seed(3))
    found = tally(SingleLabel, outputs, labels).details(["a", "b", "c"])
    predicted = outputs.argmax(1)
    assert found["confusion"] == metrics.confusion_matrix(labels, predicted).tolist()
    report = metrics.classification_report(
        labels, predicted, target_names=["a", "b", "c"], output_dict=True
    )
    for row in found["per_class"]:
        expected = report[row["class"]]
        assert row["f1"] == pytest.approx(expected["f1-score"])
        for key in ("precision", "recall", "support"):
            assert row[key] == pytest.approx(expected[key])
    assert sum(b["examples"] for b in found["calibration"]["bins"]) == 40


def test_scores_of_labels_are_those_of_scikit_learn() -> None:
    outputs = drawn(4, 50, 4)
    targets = (drawn(5, 50, 4) + outputs > 0).float()
    targets[:, 3] = 0  # a label that nothing has
    predicted = (outputs > 0).numpy()
    counted = tally(MultiLabel, outputs, targets)
    true = targets.numpy().astype(int)
    loss = torch.nn.functional.binary_cross_entropy_with_logits(outputs, targets)

    def f1(average: str | None) -> float:
        return metrics.f1_score(true, predicted, average=average, zero_division=0)

    assert counted.found() == {
        "macro_f1": pytest.approx(f1("macro")),
        "micro_f1": pytest.approx(f1("micro")),
        "exact_match": pytest.approx(metrics.accuracy_score(true, predicted)),
        "loss": pytest.approx(float(loss)),
    }
    rows = counted.details([])["per_class"]
    assert [row["f1"] for row in rows] == pytest.approx(list(f1(None)))
    assert [row["support"] for row in rows] == true.sum(0).tolist()


@pytest.mark.parametrize("shape", [(30,), (30, 1), (30, 3)])
def test_scores_of_numbers_are_those_of_scikit_learn(shape: tuple[int, ...]) -> None:
    targets = 1000 + drawn(6, *shape).double()
    outputs = targets + 0.3 * drawn(7, *shape)
    found = tally(Regression, outputs, targets).found()
    true, guess = targets.reshape(30, -1).numpy(), outputs.reshape(30, -1).numpy()
    assert found["rmse"] == pytest.approx(math.sqrt(metrics.mean_squared_error(true, guess)))
    assert found["mae"] == pytest.approx(metrics.mean_absolute_error(true, guess))
    assert found["r2"] == pytest.approx(metrics.r2_score(true, guess))


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_r2_of_numbers_far_from_zero_is_that_of_scikit_learn(parts: int) -> None:
    """Unix times of five minutes: a difference of sums of squares has no digit of their spread left."""
    times = 1.7e9 + 10 * torch.arange(30, dtype=torch.float64)
    targets = torch.stack([times, -times.flip(0), drawn(12, 30).double()], 1)
    outputs = targets + drawn(13, 30, 3)
    tallies = [Regression() for _ in range(parts)]
    for part, rows in zip(tallies, torch.arange(30).chunk(parts), strict=True):
        for one in rows.split(4):
            part.update(outputs[one], targets[one])
    found = Regression().merged(tallies).found()
    assert found["r2"] == pytest.approx(metrics.r2_score(targets, outputs), rel=1e-7)


def test_r2_of_one_example_is_undefined_and_of_a_constant_zero() -> None:
    assert tally(Regression, torch.ones(1), torch.zeros(1)).found()["r2"] is None
    assert tally(Regression, drawn(0, 9), torch.full((9,), 7.0)).found()["r2"] == 0
    assert tally(Regression, torch.full((9,), 7.0), torch.full((9,), 7.0)).found()["r2"] == 1
    tenths = torch.full((9,), 0.1, dtype=torch.float64)  # whose means differ by rounding
    assert tally(Regression, drawn(0, 9), tenths, size=3).found()["r2"] == 0
    many = torch.full((1500,), 0.1, dtype=torch.float64)
    assert tally(Regression, torch.ones(1500), many, size=1).found()["r2"] == 0


def test_tokens_that_do_not_count_are_left_out() -> None:
    outputs = drawn(8, 6, 5, 3)
    tags = torch.randint(3, (6, 5), generator=torch.Generator().manual_seed(9))
    tags[:, 3:] = IGNORED
    found = tally(TokenTagging, outputs, tags, size=2).found()
    kept = tags != IGNORED
    flat = tally(SingleLabel, outputs[kept], tags[kept]).found()
    assert found == pytest.approx(flat)


def test_perplexity_is_that_of_all_tokens_and_not_of_batches() -> None:
    outputs = drawn(10, 4, 6, 5)
    tokens = torch.randint(5, (4, 6), generator=torch.Generator().manual_seed(11))
    tokens[0, 1:] = IGNORED
    found = tally(CausalLM, outputs, tokens, size=1).found()
    logs = outputs.log_softmax(-1)
    kept = [(i, t) for i in range(4) for t in range(6) if tokens[i, t] != IGNORED]
    mean = np.mean([float(logs[i, t, tokens[i, t]]) for i, t in kept])
    assert found["perplexity"] == pytest.approx(math.exp(-mean))
    assert found["loss"] == pytest.approx(-mean)


def test_answers_count_if_they_are_exactly_right() -> None:
    counted = Generation()
    counted.update(drawn(0, 2, 1, 3), torch.zeros(2, 1, dtype=torch.long))
    counted.match(["4", "12"], ["4", "13"])
    assert counted.found()["exact_match"] == 0.5
    with pytest.raises(ConfigError, match="1 generated answers and 2 right ones"):
        counted.match(["4"], ["4", "13"])


LABELS = torch.zeros(4, dtype=torch.long)


@pytest.mark.parametrize(
    ("kind", "outputs", "targets"),
    [
        (SingleLabel, torch.zeros(4, 1), torch.zeros(4, 1)),
        (SingleLabel, torch.zeros(4, 3), torch.zeros(4)),
        (SingleLabel, torch.zeros(4, 3), LABELS + 3),
        (SingleLabel, torch.zeros(4, 3), LABELS - 1),
        (SingleLabel, torch.zeros(4, 5, 3), torch.zeros(4, 5, dtype=torch.long)),
        (SingleLabel, torch.zeros(4, 3), torch.zeros(4, 3)),
        (MultiLabel, torch.zeros(4, 3), LABELS),
        (MultiLabel, torch.zeros(4, 3), torch.full((4, 3), 0.5)),
        (Regression, torch.zeros(4, 3), torch.zeros(4)),
        (TokenTagging, torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.long)),
        (CausalLM, torch.zeros(4, 5, 3), LABELS),
        (CausalLM, torch.zeros(4, 5, 3), torch.full((4, 5), 3)),
    ],
)
def test_what_does_not_fit_a_kind_is_refused(
    kind: type[Tally], outputs: Tensor, targets: Tensor
) -> None:
    with pytest.raises(
        ConfigError, match=rf"{kind.__name__} needs .*\({len(outputs)}, .*Regression"
    ):
        kind().update(outputs, targets)


class TooGood(SingleLabel):
    def values(self) -> dict[str, float]:
        return {**super().values(), "accuracy": 3.9}


class Undeclared(SingleLabel):
    def values(self) -> dict[str, float]:
        return {**super().values(), "f2": 0.5}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (TooGood, "'accuracy' = 3.9 is outside of its bounds, 0 to 1; TooGood.values returned"),
        (Undeclared, "f2.*declared are accuracy"),
    ],
)
def test_scores_that_break_their_declaration_are_an_error(kind: type[Tally], says: str) -> None:
    counted = tally(kind, drawn(0, 4, 3), LABELS)
    with pytest.raises(ConfigError, match=says):
        counted.found()


def test_nothing_that_counts_is_an_error() -> None:
    counted = TokenTagging()
    counted.update(torch.zeros(1, 2, 3), torch.full((1, 2), IGNORED))
    with pytest.raises(ConfigError, match="no target counts"):
        counted.found()


def test_a_score_knows_which_value_is_better() -> None:
    error = Score("rmse", higher_is_better=False, high=math.inf)
    assert error.better(1, 2)
    assert not Score("accuracy").better(1, 2)
    assert error.best([3.0, 1.0, 2.0]) == 1
    assert error.spread({"a": 1.0, "b": 3.0, "c": None}) == {
        "worst": "b",
        "value": 3.0,
        "range": 2.0,
        "std": 1.0,
    }
    assert Score("accuracy").spread({"a": 1.0, "b": 0.5})["worst"] == "b"  # type: ignore[index]
    assert error.spread({"a": 1.0, "b": None}) is None
    assert error.best([]) is None
    assert error.checked(math.nan) is None
    assert Score("accuracy").checked(1 + 1e-12) == 1.0


def test_scores_of_many_classes_need_no_table_of_all_pairs() -> None:
    """A table of 200,000 classes by as many would have 320 GB."""
    tally = SingleLabel()
    outputs = torch.zeros(2, 200_000)
    outputs[:, 199_999] = 1.0
    tally.update(outputs, torch.tensor([199_999, 0]))
    assert tally.values()["accuracy"] == 0.5
    assert len(tally.details([])["per_class"]) == 200_000
