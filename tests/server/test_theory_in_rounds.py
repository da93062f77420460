"""The error floor's two terms in the log of whole rounds."""

from __future__ import annotations

import numpy as np
import pytest

from layerfed.client.workbench import workbench
from layerfed.strategies import STRATEGIES
from tests.fakes import Recorded
from tests.tiny_task import configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")


@pytest.mark.parametrize(
    "settings",
    [
        ["budget.kind=half-normal", "budget.max=3", "strategy.consistency=-1"],
        ["strategy.name=random", "strategy.resample-steps=1", "train.local-steps=4"],
    ],
    ids=["ilp", "resampled"],
)
def test_both_terms_are_those_of_the_messages(settings: list[str]) -> None:
    """From the replies as they travelled: nothing the strategy kept."""
    config = configured("strategy.theory=true", *settings)
    grid = Recorded(config)
    (record,) = run(config, 1, grid).rounds
    bench = workbench(config.to_flat())
    layers = bench.resident.layers
    selection = record.selection
    assert selection is not None
    masks = selection.choice.masks
    d = [int(r.content.metric_records["metrics"]["examples"]) for _, r in grid.trained()]
    share = np.array(d) / sum(d)
    everyone = sum(len(bench.examples(i)[0]) for i in range(6))

    norms = selection.statistics["grad_norm_sq"]
    untrained = ~masks.any(axis=0)
    assert record.e1 == pytest.approx((share @ norms)[untrained].sum())

    updates = [r.content.array_records["arrays"] for _, r in grid.trained()]
    # In how many of its steps each client trained each layer; one mask a step where they change.
    schedules = [selection.choice.schedule(i) for i in range(len(d))]
    each = config.train.local_steps // len(schedules[0])
    steps = each * np.array([schedule.sum(axis=0) for schedule in schedules])
    e2 = np.zeros(2)
    for index, block in enumerate(layers.blocks):
        there = np.flatnonzero(masks[:, index])
        if not len(there):
            continue
        rows = np.stack(
            [
                np.concatenate(
                    [updates[i][p].numpy().astype(float).ravel() for p in block.parameters]
                )
                for i in there
            ]
        )
        weights = share[there] / share[there].sum()
        spread = weights @ ((rows - weights @ rows) ** 2).sum(axis=1)
        kappa_sq = spread / (config.train.lr * (weights @ steps[there, index])) ** 2
        # Σ (w − α)²/α, first with α over all six clients, of whom those without a reply have w = 0.
        alpha = np.append(np.array(d), everyone - sum(d)) / everyone
        full = np.zeros(len(alpha))
        full[there] = weights
        e2[0] += ((full - alpha) ** 2 / alpha).sum() * kappa_sq
        e2[1] += ((full[:-1] - share) ** 2 / share).sum() * kappa_sq
    assert e2[0] > e2[1] > 0
    assert (record.e2, record.e2_masks) == pytest.approx(tuple(e2), rel=1e-5)


@pytest.mark.parametrize("name", STRATEGIES)
def test_without_a_probe_of_norms_the_first_term_is_unknown(name: str) -> None:
    few = ["federation.clients-per-round=3", "strategy.period=2", "budget.layers=2"]
    plain = run(configured(*few, f"strategy.name={name}"), 2)
    probing = "grad_norm_sq" in STRATEGIES[name].statistics
    assert [record.e1 is not None for record in plain.rounds] == [probing, False]
    assert all(record.e2 is not None for record in plain.rounds)

    shown = run(configured(*few, f"strategy.name={name}", "strategy.theory=true"), 2)
    assert all(
        record.e1 is not None and record.metrics["flops_probe"] > 0 for record in shown.rounds
    )
    # Looking changes nothing: the same masks, and the same model to the bit.
    for number in (1, 2):
        assert shown.masks(number) == plain.masks(number)
    assert all(np.array_equal(plain.after[n], shown.after[n]) for n in plain.after)


@pytest.mark.parametrize("clients", [4, 6])
def test_full_fine_tuning_of_all_clients_has_neither_term(clients: int) -> None:
    """With a part of the clients it has the second term, which does not come from its masks."""
    settings = ["strategy.theory=true", f"federation.clients-per-round={clients}"]
    (record,) = run(configured("strategy.name=full", *settings)).rounds
    assert record.e1 == record.e2_masks == 0.0
    assert (record.e2 == 0.0) == (clients == 6)


def test_layers_that_are_left_out_after_training_count_as_untrained() -> None:
    base = ["strategy.name=fedtlu", "strategy.theory=true", "strategy.fraction=0.25"]
    (record,) = run(configured(*base)).rounds
    selection = record.selection
    assert selection is not None
    assert selection.choice.masks.all()
    assert record.e1 is not None
    assert record.e1 > 0


def test_layers_that_agree_lower_one_term_and_layers_that_differ_the_other() -> None:
    """What λ trades: with λ < 0 clients spread out, with a large one they agree."""
    apart, together = (
        run(configured(f"strategy.consistency={x}", "federation.clients-per-round=6"))
        for x in (-5, 5)
    )
    layers = [{layer for mask in r.masks(1).values() for layer in mask} for r in (apart, together)]
    assert len(layers[0]) == 4
    assert len(layers[1]) == 1
    assert apart.rounds[0].e1 == 0.0 < together.rounds[0].e1  # type: ignore[operator]
    assert together.rounds[0].e2 == 0.0 < apart.rounds[0].e2  # type: ignore[operator]


def test_steps_that_nobody_makes_are_refused() -> None:
    config = configured("strategy.name=top", "federation.min-replies=1")
    grid = Recorded(config)
    work = grid._work

    def lying(message):  # type: ignore[no-untyped-def]
        reply = work(message)
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 3:
            reply.content.metric_records["metrics"]["steps"] = 0
        return reply

    grid._work = lying  # type: ignore[method-assign]
    (record,) = run(config, 1, grid).rounds
    assert [failure.reason for failure in record.failures] == [
        "it states steps = 0; 1 or more is allowed"
    ]
