"""Replies that are too large, of another kind, or from another node are not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord

from layerfed.exchange import (
    Description,
    RefusedReply,
    check_reply,
    describe_reply,
    encode,
    evaluate_reply,
    probe_reply,
    train_reply,
)
from layerfed.exchange.bounds import MAX_ARRAYS, MAX_ENTRIES, MAX_ITEMS, MAX_TEXT, check_values
from layerfed.exchange.messages import missing_reply, state_held
from layerfed.flower_compat import stamp
from tests.exchange.replies import ask, over_the_wire, update

KINDS: dict[str, Callable[[Message], Message]] = {
    "query.describe": lambda m: describe_reply(
        m, Description(0, 5, costs=(1.0,), depth_costs=(1.0,))
    ),
    "query.probe": lambda m: probe_reply(m, {"snr": [1.0] * 400}, 5, flops=1.0),
    "train": lambda m: train_reply(m, update(), 5, loss=0.5),
    "evaluate": lambda m: evaluate_reply(m, 5, loss=0.5, accuracy=0.5),
}


def refused(reply: Message, asked: Message) -> str:
    with pytest.raises(RefusedReply) as caught:
        check_reply(reply, asked)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_reply_of_ours_passes(kind: str) -> None:
    asked = ask(kind)
    reply = KINDS[kind](asked)
    state_held(reply, ["a" * 32] * 1000, "store")
    for message in (reply, over_the_wire(reply), missing_reply(asked, ["head"])):
        check_reply(message, asked)


@pytest.mark.parametrize("kind", KINDS)
def test_records_that_do_not_belong_to_the_kind_are_refused(kind: str) -> None:
    asked = ask(kind)
    for name, record in {
        "statistics": MetricRecord({"snr": [1.0]}),
        "arrays": ArrayRecord({"w": encode(np.zeros(1))}),
        "config": ConfigRecord({"a": 1}),
        "x" * 100: MetricRecord(),
    }.items():
        reply = KINDS[kind](asked)
        if name in reply.content:
            continue
        reply.content[name] = record
        assert "that does not belong there" in refused(reply, asked)


def test_a_record_of_another_type_is_refused() -> None:
    reply = KINDS["evaluate"](ask("evaluate"))
    reply.content["metrics"] = ConfigRecord({"examples": 5})
    assert "'metrics' that does not belong there" in refused(reply, ask("evaluate"))


@pytest.mark.parametrize(
    ("name", "record", "says"),
    [
        ("metrics", MetricRecord({f"k{i}": 1 for i in range(MAX_ENTRIES + 1)}), "1001 entries"),
        ("metrics", MetricRecord({"k": [1.0] * (MAX_ITEMS + 1)}), "more than 100000 items"),
        (
            "metrics",
            MetricRecord({f"k{i}": [1.0] * (MAX_ITEMS // 10) for i in range(11)}),
            "more than 100000 items",
        ),
        ("metrics", MetricRecord({"k" * (MAX_TEXT + 1): 1.0}), "1000 characters"),
        ("layers", ConfigRecord({"held": ["x"] * (MAX_ITEMS + 1)}), "more than 100000 items"),
        ("layers", ConfigRecord({"held": ["x", "y" * (MAX_TEXT + 1)]}), "1000 characters"),
        ("layers", ConfigRecord({"store": b"y" * (MAX_TEXT + 1)}), "1000 characters"),
    ],
)
def test_what_is_larger_than_any_reply_is_refused(name: str, record: Any, says: str) -> None:
    reply = KINDS["train"](ask())
    reply.content[name] = record
    assert says in refused(reply, ask())


def test_more_tensors_than_any_model_has_are_refused_unread() -> None:
    one, many = encode(np.zeros(1, np.float32)), ArrayRecord()
    many.__dict__["_data"] = {str(i): one for i in range(MAX_ARRAYS + 1)}
    reply = KINDS["train"](ask())
    reply.content["arrays"] = many
    assert "'arrays' has 100001 entries" in refused(reply, ask())


def test_what_is_at_the_bounds_passes() -> None:
    reply = KINDS["train"](ask())
    reply.content["layers"] = ConfigRecord({"held": ["y" * MAX_TEXT] * 9 + ["x"] * (MAX_ITEMS - 9)})
    reply.content["metrics"].update({f"k{i}": 1 for i in range(MAX_ENTRIES - 2)})
    check_reply(reply, ask())


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("src_node_id", 8, "sent by node 8, which was not asked"),
        ("message_type", "query.probe", "answers 'query.probe' and not 'train'"),
        ("group_id", "2", "belongs to round '2', not to 3"),
    ],
)
def test_replies_from_elsewhere_to_something_else_or_from_before_are_refused(
    field: str, value: Any, says: str
) -> None:
    reply = KINDS["train"](ask())
    stamp(reply, **{field: value})
    assert says in refused(reply, ask())


def test_reasons_are_one_short_printable_line() -> None:
    reason = str(RefusedReply("it holds \x1b[2J\nround 9: all is well \ud800" + "x" * 10**6))
    assert reason.isprintable()
    assert len(reason) < 520
    assert reason.startswith("it holds  [2J round 9: all is well  x")
    assert reason.endswith("x …")


# ------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
def test_values_that_no_training_gives_are_refused(dtype: Any) -> None:
    for value in (1e15, -1e15, 0):
        check_values("w", np.array([[0, value]], dtype))
    for value in (2e15, -2e15):
        with pytest.raises(RefusedReply, match=r"'w' holds -?2e\+15, which no training gives"):
            check_values("w", np.array([[0, value]], dtype))
    check_values("w", np.zeros((0, 3), dtype))
    check_values("w", np.zeros((), dtype))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_refused(value: float) -> None:
    for row in ([value], [value, 1], [1, value, 2], [np.inf, value]):
        with pytest.raises(RefusedReply, match="'w' holds NaN or Inf"):
            check_values("w", np.array(row, np.float32))
