"""Strategies whose clients train more than they send: fedluar recycles, fedbcgd gives out blocks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from layerfed.client.workbench import workbench
from layerfed.config import ConfigError
from layerfed.config.seeding import Stream, generator
from layerfed.exchange.instruction import TrainInstruction
from layerfed.models.layers import LayerMap
from layerfed.strategies import FedBCGD, RoundSettings, checked
from tests.candidates import candidates
from tests.conftest import TinyNet
from tests.fakes import Recorded
from tests.tiny_task import Run, check_resumed, configured, run

pytestmark = pytest.mark.usefixtures("tiny_task")
LAYERS = LayerMap.from_model(TinyNet()).with_frozen_statistics(TinyNet())
ALL = (True,) * 4


def sent(result: Run, number: int) -> np.ndarray:
    selection = result.rounds[number - 1].selection
    assert selection is not None
    assert selection.choice.masks.all(), "clients train everything"
    return selection.choice.sends


def relative_change(
    layer: str, before: dict[str, np.ndarray], after: dict[str, np.ndarray]
) -> float:
    def norm(tensors: list[np.ndarray]) -> float:
        return float(np.sqrt(sum((t.astype(float) ** 2).sum() for t in tensors)))

    names = LAYERS[layer].parameters
    return norm([after[n] - before[n] for n in names]) / norm([before[n] for n in names])


# --------------------------------------------------------------------------------------- fedluar
def test_a_recycled_layer_is_nobodys_share_of_a_cohort() -> None:
    with pytest.raises(ConfigError, match=r"server\.average-over = 'cohort' does not go with"):
        checked(configured("strategy.name=fedluar", "server.average-over=cohort"))


def test_a_recycled_layer_repeats_its_last_step_and_is_not_sent() -> None:
    config = configured("strategy.name=fedluar", "run.seed=3")
    one, grid = run(config, 1), Recorded(config)
    two = run(config, 2, grid)
    assert sent(two, 1).all()
    recycled = [b.name for b, on in zip(LAYERS.blocks, sent(two, 2)[0], strict=True) if not on]
    assert len(recycled) == 2
    # The draw, computed anew: probabilities are proportional to ‖θ‖/‖Δ‖.
    names = [block.name for block in LAYERS.blocks]
    inverse = 1 / np.array([relative_change(name, one.before, one.after) for name in names])
    rng = generator(3, Stream.MASK, 2)
    drawn = rng.choice(4, 2, replace=False, p=inverse / inverse.sum())
    assert recycled == [names[place] for place in sorted(drawn)]
    assert set(two.rounds[1].moved) == {*names, "head"}
    for name in recycled:
        for tensor in LAYERS[name].parameters:
            step = one.after[tensor] - one.before[tensor]
            np.testing.assert_allclose(two.after[tensor], one.after[tensor] + step, atol=1e-6)
    # Training is that of all layers, the uplink that of the layers sent.
    first, second = two.rounds
    flops = [record.metrics["flops"] for record in two.rounds]
    assert flops[0] == pytest.approx(flops[1], rel=0.2)
    whole = sum(block.bytes for block in LAYERS.blocks) + LAYERS.head.bytes
    saved = sum(LAYERS[name].bytes for name in recycled)
    assert {row.up for row in first.ledger.rows.values()} == {whole}
    assert {row.up for row in second.ledger.rows.values()} == {whole - saved}
    for record in two.rounds:
        assert all(not set(recycled) & set(u) for u in record.updated.values()) == (
            record is second
        )


def test_a_recycled_layer_keeps_its_score_until_it_is_sent_again() -> None:
    result = run(configured("strategy.name=fedluar", "strategy.recycled=0.75"), 6)
    counts = [int((~sent(result, number)[0]).sum()) for number in range(1, 7)]
    assert counts == [0, 3, 3, 3, 3, 3]


def test_without_recycling_it_is_full_fine_tuning() -> None:
    ours = run(configured("strategy.name=fedluar", "strategy.recycled=0"), 2)
    full = run(configured("strategy.name=full"), 2)
    assert all(np.array_equal(ours.after[name], full.after[name]) for name in full.after)


@pytest.mark.parametrize("rule", ["mean", "median"])
@pytest.mark.parametrize("name", ["fedluar", "fedbcgd"])
def test_a_resumed_run_ends_with_the_same_model(name: str, rule: str) -> None:
    three = "federation.clients-per-round=3"  # a number of blocks that leaves some waiting
    check_resumed(configured(f"strategy.name={name}", f"server.aggregation={rule}", three))


# --------------------------------------------------------------------------------------- fedbcgd
@pytest.mark.parametrize(
    "clients", [(1,), (2,), (3,), (4,), (6,), (9,), (4, 3), (1, 5, 2)], ids=str
)
def test_the_cohort_covers_all_blocks_or_several_cohorts_do(clients: tuple[int, ...]) -> None:
    strategy = FedBCGD(LAYERS, settings=RoundSettings(seed=1))
    given: list[int] = []
    for number in range(1, 13):
        cohort = [1] * clients[number % len(clients)]
        choice = strategy.select(candidates(cohort, [1.0] * 4, server_round=number, seed=1))
        assert choice.masks.all()
        assert (choice.sends.sum(axis=1) == 1).all()
        given += choice.sends.argmax(axis=1).tolist()
    # Every four blocks that are given out one after the other are all blocks.
    assert all(sorted(given[i : i + 4]) == [0, 1, 2, 3] for i in range(0, len(given) - 3, 4))
    assert clients == (1,) or given[:8] != given[4:12]


def test_each_block_moves_by_the_mean_of_the_clients_that_sent_it() -> None:
    config = configured("strategy.name=fedbcgd", "federation.clients-per-round=6")
    full = Recorded(configured("strategy.name=full", "federation.clients-per-round=6"))
    run(configured("strategy.name=full", "federation.clients-per-round=6"), 1, full)
    result = run(config, 1)
    layers = workbench(config.to_flat()).resident.layers
    updates = {}
    for question, reply in full.trained():
        arrays = reply.content.array_records["arrays"]
        partition = question.metadata.dst_node_id - 2
        updates[partition] = {name: array.numpy() for name, array in arrays.items()}
    selection = result.rounds[0].selection
    assert selection is not None
    for column, block in enumerate(layers.blocks):
        rows = np.flatnonzero(selection.choice.sends[:, column])
        own = [selection.clients[row] for row in rows]
        assert own
        weights = np.array([10 + 4 * client for client in own], dtype=float)
        for tensor in block.parameters:
            mean = np.average([updates[c][tensor] for c in own], axis=0, weights=weights)
            step = result.after[tensor] - result.before[tensor]
            np.testing.assert_allclose(step, mean, rtol=1e-4, atol=1e-7)


def test_a_node_that_cannot_train_a_block_is_given_another() -> None:
    config = configured("strategy.name=fedbcgd", "budget.kind=per-node")
    result = run(config, 3, Recorded(config, nodes=[{"budget": 2}] * 6))
    for record in result.rounds:
        assert not record.failures
        assert record.selection is not None
        choice = record.selection.choice
        assert (choice.masks.sum(axis=1) == 2).all()
        assert (choice.sends.sum(axis=1) == 1).all()
        assert not (choice.sends & ~choice.masks).any()


def test_a_node_that_trains_one_block_sends_it_in_every_round() -> None:
    strategy = FedBCGD(LAYERS)
    for number in range(1, 21):
        case = candidates([1] * 8, [1.0] * 4, server_round=number)
        choice = strategy.select(replace(case, limits=np.ones(8)))
        assert (choice.masks.sum(axis=1) == 1).all()
        np.testing.assert_array_equal(choice.sends, choice.masks)


def test_a_skipped_block_waits_for_a_client_that_trains_it() -> None:
    """Two of four blocks run on each client, and each block on half of them."""
    strategy, counts = FedBCGD(LAYERS), np.zeros(4, dtype=int)
    runs = np.array([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]], dtype=bool)
    for number in range(1, 9):
        case = candidates([1] * 4, [1.0] * 4, server_round=number).running(runs)
        sends = strategy.select(case).sends
        assert (sends.sum(axis=1) == 1).all()
        assert not (sends & ~runs).any()
        counts += sends.sum(axis=0)
    assert counts.max() - counts.min() <= 2, counts


def test_a_skipped_block_takes_no_room_of_a_nodes_own_limit() -> None:
    runs = np.array([[True] * 4 + [False] * 4])
    for number in range(1, 21):
        case = replace(candidates([1], [1.0] * 8, server_round=number), limits=np.array([4.0]))
        choice = FedBCGD(LAYERS).select(case.running(runs))
        np.testing.assert_array_equal(choice.masks, runs)


# ------------------------------------------------------------------------------- the instruction
def test_blocks_that_are_not_trained_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="not to train"):
        TrainInstruction(1, ((True, False),), sends=(True, True))
    with pytest.raises(ValueError, match="not to train"):
        TrainInstruction(1, ((True, False),), sends=(True,))
    named = TrainInstruction(1, (ALL,), sends=(False, True, False, False))
    assert named.asked(LAYERS) == ["blocks.1", "head"]
    assert named.to_config()["sends"] == [0, 1, 0, 0]


def test_fedluar_never_recycles_all_layers() -> None:
    result = run(configured("strategy.name=fedluar", "strategy.recycled=0.99"), 4)
    assert [sent(result, number).any(axis=0).sum() for number in (1, 2, 3, 4)] == [4, 1, 1, 1]
