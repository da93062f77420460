"""LoRA in the blocks: gradients and rounds are those of plain PEFT, and nothing else moves."""

from __future__ import annotations

from itertools import islice

import numpy as np
import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from layerfed.client.training import selected_layers
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, RunConfig
from layerfed.config.seeding import Stream, generator
from layerfed.models.factors import factor_pairs
from layerfed.models.layers import layer_costs
from layerfed.models.stored import Stored
from layerfed.server.aggregation import Aggregation
from layerfed.task import load_task
from layerfed.task.base import Batch, Examples
from tests.conftest import BLOCKS
from tests.tiny_task import TinyTask, configured, run

BERT, LORA = (
    "task.name=tests.models.test_adapters:BertTask",
    ("model.tuning=lora", "model.lora-rank=2"),
)
TINY = "task.name=tests.tiny_task:TinyTask"
VIT = "task.name=digits"
CPU = torch.device("cpu")


class BertTask(TinyTask):
    """A tiny BERT on texts of random tokens."""

    def build_model(self) -> nn.Module:
        sizes = {"hidden_size": 8, "intermediate_size": 16, "vocab_size": 11, "num_labels": 3}
        config = transformers.BertConfig(
            **sizes, num_hidden_layers=3, num_attention_heads=2, hidden_dropout_prob=0.0
        )
        config.initializer_range = 0.3
        config.attention_probs_dropout_prob = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return transformers.BertForSequenceClassification(config)

    def partition(self, partition_id: int) -> Examples:
        rng = generator(self.config.run.seed, Stream.PARTITION, partition_id)
        count = 10 + 4 * partition_id
        ids = torch.tensor(rng.integers(11, size=(count, 6)))
        return Examples.of({"x": ids, "label": torch.tensor(rng.integers(3, size=count))})

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(input_ids=batch["x"]).logits  # type: ignore[no-any-return]

    def example(self) -> Batch:
        return {"x": torch.zeros(1, 6, dtype=torch.long)}


def lora(*settings: str) -> RunConfig:
    return configured(*LORA, "strategy.name=full", *settings)


def plain(config: RunConfig) -> nn.Module:
    """Return the model as PEFT makes it, with our A's; only adapters and head are trainable."""
    task = load_task(config)
    head, targets = ("bert.pooler.", "classifier."), ["query", "key", "value", "dense"]
    if config.task.name == "digits":
        head, targets = ("norm.", "head."), ["qkv", "proj", "fc1", "fc2"]
    made = peft.LoraConfig(
        r=config.model.lora_rank,
        lora_alpha=config.model.lora_alpha,
        target_modules=targets,
        exclude_modules=r".*(pooler|patch_embed).*",
    )
    model: nn.Module = peft.get_peft_model(task.build_model(), made).base_model.model
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name or name.startswith(head))
    ours = workbench(config.to_flat()).resident.base_state()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.from_numpy(ours[name]))
    return model


@pytest.mark.parametrize("task", [BERT, VIT])
def test_gradients_are_those_of_plain_peft(task: str) -> None:
    config = lora(task)
    bench, expected = workbench(config.to_flat()), plain(config)
    batch = next(bench.task.test_examples().in_order(8, CPU))
    layers, model = bench.resident.layers, bench.resident.model
    bench.task.loss(expected.eval(), batch).backward()
    wanted = {n: p.grad for n, p in expected.named_parameters() if p.grad is not None}
    with selected_layers(model, layers, layers.trained([True] * layers.num_blocks)):
        bench.task.loss(model.eval(), batch).backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert any("lora_B" in name and gradient.abs().sum() > 0 for name, gradient in wanted.items())


@pytest.mark.parametrize("task", [BERT, VIT])
def test_full_is_fedit_by_hand(task: str) -> None:
    """Each client trains all adapters and the head by plain SGD; the server averages A and B."""
    config = lora(task)
    done = run(config)
    [record] = done.rounds
    assert record.selection is not None
    clients = list(record.selection.clients)
    task_ = load_task(config)
    total, sums = 0, dict[str, np.ndarray]()
    for client in clients:
        model, examples = plain(config).train(), task_.client_examples(client)[0]
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        sgd = torch.optim.SGD(parameters.values(), lr=config.train.lr)
        rng = generator(config.run.seed, Stream.TRAIN, 1, client)
        batches = examples.shuffled(config.train.batch_size, CPU, rng)
        for batch in islice(batches, config.train.local_steps):
            sgd.zero_grad()
            task_.loss(model, batch).backward()
            sgd.step()
        total += len(examples)
        for name, parameter in parameters.items():
            term = len(examples) * parameter.detach().double().numpy()
            sums[name] = sums.get(name, 0 * term) + term
    assert len(clients) > 1
    for name, value in done.after.items():
        expected = sums[name] / total if name in sums else done.before[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-6, err_msg=name)
        if name.endswith(("lora_B.default.weight", "classifier.weight", "head.weight")):
            assert not np.array_equal(value, done.before[name]), name


@pytest.mark.parametrize("strategy", ["top", "ilp", "random"])
def test_unselected_adapters_and_all_weights_stay_to_the_bit(strategy: str) -> None:
    config = lora(TINY, f"strategy.name={strategy}")
    done, layers = run(config), workbench(config.to_flat()).resident.layers
    chosen = {block for blocks in done.masks(1).values() for block in blocks}
    assert 0 < len(chosen) <= BLOCKS
    for index, layer in enumerate(layers.layers):
        trained = layer.name == "head" or index - 1 in chosen
        for name in layer.tensors:
            same = np.array_equal(done.before[name], done.after[name])
            assert same is not trained or ("lora_A" in name and trained), name
    assert any("running_mean" in name for name in layers.embeddings.tensors)


def test_adapters_are_what_is_budgeted_and_sent() -> None:
    bench = workbench(lora(TINY).to_flat())
    layers = bench.resident.layers
    for index, block in enumerate(layers.blocks):
        prefix = f"blocks.{index}.linear.lora_"
        assert set(block.tensors) == {f"{prefix}A.default.weight", f"{prefix}B.default.weight"}
        assert (block.elements, block.bytes) == (2 * (6 + 6), 4 * 2 * (6 + 6))
    assert layer_costs(layers, "parameters").tolist() == [24.0] * BLOCKS  # type: ignore[union-attr]
    up = sum(layer.bytes for layer in (*layers.blocks, layers.head))
    ledger = run(lora(TINY)).rounds[0].ledger
    assert len(ledger.rows) == 4
    assert {row.up for row in ledger.rows.values()} == {up}


def test_seeds_draw_the_adapters_and_the_fingerprint_knows() -> None:
    def base(*settings: str) -> str:
        return workbench(lora(TINY, *settings).to_flat()).resident.base

    torch.manual_seed(1)
    first, drawn = base(), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn), "adapters drew from the global generator"
    assert base("model.storage=bfloat16") == first
    assert base("run.seed=1") != first  # TinyTask's own weights do not depend on it
    assert base("model.lora-rank=3") != first


def test_weights_are_stored_and_adapters_are_not() -> None:
    config = lora(TINY, "model.storage=bfloat16")
    tensors = workbench(config.to_flat()).resident.tensors
    assert isinstance(tensors["blocks.0.linear.base_layer.weight"], Stored)
    assert type(tensors["blocks.0.linear.lora_A.default.weight"].data) is Tensor
    done, exact = run(config), run(lora(TINY))
    for name, value in done.after.items():
        if "lora_" in name or name.startswith("head"):
            np.testing.assert_allclose(value, exact.after[name], rtol=0, atol=0.01, err_msg=name)


def test_targets_dropout_and_scale_are_what_is_asked_for() -> None:
    settings = ("model.lora-targets=query, output.dense", "model.lora-alpha=6")
    model = workbench(lora(BERT, *settings, "model.lora-dropout=0.3").to_flat()).resident.model
    found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    ends = ("query", "output.dense", "attention.output.dense")
    assert len(found) == 9
    assert all(name.endswith(ends) for name in found)
    for module in found.values():
        assert module.scaling == {"default": 3.0}
        assert module.lora_dropout["default"].p == 0.3


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ([BERT, "model.lora-targets=qkv"], r"'qkv' names nothing .*: query, key, value, dense"),
        (
            [BERT, "model.lora-targets=layer.1.attention.self.query"],
            r"nothing to adapt in blocks\.0",
        ),
        (["task.name=tests.models.test_adapters:FusedTask"], "that can be adapted are: none"),
    ],
)
def test_a_model_without_modules_to_adapt_is_refused(settings: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        workbench(lora(*settings).to_flat())


class FusedTask(TinyTask):
    """Blocks whose linear layers torch runs as one operation, past any adapter."""

    def build_model(self) -> nn.Module:
        blocks = [nn.TransformerEncoderLayer(8, 2, 8, batch_first=True) for _ in range(2)]
        return nn.Sequential(nn.Linear(5, 8), nn.Sequential(*blocks), nn.Linear(8, 3))


def products(rule: str, settings: tuple[str, ...] = ()) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return B·A of each adapter after a rule's aggregation, beside Σ_i p_i B_i·A_i."""
    resident = workbench(lora(TINY, *settings).to_flat()).resident
    state, layers = resident.base_state(), resident.layers
    rng, examples = np.random.default_rng(0), (3, 9, 4)
    mean = Aggregation(rule).begin(layers, state)
    expected: dict[str, np.ndarray] = {}
    pairs = [pair for block in layers.blocks for pair in factor_pairs(block.parameters)]
    for count in examples:
        update = {name: rng.standard_normal(value.shape) for name, value in state.items()}
        mean.add([block.name for block in layers.blocks], update, count)
        for a, b in pairs:
            product = (state[b] + update[b]) @ (state[a] + update[a])
            expected[a] = expected.get(a, 0 * product) + count / sum(examples) * product
    after: dict[str, np.ndarray] = {}
    for block in layers.blocks:
        changes = mean.changes(block.name)
        found = mean.pop(block.name)
        if rule == "svd":
            for name, change in zip(block.parameters, changes, strict=True):
                np.testing.assert_array_equal(found[name], change)
        after |= {name: state[name] + change for name, change in found.items()}
    return [(after[b] @ after[a], expected[a]) for a, b in pairs]


def test_svd_is_the_closest_of_its_rank_to_the_mean_product() -> None:
    """Its distance is what the singular values after the r-th leave [Eckart & Young, 1936]."""
    for (best, exact), (averaged, _) in zip(products("svd"), products("mean"), strict=True):
        left = np.linalg.svd(exact)[1][2:]
        distance = np.linalg.norm(best - exact)
        assert distance == pytest.approx(np.sqrt((left**2).sum()), rel=1e-9)
        assert 0 < distance < np.linalg.norm(averaged - exact)
    for best, exact in products("svd", ("model.lora-rank=6",)):
        np.testing.assert_allclose(best, exact, rtol=0, atol=1e-9)


def test_svd_of_adapters_without_effect_keeps_their_factors() -> None:
    resident = workbench(lora(TINY).to_flat()).resident
    state, layers = resident.base_state(), resident.layers
    mean = Aggregation("svd").begin(layers, state)
    mean.add(["blocks.0"], {name: 0 * value for name, value in state.items()}, 5)
    assert all(not change.any() for change in mean.pop("blocks.0").values())


def test_a_round_with_svd_is_not_fedit_and_learns() -> None:
    def factors(rule: str) -> list[np.ndarray]:
        after = run(lora(TINY, f"server.aggregation={rule}"), 2).after
        return [value for name, value in after.items() if "lora_" in name]

    found, other = factors("svd"), factors("mean")
    assert all(np.isfinite(value).all() and value.any() for value in found)
    assert not any(np.allclose(a, b) for a, b in zip(found, other, strict=True))
    with pytest.raises(ConfigError, match=r"server\.aggregation = 'svd' is for adapters"):
        configured(TINY, "server.aggregation=svd")
