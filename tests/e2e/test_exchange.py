"""Layers in whole runs: each is sent once, missing ones again, and the model is always the same."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

from layerfed.client.workbench import workbench
from layerfed.client_app import build_client_app, client_app
from layerfed.config import RunConfig, load_config
from layerfed.engine import InProcessGrid, run_on
from layerfed.exchange import instruction, open_store, record_of
from layerfed.exchange.arrays import carried_bytes
from layerfed.exchange.messages import missing_reply
from layerfed.runs import read_lines
from layerfed.runs.ledger import Ledger
from layerfed.runs.records import Observer, RoundRecord
from layerfed.server.transport import exchange
from layerfed.server_app import build_strategy
from tests.fakes import PlayedGrid

QUICK = [
    *("federation.clients=4", "federation.clients-per-round=4"),
    *("train.local-steps=2", "train.batch-size=8"),
]


def configured(*overrides: str) -> RunConfig:
    return load_config(None, [*QUICK, *overrides])


class Devices(InProcessGrid):
    """Clients that are devices of their own: a layer store each, and a new process for each message."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        super().__init__(client_app, config.federation.clients, config.to_flat())
        self.config = config
        self.folders = {node: folder / f"store-{node}" for node in self._contexts}
        for node, context in self._contexts.items():
            context.node_config["store"] = str(self.folders[node])
        self.base = workbench(config.to_flat()).resident._build().state_dict()
        self.asked: list[Message] = []
        self.before: Callable[[Message], None] = lambda message: None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        held = list(messages)
        self.asked += held
        return super().push_messages(held)

    def _work(self, message: Message) -> Message:
        self.before(message)
        resident = workbench(self.config.to_flat()).resident
        for name in resident.layers.names:
            resident._digests[name] = None  # whatever the process before left in memory
        for layer in resident.layers.layers:
            resident._load(layer.name, {t: self.base[t] for t in layer.tensors})
            resident._digests[layer.name] = resident._base[layer.name]
        return super()._work(message)

    def sent(self, kind: str) -> list[int]:
        """Bytes of layers in each message of a kind."""
        return [
            carried_bytes(m.content.array_records["arrays"].values())
            for m in self.asked
            if m.metadata.message_type == kind
        ]


class Ledgers(Observer):
    def __init__(self) -> None:
        self.rounds: list[Ledger] = []
        self.records: list[RoundRecord] = []

    def on_round(self, record: RoundRecord) -> None:
        self.rounds.append(record.ledger)
        self.records.append(record)


def start(grid: Grid, config: RunConfig, rounds: int = 3) -> tuple[dict[str, np.ndarray], Ledgers]:
    bench, ledgers = workbench(config.to_flat()), Ledgers()
    strategy = build_strategy(config, bench.resident.layers, open_store("memory"))
    strategy.observers = (ledgers,)
    strategy.start(
        grid,
        record_of(bench.resident.base_state()),
        rounds,
        timeout=60,
        train_config=ConfigRecord({"lr": config.train.lr}),
    )
    return strategy.model.tensors, ledgers


@cache
def together(config: RunConfig, rounds: int = 3) -> tuple[dict[str, np.ndarray], Ledgers]:
    """Run with all clients in one process, once for all tests that compare with it."""
    grid = InProcessGrid(client_app, config.federation.clients, config.to_flat())
    return start(grid, config, rounds)


Apart = Callable[[RunConfig], tuple[Devices, dict[str, np.ndarray], Ledgers]]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """Run on devices of their own to which nothing happens, once for all tests that compare with it."""

    @cache
    def run(config: RunConfig) -> tuple[Devices, dict[str, np.ndarray], Ledgers]:
        grid = Devices(config, tmp_path_factory.mktemp("apart"))
        return grid, *start(grid, config)

    return run


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------ a layer travels once
def test_a_layer_is_sent_once_to_each_device(apart: Apart) -> None:
    config = configured("strategy.name=ilp")
    grid, model, ledgers = apart(config)
    assert same(model, together(config)[0])
    layers = workbench(config.to_flat()).resident.layers
    probes, trains = grid.sent("query.probe"), grid.sent("train")
    assert probes[:4] == [0] * 4, "the base never travels"
    assert all(size > 0 for size in probes[4:])
    assert trains == [0] * 12, "what came with the probe is still there"
    once = layers.head.bytes + layers.blocks[0].bytes
    assert max(probes) <= 2 * once
    for number, ledger in enumerate(ledgers.rounds):
        total = ledger.total()
        assert total.moved_down == total.down == sum(probes[4 * number : 4 * number + 4])


def test_on_one_machine_nothing_is_sent_and_the_ledger_still_counts(apart: Apart) -> None:
    config = configured("strategy.name=ilp")
    pairs = zip(apart(config)[2].rounds, together(config)[1].rounds, strict=True)
    for own, common in pairs:
        assert common.total().moved_down == 0
        assert common.total().moved_up == 4 * 12 * 8, "the statistics"
        assert common.total().down == own.total().down
        assert common.total().up == own.total().up


def test_a_client_that_was_away_gets_every_layer_it_missed_and_no_other(tmp_path: Path) -> None:
    config = configured(
        "federation.clients=6", "federation.clients-per-round=2", "strategy.name=random"
    )
    grid = Devices(config, tmp_path)
    model, _ = start(grid, config, rounds=5)
    assert same(model, together(config, rounds=5)[0])
    held: dict[int, set[str]] = {node: set() for node in grid.folders}
    for message in grid.asked:
        if "manifest" not in message.content.config_records:
            continue
        node = message.metadata.dst_node_id
        came = set(message.content.array_records["arrays"])
        digests = message.content.config_records["manifest"]
        layers = workbench(config.to_flat()).resident.layers
        base = workbench(config.to_flat()).resident._base
        due = {
            name
            for name in layers.names
            if digests[name] not in held[node] and digests[name] != base[name]
        }
        assert came == {tensor for name in due for tensor in layers[name].tensors}
        held[node] |= {str(digests[name]) for name in due}


# ------------------------------------------------------------------------------ layers that go missing
@pytest.mark.parametrize("phase", ["query.probe", "train", "evaluate"])
def test_a_store_wiped_in_mid_run_changes_nothing_but_bytes(
    apart: Apart, tmp_path: Path, phase: str
) -> None:
    config = configured("strategy.name=ilp", "task.local-test=0.2")
    undisturbed = apart(config)[2]
    grid = Devices(config, tmp_path)
    wiped: list[int] = []

    def wipe(message: Message) -> None:
        settings = message.content.config_records["config"]
        if message.metadata.message_type == phase and settings["round"] == 2 and not wiped:
            node = message.metadata.dst_node_id
            wiped.append(node)
            for file in grid.folders[node].glob("*.safetensors"):
                file.unlink()

    grid.before = wipe
    model, ledgers = start(grid, config)
    assert wiped
    assert same(model, together(config)[0])
    assert [len(r.failures) for r in ledgers.records] == [0, 0, 0]
    extra = ledgers.rounds[1].total().down - undisturbed.rounds[1].total().down
    # A probe or evaluation brings new layers with it: there the others alone were lost.
    assert extra > 0 or phase != "train"
    assert ledgers.rounds[1].total().up == undisturbed.rounds[1].total().up


def test_damaged_layers_are_fetched_again(tmp_path: Path) -> None:
    config = configured("strategy.name=ilp")
    grid = Devices(config, tmp_path)

    def damage(message: Message) -> None:
        settings = message.content.config_records["config"]
        if message.metadata.message_type == "train" and settings["round"] == 3:
            for file in grid.folders[message.metadata.dst_node_id].glob("*.safetensors"):
                data = bytearray(file.read_bytes())
                data[-1] ^= 0xFF
                file.write_bytes(bytes(data))

    grid.before = damage
    model, ledgers = start(grid, config)
    assert same(model, together(config)[0])
    assert [len(r.failures) for r in ledgers.records] == [0, 0, 0]


def test_a_client_that_misses_layers_for_ever_is_left_out(tmp_path: Path) -> None:
    config = configured("strategy.name=top")
    grid = Devices(config, tmp_path)
    asked: list[Message] = []

    def hopeless(message: Message, context: Context, call_next: Callable) -> Message:
        asked.append(message)
        training = message.metadata.message_type == "train"
        if training and context.node_config["partition-id"] == 1:
            return missing_reply(message, ["head"])
        return call_next(message, context)

    grid._app = build_client_app([hopeless])
    _, ledgers = start(grid, config, rounds=1)
    (failure,) = ledgers.records[0].failures
    assert failure.partition == 1
    assert "lacks layers that were sent" in failure.reason
    mine = [m for m in asked if m.metadata.message_type == "train"]
    assert len(mine) == 5, "asked once more, and once only"


def test_a_folder_that_vanishes_is_made_up_for(tmp_path: Path) -> None:
    config = configured("strategy.name=top")
    grid = Devices(config, tmp_path)

    def vanish(message: Message) -> None:
        if message.content.config_records["config"]["round"] == 2:
            shutil.rmtree(grid.folders[message.metadata.dst_node_id], ignore_errors=True)

    grid.before = vanish
    model, ledgers = start(grid, config)
    assert same(model, together(config)[0])
    assert not any(r.failures for r in ledgers.records)


# ------------------------------------------------------------------------------------------- codecs
@pytest.mark.parametrize(("codec", "share"), [("float16", 0.5), ("bfloat16", 0.5), ("int8", 0.27)])
def test_a_codec_shrinks_the_uplink_and_keeps_the_model_close(codec: str, share: float) -> None:
    exact = configured("strategy.name=top")
    coded = configured("strategy.name=top", f"exchange.codec={codec}")
    (model, ledgers), (other, smaller) = together(exact), together(coded)
    ratio = smaller.rounds[0].total().up / ledgers.rounds[0].total().up
    assert ratio == pytest.approx(share, abs=0.02)
    base = workbench(exact.to_flat()).resident.base_state()
    moved = np.sqrt(sum(float(np.square(model[n] - base[n]).sum()) for n in base))
    off = np.sqrt(sum(float(np.square(model[n] - other[n]).sum()) for n in base))
    assert 0 < off < 0.05 * moved


@pytest.mark.parametrize(("codec", "share"), [("bfloat16", 0.5), ("int8", 0.27)])
def test_a_downlink_codec_shrinks_what_goes_down_and_keeps_the_clients_equal(
    apart: Apart, codec: str, share: float
) -> None:
    away = ("federation.clients=6", "federation.clients-per-round=2", "strategy.name=random")
    exact, coded = (configured(*away, f"exchange.downlink-codec={c}") for c in ("float32", codec))
    (model, ledgers), (other, smaller) = together(exact), together(coded)
    ratio = smaller.rounds[2].total().down / ledgers.rounds[2].total().down
    assert ratio == pytest.approx(share, abs=0.02)
    base = workbench(exact.to_flat()).resident.base_state()
    moved = np.sqrt(sum(float(np.square(model[n] - base[n]).sum()) for n in base))
    off = np.sqrt(sum(float(np.square(model[n] - other[n]).sum()) for n in base))
    assert 0 < off < 0.05 * moved
    # Devices decode what the ledger counts, and end with the model of those that share one store.
    grid, apart_model, ledger = apart(coded)
    assert same(apart_model, other)
    assert sum(row.total().down for row in ledger.rounds) == sum(grid.sent("train"))


def test_error_feedback_of_one_run_does_not_leak_into_the_next(tmp_path: Path) -> None:
    config = configured("strategy.name=top", "exchange.codec=int8")
    runs = [
        start(InProcessGrid(client_app, 4, config.to_flat()), config, rounds=2)[0] for _ in range(2)
    ]
    assert same(*runs)


# ------------------------------------------------------------------------------- over-provisioning
def test_the_first_to_answer_count_and_the_rest_are_dropped(tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            *("federation.clients=8", "federation.clients-per-round=4", "federation.rounds=2"),
            *(
                "federation.over-provision=0.5",
                "train.local-steps=1",
                "train.batch-size=8",
                f"run.dir={tmp_path}",
            ),
        ],
    )
    folder = run_on("inprocess", config)
    for metrics, chosen in zip(
        read_lines(folder / "metrics.jsonl"), read_lines(folder / "selection.jsonl"), strict=True
    ):
        # 6 are probed; the first 5 to answer are asked to train, and the first 4 of them count.
        assert (len(chosen["clients"]), metrics["clients"], metrics["late"]) == (5, 4, 1)
        assert metrics["failures"] == 0
    asked = [len(row["clients"]) for row in read_lines(folder / "ledger.jsonl")]
    assert asked == [6, 6]


class Slow(PlayedGrid):
    """A grid on which some nodes answer only from a given pull on."""

    def __init__(self, ready: dict[int, int]) -> None:
        super().__init__(ready)
        self.ready, self.pulls = ready, 0
        self.pulled: list[Message] = []

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        self.pulls += 1
        return super().pull_messages(message_ids)

    def answer(self, message: Message) -> Message | None:
        if self.pulls < self.ready[message.metadata.dst_node_id]:
            return None
        self.pulled.append(message)
        return Message(RecordDict(), reply_to=message)


def questions(*nodes: int) -> list[Message]:
    return [instruction("train", node, server_round=1, timeout=60.0) for node in nodes]


def test_replies_nobody_waits_for_are_fetched_and_dropped_with_the_next_exchange() -> None:
    grid, late = Slow({1: 1, 2: 1, 3: 3}), {}
    first = exchange(grid, questions(1, 2, 3), timeout=30, late=late)
    assert [next(first).metadata.src_node_id for _ in range(2)] == [1, 2]
    first.close()
    assert len(late) == 1
    again = exchange(grid, questions(1, 3), timeout=30, late=late)
    nodes = [reply.metadata.src_node_id for reply in again]
    assert sorted(nodes) == [1, 3], "the late reply of node 3 was not taken for its new one"
    assert late == {}
    assert len(grid.pulled) == 5


def test_what_times_out_is_late_too() -> None:
    grid, late = Slow({1: 1, 2: 10**9}), {}
    replies = exchange(grid, questions(1, 2), timeout=0.05, late=late)
    found = {reply.metadata.src_node_id: reply for reply in replies}
    assert not found[1].has_error()
    assert found[2].error.reason == "no reply in time"
    assert len(late) == 1
