"""Malformed replies through the whole strategy: each is refused with a reason, and changes nothing else.

There are 100 federations of three honest and nine hostile clients, with two rounds each. Every hostile
client has a forgery of its own, which gives 1,800 malformed replies. As many replies again have bytes
that were changed at random.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from operator import methodcaller
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from layerfed.config import BudgetConfig
from layerfed.exchange import CODECS, encode
from layerfed.exchange.bounds import MAX_ENTRIES, MAX_ITEMS, MAX_TEXT
from layerfed.exchange.messages import MAX_EXAMPLES, missing_reply, state_held
from layerfed.flower_compat import stamp
from layerfed.selection import preparing
from layerfed.server.budgets import Budgets
from tests.exchange.replies import npy, raw
from tests.exchange.test_forged_arrays import FORGED
from tests.made_up import (
    BASE,
    LAYERS,
    Federation,
    Forge,
    Outcome,
    run,
    strategy_for,
)

KINDS = {"query.probe": "probe", "train": "train", "evaluate": "evaluate"}
HONEST = (1, 6, 11)
# Each forges its replies of one kind.
HOSTILE = dict(zip((0, 2, 3, 4, 5, 7, 8, 9, 10), 3 * list(KINDS), strict=True))
CLIENTS = len(HONEST) + len(HOSTILE)
NOT_NUMBERS = [np.nan, np.inf, -np.inf, 1e200, -1e200, 10**400]
QUICK = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


# ------------------------------------------------------------------------- forgeries of any reply
def record(name: str, forge: Callable[[Any], None]) -> Forge:
    """Change one record of a reply in place."""

    def change(reply: Message) -> Message:
        forge(reply.content[name])
        return reply

    return change


def put(name: str, key: str, value: Any) -> Forge:
    return record(name, lambda entries: entries.__setitem__(key, value))


def without(name: str, key: str) -> Forge:
    return record(name, lambda entries: entries.__delitem__(key))


def whole(name: str, value: Any) -> Forge:
    """Put another record in the place of one."""

    def change(reply: Message) -> Message:
        reply.content[name] = value
        return reply

    return change


def dropped(name: str) -> Forge:
    def change(reply: Message) -> Message:
        del reply.content[name]
        return reply

    return change


def stamped(field: str, value: Any) -> Forge:
    """Forge a field of the envelope."""

    def change(reply: Message) -> Message:
        stamp(reply, **{field: value})
        return reply

    return change


def unreadable(error: type[Exception], *what: Any) -> Forge:
    """Make a reply that Flower cannot build."""

    def change(reply: Message) -> Message:
        raise error(*what)

    return change


def lacking(*layers: Any) -> Forge:
    return lambda reply: missing_reply(asked_by(reply), layers)


def asked_by(reply: Message) -> Message:
    """Stand in for the instruction, of which only the envelope is read."""
    m = reply.metadata
    asked = Message(RecordDict(), m.src_node_id, m.message_type, group_id=m.group_id)
    stamp(asked, src_node_id=m.dst_node_id)
    stamp(asked, message_id=m.reply_to_message_id)
    return asked


RECORDS = [
    ConfigRecord({"a": "b"}),
    MetricRecord({"a": 1}),
    ArrayRecord({"w": encode(np.zeros(2, np.float32))}),
]
ANY_KIND = st.one_of(
    st.builds(
        lambda code, text: lambda reply: Message(Error(code, text), reply_to=asked_by(reply)),
        st.integers(0, 500),
        st.text(max_size=40) | st.just("long " * 1000),
    ),
    st.sampled_from(["metrics"]).map(dropped),
    st.builds(whole, st.text(min_size=1, max_size=9).map("x{}".format), st.sampled_from(RECORDS)),
    st.just(
        whole("metrics", ConfigRecord({"examples": 9, "client_loss": 0.5, "client_accuracy": 0.5}))
    ),
    st.builds(put, st.just("metrics"), st.just("examples"), st.sampled_from([0, -1, 0.5, 10.5])),
    st.builds(put, st.just("metrics"), st.just("examples"), st.sampled_from(NOT_NUMBERS)),
    st.builds(put, st.just("metrics"), st.just("examples"), st.integers(MAX_EXAMPLES + 1, 2**80)),
    st.just(put("metrics", "examples", [9, 9])),
    st.just(without("metrics", "examples")),
    st.builds(put, st.just("metrics"), st.text(max_size=9), st.sampled_from(NOT_NUMBERS)),
    st.builds(
        put, st.just("metrics"), st.sampled_from(["flops", "train_seconds", "steps"]), st.just(-1.0)
    ),
    st.just(put("metrics", "peak_memory", -1)),
    # Beyond all bounds.
    st.integers(MAX_ENTRIES, 2 * MAX_ENTRIES).map(
        lambda n: record("metrics", lambda entries: entries.update({f"k{i}": 1 for i in range(n)}))
    ),
    st.just(put("metrics", "list", [0.0] * (MAX_ITEMS + 1))),
    st.just(put("metrics", "k" * (MAX_TEXT + 1), 1.0)),
    st.just(put("layers", "store", "s" * (MAX_TEXT + 1))),
    st.just(put("layers", "held", ["a"] * (MAX_ITEMS + 1))),
    st.just(put("layers", "more", [b"b" * (MAX_TEXT + 1)])),
    # Lies about layers that cannot be meant.
    st.lists(st.text(max_size=9).map("no {}".format), min_size=1, max_size=9).map(
        lambda names: lacking(*names)
    ),
    st.lists(st.integers(), min_size=1, max_size=3).map(lambda names: lacking(*names)),
    st.sampled_from([("head",), LAYERS.names, ("blocks.0",) * 50]).map(lambda n: lacking(*n)),
    st.just(put("layers", "missing", "head")),
    st.sampled_from(["digest", 7, True, b"bytes"]).map(lambda held: put("layers", "held", held)),
    st.sampled_from([7, 1.5, True, b"bytes", ["a"]]).map(lambda s: put("layers", "store", s)),
    st.just(whole("layers", MetricRecord({"held": 1}))),
    # The envelope.
    st.sampled_from(["train.other", "query.probe.x", "evaluate.x", "system"]).map(
        lambda kind: stamped("message_type", kind)
    ),
    st.sampled_from(["", "0", "3", "nonsense " * 99]).map(lambda g: stamped("group_id", g)),
    st.sampled_from([0, 1, 3, 999]).map(lambda node: stamped("src_node_id", node)),
    st.sampled_from(
        [
            *((ValueError, "no"), (KeyError, 3), (TypeError, "x" * 999), (RecursionError,)),
            *((MemoryError,), (AttributeError, "a"), (OSError, 5)),
            (UnicodeDecodeError, "utf-8", b"\xff", 0, 1, "no"),
        ]
    ).map(lambda error: unreadable(*error)),
)

# ---------------------------------------------------------------------------- forgeries of a kind
STATISTICS = st.one_of(
    st.just(dropped("statistics")),
    st.just(without("statistics", "grad_norm_sq")),
    st.just(put("statistics", "grad_norm_sq", 3.0)),
    st.integers(0, 9)
    .filter(lambda n: n != LAYERS.num_blocks)
    .map(lambda n: put("statistics", "grad_norm_sq", [1.0] * n)),
    st.builds(
        lambda row, place, bad: put(
            "statistics", "grad_norm_sq", [*map(float, row[:place]), bad, *map(float, row[place:])]
        ),
        st.lists(st.integers(0, 9), min_size=3, max_size=3),
        st.integers(0, 3),
        st.sampled_from([x for x in NOT_NUMBERS if isinstance(x, float)] + [-1e-9]),
    ),
    st.just(put("statistics", "grad_norm_sq", [1, 2, 3, 10**400])),
)


def tensors(forge: Callable[[ArrayRecord, str], None]) -> st.SearchStrategy[Forge]:
    """Forgeries that change one of the tensors sent: any of them."""

    def at(place: int) -> Forge:
        def change(reply: Message) -> Message:
            arrays = reply.content.array_records["arrays"]
            forge(arrays, sorted(arrays)[place % len(arrays)])
            return reply

        return change

    return st.integers(0, 50).map(at)


def values(make: Callable[[np.ndarray], Any]) -> st.SearchStrategy[Forge]:
    def forge(arrays: ArrayRecord, name: str) -> None:
        arrays[name] = encode(np.asarray(make(arrays[name].numpy())))

    return tensors(forge)


def floats(value: float) -> st.SearchStrategy[Forge]:
    """Put one number among those of some tensor of floats."""

    def forge(arrays: ArrayRecord, name: str) -> None:
        name = name if BASE[name].dtype == np.float32 else "head.weight"
        changed = arrays[name].numpy()
        changed.reshape(-1)[-1] = value
        arrays[name] = encode(changed)

    return tensors(forge)


def cut_short(reply: Message, share: float) -> Message:
    arrays = reply.content.array_records["arrays"]
    name = min(arrays)
    data = npy(arrays[name].numpy())
    arrays[name] = raw(data[: int(share * len(data))])
    return reply


def beyond_the_mask(reply: Message) -> Message:
    """Send one more block, well-formed, than was asked for."""
    arrays = reply.content.array_records["arrays"]
    block = next(b for b in LAYERS.blocks if not set(b.tensors) & set(arrays))
    for name in block.tensors:
        arrays[name] = encode(np.zeros_like(BASE[name]))
    return reply


TENSORS = st.one_of(
    st.just(dropped("arrays")),
    st.just(whole("arrays", ArrayRecord())),
    st.just(whole("arrays", MetricRecord({"w": 1.0}))),
    tensors(lambda arrays, name: arrays.__delitem__(name)),
    tensors(lambda arrays, name: arrays.__setitem__(name + "'", arrays.pop(name))),
    tensors(lambda arrays, name: arrays.__setitem__("\n" + 500 * name, arrays[name])),
    st.just(beyond_the_mask),
    st.just(put("arrays", "embed.weight", encode(BASE["embed.weight"]))),
    values(lambda v: v.astype(np.float64)),
    values(lambda v: v.astype(np.complex64)),
    values(lambda v: v.astype(v.dtype.newbyteorder(">"))),
    values(lambda v: v[..., None]),
    values(lambda v: np.zeros((*v.shape, 0), v.dtype)),
    values(lambda v: np.broadcast_to(v, (2, *v.shape))),
    *(floats(x) for x in (np.nan, np.inf, -np.inf, 1e16, -3e38)),
    st.sampled_from(sorted(FORGED)).map(lambda key: put("arrays", "head.weight", raw(FORGED[key]))),
    st.sampled_from(["", "pickle", "torch.tensor"]).map(
        lambda stype: put("arrays", "head.weight", raw(npy(BASE["head.weight"]), stype))
    ),
    st.floats(0, 0.999).map(lambda share: lambda reply: cut_short(reply, share)),
    st.just(put("arrays", "blocks.0.norm.num_batches_tracked", encode(np.asarray(2**62)))),
    # One more than any of them had on joining.
    st.integers(10 + CLIENTS, MAX_EXAMPLES).map(lambda n: put("metrics", "examples", n)),
    st.sampled_from([0, 0.5, -3]).map(lambda steps: put("metrics", "steps", steps)),
    st.just(without("metrics", "examples")),
)
EVALUATIONS = st.sampled_from(["client_loss", "client_accuracy"]).map(
    lambda name: without("metrics", name)
)
OF_KIND = {"query.probe": STATISTICS, "train": TENSORS, "evaluate": EVALUATIONS}
FORGERIES = st.fixed_dictionaries({(p, k): OF_KIND[k] | ANY_KIND for p, k in HOSTILE.items()})


# ------------------------------------------------------------------------------------- the property
def silent(reply: Message) -> Message:
    return Message(Error(0, "absent"), reply_to=asked_by(reply))


@cache
def without_them() -> Outcome:
    """Return the run in which hostile clients give no reply in place of a forged one."""
    return run(Federation(CLIENTS, dict.fromkeys(HOSTILE.items(), silent)))


@QUICK
@given(FORGERIES)
def test_malformed_replies_are_refused_and_change_nothing(
    forged: dict[tuple[int, str], Forge],
) -> None:
    found, expected = run(Federation(CLIENTS, forged)), without_them()
    for name, tensor in expected.model.items():
        assert np.isfinite(tensor).all()
        np.testing.assert_array_equal(found.model[name], tensor)
    assert len(found.rounds) == 2
    for ours, theirs in zip(found.rounds, expected.rounds, strict=True):
        refused = {(failure.partition, failure.phase) for failure in ours.failures}
        assert refused == {(p, KINDS[kind]) for p, kind in HOSTILE.items()}
        assert len(ours.failures) == len(HOSTILE)
        for failure in ours.failures:
            assert failure.reason.isprintable()
            assert len(failure.reason) <= 510
        assert ours.updated == theirs.updated
        for name in ("e1", "e2", "metrics"):
            assert getattr(ours, name) == getattr(theirs, name), name


@st.composite
def garbled(draw: st.DrawFn) -> Forge:
    """Change some bytes of a reply between node and server, or cut off its end."""
    places = draw(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6))
    kept = draw(st.just(1.0) | st.floats(0, 1))

    def change(reply: Message) -> Message:
        data = bytearray(message_to_proto(reply).SerializeToString())
        for place, byte in places:
            data[int(place * (len(data) - 1))] = byte
        return message_from_proto(ProtoMessage.FromString(bytes(data[: int(kept * len(data))])))

    return change


@QUICK
@given(
    st.fixed_dictionaries({hostile: garbled() for hostile in HOSTILE.items()}),
    st.sampled_from(sorted(CODECS)),
)
def test_garbled_bytes_are_refused_or_are_another_plausible_reply(
    forged: dict[tuple[int, str], Forge], codec: str
) -> None:
    """A flipped bit of a number is one that the client might have sent."""
    found = run(Federation(CLIENTS, forged), codec=codec)
    assert len(found.rounds) == 2
    assert all(np.isfinite(tensor).all() for tensor in found.model.values())
    for record_ in found.rounds:
        assert set(HONEST) <= set(record_.updated)
        assert {failure.partition for failure in record_.failures} <= set(HOSTILE)


# ----------------------------------------------------------------------- lies that harm nobody else
LIES = {
    "holds everything": put("layers", "held", ["f" * 32] * 9),
    "holds nothing": put("layers", "held", []),
    "another store": put("layers", "store", "/etc"),
    "metrics of its own": put("metrics", "mine", 3.0),
    "a list of its own": put("metrics", "mine", [3.0] * 9),
}


@cache
def honest() -> Outcome:
    return run(Federation(CLIENTS))


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("kind", KINDS)
def test_lies_about_what_a_node_holds_change_no_result(kind: str, lie: str) -> None:
    found = run(Federation(CLIENTS, {(1, kind): LIES[lie]}))
    assert [r.failures for r in found.rounds] == [[], []]
    for name, tensor in honest().model.items():
        np.testing.assert_array_equal(found.model[name], tensor)


def test_layers_said_to_be_missing_are_sent_once_however_often_they_are_named() -> None:
    """Its first answers say that the head is missing, fifty times over; the second ones are in order."""
    seen: set[tuple[str, str]] = set()

    def once(reply: Message) -> Message:
        key = reply.metadata.message_type, reply.metadata.group_id
        if key in seen:
            return reply
        seen.add(key)
        return missing_reply(asked_by(reply), ["head"] * 50)

    found = run(Federation(CLIENTS, {(1, kind): once for kind in KINDS}))
    assert len(seen) == 6
    assert [r.failures for r in found.rounds] == [[], []]
    more = found.rounds[0].ledger[1].down - honest().rounds[0].ledger[1].down
    assert more == 3 * LAYERS.head.bytes
    for name, tensor in honest().model.items():
        np.testing.assert_array_equal(found.model[name], tensor)


def test_scores_weigh_by_no_more_examples_than_a_client_stated_on_joining() -> None:
    def boast(reply: Message) -> Message:
        metrics = reply.content.metric_records["metrics"]
        metrics["examples"], metrics["client_accuracy"] = 2**29, 1.0
        return reply

    grid = Federation(3, {(1, "evaluate"): boast})
    found = run(grid, rounds=1)
    answers = {
        m.metadata.dst_node_id - 2: grid.answer(m).content.metric_records["metrics"]
        for m in grid.asked
        if m.metadata.message_type == "evaluate" and m.metadata.group_id == "1"
    }
    counted = {0: 3, 1: 10 + 1, 2: 5}  # held out, but for client 1
    accuracy = np.average(
        [answers[client]["client_accuracy"] for client in counted], weights=list(counted.values())
    )
    assert found.rounds[0].failures == []
    assert found.rounds[0].metrics["client_accuracy"] == pytest.approx(accuracy)


@pytest.mark.parametrize("budget", [5e-324, 1e-305])
def test_a_budget_too_small_for_a_unit_affords_nothing_and_harms_nobody(
    budget: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs are measured ones, which are rounded to a grid where there are many layers."""
    monkeypatch.setattr(preparing, "ENUMERATION_LAYERS", 0)
    rng, forged = np.random.default_rng(0), dict[tuple[int, str], Forge]()
    for client in range(3):
        stated: dict[str, Any] = {"costs": rng.uniform(1, 2, 4).tolist(), "depth_costs": [0.0] * 4}
        if client == 1:
            stated["budget"] = budget
        forged[client, "query.describe"] = record("metrics", methodcaller("update", stated))
    budgets = Budgets(BudgetConfig(unit="seconds", layers=4), None, 0)
    found = run(Federation(3, forged), 1, budget=budgets)
    (outcome,) = found.rounds
    assert outcome.failures == []
    assert outcome.updated[1] == ("head",)
    assert all(len(outcome.updated[client]) > 1 for client in (0, 2))


# --------------------------------------------------------------------- replies handed in step by step
def test_late_repeated_and_unasked_replies_are_refused_in_flowers_own_steps() -> None:
    """An app that calls Flower's four steps itself can pass any replies."""
    grid = Federation(3)
    strategy = strategy_for(3, min_replies=1)
    arrays, config = strategy_arrays(), ConfigRecord({"lr": 0.1})

    def answers(number: int) -> list[Message]:
        messages = list(strategy.configure_train(number, arrays, config, grid))
        grid.push_messages(messages)
        return [grid.answer(message) for message in messages]

    first = answers(1)
    stranger = grid.answer(first_message_to(grid, node=4))
    stamp(stranger, src_node_id=77)
    strategy.aggregate_train(1, [first[0], first[0], stranger, *first[1:]])
    record_ = strategy.round.record
    assert record_.replies == 3
    assert [(f.partition, f.reason) for f in record_.failures] == [
        (0, "it has answered already"),
        (-1, "node 77 was not asked"),
    ]

    strategy.aggregate_train(2, [*first[:1], *answers(2)])
    record_ = strategy.round.record
    assert record_.replies == 3
    assert [f.reason for f in record_.failures] == ["it belongs to round '1', not to 2"]
    # Replies to a training that nobody was asked to evaluate.
    strategy.aggregate_evaluate(2, first)
    assert [f.reason for f in record_.failures[1:]] == ["it was not asked to evaluate"] * 3


def strategy_arrays() -> ArrayRecord:
    return ArrayRecord({name: encode(values_) for name, values_ in BASE.items()})


def first_message_to(grid: Federation, node: int) -> Message:
    return next(
        m for m in grid.asked if m.metadata.dst_node_id == node and "mask" in m.content["config"]
    )


def test_a_held_statement_that_cannot_be_read_is_not_believed_in_part() -> None:
    def forge(reply: Message) -> Message:
        state_held(reply, ["f" * 32], "s")
        return whole("layers", ConfigRecord({"held": ["f" * 32], "store": 7}))(reply)

    found = run(Federation(3, {(1, "train"): forge}), rounds=1)
    assert [(f.partition, f.phase) for f in found.rounds[0].failures] == [(1, "train")]
