"""Whole runs with the real ServerApp, strategy and ClientApp, and checks of their messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load_file

from layerfed.client.workbench import workbench
from layerfed.client_app import build_client_app, client_app
from layerfed.config import ConfigError, RunConfig, load_config
from layerfed.engine import InProcessGrid, run_on
from layerfed.exchange import encode
from layerfed.runs import read_lines
from layerfed.runs.records import RoundFailed
from layerfed.server_app import build_strategy, run
from tests.fakes import Recorded
from tests.made_up import final_tensors

QUICK = [
    *("federation.rounds=3", "strategy.probe-batches=1", "federation.clients-per-round=6"),
    "train.batch-size=8",
]


def configured(directory: Path, *overrides: str) -> RunConfig:
    return load_config(None, [*QUICK, f"run.dir={directory}", *overrides]).simulated()


def start(grid: InProcessGrid, config: RunConfig, rounds: int = 1) -> dict[str, np.ndarray]:
    """Run a strategy on a grid; return the final tensors."""
    bench = workbench(config.to_flat())
    strategy = build_strategy(config, bench.resident.layers)
    base = ArrayRecord({n: encode(t) for n, t in bench.resident.base_state().items()})
    strategy.start(
        grid, base, rounds, timeout=60, train_config=ConfigRecord({"lr": config.train.lr})
    )
    return strategy.model.tensors


def base_state(config: RunConfig) -> dict[str, np.ndarray]:
    return workbench(config.to_flat()).resident.base_state()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path]:
    config = configured(tmp_path_factory.mktemp("runs"), "run.name=first", "federation.rounds=4")
    return config, run_on("inprocess", config)


def test_accuracy_rises_well_above_the_start(finished: tuple[RunConfig, Path]) -> None:
    summary = json.loads((finished[1] / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert summary["initial_accuracy"] < 0.3
    assert summary["accuracy"] > summary["initial_accuracy"] + 0.3


def test_layers_nobody_selected_are_bit_identical(finished: tuple[RunConfig, Path]) -> None:
    config, folder = finished
    before, after = base_state(config), final_tensors(folder)
    masks = [np.array(row["masks"]) for row in read_lines(folder / "selection.jsonl")]
    selected = np.concatenate(masks).any(axis=0)
    layers = workbench(config.to_flat()).resident.layers
    assert selected.any()
    assert not selected.all()
    for block, chosen in zip(layers.blocks, selected, strict=True):
        same = all(np.array_equal(before[t], after[t]) for t in block.tensors)
        assert same != chosen, block.name
    assert all(np.array_equal(before[t], after[t]) for t in layers.embeddings.tensors)
    assert not np.array_equal(before["head.weight"], after["head.weight"])


def test_the_aggregated_layer_is_formula_7_on_the_captured_replies(tmp_path: Path) -> None:
    config = configured(tmp_path, "strategy.name=random", "budget.kind=half-normal")
    grid = Recorded(config)
    after = start(grid, config)
    layers, before = workbench(config.to_flat()).resident.layers, base_state(config)

    total: dict[str, float] = {}
    step: dict[str, np.ndarray] = {}
    for question, reply in grid.trained():
        mask = question.content.config_records["config"]["mask"]
        chosen = [b.name for b, on in zip(layers.blocks, mask, strict=True) if on] + ["head"]
        d = int(reply.content.metric_records["metrics"]["examples"])
        update = reply.content.array_records["arrays"]
        assert set(update) == {t for name in chosen for t in layers[name].tensors}
        for name in update:
            total[name] = total.get(name, 0.0) + d
            step[name] = step.get(name, 0.0) + d * update[name].numpy().astype(np.float64)

    assert len(grid.trained()) == config.federation.clients_per_round
    for name, value in before.items():
        if name in step:
            expected = (value.astype(np.float64) + step[name] / total[name]).astype(np.float32)
            np.testing.assert_allclose(after[name], expected, rtol=1e-6, atol=1e-9)
        else:
            np.testing.assert_array_equal(after[name], value)


def test_a_second_run_repeats_the_first_to_the_bit(
    finished: tuple[RunConfig, Path], tmp_path: Path
) -> None:
    config, first = finished
    again = RunConfig.from_flat(config.to_flat() | {"run.dir": str(tmp_path)})
    np.random.seed(5)  # global generators must not matter
    second = run_on("inprocess", again)
    a, b = (read_lines(folder / "selection.jsonl") for folder in (first, second))
    for row in (*a, *b):
        row.pop("seconds")
    assert a == b
    one, two = (load_file(folder / "final.safetensors") for folder in (first, second))
    assert all(np.array_equal(one[name], two[name]) for name in one)


def test_another_seed_gives_another_sampling(tmp_path: Path) -> None:
    rows = []
    for seed in (0, 1):
        config = configured(
            *(tmp_path, f"run.seed={seed}", f"run.name=s{seed}", "strategy.name=top"),
            *("federation.rounds=2", "train.local-steps=1"),
        )
        rows.append(
            [r["clients"] for r in read_lines(run_on("inprocess", config) / "selection.jsonl")]
        )
    assert rows[0] != rows[1]
    assert all(clients == sorted(set(clients)) for run in rows for clients in run)


def test_the_first_message_carries_no_layer_and_later_ones_only_changed_layers(
    tmp_path: Path,
) -> None:
    config = configured(tmp_path, "strategy.name=top")
    grid = Recorded(config)
    start(grid, config, rounds=2)
    layers = workbench(config.to_flat()).resident.layers
    by_round: dict[int, set[str]] = {}
    for question, _ in grid.trained():
        number = int(question.content.config_records["config"]["round"])
        by_round.setdefault(number, set()).update(question.content.array_records["arrays"])
    changed = {*layers.blocks[-1].tensors, *layers.head.tensors}
    assert by_round == {1: set(), 2: changed}


# ------------------------------------------------------------------------------- bad clients
def tampering(change: Callable[[Message], None], partitions: set[int]) -> ClientApp:
    """A ClientApp whose training replies are changed on their way, for some partitions."""

    def mod(message: Message, context: Context, call_next: object) -> Message:
        reply = call_next(message, context)  # type: ignore[operator]
        training = message.metadata.message_type == "train"
        if training and context.node_config["partition-id"] in partitions:
            change(reply)
        return reply

    return build_client_app([mod])


def poison(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["head.bias"] = encode(np.full(10, np.nan, dtype=np.float32))


def widen(reply: Message) -> None:
    arrays = reply.content.array_records["arrays"]
    arrays["pos_embed"] = encode(np.zeros((1, 17, 80), dtype=np.float32))


def inflate(reply: Message) -> None:
    reply.content.metric_records["metrics"]["examples"] = 10**15


def crash(reply: Message) -> None:
    raise MemoryError("out of memory")


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Recorded]:
    """One round in which all clients are good."""
    config = configured(
        *(tmp_path_factory.mktemp("honest"), "strategy.name=top", "train.local-steps=2"),
        "federation.clients-per-round=10",
    )
    grid = Recorded(config)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    start(grid, config)
    return config, grid


@pytest.mark.parametrize("change", [poison, widen, inflate, crash], ids=lambda f: f.__name__)
def test_a_bad_client_is_left_out_and_the_round_is_that_of_the_others(
    change: Callable[[Message], None], honest: tuple[RunConfig, Recorded]
) -> None:
    config, good = honest
    attacked = start(Recorded(config, tampering(change, {0, 3})), config)

    # What the honest clients alone give, by hand.
    total, step = 0.0, 0.0
    for _question, reply in good.trained():
        partition = reply.metadata.src_node_id - 2
        if partition not in (0, 3):
            d = int(reply.content.metric_records["metrics"]["examples"])
            total += d
            step += d * reply.content.array_records["arrays"]["head.bias"].numpy().astype(float)
    expected = base_state(config)["head.bias"] + step / total
    np.testing.assert_allclose(attacked["head.bias"], expected, rtol=1e-6, atol=1e-9)
    assert all(np.isfinite(t).all() for t in attacked.values())


def test_too_few_usable_replies_stop_the_run_with_the_reasons(tmp_path: Path) -> None:
    config = configured(tmp_path, "strategy.name=top", "federation.min-replies=6")
    grid = Recorded(config, tampering(poison, set(range(10))))
    with pytest.raises(RoundFailed, match=r"0 usable replies in train, 6 are needed.*NaN"):
        start(grid, config)


def test_a_failed_run_says_so_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path, "run.name=bad", "federation.min-replies=6")
    app = tampering(poison, set(range(10)))
    monkeypatch.setattr("layerfed.engine.client_app", app)
    with pytest.raises(RoundFailed):
        run_on("inprocess", config)
    summary = json.loads((tmp_path / "bad/summary.json").read_text())
    assert summary["status"] == "failed"
    assert "NaN" in summary["error"]


# --------------------------------------------------------------------------- measured budgets
def test_budgets_in_flops_keep_clients_near_the_output(tmp_path: Path) -> None:
    """With half of the cost of full backward, the lowest layers are out of reach and the top is not."""
    config = configured(tmp_path, "budget.unit=flops", "budget.layers=1.5e8", "federation.rounds=1")
    rows = read_lines(run_on("inprocess", config) / "selection.jsonl")
    for row in rows:
        masks = np.array(row["masks"], dtype=bool)
        costs, depth = np.array(row["costs"]), np.array(row["depth_costs"])
        assert (np.diff(depth) < 0).all()
        assert masks.any(axis=1).all()
        for mask in masks:
            assert costs[mask].sum() + depth[mask.argmax()] <= 1.5e8
        assert not masks[:, 0].any()


def test_a_budget_that_fits_no_measured_cost_is_refused_before_any_training(
    tmp_path: Path,
) -> None:
    for layers, says in (
        ("1e15", "above the whole model"),
        ("1", "below the least that a client can train"),
    ):
        config = configured(tmp_path / "runs", "budget.unit=flops", f"budget.layers={layers}")
        with pytest.raises(ConfigError, match=says):
            run_on("inprocess", config)
    assert not (tmp_path / "runs").exists()


def test_the_test_set_is_evaluated_every_so_many_rounds_and_at_the_end(tmp_path: Path) -> None:
    config = configured(
        tmp_path, "strategy.name=top", "run.evaluate-every=2", "train.local-steps=1"
    )
    folder = run_on("inprocess", config)
    scores = [row["accuracy"] for row in read_lines(folder / "metrics.jsonl")]
    assert [score is None for score in scores] == [True, False, False]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["initial_accuracy"] is not None
    assert summary["accuracy"] == scores[-1]


# --------------------------------------------------------------------------- the federation as it is
def serve(nodes: int, config: RunConfig) -> Path:
    """Run the ServerApp on a federation of some nodes, as Flower does; return the run folder."""
    grid = InProcessGrid(client_app, nodes, config.to_flat())
    context = Context(
        run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config.to_flat()
    )
    return run(grid, context, [], lambda folder: None)


def test_a_run_takes_the_federation_as_it_is(tmp_path: Path) -> None:
    quick = ["strategy.name=top", "federation.rounds=1", f"run.dir={tmp_path}"]
    folder = serve(3, load_config(None, [*quick, "run.name=as-it-is"]))
    stated = run_on("inprocess", load_config(None, [*quick, "federation.clients=3"]))
    written = json.loads((folder / "config.json").read_text())
    assert (written["federation.clients"], written["federation.clients-per-round"]) == (3, 3)
    ours, theirs = (load_file(f / "final.safetensors") for f in (folder, stated))
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("federation.clients=4", "federation.clients = 4, but the federation has 3 SuperNodes"),
        ("federation.clients-per-round=4", "is above the 3 clients of the federation"),
        ("federation.min-replies=4", "federation.min-replies = 4 is above"),
    ],
)
def test_a_number_that_does_not_fit_the_federation_is_refused(
    setting: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        serve(3, load_config(None, [setting, f"run.dir={tmp_path}/runs"]))
    assert not (tmp_path / "runs").exists()
