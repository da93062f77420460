"""Personal layers: each client's own by plain SGD, the mean of the others, and no byte of them sent."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.common.serde import message_to_proto
from torch import nn

from layerfed.client.personal import OwnLayers
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, RunConfig
from layerfed.config.seeding import Stream, generator
from layerfed.engine import run_on
from layerfed.exchange import open_store
from layerfed.export import export_run
from layerfed.export.saved import SavedRun
from layerfed.runs.files import read_lines
from layerfed.task import load_task
from tests.fakes import Recorded
from tests.tiny_task import check_resumed, configured, run

TINY = "task.name=tests.tiny_task:TinyTask"
CPU = torch.device("cpu")
# Beside each adapter a second one, which stays on its client.
SECOND = ("model.personal=", "model.tuning=lora", "model.lora-rank=2", "model.personal-rank=3")


def personal(*settings: str) -> RunConfig:
    return configured(
        *(TINY, "model.personal=head", "task.local-test=0.3", "strategy.name=full"), *settings
    )


def by_hand(config: RunConfig, rounds: int, own: tuple[str, ...]) -> list[dict[int, nn.Module]]:
    """Return each client's model after each round: its own parts, and the mean of the others."""
    task = load_task(config)
    clients = range(config.federation.clients)
    shared = task.build_model().state_dict()
    parts = {c: {n: t.clone() for n, t in shared.items() if n.startswith(own)} for c in clients}
    found = []
    for number in range(1, rounds + 1):
        total, sums = 0, dict[str, torch.Tensor]()
        for client in clients:
            model, examples = task.build_model(), task.client_examples(client)[0]
            model.load_state_dict(shared | parts[client])
            model.train()
            model.embed.requires_grad_(False)
            parameters = [p for p in model.parameters() if p.requires_grad]
            sgd = torch.optim.SGD(parameters, config.train.lr)
            rng = generator(config.run.seed, Stream.TRAIN, number, client)
            batches = examples.shuffled(config.train.batch_size, CPU, rng)
            for batch in islice(batches, config.train.local_steps):
                sgd.zero_grad()
                task.loss(model, batch).backward()
                sgd.step()
            after = {n: t.detach().clone() for n, t in model.state_dict().items()}
            parts[client] = {n: after[n] for n in parts[client]}
            total += len(examples)
            for name, value in after.items():
                sums[name] = sums.get(name, 0) + len(examples) * value.double()
        shared = {n: t if n.startswith(own) else sums[n] / total for n, t in shared.items()}
        models = {}
        for client in clients:
            models[client] = task.build_model()
            models[client].load_state_dict(shared | parts[client])
            models[client].eval()
        found.append(models)
    return found


@pytest.fixture
def without_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)


@pytest.mark.usefixtures("without_dropout")
@pytest.mark.parametrize(
    ("pattern", "own"),
    [
        ("head", ("norm.", "head.")),
        ("blocks.[12], head", ("blocks.1", "blocks.2", "norm.", "head.")),
    ],
)
def test_it_is_fedper_by_hand(pattern: str, own: tuple[str, ...]) -> None:
    """Clients' scores are those of their own models [Arivazhagan et al., FedPer, 2019]."""
    whole = ("federation.clients-per-round=6", "model.batch-norm=trained")
    config = personal(f"model.personal={pattern}", *whole)
    done, task = run(config, 3), load_task(config)
    expected = by_hand(config, 3, own)
    for record, models in zip(done.rounds, expected, strict=True):
        assert record.failures == []
        right, count = 0.0, 0
        for client, model in models.items():
            held_out = task.client_examples(client)[1]
            batch = next(held_out.in_order(1000, CPU))
            hits = (task.logits(model, batch).argmax(1) == batch["label"]).double()
            loss = float(task.loss(model, batch).detach())
            stated = record.numbers.rows[client]
            assert stated["client_accuracy"] == pytest.approx(float(hits.mean()))
            assert stated["client_loss"] == pytest.approx(loss, rel=1e-4)
            right, count = right + float(hits.sum()), count + len(hits)
        assert record.value == record.scores["accuracy"] == pytest.approx(right / count)
    # One round: BatchNorm of a few examples blows rounding up later.
    first = expected[0][0].state_dict()
    for name, value in run(config, 1).after.items():
        if name.startswith(own):
            np.testing.assert_array_equal(value, done.before[name])
        else:
            np.testing.assert_allclose(value, first[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    "settings",
    [
        ("model.personal=head",),
        ("model.personal=blocks.3", "strategy.name=top", "budget.layers=2"),
        ("model.personal=head, blocks.0", "strategy.name=ilp", "budget.layers=2"),
        ("model.personal=head", "strategy.name=fedtlu", "strategy.side=client"),
        ("model.personal=blocks.*", "strategy.name=fedtlu", "strategy.side=client"),
        ("model.personal=head, blocks.3", "strategy.name=fedluar"),
        ("model.personal=head", "strategy.name=top", "exchange.codec=int8"),
        ("model.personal=blocks.2", "model.tuning=lora", "server.aggregation=svd"),
        (*SECOND, "strategy.name=ilp", "budget.layers=2"),
        (*SECOND, "server.aggregation=svd", "strategy.name=top", "exchange.codec=int8"),
        (*SECOND, "server.aggregation=stack", "model.personal=head"),
        (*SECOND, "strategy.name=fedtlu", "strategy.side=client", "train.optimizer=adamw"),
        (*SECOND, "strategy.name=top", "secagg.enabled=true"),
        (*SECOND, "task.local-test=0", "privacy.mode=local", "privacy.noise=0.1"),
        (*SECOND, "task.local-test=0", "privacy.mode=central", "privacy.noise=0.1"),
        ("model.personal=head", "strategy.name=top", "secagg.enabled=true"),
        ("model.tuning=lora", "task.local-test=0", "privacy.mode=local", "privacy.noise=0.1"),
    ],
)
def test_no_byte_of_a_personal_layer_is_in_any_message(settings: tuple[str, ...]) -> None:
    config = personal(*settings)
    grid = Recorded(config)
    done = run(config, 2, grid)
    resident = workbench(config.to_flat()).resident
    layers = resident.layers
    names = layers.kept
    assert [record.failures for record in done.rounds] == [[], []]
    kept = kept_by(grid)
    assert len(kept) > 1
    messages = [m for pair in grid.replies for m in pair]
    written = [message_to_proto(message).SerializeToString() for message in messages]
    changed = 0
    for tensors in kept.values():
        for key, value in tensors.items():
            if value.size < 6:
                continue
            name = key.partition("/")[2]
            assert name in names
            start = resident.values(name)
            changed += not np.array_equal(value, start)
            for content in (value, value - start):
                if content.any():
                    assert not any(content.tobytes() in message for message in written)
    assert changed
    for message in messages:
        arrays = message.content.array_records.get("arrays", {})
        assert not names.intersection(name.partition("#")[0] for name in arrays)
    for name in names:
        if name in done.before:
            np.testing.assert_array_equal(done.after[name], done.before[name])
        else:
            assert "personal" in name
            assert name not in done.after
    assert not {*layers.personal}.intersection(*(record.moved for record in done.rounds))


def test_a_layer_that_some_clients_have_not_trained_yet() -> None:
    config = personal(
        "model.personal=blocks.1", "strategy.name=random", "federation.clients-per-round=6"
    )
    grid = Recorded(config)
    done = run(config, 4, grid)
    assert all(record.failures == [] for record in done.rounds)
    trained = {c for n in range(1, 5) for c, blocks in done.masks(n).items() if 1 in blocks}
    kept = {
        c for c, tensors in kept_by(grid).items() if any("blocks.1" in name for name in tensors)
    }
    assert trained == kept
    assert 0 < len(trained) < 6


@pytest.mark.parametrize(("pattern", "public"), [("head", True), ("head, blocks.3", False)])
def test_of_a_personal_block_nothing_is_public(pattern: str, public: bool) -> None:
    """Statistics of global weights are sent without noise, and those of a client's own with it."""
    private = ("privacy.mode=local", "privacy.noise=0.1", "task.local-test=0")
    noisy = ("privacy.statistics-clip=1", "privacy.statistics-noise=1")
    config = personal(f"model.personal={pattern}", "strategy.name=rgn", *private, *noisy)
    done = run(config, 1)
    selection, blocks = done.rounds[0].selection, workbench(config.to_flat()).resident.layers.blocks
    assert selection is not None
    exact = [sum(float((done.before[p] ** 2).sum()) for p in b.parameters) for b in blocks]
    for row in selection.statistics["param_norm_sq"]:
        assert np.allclose(row, exact, rtol=1e-5) is public


def kept_by(grid: Recorded) -> dict[int, dict[str, np.ndarray]]:
    """Return what each client keeps of its own, by round and tensor."""
    (token,) = {m.content.config_records["config"]["run"] for m, _ in grid.trained()}
    found = {c: open_store("", 10.0).recall(f"{token}/{c}/personal") for c in range(6)}
    return {client: tensors for client, tensors in found.items() if tensors}


def test_a_client_keeps_the_versions_that_a_checkpoint_may_need() -> None:
    config = personal("run.checkpoint-every=2", "run.checkpoints=1")
    grid = Recorded(config)
    run(config, 6, grid)
    trained: dict[int, list[int]] = {}
    for asked, _ in grid.trained():
        entries = asked.content.config_records["config"]
        trained.setdefault(int(entries["client"]), []).append(int(entries["round"]))
    for client, tensors in kept_by(grid).items():
        rounds = sorted({int(name.partition("/")[0]) for name in tensors})
        last = trained[client][-1]
        since = [n for n in trained[client] if n > last - 2]
        before = [n for n in trained[client] if n <= last - 2][-1:]
        assert rounds == before + since


@pytest.mark.parametrize("settings", [("model.personal=head, blocks.1",), SECOND])
def test_a_resumed_run_is_the_same_to_the_bit(settings: tuple[str, ...]) -> None:
    check_resumed(personal("strategy.name=ilp", *settings))


def test_the_file_is_private_to_its_user_and_a_lost_one_is_an_error(tmp_path: Path) -> None:
    config = personal("federation.clients-per-round=6")
    nodes = [{"store": str(tmp_path / f"node{client}")} for client in range(6)]
    grid = Losing(config, nodes=nodes)
    done = run(config, 3, grid)
    files = [*tmp_path.glob("node*/own-*.safetensors")]
    assert files
    assert all(file.stat().st_mode & 0o777 == 0o600 for file in files)
    [failure, other] = [f for f in done.rounds[2].failures if f.phase == "train"]
    assert {failure.partition, other.partition} == {0, 1}
    assert done.rounds[2].replies == 4
    assert "trained its personal layers in round 2, and its store lacks them" in failure.reason


class Losing(Recorded):
    """Nodes whose stores are cleared before the third round."""

    def push_messages(self, messages):  # type: ignore[no-untyped-def]
        held = list(messages)
        if any(m.metadata.group_id == "3" and m.metadata.message_type == "train" for m in held):
            for context in list(self._contexts.values())[:2]:
                for file in Path(str(context.node_config["store"])).glob("own-*"):
                    file.unlink()
        return super().push_messages(held)


def test_a_run_is_judged_by_its_clients(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = personal("federation.rounds=3", f"run.dir={tmp_path}", "strategy.name=top")
    folder = run_on("inprocess", config)
    lines = read_lines(folder / "metrics.jsonl")
    summary = json.loads((folder / "summary.json").read_text())
    values = [line["client_accuracy"] for line in lines]
    assert [line["accuracy"] for line in lines] == values
    assert summary["best"] == {"round": 1 + int(np.argmax(values)), "value": max(values)}
    assert summary["initial_scores"] == {}
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["scores"]["accuracy"] == values[-1]
    everyone = {row["client"] for row in read_lines(folder / "clients.jsonl")}
    assert {row["partition"] for row in result["clients"]} == everyone
    assert (folder / "report.html").exists()
    export_run(SavedRun.open(folder, best=True), tmp_path / "out")
    assert "personal: head stayed on the clients" in caplog.text
    assert "accuracy" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            ("task.local-test=0",),
            "needs task.local-test above 0: only clients have what stays on th",
        ),
        ((*SECOND, "task.local-test=0"), "personal-rank = 3 needs task.local-test above 0"),
        (
            ("model.personal=", "model.personal-rank=3"),
            "personal-rank = 3 has no use for model.tuni",
        ),
        (
            ("run.ray-address=a:1",),
            "'head' does not go with run.ray-address = 'a:1': what stays on",
        ),
        (("model.personal=hat",), r"'hat' names no layer .* blocks\.0 to blocks\.3 and head"),
        (("model.personal=embeddings",), "'embeddings' names no layer that clients train"),
        (("model.personal=*",), "leaves no layer that is shared"),
    ],
)
def test_what_cannot_be_personal_is_refused(settings: tuple[str, ...], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        workbench(personal(*settings).to_flat())


@pytest.mark.parametrize("storage", ["checkpoint", "bfloat16"])
def test_a_personal_layer_begins_at_the_checkpoints_own_weights(storage: str) -> None:
    """A layer that is held in half precision is not rounded in what a client keeps."""
    config = personal("model.personal=blocks.3", f"model.storage={storage}")
    bench, content = workbench(config.to_flat()), dict[str, np.ndarray]()
    store = SimpleNamespace(remember=lambda key, found: content.update(found))
    base = load_task(config).build_model().state_dict()
    unchanged = {
        name: np.zeros_like(base[name]) for name in bench.resident.layers["blocks.3"].tensors
    }
    OwnLayers(SimpleNamespace(bench=bench, run=config, store=store), "key", 1).keep(unchanged)  # type: ignore[arg-type]
    for name in unchanged:
        np.testing.assert_array_equal(content[f"1/{name}"], base[name].numpy())


def test_a_stored_base_does_not_come_back_while_a_client_works() -> None:
    """Exact weights of a layer that is held in half precision are not taken for a client's own."""
    exact = run(personal("model.personal=blocks.3"), 2)
    stored = run(personal("model.personal=blocks.3", "model.storage=bfloat16"), 2)
    for one, other in zip(exact.rounds, stored.rounds, strict=True):
        assert one.metrics["train_loss"] == pytest.approx(other.metrics["train_loss"], abs=0.05)
