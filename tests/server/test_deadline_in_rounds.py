"""Rounds with a deadline: slow clients send fewer layers, and each layer is the mean of what came."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from flwr.app import Message

from layerfed.client.workbench import workbench
from layerfed.client_app import build_client_app
from layerfed.config import ConfigError
from layerfed.exchange import record_of
from layerfed.runs.records import RoundFailed
from tests.fakes import Recorded
from tests.tiny_task import Run, check_resumed, configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")

# More FLOPs than a client's two steps of the tiny model on all blocks take.
WORK = 17_000.0
FULL = ("strategy.name=full", "federation.clients=4", "federation.clients-per-round=4")
# Clients 1 and 3 have a third of the speed, which is less than one step.
SLOW = (*FULL, f"federation.speeds={WORK}, {WORK / 3}")


def sent(reply: Message) -> dict[str, np.ndarray]:
    return {n: a.numpy() for n, a in reply.content.array_records["arrays"].items()}


def layers_of(found: Run, client: int) -> int:
    return len(found.rounds[0].updated[client])


def test_each_layer_is_the_mean_over_the_clients_that_had_finished_it() -> None:
    config = configured(*SLOW, "federation.deadline=1.0")
    grid = Recorded(config)
    found = run(config, grid=grid)
    (record,) = found.rounds
    layers = workbench(config.to_flat()).resident.layers
    assert [layers_of(found, client) for client in (0, 2)] == [5, 5]
    assert all(0 < layers_of(found, client) < 5 for client in (1, 3))
    assert record.late == len(record.failures) == 0
    total: dict[str, np.ndarray] = {}
    weight: dict[str, float] = {}
    for _, reply in grid.trained():
        examples = float(reply.content.metric_records["metrics"]["examples"])  # type: ignore[arg-type]
        for name, values in sent(reply).items():
            total[name] = total.get(name, 0.0) + examples * values.astype(np.float64)
            weight[name] = weight.get(name, 0.0) + examples
    for name, before in found.before.items():
        if before.dtype != np.float32:
            continue  # BatchNorm's counter, which is rounded
        mean = total[name] / weight[name] if name in total else 0.0
        np.testing.assert_allclose(found.after[name], before + mean, rtol=1e-6, atol=1e-7)
    # From the output down, without gaps.
    for client in (1, 3):
        names = [*(block.name for block in layers.blocks), "head"]
        assert record.updated[client] == tuple(names[-layers_of(found, client) :])
    seconds = [record.numbers.rows[client]["simulated_seconds"] for client in range(4)]
    assert record.metrics["simulated_seconds"] == max(seconds)
    assert all(1.0 <= seconds[client] < 1.5 for client in (1, 3))
    assert [record.numbers.rows[client]["steps"] for client in range(4)] == [2, 1, 2, 1]


def test_without_a_deadline_the_round_lasts_as_long_as_its_slowest_client() -> None:
    (record,) = run(configured(*SLOW)).rounds
    seconds = [record.numbers.rows[client]["simulated_seconds"] for client in range(4)]
    assert seconds[3] == pytest.approx(3 * seconds[2]), "both make two steps on whole batches"
    assert record.metrics["simulated_seconds"] == max(seconds)


def test_a_client_that_sends_nothing_is_late_and_its_work_is_counted() -> None:
    kept = run(configured(*SLOW, "federation.deadline=1.0"))
    dropped = run(configured(*SLOW, "federation.deadline=1.0", "federation.late=drop"))
    (before,), (record,) = kept.rounds, dropped.rounds
    assert (record.late, record.replies, record.failures) == (2, 2, [])
    assert set(record.updated) == {0, 2}
    assert record.metrics["flops"] == before.metrics["flops"]
    assert record.ledger[1].up == 0 < record.ledger[0].up
    with pytest.raises(RoundFailed, match=r"0 usable replies in train.*4 clients were late"):
        run(configured(*FULL, "federation.speeds=1", "federation.deadline=1.0"))


@pytest.mark.parametrize(
    "slow",
    [(f"federation.speeds={WORK}, {WORK / 1e9}",), (*SLOW[-1:], "federation.late=drop")],
    ids=["nothing is finished", "nothing is sent"],
)
def test_a_late_client_is_one_of_the_cohort(slow: tuple[str, ...]) -> None:
    """It counts as no change of any layer, so two of four clients move the model."""
    config = configured(*FULL, *slow, "federation.deadline=1.0", "server.average-over=cohort")
    grid = Recorded(config)
    found = run(config, grid=grid)
    assert (found.rounds[0].replies, found.rounds[0].late) == (2, 2)
    sums: dict[str, np.ndarray] = {}
    for asked, reply in grid.trained():
        client = int(asked.content.config_records["config"]["client"])  # type: ignore[arg-type]
        if client in (0, 2):
            for name, change in sent(reply).items():
                sums[name] = sums.get(name, 0.0) + (10 + 4 * client) * change.astype(float)
    for name in [name for name in sums if found.before[name].dtype == np.float32]:
        step = sums[name] / (10 + 14 + 18 + 22)
        np.testing.assert_allclose(
            found.after[name], found.before[name] + step, rtol=1e-6, atol=1e-7
        )


def test_it_goes_with_uploads_schedules_codecs_and_resuming() -> None:
    slow = f"federation.speeds={WORK}, {WORK / 3}"
    for more in (
        ("strategy.name=fedtlu", "strategy.side=client"),
        ("strategy.name=random", "strategy.resample-steps=1", "budget.layers=2"),
        ("strategy.name=full", "exchange.codec=int8", "exchange.downlink-codec=int8"),
        ("strategy.name=fedbcgd",),
        ("strategy.name=full", "train.optimizer=adamw", "train.micro-batch=0"),
    ):
        found = run(configured(*more, slow, "federation.deadline=0.8"), rounds=2)
        assert not any(record.failures for record in found.rounds), more
    check_resumed(configured(*SLOW, "federation.deadline=1.0"))


def forged(change: Callable[[dict[str, np.ndarray]], object]) -> list[str]:
    """Reasons for refusing client 0, which changes the tensors that it sends."""
    config = configured(*FULL, "federation.deadline=100", "strategy.name=top", "budget.layers=2")

    def forge(message: Message, context: object, call_next: Callable[..., Message]) -> Message:
        reply = call_next(message, context)
        if "arrays" in reply.content.array_records and context.node_config["partition-id"] == 0:  # type: ignore[attr-defined]
            tensors = sent(reply)
            change(tensors)
            reply.content["arrays"] = record_of(tensors)
        return reply

    found = run(config, grid=Recorded(config, build_client_app([forge])))
    return [failure.reason for failure in found.rounds[0].failures]


def without(prefix: str) -> Callable[[dict[str, np.ndarray]], object]:
    def change(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith(prefix)]:
            del tensors[name]

    return change


def test_a_reply_holds_whole_layers_of_its_mask_and_the_head() -> None:
    assert forged(lambda tensors: None) == []
    assert forged(without("blocks.2.")) == []
    (reason,) = forged(without("head."))
    assert "lacks tensors" in reason
    (reason,) = forged(lambda tensors: [without(name)(tensors) for name in ("head.", "norm.")])
    assert "the head are due" in reason
    (reason,) = forged(without("blocks.3.linear.bias"))
    assert "lacks tensors it was asked to train: blocks.3.linear.bias" in reason
    (reason,) = forged(
        lambda tensors: tensors.update({"blocks.0.linear.bias": np.zeros(6, np.float32)})
    )
    assert "it was not asked to train" in reason


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["secagg.enabled=true", "strategy.name=top", "federation.deadline=5"],
            "federation.deadline",
        ),
        (["federation.late=drop"], "no use without a deadline"),
        (["federation.speeds=1e9, fast"], "numbers above 0"),
        (["federation.speeds=0"], "numbers above 0"),
        (["federation.speeds=1e9,"], "numbers above 0"),
        (["federation.deadline=-1"], "federation.deadline"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(*overrides)
