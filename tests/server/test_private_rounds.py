"""Differential privacy in whole rounds: clients' replies, the model, and the node's own settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest
from flwr.app import Message
from torch import nn

from layerfed.client import workbench as benches
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, RunConfig, Scalar
from layerfed.engine import InProcessGrid
from layerfed.exchange import CODECS, encode, open_store
from layerfed.exchange.clipping import norm_of
from layerfed.server_app import build_strategy
from layerfed.strategies import STRATEGIES
from tests.conftest import WIDTH
from tests.fakes import Recorded
from tests.tiny_task import Run, TinyTask, configured, run

PRIVATE = {"train_loss", "steps", "train_seconds", "peak_memory"}


class PlainTask(TinyTask):
    """Without BatchNorm, which has buffers."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        for block in model.blocks:
            block.norm = nn.LayerNorm(WIDTH)
        return model


@pytest.fixture(autouse=True, scope="module")
def plain_task() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benches, "load_task", PlainTask)
        benches._workbench.cache_clear()
        yield
    benches._workbench.cache_clear()


def sent(grid: Recorded) -> list[dict[str, np.ndarray]]:
    """Each training reply's arrays, as they travelled."""
    return [
        {name: array.numpy() for name, array in reply.content.array_records["arrays"].items()}
        for _, reply in grid.trained()
    ]


def metrics(reply: Message) -> Mapping[str, object]:
    return reply.content.metric_records["metrics"]


def rounds_of(
    *overrides: str, rounds: int = 1, nodes: Sequence[Mapping[str, Scalar]] = ()
) -> tuple[Recorded, Run]:
    config = configured(*overrides)
    grid = Recorded(config, nodes=nodes)
    return grid, run(config, rounds, grid)


@pytest.mark.parametrize("mode", ["local", "central"])
def test_a_private_reply_says_nothing_of_the_data_but_its_update(mode: str) -> None:
    """Clipped over all layers that it holds; no loss, and the same number of examples for all."""
    grid, result = rounds_of(f"privacy.mode={mode}", "privacy.clip=0.01", "budget.layers=2")
    (record,) = result.rounds
    assert (record.replies, record.failures) == (4, [])
    assert (record.metrics["train_loss"], record.e2) == (None, None)
    for update in sent(grid):
        assert norm_of(update) == pytest.approx(0.01, rel=1e-5)
    for question, reply in grid.replies:
        if question.metadata.message_type == "evaluate":
            continue
        assert metrics(reply)["examples"] == 1
        assert not PRIVATE & set(metrics(reply))


def test_local_noise_is_on_every_coordinate_that_is_sent() -> None:
    """The same run with and without: what differs is N(0, (z·C)²)."""
    settings = ["privacy.mode=local", "privacy.clip=0.05", "budget.layers=4"]
    still, _ = rounds_of(*settings)
    noisy, _ = rounds_of(*settings, "privacy.noise=3.0")
    noise = np.concatenate(
        [
            (b[name].astype(np.float64) - a[name]).ravel()
            for a, b in zip(sent(still), sent(noisy), strict=True)
            for name in a
        ]
    )
    assert noise.size > 800
    # Six standard errors: this fails by chance once in a hundred million runs.
    assert abs(noise.mean()) < 6 * 0.15 / np.sqrt(noise.size)
    assert noise.std() == pytest.approx(0.15, rel=6 / np.sqrt(2 * noise.size))


def test_central_mode_averages_clipped_updates_with_equal_weights() -> None:
    grid, result = rounds_of("privacy.mode=central", "privacy.clip=0.02", "strategy.name=full")
    before, after = result.before, result.after
    updates = sent(grid)
    for name in updates[0]:
        expected = before[name] + np.mean([u[name].astype(np.float64) for u in updates], axis=0)
        np.testing.assert_allclose(after[name], expected, rtol=0, atol=1e-7)


def test_central_noise_is_on_layers_that_move_and_no_others() -> None:
    settings = ["privacy.mode=central", "privacy.clip=0.5", "strategy.name=top"]
    _, still = rounds_of(*settings)
    _, noisy = rounds_of(*settings, "privacy.noise=2.0")
    layers = workbench(configured(*settings).to_flat()).resident.layers
    moved = set(noisy.rounds[0].moved)
    assert moved == {"blocks.3", "head"}
    difference = []
    for layer in layers.layers:
        for name in layer.tensors:
            apart = noisy.after[name].astype(float) - still.after[name]
            if layer.name in moved:
                difference.append(apart.ravel())
            else:
                assert (apart == 0).all(), name
    noise = np.concatenate(difference)
    # N(0, (z·C)²) on the sum of four clients.
    assert noise.std() == pytest.approx(0.25, rel=6 / np.sqrt(2 * noise.size))


def test_the_server_clips_what_a_client_did_not() -> None:
    config = configured("privacy.mode=central", "privacy.clip=0.1", "strategy.name=full")
    grid = Recorded(config)
    work = grid._work

    def shouting(message: Message) -> Message:
        reply = work(message)
        if message.metadata.message_type == "train":
            record = reply.content.array_records["arrays"]
            for name, array in list(record.items()):
                record[name] = encode(1e6 * array.numpy())
        return reply

    grid._work = shouting  # type: ignore[method-assign]
    result = run(config, 1, grid)
    assert result.rounds[0].replies == 4
    change = {n: result.after[n].astype(float) - result.before[n] for n in result.before}
    assert 0 < norm_of(change) <= 0.1 * (1 + 1e-4)


@pytest.mark.parametrize("mode", ["local", "central"])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_works_in_private(name: str, mode: str) -> None:
    settings = ["federation.clients-per-round=3", "budget.layers=2", "privacy.noise=0.1"]
    statistics = ["privacy.statistics-clip=1.0", "privacy.statistics-noise=0.5"]
    config = configured(f"strategy.name={name}", f"privacy.mode={mode}", *settings, *statistics)
    result = run(config, 2)
    assert [record.failures for record in result.rounds] == [[], []]


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_works_and_none_remembers(codec: str) -> None:
    grid, result = rounds_of(
        "privacy.mode=local", "privacy.noise=1.0", f"exchange.codec={codec}", rounds=2
    )
    assert [r.failures for r in result.rounds] == [[], []]
    assert remembered(grid) == 0
    open_grid, _ = rounds_of(f"exchange.codec={codec}", rounds=2)
    assert (remembered(open_grid) > 0) == (codec == "int8")


def remembered(grid: Recorded) -> int:
    """Return the number of clients whose node keeps an error of its head's update."""
    store = open_store("memory", 1.0)
    (token,) = {m.content.config_records["config"]["run"] for m, _ in grid.trained()}
    return sum(store.recall(f"{token}/{client}/head") is not None for client in range(6))


def test_the_server_sees_clipped_and_noised_statistics_only() -> None:
    """A norm of nearly the bound without noise to speak of; with much, about half is cut off at 0."""
    for noise in (1e-9, 1e3):
        grid, result = rounds_of(
            "privacy.mode=central",
            "privacy.statistics-clip=0.125",
            f"privacy.statistics-noise={noise}",
            "federation.clients-per-round=6",
        )
        (record,) = result.rounds
        seen = record.selection.statistics["grad_norm_sq"]
        stated = [
            reply.content.metric_records["statistics"]["grad_norm_sq"]
            for question, reply in grid.replies
            if question.metadata.message_type == "query.probe"
        ]
        np.testing.assert_array_equal(seen, np.array(stated))
        if noise < 1:
            np.testing.assert_allclose(np.linalg.norm(seen, axis=1), 0.125, rtol=1e-6)
        else:
            assert (seen >= 0).all()
            assert 0 < (seen == 0).sum() < seen.size
            assert seen.max() > 10


# ------------------------------------------------------------------ what a node demands for itself
OWN: dict[str, Scalar] = {
    "privacy-clip": 0.01,
    "privacy-noise": 1e-6,
    "privacy-statistics-clip": 0.5,
    "privacy-statistics-noise": 1e-9,
}


def test_a_node_protects_itself_whatever_the_run_says() -> None:
    """Other clients do not change, and the server needs no setting for it."""
    everyone = ["federation.clients-per-round=6", "budget.layers=2"]
    plain, _ = rounds_of(*everyone)
    grid, result = rounds_of(*everyone, nodes=[OWN])
    (record,) = result.rounds
    assert (record.replies, record.failures, record.e2) == (6, [], None)
    assert record.metrics["train_loss"] is not None  # that of the other five
    norms = [norm_of(update) for update in sent(grid)]
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert min(norms[1:]) > 0.02
    own, others = grid.trained()[0][1], [reply for _, reply in grid.trained()[1:]]
    assert not PRIVATE & set(metrics(own))
    assert all(set(metrics(reply)) >= PRIVATE for reply in others)
    # Its weight is that of its examples, which it does not hide from a run that weighs by them.
    assert metrics(own)["examples"] == metrics(plain.trained()[0][1])["examples"] == 10
    assert np.linalg.norm(record.selection.statistics["grad_norm_sq"][0]) <= 0.5 * (1 + 1e-6)


def test_a_private_node_neither_scores_its_own_layers_nor_states_its_accuracy() -> None:
    scoring = ["strategy.name=fedtlu", "strategy.side=client", "federation.min-replies=1"]
    everyone = ["federation.clients-per-round=6", "task.local-test=0.5"]
    _, result = rounds_of(*scoring, *everyone, nodes=[OWN])
    (record,) = result.rounds
    assert [(f.partition, f.phase) for f in record.failures] == [(0, "train"), (0, "evaluate")]
    assert "its updates are private" in record.failures[0].reason
    assert "client's replies are private" in record.failures[1].reason
    assert record.replies == 5


# ------------------------------------------------------------------------------------ models
def test_a_model_with_buffers_is_refused_before_anybody_works(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benches, "load_task", TinyTask)
    benches._workbench.cache_clear()
    try:
        config: RunConfig = configured("privacy.mode=central", "model.batch-norm=trained")
        layers = workbench(config.to_flat()).resident.layers
        with pytest.raises(ConfigError, match="num_batches_tracked"):
            build_strategy(config, layers)
        build_strategy(configured(), layers)
        # If only a node asks for privacy, the server does not refuse anything in its place.
        config = configured(
            "federation.clients-per-round=6",
            "federation.min-replies=1",
            "model.batch-norm=trained",
        )
        grid: InProcessGrid = Recorded(config, nodes=[OWN])
        (record,) = run(config, 1, grid).rounds
        assert [f.partition for f in record.failures] == [0]
        assert "no parameter but a buffer" in record.failures[0].reason
    finally:
        benches._workbench.cache_clear()


def test_secure_sums_are_of_what_clients_have_protected() -> None:
    private = ["privacy.mode=local", "privacy.clip=0.01", "strategy.name=top"]
    grid, secure = rounds_of(*private, "secagg.enabled=true", rounds=2)
    _, plain = rounds_of(*private, rounds=2)
    assert [(r.replies, r.failures, r.metrics["train_loss"]) for r in secure.rounds] == [
        (4, [], None)
    ] * 2
    assert {name for update in sent(grid) for name in update} == {"masked"}
    for name, values in plain.after.items():
        np.testing.assert_allclose(secure.after[name], values, rtol=1e-6, atol=1e-6, err_msg=name)
