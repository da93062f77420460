"""Whole rounds with secure aggregation: the plain run's model, and nothing but sums on the server."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.serde import context_from_proto, context_to_proto
from flwr.proto.message_pb2 import Context as ProtoContext

from layerfed.client.workbench import workbench
from layerfed.client_app import build_client_app, client_app
from layerfed.config import RunConfig, Scalar
from layerfed.exchange import encode
from layerfed.runs.records import RoundFailed
from layerfed.secure import client as secure_client
from layerfed.secure.messages import PADDED
from tests.fakes import Recorded
from tests.tiny_task import Run, check_resumed, configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")
QUERIES = ("query.keys", "query.shares", "query.unmask")


def secure(*overrides: str) -> RunConfig:
    return configured("secagg.enabled=true", "federation.clients-per-round=5", *overrides)


def plain(*overrides: str) -> RunConfig:
    return configured("federation.clients-per-round=5", *overrides)


class Leaving(Recorded):
    """A grid on which some clients raise an error at a given message."""

    def __init__(
        self,
        config: RunConfig,
        leaving: Mapping[str, Sequence[int]],
        app: ClientApp = client_app,
        nodes: Sequence[Mapping[str, Scalar]] = (),
    ) -> None:
        super().__init__(config, app, nodes)
        self.leaving = leaving

    def _work(self, message: Message) -> Message:
        kind, partition = message.metadata.message_type, message.metadata.dst_node_id - 2
        if partition in self.leaving.get(kind, ()):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self, "_app", gone)
                return super()._work(message)
        return super()._work(message)


def gone(message: Message, context: Context) -> Message:
    raise ConnectionError("gone")


def assert_close(found: Run, expected: Run, error: float) -> None:
    assert found.after.keys() == expected.after.keys()
    for name, values in expected.after.items():
        np.testing.assert_allclose(found.after[name], values, rtol=1e-6, atol=error, err_msg=name)


def error_of(grid: Recorded, record_examples: int) -> float:
    """Return the error bound in the docs: n / (2 s D)."""
    trained = [m.content.config_records["secure"] for m, _ in grid.trained()]
    scale = {record["scale"] for record in trained}
    assert len(scale) == 1
    return len(trained) / (2 * float(scale.pop()) * record_examples)  # type: ignore[arg-type]


def examples(clients: Iterable[int]) -> int:
    return sum(10 + 4 * client for client in clients)


# ------------------------------------------------------------------------------- the same model
@pytest.mark.parametrize("strategy", ["top", "both", "cyclic", "full", "head", "fedtlu", "fedluar"])
def test_the_model_is_that_of_the_plain_run(strategy: str) -> None:
    options = [f"strategy.name={strategy}", "budget.layers=2"]
    grid = Recorded(secure(*options))
    found, expected = run(secure(*options), 2, grid), run(plain(*options), 2)
    assert [r.replies for r in found.rounds] == [5, 5]
    assert_close(found, expected, 4 * error_of(grid, 5 * 10))
    assert found.rounds[-1].moved == expected.rounds[-1].moved
    losses = [run.rounds[-1].metrics["train_loss"] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_ilp_under_a_large_consistency_works() -> None:
    options = ["strategy.name=ilp", "strategy.consistency=1000", "budget.layers=2"]
    found, expected = run(secure(*options), 2), run(plain(*options), 2)
    for number in (1, 2):
        assert found.masks(number) == expected.masks(number)
        assert len({tuple(mask) for mask in found.masks(number).values()}) == 1
    assert_close(found, expected, 1e-6)


def test_every_optimizer_of_the_server_gets_the_mean() -> None:
    options = ["strategy.name=top", "server.optimizer=momentum", "server.lr=0.5"]
    assert_close(run(secure(*options), 2), run(plain(*options), 2), 1e-6)


def test_a_resumed_run_ends_with_the_same_model_to_the_bit() -> None:
    """Nothing of a secure sum outlives its round, and sums of integers have no order."""
    check_resumed(secure("strategy.name=cyclic"))


# ------------------------------------------------------------------------------ clients that leave
@pytest.mark.parametrize("kind", ["query.keys", "query.shares", "train", "query.unmask"])
def test_the_round_is_that_of_the_clients_that_stay(kind: str) -> None:
    config = secure("strategy.name=top", "secagg.threshold=0.6", "federation.over-provision=0")
    sampled = sorted(run(plain("strategy.name=top"), 1).masks(1))
    gone = sampled[1::2]
    found = run(config, 1, Leaving(config, {kind: gone}))
    without = {} if kind == "query.unmask" else {"train": gone}
    expected = run(plain("strategy.name=top"), 1, Leaving(plain("strategy.name=top"), without))
    assert_close(found, expected, 1e-6)
    phases = {(f.partition, f.phase) for f in found.rounds[0].failures}
    named = kind.removeprefix("query.")
    assert phases <= {(client, named) for client in gone}
    assert kind == "query.unmask" or len(phases) == 2


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("query.keys", "2 clients stated keys, 4 are needed for a secure sum"),
        ("query.shares", "2 clients shared secrets, 4 are needed for a secure sum"),
        ("train", "2 clients sent an update, 4 are needed for a secure sum"),
        ("query.unmask", "2 clients revealed shares, 4 are needed for a secure sum"),
    ],
)
def test_below_the_threshold_the_round_fails_and_the_model_stays(kind: str, says: str) -> None:
    config = secure("strategy.name=top")
    sampled = sorted(run(plain("strategy.name=top"), 1).masks(1))
    bench = workbench(config.to_flat())
    before = {name: tensor.copy() for name, tensor in bench.resident.base_state().items()}
    grid = Leaving(config, {kind: sampled[:3]})
    with pytest.raises(RoundFailed, match=f"round 1: {says}.*gone"):
        run(config, 1, grid)
    asked = [m.metadata.message_type for m in grid.asked.values()]
    assert ("query.unmask" in asked) == (kind == "query.unmask")
    after = bench.resident.base_state()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_a_late_update_is_dropped_and_its_common_pads_are_removed() -> None:
    """A round ends with the first four of six; the other two count as dropped out."""
    options = ["strategy.name=top", "federation.clients-per-round=4"]
    config = configured("secagg.enabled=true", *options, "federation.over-provision=0.5")
    found = run(config, 1)
    expected = run(configured(*options, "federation.over-provision=0.5"), 1)
    assert (found.rounds[0].replies, found.rounds[0].late) == (4, 2)
    assert_close(found, expected, 1e-6)


def test_a_client_that_never_agreed_on_pads_is_a_failure_and_not_late() -> None:
    options = ["federation.clients-per-round=4", "federation.over-provision=0.5"]
    config = configured("secagg.enabled=true", "strategy.name=top", *options)
    record = run(config, 1, Leaving(config, {"query.keys": [3]})).rounds[0]
    assert (record.replies, record.late, [f.partition for f in record.failures]) == (4, 1, [3])


# --------------------------------------------------------------------------- what the server sees
def test_replies_hold_one_padded_vector_and_no_number_of_examples() -> None:
    config = secure("strategy.name=top")
    grid = Recorded(config)
    found = run(config, 1, grid)
    layers = workbench(config.to_flat()).resident.layers
    size = sum(found.before[t].size for x in (layers.blocks[-1], layers.head) for t in x.tensors)
    assert len(grid.trained()) == 5
    for _, reply in grid.trained():
        arrays = reply.content.array_records["arrays"]
        assert set(arrays) == {PADDED}
        vector = arrays[PADDED].numpy()
        assert vector.shape == (size + 1,)
        # Uniform 32-bit integers: the mean is at the middle, up to six standard deviations.
        assert abs(vector.mean() / 2**32 - 0.5) < 6 / np.sqrt(12 * vector.size)
        assert "examples" not in reply.content.metric_records["metrics"]


def test_what_needs_single_norms_is_unknown() -> None:
    record = run(secure("strategy.name=top", "strategy.theory=true"), 1).rounds[0]
    assert record.e2 is None
    assert record.e1 is not None


def test_bytes_of_pads_keys_and_shares_are_counted() -> None:
    config = secure("strategy.name=top")
    grid = Recorded(config)
    found = run(config, 1, grid)
    size = next(iter(grid.trained()))[1].content.array_records["arrays"][PADDED].numpy().size
    total = found.rounds[0].ledger.total()
    kinds = [m.metadata.message_type for m, _ in grid.replies]
    up = [kind for kind in kinds if kind in QUERIES]
    assert len(up) == 5 + 5 + 4, "unmasking ends with the threshold"
    # Of each: the vector, three keys of 32, a box of 60 for each of five; of four: a share for each.
    assert total.up == 5 * (4 * size + 3 * 32 + 5 * 60) + 4 * 5 * 16


def test_clients_forget_their_secrets_once_they_have_unmasked() -> None:
    config = secure("strategy.name=top", "secagg.threshold=1")
    grid = Recorded(config)
    run(config, 1, grid)
    assert all(secure_client.STATE not in c.state for c in grid._contexts.values())


def test_secrets_go_from_process_to_process_in_flowers_context() -> None:
    """A SuperNode starts a process for each message, and gives it the node's context."""
    config = secure("strategy.name=top")

    class Processes(Recorded):
        def _work(self, message: Message) -> Message:
            node = message.metadata.dst_node_id
            stored = context_to_proto(self._contexts[node]).SerializeToString()
            self._contexts[node] = context_from_proto(ProtoContext.FromString(stored))
            return super()._work(message)

    found, expected = run(config, 2, Processes(config)), run(config, 2)
    assert all(np.array_equal(found.after[n], expected.after[n]) for n in expected.after)


def test_a_client_that_was_restarted_between_two_messages_is_left_out() -> None:
    config = secure("strategy.name=top")
    victim = min(run(plain("strategy.name=top"), 1).masks(1))

    class Forgetful(Recorded):
        def _work(self, message: Message) -> Message:
            node = message.metadata.dst_node_id
            if (message.metadata.message_type, node) == ("train", victim + 2):
                self._contexts[node].state.config_records.clear()
            return super()._work(message)

    found = run(config, 1, Forgetful(config))
    (failure,) = found.rounds[0].failures
    assert (failure.partition, failure.phase) == (victim, "train")
    assert "was it restarted" in failure.reason


def test_a_question_of_an_earlier_round_is_not_answered_with_this_rounds_secrets() -> None:
    config = secure("strategy.name=top")
    grid = Recorded(config)
    run(config, 1, grid)
    stale = next(m for m in grid.asked.values() if m.metadata.message_type == "query.unmask")
    again = next(m for m in grid.asked.values() if m.metadata.message_type == "query.keys")
    context = grid._contexts[stale.metadata.dst_node_id]
    again.content.config_records["secure"]["purpose"] = "run/2"
    client_app(again, context)
    with pytest.raises(ValueError, match="no keys for this secure sum"):
        client_app(stale, context)
    assert secure_client.STATE in context.state


# ------------------------------------------------------------------------------------- refusals
def test_clients_that_get_different_layers_are_named_before_anybody_trains() -> None:
    config = secure("strategy.name=top", "budget.layers=2")
    nodes = [{"budget": 1.0}, {"budget": 1.0}]
    grid = Recorded(config, nodes=nodes)
    with pytest.raises(RoundFailed) as caught:
        run(config, 1, grid)
    message = str(caught.value)
    assert re.search(r"clients [01, ]+: blocks\.3", message)
    assert "blocks.2, blocks.3" in message
    assert "secagg.enabled=false" in message
    assert not grid.trained()
    assert {m.metadata.message_type for m in grid.asked.values()} == {"query.describe"}


def test_ilp_with_little_consistency_is_refused_in_the_round() -> None:
    config = secure("strategy.name=ilp", "strategy.consistency=1e-9", "budget.layers=2")
    with pytest.raises(RoundFailed, match=r"raise strategy\.consistency"):
        run(config, 1)


def tampering(change: Callable[[Message, Message], None], kind: str, victim: int) -> ClientApp:
    """Return a ClientApp in which one client answers one kind of message wrongly."""
    app = build_client_app()

    class Tampered(ClientApp):
        def __call__(self, message: Message, context: Context) -> Message:
            asked, mine = message.metadata.message_type, context.node_config["partition-id"]
            reply = app(message, context)
            if asked == kind and mine == victim:
                change(message, reply)
            return reply

    return Tampered()


def shorter(message: Message, reply: Message) -> None:
    record = reply.content.config_records["secure"]
    name = next(iter(record))
    value = record[name]
    record[name] = value[:-1]  # type: ignore[index]


def in_the_clear(message: Message, reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["head.bias"] = encode(np.zeros(3, np.float32))


def of_another_type(message: Message, reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays[PADDED] = encode(arrays[PADDED].numpy().astype(np.int64))


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("query.keys", shorter, "'sealing' is not the 1 × 32 bytes"),
        ("query.shares", shorter, "'sealed' is not the 5 × 60 bytes"),
        ("train", in_the_clear, "not one padded vector"),
        ("train", of_another_type, "'masked' is an array of int64"),
    ],
)
def test_a_malformed_answer_is_refused_and_the_round_goes_on(
    kind: str, change: Callable[[Message, Message], None], says: str
) -> None:
    config = secure("strategy.name=top")
    victim = min(run(plain("strategy.name=top"), 1).masks(1))
    found = run(config, 1, Recorded(config, tampering(change, kind, victim)))
    (failure,) = found.rounds[0].failures
    assert says in failure.reason
    assert failure.partition == victim
    assert found.rounds[0].replies == 4


@pytest.mark.parametrize("more", [2**30, 1, 2**32 - 1], ids=["far more", "one more", "one fewer"])
def test_a_sum_that_states_other_examples_fails_the_round(more: int) -> None:
    """With fewer a client would multiply everybody's mean."""

    def change(message: Message, reply: Message) -> None:
        arrays = reply.content.array_records["arrays"]
        vector = arrays[PADDED].numpy()
        vector[-1:] += np.uint32(more)
        arrays[PADDED] = encode(vector)

    config = secure("strategy.name=top")
    victim = min(run(plain("strategy.name=top"), 1).masks(1))
    with pytest.raises(RoundFailed, match="broke the protocol: it states"):
        run(config, 1, Recorded(config, tampering(change, "train", victim)))


def test_an_update_is_not_sent_in_the_clear_where_the_run_is_secure() -> None:
    config = secure("strategy.name=top")

    class Careless(Recorded):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            held = list(messages)
            for message in held:
                if message.metadata.message_type == "train":
                    del message.content["secure"]
            return super().push_messages(held)

    grid = Careless(config)
    with pytest.raises(RoundFailed, match="in the clear"):
        run(config, 1, grid)
    assert all(reply.has_error() for _, reply in grid.trained())


def test_clipped_coordinates_are_said_in_the_clients_log(caplog: pytest.LogCaptureFixture) -> None:
    config = secure("strategy.name=top", "secagg.range=1e-4")
    run(config, 1)
    said = [r.getMessage() for r in caplog.records if "secagg.range = 0.0001" in r.getMessage()]
    assert len(said) == 5
    assert all(re.match(r"client \d: \d+ of \d+ coordinates", line) for line in said)
