"""Bounds on one client's influence in whole rounds, against the formulas and against a liar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable

from layerfed.client_app import build_client_app
from layerfed.config import RunConfig
from layerfed.engine import InProcessGrid, run_on
from layerfed.exchange import CODECS, encode, record_of
from layerfed.runs import read_lines
from layerfed.runs.records import Choice
from layerfed.server.aggregation import AGGREGATIONS, Aggregation
from layerfed.server.candidates import Candidates
from layerfed.server.optimizers import SERVER_OPTIMIZERS
from layerfed.server.steps import CappedWeights, Clipping, ServerStep
from layerfed.strategies import ILP
from tests.fakes import Recorded
from tests.made_up import (
    BASE,
    LAYERS,
    Federation,
    Outcome,
    run,
    strategy_for,
)
from tests.strategies.test_compositions import WAYS
from tests.tiny_task import Run, configured
from tests.tiny_task import run as run_tiny

CLIENTS = 7


def limits(
    rule: str = "mean", trim: float = 0.1, clip: float = 0.0, max_examples: int = 0
) -> dict[str, Any]:
    """Settings of a strategy that bound how much one client can change the mean."""
    steps: list[ServerStep] = [Clipping(clip)] if clip else []
    steps += [CappedWeights(max_examples)] if max_examples else []
    return {"aggregation": Aggregation(rule, trim), "steps": tuple(steps)}


def rounds_of(grid: Federation) -> list[list[tuple[dict[str, np.ndarray], dict[str, Any]]]]:
    """Update and metrics of each training reply, by round."""
    found: dict[str, list[tuple[dict[str, np.ndarray], dict[str, Any]]]] = {}
    for message in grid.asked:
        if message.metadata.message_type == "train":
            content = grid.answer(message).content
            arrays = {name: a.numpy() for name, a in content.array_records["arrays"].items()}
            metrics = dict(content.metric_records["metrics"])
            found.setdefault(message.metadata.group_id, []).append((arrays, metrics))
    return list(found.values())


def expected(
    grid: Federation,
    rule: str,
    trim: float = 0.0,
    clip: float = 0.0,
    cap: int = 0,
    over: str = "trained",
) -> Any:
    """The model after these rounds, in float64 and written out."""
    model = {name: tensor.astype(np.float64) for name, tensor in BASE.items()}
    for replies in rounds_of(grid):
        for name in model:
            rows, weights = [], []
            for arrays, metrics in replies:
                if name in arrays:
                    floats = [a for a in arrays.values() if a.dtype == np.float32]
                    norm = np.sqrt(sum(np.square(a.astype(float)).sum() for a in floats))
                    scaled = clip and norm > clip and arrays[name].dtype == np.float32
                    rows.append(arrays[name].astype(float) * (clip / norm if scaled else 1.0))
                    weights.append(min(metrics["examples"], cap or np.inf))
            if not rows:
                continue
            table = np.sort(np.stack(rows), axis=0)
            cut = int(trim * len(rows) + 1e-9)
            mean = np.average(np.stack(rows), axis=0, weights=weights)
            step = {
                "mean": mean,
                "svd": mean,  # of a model without adapters
                "stack": mean,
                "median": np.median(table, axis=0),
                "trimmed-mean": table[cut : len(rows) - cut].mean(axis=0),
            }[rule]
            if over == "cohort":
                counts = [metrics["examples"] for _, metrics in replies]
                weighted = rule not in ("median", "trimmed-mean")  # a client states its own weight
                step = step * (sum(weights) / sum(counts) if weighted else len(rows) / len(counts))
            step = np.rint(step) if BASE[name].dtype == np.int64 else step
            model[name] = (model[name] + step).astype(BASE[name].dtype).astype(float)
    return model


def same_model(outcome: Outcome, wanted: dict[str, np.ndarray]) -> None:
    moved = 0.0
    for name, tensor in wanted.items():
        np.testing.assert_allclose(outcome.model[name], tensor, rtol=1e-5, atol=1e-7)
        moved += float(np.abs(tensor - BASE[name]).max(initial=0))
    assert moved > 0.01


# ------------------------------------------------------------------------------- against formulas
@pytest.mark.parametrize("over", ["trained", "cohort"])
@pytest.mark.parametrize("budget", [1, 2, 4])
@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_rounds_are_the_formula_over_the_clients_of_each_layer(
    rule: str, budget: int, over: str
) -> None:
    """With one layer for each client, one, two or no clients train a layer."""
    grid = Federation(CLIENTS)
    found = run(grid, budget=budget, aggregation=Aggregation(rule, 0.3, over=over))
    same_model(found, expected(grid, rule, trim=0.3, over=over))
    assert [(r.failures, r.late) for r in found.rounds] == [([], 0), ([], 0)]
    for record in found.rounds:
        assert record.e1 is not None
        # The weights that E2 speaks of exist in a mean only.
        assert (record.e2 is None) == (rule != "mean")
        assert record.clipped == 0


class Idle(ILP):
    """Leaves some clients without a block."""

    def select(self, candidates: Candidates) -> Choice:
        """Take the blocks of every third client away."""
        choice = super().select(candidates)
        return replace(choice, masks=choice.masks * (np.array(candidates.clients) % 3 > 0)[:, None])


def test_a_client_with_nothing_to_send_is_one_of_the_cohort() -> None:
    """Its head is personal and it has no block, so it counts as no change of any layer."""
    grid = Federation(CLIENTS, layers=LAYERS.keeping("head"))
    found = run(grid, kind=Idle, aggregation=Aggregation(over="cohort"))
    assert sorted(len(arrays) for arrays, _ in rounds_of(grid)[0])[:3] == [0, 0, 0]
    same_model(found, expected(grid, "mean", over="cohort"))


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_updates_of_large_norm_are_scaled_down_and_counted(
    rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    grid = Federation(CLIENTS)
    run(grid, rounds=1, budget=2)
    norms = [
        np.sqrt(sum(np.square(a.astype(float)).sum() for a in arrays.values() if a.dtype == "f4"))
        for arrays, _ in rounds_of(grid)[0]
    ]
    bound = float(np.median(norms)) * 1.001
    grid = Federation(CLIENTS)
    found = run(grid, rounds=1, budget=2, **limits(rule, 0.3, clip=bound))
    same_model(found, expected(grid, rule, trim=0.3, clip=bound))
    assert found.rounds[0].clipped == 3
    lines = [line for line in caplog.messages if "server.clip" in line]
    assert lines == [
        f"round 1: 3 of 7 updates were scaled down to a norm of {bound:g} (server.clip)"
    ]


def test_counts_beyond_the_limit_weigh_as_the_limit_everywhere() -> None:
    """Clients have 10 to 16 examples, and 3 to 9 held out; at most 5 count."""
    grid, cap = Federation(CLIENTS), 12
    found = run(grid, budget=2, **limits(max_examples=cap))
    same_model(found, expected(grid, "mean", cap=cap))
    weights = np.minimum(np.arange(10, 10 + CLIENTS), cap)
    for record, replies in zip(found.rounds, rounds_of(grid), strict=True):
        losses = [metrics["train_loss"] for _, metrics in replies]
        assert record.metrics["train_loss"] == pytest.approx(np.average(losses, weights=weights))
        assert record.selection is not None
        norms = record.selection.statistics["grad_norm_sq"]
        untrained = ~record.selection.choice.masks.any(axis=0)
        shares = weights / weights.sum()
        assert record.e1 == pytest.approx((shares @ norms)[untrained].sum())

    found = run(Federation(CLIENTS), **limits(max_examples=5))
    answers = [
        dict(grid.answer(m).content.metric_records["metrics"])
        for m in grid.asked
        if m.metadata.message_type == "evaluate" and m.metadata.group_id == "1"
    ]
    counted = [min(a["examples"], 5) for a in answers]
    accuracy = np.average([a["client_accuracy"] for a in answers], weights=counted)
    assert found.rounds[0].metrics["client_accuracy"] == pytest.approx(accuracy)


def test_a_forged_count_decides_no_longer() -> None:
    """A client with 2²⁹ examples is nearly all of a plain mean, and one of equals in a capped one."""

    def enormous(reply: Message) -> Message:
        reply.content.metric_records["metrics"]["examples"] = 2**29
        return reply

    forged = {(0, kind): enormous for kind in ("query.describe", "query.probe", "train")}
    trusting = run(Federation(4, forged), 1, budget=4)
    alone = run(Federation(1, forged), 1, budget=4)
    for name in LAYERS.head.tensors:
        np.testing.assert_allclose(trusting.model[name], alone.model[name], atol=1e-7)
    grid = Federation(4, forged)
    capped = run(grid, 1, budget=4, **limits(max_examples=10))
    same_model(capped, expected(grid, "mean", cap=10))


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
def test_a_forged_count_does_not_hold_still_what_its_client_left_alone(rule: str) -> None:
    aggregation = Aggregation(rule, over="cohort")
    result = aggregation.begin(LAYERS)
    ones = {name: np.ones_like(tensor) for name, tensor in BASE.items()}
    for trained, examples in [("blocks.0", 10)] * 9 + [("blocks.3", 2**29)]:
        result.add([trained, "head"], ones, examples)
    shares = [aggregation.share(result, layer) for layer in ("blocks.0", "blocks.3", "head")]
    assert shares == [0.9, 0.1, 1.0]


# --------------------------------------------------------------------------------- compositions
@pytest.mark.usefixtures("tiny_task")
@pytest.mark.parametrize(
    "rule",
    [["server.aggregation=median"], ["server.aggregation=trimmed-mean", "server.trim=0.34"]],
    ids=["median", "trimmed-mean"],
)
@pytest.mark.parametrize("way", WAYS)
def test_every_strategy_works_with_every_rule(way: str, rule: list[str]) -> None:
    few = ["federation.clients-per-round=3", "budget.layers=2", "server.clip=0.05"]
    config = configured(*few, *WAYS[way], *rule)
    found = run_tiny(config, 2, Recorded(config))
    for record in found.rounds:
        assert record.failures == []
        assert record.clipped > 0
        assert "head" in record.moved
    moved = {layer for record in found.rounds for layer in record.moved}
    for layer in LAYERS.layers:
        same = all(np.array_equal(found.before[t], found.after[t]) for t in layer.tensors)
        assert same == (layer.name not in moved), layer.name
    assert all(np.isfinite(tensor).all() for tensor in found.after.values())


@pytest.mark.parametrize("rule", ["median", "trimmed-mean"])
@pytest.mark.parametrize("codec", CODECS)
def test_codecs_add_no_more_than_their_error(codec: str, rule: str) -> None:
    plain, coded = (
        run(Federation(CLIENTS), 1, budget=2, codec=c, aggregation=Aggregation(rule, 0.2))
        for c in ("float32", codec)
    )
    for name, tensor in plain.model.items():
        # Updates reach 0.04, and int8 is off by a 254th of a row's largest.
        np.testing.assert_allclose(coded.model[name], tensor, atol=3e-4)


@pytest.mark.parametrize("rule", AGGREGATIONS)
def test_a_resumed_run_ends_as_if_it_had_not_stopped(rule: str) -> None:
    def options() -> dict[str, Any]:
        optimizer = SERVER_OPTIMIZERS["momentum"](1.0, 0.5)
        bounds = limits(rule, 0.3, clip=0.05, max_examples=12)
        return {"optimizer": optimizer, **bounds, "budget": 2}

    whole = run(Federation(CLIENTS), 4, **options())
    first = strategy_for(CLIENTS, **options())
    first.start(Federation(CLIENTS), record_of(BASE), 2, 60, ConfigRecord({"lr": 0.1}))
    second, grid = strategy_for(CLIENTS, **options()), Federation(CLIENTS)
    second.resume(first.checkpoint())
    second.start(grid, record_of(BASE), 4, 60, ConfigRecord({"lr": 0.1}))
    assert second.model is not None
    for name, tensor in whole.model.items():
        np.testing.assert_array_equal(second.model.tensors[name], tensor)


# ------------------------------------------------------------------------------- against a liar
def liar(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """One client in ten sends its update times -100."""
    reply = call_next(message, context)
    if message.metadata.message_type == "train" and context.node_config["partition-id"] == 4:
        arrays = reply.content.array_records["arrays"]
        for name, array in list(arrays.items()):
            values = array.numpy()
            if values.dtype == np.float32:
                arrays[name] = encode(values * np.float32(-100))
    return reply


def ten(*overrides: str) -> RunConfig:
    everyone = ["federation.clients=10", "federation.clients-per-round=10"]
    return configured(*everyone, "strategy.name=top", "budget.layers=2", *overrides)


def lied_to(config: RunConfig) -> Run:
    return run_tiny(config, 5, InProcessGrid(build_client_app([liar]), 10, config.to_flat()))


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    """Norm of the difference over what is trained, but for BatchNorm's statistics."""
    names = [name for layer in LAYERS.layers for name in layer.parameters]
    return float(np.sqrt(sum(np.square(one[n] - other[n]).sum() for n in names)))


@pytest.mark.usefixtures("tiny_task")
def test_robust_rules_stay_with_the_honest_clients_and_the_mean_does_not() -> None:
    off = {}
    for rule, settings in {
        "mean": [],
        "median": ["server.aggregation=median"],
        "trimmed-mean": ["server.aggregation=trimmed-mean", "server.trim=0.2"],
    }.items():
        honest = run_tiny(ten(*settings), 5, InProcessGrid(build_client_app(), 10, ten().to_flat()))
        lied = lied_to(ten(*settings))
        assert [r.replies for r in lied.rounds] == [10] * 5, "nothing about the lies is malformed"
        off[rule] = distance(lied.after, honest.after) / distance(honest.after, honest.before)
    # In units of how far honest training goes.
    assert off["mean"] > 10
    assert off["median"] < 0.8
    assert off["trimmed-mean"] < 0.8


@pytest.mark.usefixtures("tiny_task")
def test_clipping_bounds_what_a_liar_does() -> None:
    honest = run_tiny(ten(), 5)
    sizes = [distance(honest.after, honest.before) / 5]
    clipped = lied_to(ten(f"server.clip={sizes[0]:.3g}"))
    plain = lied_to(ten())
    assert all(record.clipped >= 1 for record in clipped.rounds)
    assert distance(clipped.after, honest.after) < 0.2 * distance(plain.after, honest.after)


@pytest.mark.usefixtures("tiny_task")
def test_the_run_folder_counts_what_was_clipped(tmp_path: Path) -> None:
    more = [f"run.dir={tmp_path}", "federation.rounds=2", "server.clip=0.0001"]
    folder = run_on("inprocess", configured(*more))
    assert [row["clipped"] for row in read_lines(folder / "metrics.jsonl")] == [4, 4]
