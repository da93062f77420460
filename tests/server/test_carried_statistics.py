"""Whole rounds in which a client's earlier statistics enter its selection."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from layerfed.client.probe import probe_layers
from layerfed.client.training import train_update
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.config.seeding import Stream, generator
from layerfed.engine import run_on
from layerfed.exchange import Probe
from layerfed.models.layers import LayerMap
from layerfed.runs import read_lines
from layerfed.runs.records import RoundRecord, SelectionRecord
from layerfed.server.candidates import Candidates
from layerfed.server.memory import Memory
from layerfed.server_app import build_account, build_strategy
from layerfed.strategies import ILP, RoundSettings
from tests import made_up
from tests.conftest import BLOCKS, TinyNet
from tests.fakes import Recorded
from tests.strategies.test_compositions import Wire
from tests.tiny_task import Run, check_resumed, configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")

NORM = "grad_norm_sq"
HALF = "strategy.probe-share=0.5"
AFTER = "strategy.probe=after"
THREE = "federation.clients-per-round=3"


def config_of(message: Message) -> Mapping[str, Any]:
    return message.content.config_records["config"]


def given(reply: Message) -> list[float]:
    found: Any = reply.content.metric_records["statistics"][NORM]
    return list(found)


def probes(grid: Recorded) -> list[tuple[Message, Message]]:
    return [(m, r) for m, r in grid.replies if m.metadata.message_type == "query.probe"]


def selection_of(record: RoundRecord) -> SelectionRecord:
    assert record.selection is not None
    return record.selection


def rounds_of(selection: SelectionRecord) -> np.ndarray:
    assert selection.measured is not None
    return selection.measured


# --------------------------------------------------------------------------- a part of the blocks
def test_a_probe_measures_blocks_in_turn_and_the_selection_uses_each_clients_last_numbers() -> None:
    """Recomputed from the replies alone."""
    config = configured(HALF, THREE)
    grid = Recorded(config)
    found = run(config, 6, grid)
    last: dict[int, np.ndarray] = {}
    when: dict[int, np.ndarray] = {}
    turns: dict[int, list[list[int]]] = {}
    for message, reply in probes(grid):
        asked, client = config_of(message), int(config_of(message)["client"])
        blocks = np.array(asked.get("blocks", [1] * BLOCKS), dtype=bool)
        turns.setdefault(client, []).append(blocks.astype(int).tolist())
        assert len(given(reply)) == blocks.sum()
        for table, values in ((last, given(reply)), (when, asked["round"])):
            row = table.get(client, np.full(BLOCKS, np.nan)).copy()
            row[blocks] = values
            table[client] = row
        selection = selection_of(found.rounds[asked["round"] - 1])
        at = list(selection.clients).index(client)
        np.testing.assert_array_equal(selection.statistics[NORM][at], last[client])
        if selection.measured is not None:
            np.testing.assert_array_equal(selection.measured[at], when[client])
    assert not any(np.isnan(row).any() for row in last.values())
    order = [[1, 1, 1, 1], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0]]
    assert all(own == order[: len(own)] for own in turns.values())
    assert max(map(len, turns.values())) > 3, "or this test shows nothing"
    assert found.rounds[0].e1 is not None
    assert [record.e1 is None for record in found.rounds] == [
        selection_of(record).measured is not None for record in found.rounds
    ]


def test_a_round_of_half_probes_takes_less_arithmetic_and_fewer_bytes_up() -> None:
    everyone = ("federation.clients-per-round=6",)
    whole, half = (run(configured(*everyone, *more), 3) for more in ((), (HALF,)))
    flops = [[r.metrics["flops_probe"] for r in found.rounds] for found in (whole, half)]
    assert flops[1][0] == flops[0][0]
    assert flops[1][1] < flops[1][2] < flops[0][2], "the upper half needs the shorter backward"
    ups = [found.rounds[1].ledger.total().up for found in (whole, half)]
    masks = [found.masks(2) for found in (whole, half)]
    assert sum(map(len, masks[0].values())) == sum(map(len, masks[1].values()))
    assert ups[0] - ups[1] == 6 * 8 * BLOCKS // 2


def test_a_part_is_as_large_as_the_share_and_goes_round() -> None:
    memory = Memory()
    seen = []
    for number in range(1, 7):
        part = memory.part(3, 0.4, 5)
        seen.append(np.flatnonzero(part).tolist())
        probe = Probe((NORM,), tuple(part.tolist()))
        memory.note(3, number, probe, {NORM: np.full(part.sum(), float(number))})
    assert seen == [[0, 1, 2, 3, 4], [3, 4], [1, 2], [0], [3, 4], [1, 2]]
    assert memory.given(3, (NORM,))[NORM].tolist() == [4, 6, 6, 5, 5]
    assert memory.given(4, (NORM,)) == {}
    assert memory.part(3, 0.01, 5).sum() == 1
    assert memory.part(3, 0.99, 5).all()
    other = Memory()
    other.restore(memory.state())
    assert other.given(3, (NORM,))[NORM].tolist() == [4, 6, 6, 5, 5]


# ----------------------------------------------------------------------------- after the training
def test_a_client_that_trains_measures_for_its_next_selection_in_the_same_message() -> None:
    config = configured(AFTER, THREE)
    grid = Recorded(config)
    found = run(config, 5, grid)
    known: dict[int, tuple[int, list[float]]] = {}
    replies = {(config_of(m)["round"], config_of(m)["client"]): r for m, r in grid.trained()}
    first = {(config_of(m)["round"], config_of(m)["client"]): r for m, r in probes(grid)}
    for record in found.rounds:
        selection = selection_of(record)
        for row, client in enumerate(selection.clients):
            assert ((record.round, client) in first) == (client not in known)
            if client not in known:
                known[client] = record.round, given(first[record.round, client])
            number, values = known[client]
            assert selection.statistics[NORM][row].tolist() == values
            if selection.measured is not None:
                assert (selection.measured[row] == number).all()
        for client in selection.clients:
            known[client] = record.round, given(replies[record.round, client])
        asked = len(selection.clients)
        new = sum((record.round, client) in first for client in selection.clients)
        single = record.numbers.rows[selection.clients[0]]["flops_probe"]
        assert record.metrics["flops_probe"] > 0
        assert single > 0
        up = record.ledger.total().up
        sent = sum(
            array.numpy().nbytes
            for client in selection.clients
            for array in replies[record.round, client].content.array_records["arrays"].values()
        )
        assert up == sent + 8 * BLOCKS * (asked + new)
    assert len(first) == 6
    assert not any(record.failures for record in found.rounds)


def test_it_is_measured_at_the_model_that_the_clients_own_training_left() -> None:
    config = configured(AFTER, "federation.clients-per-round=6", "budget.layers=2")
    grid = Recorded(config)
    found = run(config, 1, grid)
    bench = workbench(config.to_flat())
    for message, reply in grid.trained():
        client = int(config_of(message)["client"])
        model = TinyNet()
        state = {name: tensor.copy() for name, tensor in found.before.items()}
        for name, change in reply.content.array_records["arrays"].items():
            state[name] = state[name] + change.numpy()
        model.load_state_dict({name: torch.from_numpy(x) for name, x in state.items()})
        examples, _ = bench.examples(client)
        rng = generator(config.run.seed, Stream.PROBE, 2, client)
        batch = next(iter(examples.shuffled(config.train.batch_size, torch.device("cpu"), rng)))
        layers = LayerMap.from_model(model)
        expected, _ = probe_layers(model, layers, [batch], bench.loss(client), [NORM])
        np.testing.assert_allclose(given(reply), expected[NORM], rtol=1e-4)


@pytest.mark.parametrize("clock", [(), ("federation.deadline=100",)], ids=str)
def test_what_is_measured_before_and_after_one_training_is_counted_twice(
    clock: tuple[str, ...],
) -> None:
    settings = ("federation.clients-per-round=6", "federation.speeds=1e6", *clock)
    before, after = (run(configured(*settings, *more), 2) for more in ((), (AFTER,)))
    for name in ("flops_probe", "simulated_seconds_probe"):
        plain = [record.metrics[name] for record in before.rounds]
        found = [record.metrics[name] for record in after.rounds]
        assert found == pytest.approx([2 * plain[0], plain[0]])
    for name in ("flops", "simulated_seconds"):  # in round 1 the masks are the same
        assert before.rounds[0].metrics[name] == after.rounds[0].metrics[name] > 0


def test_between_two_selections_nothing_is_measured_that_no_selection_uses() -> None:
    config = configured(AFTER, "strategy.period=3", "federation.clients-per-round=6")
    grid = Recorded(config)
    found = run(config, 6, grid)
    assert [n for n, kind in grid.kinds() if kind == "query.probe"] == [1]
    asked = {config_of(m)["round"] for m, _ in grid.trained() if "probe-batches" in config_of(m)}
    assert asked == {3, 6}
    assert (rounds_of(selection_of(found.rounds[3])) == 3).all()


def test_a_client_whose_answer_is_lost_is_probed_as_before() -> None:
    def lost(reply: Message) -> Message:
        del reply.content["statistics"]
        return reply

    grid = made_up.Federation(3, {(1, "train"): lost})
    found = made_up.run(grid, 2, probe="after")
    reasons = [(f.partition, f.reason) for record in found.rounds for f in record.failures]
    assert reasons == 2 * [(1, "it has no 'statistics' record")]
    # A probe in round 1 gave client 1 its numbers, and its later ones are lost.
    assert rounds_of(selection_of(found.rounds[1]))[:, 0].tolist() == [1, 1, 1]
    kinds = [(m.metadata.message_type, m.metadata.dst_node_id - 2) for m in grid.asked]
    assert [client for kind, client in kinds if kind == "query.probe"] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["query.probe", "train"])
@pytest.mark.parametrize("extra", [-1, 1])
def test_a_reply_must_hold_just_the_blocks_that_were_asked_for(kind: str, extra: int) -> None:
    def forge(reply: Message) -> Message:
        record = reply.content.metric_records["statistics"]
        row: Any = record[NORM]
        record[NORM] = [*row, 1.0] if extra > 0 else row[:-1]
        return reply

    settings = {"probe_share": 0.5, "probe": "after" if kind == "train" else "before"}
    found = made_up.run(made_up.Federation(3, {(1, kind): forge}), 2, **settings)
    due = made_up.LAYERS.num_blocks if kind == "query.probe" else made_up.LAYERS.num_blocks // 2
    reasons = {(f.partition, f.reason) for record in found.rounds for f in record.failures}
    assert (1, f"its statistic '{NORM}' is not a list of {due} numbers") in reasons
    assert {client for client, _ in reasons} == {1}
    assert all(1 not in record.updated for record in found.rounds)


def test_statistics_that_were_not_asked_for_are_refused() -> None:
    def forge(reply: Message) -> Message:
        reply.content["statistics"] = reply.content["metrics"]
        return reply

    found = made_up.run(made_up.Federation(3, {(1, "train"): forge}), 1)
    (failure,) = found.rounds[0].failures
    assert "'statistics' that does not belong there" in failure.reason


# ----------------------------------------------------------------------------- with everything else
@pytest.mark.parametrize("settings", [(HALF,), (AFTER,), (HALF, AFTER)], ids=str)
@pytest.mark.parametrize("more", [(), ("strategy.period=2",)], ids=str)
def test_a_resumed_run_is_the_same(settings: tuple[str, ...], more: tuple[str, ...]) -> None:
    check_resumed(configured(*settings, *more, THREE))


@pytest.mark.parametrize(
    "more",
    [
        ("strategy.name=rgn",),
        ("strategy.name=f3ocus",),
        ("strategy.consistency=auto", "federation.over-provision=0.5"),
        ("strategy.statistic=grad_signal_sq", "exchange.codec=int8"),
        ("model.personal=blocks.3, head", "task.local-test=0.2", "model.batch-norm=frozen"),
        ("federation.speeds=1e4, 1e6", "federation.deadline=1", "budget.layers=3"),
        ("secagg.enabled=true", "strategy.consistency=50"),
        ("privacy.mode=central", "privacy.noise=1", "privacy.delta=0.01"),
        ("strategy.name=top",),
        ("strategy.name=random", "strategy.resample-steps=1"),
    ],
    ids=str,
)
def test_it_goes_with_everything_else_also_over_the_wire(more: tuple[str, ...]) -> None:
    config = configured(HALF, AFTER, *more)
    found: list[Run] = []
    for grid in (Recorded(config), Wire(config)):
        if "privacy.mode=central" in more and found:
            break  # its noise is never the same
        found.append(run(config, 3, grid))
        assert not any(record.failures for record in found[-1].rounds)
        assert all(record.replies for record in found[-1].rounds)
    for one in found[1:]:
        assert all(np.array_equal(one.after[name], found[0].after[name]) for name in one.after)


def test_without_the_settings_nothing_is_kept_or_recorded() -> None:
    config = configured(THREE)
    bench = workbench(config.to_flat())
    strategy = ILP(bench.resident.layers, settings=RoundSettings(clients_per_round=3, clients=6))
    assert not strategy.settings.carries
    found = run(config, 2)
    assert all(selection_of(record).measured is None for record in found.rounds)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([HALF, "strategy.theory=true"], r"probe-share = 0\.5 .*theory.*E1"),
        ([AFTER, "strategy.theory=true"], r"probe = 'after' .*theory"),
        ([HALF, "train.skip=substack"], r"train\.skip = 'substack'"),
        ([AFTER, "train.skip=random"], r"train\.skip = 'random'"),
        (
            [
                *(AFTER, "privacy.mode=central", "privacy.delta=0.001"),
                *("privacy.statistics-clip=1", "privacy.statistics-noise=1"),
            ],
            r"statistics-noise = 1: ε",
        ),
        (["strategy.probe-share=0"], r"strategy\.probe-share"),
        (["strategy.probe-share=1.5"], r"strategy\.probe-share"),
        (["strategy.probe=never"], r"'before' or 'after'"),
    ],
)
def test_settings_that_cannot_be_are_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(*overrides)


def test_statistics_of_all_layers_together_are_refused() -> None:
    config = configured(HALF, "strategy.statistic=newton_decrease")
    with pytest.raises(ConfigError, match=r"probe-share = 0\.5 .*newton_decrease"):
        run(config)


def test_a_node_that_clips_its_statistics_refuses_a_part() -> None:
    config = configured(HALF, "federation.clients-per-round=6", "federation.min-replies=5")
    private = {"privacy-statistics-clip": 1.0, "privacy-statistics-noise": 0.1}
    grid = Recorded(config, nodes=[{}, private, {}, {}, {}, {}])
    first, second = run(config, 2, grid).rounds
    assert first.failures == []
    (failure,) = second.failures
    assert failure.partition == 1
    assert "clips its statistics as a whole" in failure.reason


def test_a_node_that_clips_its_statistics_refuses_a_part_before_it_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[object] = []

    def watched(*args: Any, **options: Any) -> Any:
        started.append(args)
        return train_update(*args, **options)

    monkeypatch.setattr("layerfed.client_app.train_update", watched)
    config = configured(HALF, AFTER, "federation.clients-per-round=6", "federation.min-replies=5")
    private = {"privacy-statistics-clip": 1.0, "privacy-statistics-noise": 0.1}
    (record,) = run(config, 1, Recorded(config, nodes=[{}, private, {}, {}, {}, {}])).rounds
    (failure,) = record.failures
    assert (failure.partition, failure.phase) == (1, "train")
    assert "clips its statistics as a whole" in failure.reason
    assert len(started) == 5


def test_norms_of_weights_are_public_at_the_global_model_and_no_longer_after_training() -> None:
    config = configured(AFTER, "strategy.name=rgn", "model.batch-norm=frozen")
    node = {"privacy-statistics-clip": 0.1, "privacy-statistics-noise": 1e-9}
    grid = Recorded(config, nodes=[node] * 6)
    found = run(config, 1, grid)
    norms = [
        sum(float((found.before[name].astype(float) ** 2).sum()) for name in block.parameters)
        for block in workbench(config.to_flat()).resident.layers.blocks
    ]
    assert min(norms) > 0.1

    def norms_in(reply: Message) -> np.ndarray:
        return np.array(reply.content.metric_records["statistics"]["param_norm_sq"])

    for _, reply in probes(grid):
        np.testing.assert_allclose(norms_in(reply), norms, rtol=1e-5)
    assert len(grid.trained()) == 4
    for _, reply in grid.trained():
        assert np.linalg.norm(norms_in(reply)) <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("settings", "covers"),
    [
        (["strategy.probe=before"], "updates and selection"),
        (["strategy.probe=after"], "updates"),
        # Norms of gradients are what λ is found by.
        (["strategy.consistency=auto"], "updates"),
        # Of a personal block nothing is public, and clients add noise to its norm as well.
        (["model.personal=blocks.0"], "updates"),
    ],
)
def test_what_epsilon_covers_depends_on_whose_norms_of_weights_are_measured(
    settings: list[str], covers: str
) -> None:
    config = configured(
        *("strategy.statistic=param_norm_sq", "strategy.consistency=0.1"),
        *("privacy.mode=local", *settings),
        *("privacy.noise=1", "model.batch-norm=frozen"),
    )
    strategy = build_strategy(config, workbench(config.to_flat()).resident.layers)
    account = build_account(config, strategy)
    assert account is not None
    assert account.covers == covers


@pytest.mark.parametrize("settings", [(HALF,), (AFTER,)], ids=str)
def test_masks_can_be_found_again_from_the_run_folder(
    settings: tuple[str, ...], tmp_path: Path
) -> None:
    config: RunConfig = load_config(
        None,
        [
            *("task.name=tests.tiny_task:TinyTask", "federation.clients=6", "train.lr=0.1", THREE),
            *("federation.rounds=4", "train.local-steps=2", "train.batch-size=8"),
            *(f"run.dir={tmp_path}", "run.name=one", *settings),
        ],
    )
    folder = run_on("inprocess", config)
    lines = list(read_lines(folder / "selection.jsonl"))
    layers = workbench(config.to_flat()).resident.layers
    for line in lines:
        statistics = {name: np.array(table) for name, table in line["statistics"].items()}
        case = Candidates(
            line["round"], line["clients"], np.array(line["budgets"]), np.array(line["costs"]),
            statistics, config.run.seed,
        )  # fmt: skip
        assert ILP(layers).select(case).masks.astype(int).tolist() == line["masks"]
    assert "measured" not in lines[0]
    rounds = [np.array(line["measured"]) for line in lines[1:] if "measured" in line]
    assert rounds
    assert all(table.shape == (3, BLOCKS) and (table >= 1).all() for table in rounds)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "completed"
