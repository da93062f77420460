"""One side reads a message as the other wrote it, and impossible messages are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from layerfed.exchange import (
    METRICS,
    Description,
    RefusedReply,
    TrainInstruction,
    describe_reply,
    evaluate_reply,
    probe_reply,
    read_description,
    read_evaluation,
    read_held,
    read_manifest,
    read_missing,
    read_statistics,
    read_train_reply,
    train_reply,
)
from layerfed.exchange.arrays import decode
from layerfed.exchange.messages import MAX_EXAMPLES, missing_reply, state_held
from layerfed.exchange.metrics import client_metrics
from layerfed.exchange.scores import LOSS, Score
from layerfed.models.layers import LayerMap
from layerfed.server.global_model import GlobalModel
from tests.exchange.replies import (
    EXPECTED,
    SHAPE,
    VALID,
    ask,
    over_the_wire,
    raw,
    refused,
    reply_with,
    update,
)


# --------------------------------------------------------------------------------- round trips
def test_an_instruction_brings_mask_manifest_and_changed_arrays(
    tiny: torch.nn.Module, layers: LayerMap
) -> None:
    model = GlobalModel(layers, ArrayRecord(tiny.state_dict()))
    head = {name: values + 1 for name, values in model.layer("head").items()}
    model.replace("head", head)
    mask = [0, 1, 0, 1]
    sent = ask(manifest=model.manifest(), arrays=model.payload(model.changed), mask=mask, lr=0.5)

    message = over_the_wire(sent)
    manifest, arrays = read_manifest(message)
    assert manifest == model.manifest()
    assert set(arrays) == set(layers["head"].tensors)
    for name, values in head.items():
        found = decode(arrays[name], values.shape, values.dtype)
        np.testing.assert_array_equal(found, values)
    assert TrainInstruction.read(message, 4).mask == (False, True, False, True)
    assert message.content.config_records["config"]["lr"] == 0.5
    assert message.content.config_records["config"]["round"] == 3
    assert message.metadata.dst_node_id == 7


def test_an_instruction_without_arrays_reads_as_no_arrays(
    tiny: torch.nn.Module, layers: LayerMap
) -> None:
    model = GlobalModel(layers, ArrayRecord(tiny.state_dict()))
    manifest, arrays = read_manifest(ask("evaluate", manifest=model.manifest()))
    assert manifest == model.manifest()
    assert len(arrays) == 0


@pytest.mark.parametrize(
    "description",
    [
        Description(4, 100),
        Description(0, 1, budget=0.0),
        Description(4, 100, budget=2.5, partitions=10),
    ],
)
def test_a_description_arrives_as_it_was_sent(description: Description) -> None:
    reply = over_the_wire(describe_reply(ask("query.describe"), description))
    assert read_description(reply) == description


def test_statistics_arrive_as_they_were_sent() -> None:
    sent = {"snr": [0.0, 1.5, 2.0], "grad_norm_sq": [1e-30, 3.0, 1e30]}
    reply = over_the_wire(probe_reply(ask("query.probe"), sent, 9, flops=8.0))
    found, metrics = read_statistics(reply, ["grad_norm_sq", "snr"], 3)
    assert list(found) == ["grad_norm_sq", "snr"]
    for name, row in sent.items():
        assert found[name].tolist() == row
    assert metrics == {"examples": 9.0, "flops": 8.0}


def test_a_training_reply_arrives_bit_by_bit() -> None:
    sent = update()
    reply = over_the_wire(train_reply(ask(), sent, 9, loss=0.5, flops=8.0))
    found = read_train_reply(reply, EXPECTED)
    assert found.examples == 9
    assert found.metrics == {"examples": 9.0, "loss": 0.5, "flops": 8.0}
    assert set(found.update) == set(sent)
    for name, values in sent.items():
        np.testing.assert_array_equal(found.update[name], values)
        assert found.update[name].dtype == values.dtype
        assert found.update[name].shape == values.shape


def test_an_evaluation_arrives_as_it_was_sent() -> None:
    reply = over_the_wire(
        evaluate_reply(ask("evaluate"), 12, client_loss=0.25, client_accuracy=0.75)
    )
    examples, metrics = read_evaluation(reply)
    assert examples == 12
    assert (metrics["client_loss"], metrics["client_accuracy"]) == (0.25, 0.75)


SCORES = client_metrics([Score("rmse", False, high=math.inf), Score("macro_f1"), LOSS])


def test_scores_of_a_task_are_read_without_an_accuracy() -> None:
    stated = {"client_rmse": 3.0, "client_macro_f1": 1.0, "client_loss": -9.0}
    _, found = read_evaluation(evaluate_reply(ask("evaluate"), 12, **stated), SCORES)
    assert {name: found[name] for name in stated} == stated


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        ({"client_rmse": -0.5}, "client_rmse = -0.5; 0 or more"),
        ({"client_macro_f1": 3.9}, "client_macro_f1 = 3.9; 1 or less"),
        ({"client_macro_f1": math.nan}, "not finite: client_macro_f1"),
    ],
)
def test_scores_beyond_their_bounds_are_refused(stated: dict[str, float], says: str) -> None:
    reply = evaluate_reply(ask("evaluate"), 12, **{"client_loss": 0.5, **stated})
    with pytest.raises(RefusedReply, match=says):
        read_evaluation(reply, SCORES)


def test_updates_in_any_memory_order_are_written_row_major() -> None:
    values = np.asfortranarray(update()["w"])
    found = read_train_reply(train_reply(ask(), update(w=values), 9, loss=0.5), EXPECTED)
    np.testing.assert_array_equal(found.update["w"], values)


# ------------------------------------------------------------------------- tensors not asked for
def test_extra_and_missing_tensors_are_refused() -> None:
    extra = update(embed=np.zeros(2, np.float32))
    assert "not asked to train: embed" in refused(train_reply(ask(), extra, 9, loss=0.5))
    few = {"count": update()["count"]}
    assert "lacks tensors it was asked to train: w" in refused(train_reply(ask(), few, 9, loss=0.5))
    no_arrays = evaluate_reply(ask(), 9, loss=0.5)
    assert "lacks tensors it was asked to train: count, w" in refused(no_arrays)


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((4, 3), np.float32),
        np.zeros(12, np.float32),
        np.zeros((1, 3, 4), np.float32),
        np.zeros((3, 5), np.float32),
        np.zeros((), np.float32),
        np.zeros((0, 4), np.float32),
    ],
    ids=lambda v: str(v.shape),
)
def test_another_shape_is_refused(values: np.ndarray) -> None:
    says = refused(train_reply(ask(), update(w=values), 9, loss=0.5))
    assert says.startswith("'w' is an array of ")
    assert "(3, 4) is due" in says


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.float16, ">f4", np.complex64, "S4"])
def test_another_dtype_is_refused(dtype: Any) -> None:
    values = np.zeros(SHAPE, dtype)
    assert "float32(3, 4) is due" in refused(train_reply(ask(), update(w=values), 9, loss=0.5))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_is_refused(value: float) -> None:
    values = update()["w"]
    values[2, 3] = value
    assert refused(train_reply(ask(), update(w=values), 9, loss=0.5)) == "'w' holds NaN or Inf"


# ------------------------------------------------------------------------------ counts and metrics
@pytest.mark.parametrize("examples", [0, -1, 2**40, MAX_EXAMPLES + 1, 0.5, 1.5, np.nan, np.inf])
def test_forged_example_counts_are_refused_by_every_reader(examples: float) -> None:
    """d_i is a client's weight in the mean, and it states it itself."""
    readers = [
        (reply_with(raw(VALID), examples), lambda m: read_train_reply(m, EXPECTED)),
        (
            probe_reply(ask(), {"snr": [1.0]}, examples),  # type: ignore[arg-type]
            lambda m: read_statistics(m, ["snr"], 1),
        ),
        (
            evaluate_reply(ask(), examples, client_loss=0.1, client_accuracy=0.1),  # type: ignore[arg-type]
            read_evaluation,
        ),
        (
            describe_reply(ask(), Description(0, examples)),  # type: ignore[arg-type]
            read_description,
        ),
    ]
    for message, read in readers:
        with pytest.raises(RefusedReply, match="examples"):
            read(message)


@pytest.mark.parametrize("examples", [1, MAX_EXAMPLES])
def test_counts_up_to_the_limit_are_taken(examples: int) -> None:
    assert read_train_reply(reply_with(raw(VALID), examples), EXPECTED).examples == examples


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_any_metric_that_is_not_finite_is_refused(value: float) -> None:
    assert "not finite: loss" in refused(reply_with(raw(VALID), loss=value))
    assert "not finite: flops" in refused(reply_with(raw(VALID), flops=value))


@pytest.mark.parametrize("value", [1e101, -1e101])
def test_metrics_that_none_can_be_are_refused(value: float) -> None:
    assert "metrics are too large: loss" in refused(reply_with(raw(VALID), loss=value))


@pytest.mark.parametrize("name", [name for name, m in METRICS.items() if m.least > -np.inf])
def test_work_that_takes_less_than_nothing_is_refused(name: str) -> None:
    assert f"states {name} = -1; " in refused(reply_with(raw(VALID), **{name: -1.0}))


def test_an_integer_beyond_any_float_is_no_number() -> None:
    """In a message that stays in one process, Python's integers can have any size."""
    assert "not finite: examples" in refused(reply_with(raw(VALID), 10**400))
    message = probe_reply(ask("query.probe"), {"snr": [1, 10**400]}, 9)
    with pytest.raises(RefusedReply, match="'snr' holds negative or non-finite"):
        read_statistics(message, ["snr"], 2)


def test_missing_metrics_are_named() -> None:
    message = reply_with(raw(VALID))
    del message.content["metrics"]
    assert refused(message) == "it has no 'metrics' record"
    message.content["metrics"] = MetricRecord({"examples": 9})
    # A private client does not state its loss.
    assert read_train_reply(message, EXPECTED).metrics == {"examples": 9.0}
    message.content["metrics"] = MetricRecord({"examples": [9, 9], "loss": 0.5})
    assert refused(message) == "its metrics lack examples"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"partition": -1}, "'partition' -1"),
        ({"partition": 0.5}, "'partition' 0.5"),
        ({"partitions": -2}, "'partitions' -2"),
        ({"budget": -1.0}, "budget of -1"),
        ({"budget": np.nan}, "not finite: budget"),
        ({"budget": np.inf}, "not finite: budget"),
    ],
)
def test_impossible_descriptions_are_refused(wrong: dict[str, float], says: str) -> None:
    metrics = MetricRecord({"partition": 0, "examples": 5, **wrong})
    message = Message(RecordDict({"metrics": metrics}), reply_to=ask())
    with pytest.raises(RefusedReply, match=says):
        read_description(message)


def described(costs: Any, depth: Any) -> Message:
    metrics = {"partition": 0, "examples": 5, "costs": costs, "depth_costs": depth}
    given_rows = {name: value for name, value in metrics.items() if value is not None}
    return Message(RecordDict({"metrics": MetricRecord(given_rows)}), reply_to=ask())


def test_measured_costs_arrive_as_they_were_sent() -> None:
    description = Description(4, 100, costs=(1.0, 0.0, 2.5), depth_costs=(3.0, 3.0, 0.0))
    reply = over_the_wire(describe_reply(ask("query.describe"), description))
    assert read_description(reply, 3) == description


@pytest.mark.parametrize(
    ("costs", "depth"),
    [
        ([1.0] * 3, [2.0, 1.0]),
        ([1.0] * 2, [2.0, 1.0, 0.0]),
        ([1.0] * 4, [0.0] * 4),
        ([1.0] * 3, None),
        (None, [2.0, 1.0, 0.0]),
        (1.0, [2.0, 1.0, 0.0]),
        ([1.0, -1.0, 1.0], [2.0, 1.0, 0.0]),
        ([1.0, np.nan, 1.0], [2.0, 1.0, 0.0]),
        ([1.0] * 3, [np.inf, 1.0, 0.0]),
        ([1.0] * 3, [1.0, 0.0, -1.0]),
        ([1.0] * 3, [1.0, 2.0, 0.0]),
    ],
    ids=str,
)
def test_measured_costs_of_wrong_length_or_impossible_value_are_refused(
    costs: Any, depth: Any
) -> None:
    with pytest.raises(RefusedReply, match="costs'"):
        read_description(described(costs, depth), 3)


# ---------------------------------------------------------------------------------- statistics
@pytest.mark.parametrize(
    "row",
    [
        [],
        [1.0, 2.0],
        [1.0] * 4,
        [1.0, -1e-9, 2.0],
        [1.0, np.nan, 2.0],
        [np.inf, 1.0, 1.0],
        [1.0, 1e308, 1.0],
    ],
    ids=str,
)
def test_statistics_of_wrong_length_or_impossible_value_are_refused(row: list[float]) -> None:
    message = probe_reply(ask("query.probe"), {"snr": [1.0] * 3, "grad_norm_sq": row}, 9)
    with pytest.raises(RefusedReply, match="'grad_norm_sq'"):
        read_statistics(message, ["snr", "grad_norm_sq"], 3)


def test_statistics_that_are_missing_or_a_single_number_are_refused() -> None:
    message = probe_reply(ask("query.probe"), {"snr": [1.0] * 3}, 9)
    with pytest.raises(RefusedReply, match="'grad_norm_sq' is not a list of 3 numbers"):
        read_statistics(message, ["snr", "grad_norm_sq"], 3)
    message.content["statistics"] = MetricRecord({"snr": 3.0})
    with pytest.raises(RefusedReply, match="'snr' is not a list of 3 numbers"):
        read_statistics(message, ["snr"], 3)
    del message.content["statistics"]
    with pytest.raises(RefusedReply, match="no 'statistics' record"):
        read_statistics(message, ["snr"], 3)


def test_statistics_nobody_asked_for_are_ignored() -> None:
    message = probe_reply(ask("query.probe"), {"snr": [1.0], "other": [-1.0, 2.0]}, 9)
    found, _ = read_statistics(message, ["snr"], 1)
    assert list(found) == ["snr"]


# ------------------------------------------------------------------------------ layers held and missing
def test_what_a_node_holds_and_misses_arrives_as_it_was_sent(layers: LayerMap) -> None:
    reply = missing_reply(ask(), ["blocks.1", "head"])
    state_held(reply, ["a" * 32], "store")
    reply = over_the_wire(reply)
    assert read_missing(reply, layers) == ("blocks.1", "head")
    assert read_held(reply) == (("a" * 32,), "store")


def test_a_reply_that_says_nothing_of_layers_holds_and_misses_nothing(layers: LayerMap) -> None:
    reply = train_reply(ask(), update(), 9, loss=0.5)
    assert read_missing(reply, layers) == ()
    assert read_held(reply) == ((), "")


def test_layers_the_model_does_not_have_cannot_be_missing(layers: LayerMap) -> None:
    with pytest.raises(RefusedReply, match="layers that the model does not have"):
        read_missing(missing_reply(ask(), ["blocks.1", "../etc"]), layers)


def test_a_node_cannot_say_that_it_holds_anything_but_digests() -> None:
    reply = train_reply(ask(), update(), 9, loss=0.5)
    state_held(reply, ["a"] * 100_001, "store")
    with pytest.raises(RefusedReply, match="cannot be read"):
        read_held(reply)


def test_a_layer_that_is_missing_many_times_is_missing_once(layers: LayerMap) -> None:
    assert read_missing(missing_reply(ask(), ["head"] * 99), layers) == ("head",)
