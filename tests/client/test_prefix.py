"""What is kept of a frozen prefix changes nothing but the arithmetic, and is never out of date."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from layerfed.client import prefix, workbench
from layerfed.client.flops import TotalFlops
from layerfed.client.local_optimizers import LocalSGD
from layerfed.client.prefix import Kept, PrefixCache
from layerfed.client.probe import probe_layers
from layerfed.client.resident import ResidentModel
from layerfed.client.training import Step, TrainResult, train_update
from layerfed.client.workbench import Workbench
from layerfed.exchange.messages import Manifest
from layerfed.models.layers import LayerMap
from layerfed.task.base import Batch
from layerfed_assets import backbone
from tests.conftest import TinyNet
from tests.tiny_task import TinyTask, configured, run

CPU = torch.device("cpu")
ROWS, PASSES = 20, 3
Logits = Callable[[nn.Module, Batch], Tensor]


def scores(model: nn.Module, batch: Batch) -> Tensor:
    if isinstance(model, BertForSequenceClassification):
        words = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**words).logits  # type: ignore[no-any-return]
    return model(batch["image"])  # type: ignore[no-any-return]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(scores(model, batch), batch["label"])


def vit() -> nn.Module:
    return backbone(num_classes=3)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return BertForSequenceClassification(
        BertConfig(vocab_size=50, intermediate_size=64, num_labels=3, **sizes)
    )


def convolutional(name: str, **options: object) -> nn.Module:
    return timm.create_model(name, num_classes=3, **options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": vit,
    "bert": bert,
    "resnet": partial(convolutional, "resnet10t"),
    "efficientnet": partial(convolutional, "efficientnet_lite0"),
    "tiny": TinyNet,
}


def rows(name: str) -> list[Batch]:
    """Two batches, of which the last is smaller."""
    rng = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (ROWS,), generator=rng)
    if name == "bert":
        ids = torch.randint(1, 50, (ROWS, 8), generator=rng)
        mask = (torch.arange(8) < torch.randint(3, 9, (ROWS, 1), generator=rng)).long()
        whole = {"input_ids": ids, "attention_mask": mask, "label": labels}
    elif name == "tiny":
        whole = {"image": torch.randn(ROWS, 5, generator=rng), "label": labels}
    else:
        side = 32 if name == "vit" else 64
        whole = {"image": torch.randn(ROWS, 3, side, side, generator=rng), "label": labels}
    return [{n: t[:12] for n, t in whole.items()}, {n: t[12:] for n, t in whole.items()}]


def resident(name: str) -> ResidentModel:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return MODELS[name]()

    def layers(model: nn.Module) -> LayerMap:
        first = {n: t[:1] for n, t in rows(name)[0].items()}
        return LayerMap.from_model(model, forward=lambda net: scores(net, first))

    return ResidentModel(build, layers, CPU)


def trained(
    held: ResidentModel, name: str, cache: PrefixCache | None, low: int, **how: Any
) -> tuple[dict[str, np.ndarray], TrainResult]:
    mask = [i >= low for i in range(held.layers.num_blocks)]
    torch.manual_seed(1)
    return train_update(
        held, mask, rows(name) * PASSES, loss, partial(LocalSGD, lr=1e-3), cache=cache, **how
    )


def assert_close(
    found: dict[str, np.ndarray], true: dict[str, np.ndarray], tolerance: float = 5e-3
) -> None:
    """Half precision has 11 bits, so an update may differ by some thousandths of its norm."""
    assert found.keys() == true.keys()
    difference = sum(float(((found[n] - true[n]) ** 2).sum()) for n in true) ** 0.5
    norm = sum(float((array**2).sum()) for array in true.values()) ** 0.5
    assert norm > 0
    assert difference <= tolerance * norm


# Not EfficientNet's top in half precision: BatchNorm on random weights and few images enlarges rounding.
@pytest.mark.parametrize(
    ("kind", "name", "depth"),
    sorted(
        {*product([torch.float16, torch.float32], MODELS, ["head", "top"])}
        - {(torch.float16, "efficientnet", "top")},
        key=str,
    ),
)
def test_training_is_equal_with_and_without(
    kind: torch.dtype, name: str, depth: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "TYPE", kind)
    tolerance = 5e-3 if kind == torch.float16 else 1e-4
    held = resident(name)
    low = held.layers.num_blocks - (depth == "top")
    cache = PrefixCache(held, 1e7)

    true, plain = trained(held, name, None, low)
    found, kept = trained(held, name, cache, low)

    assert not cache.refused
    assert_close(found, true, tolerance)
    assert kept.loss == pytest.approx(plain.loss, rel=1e-3)
    assert (kept.found, kept.examples) == (ROWS * (PASSES - 1), ROWS * PASSES)
    assert kept.flops < plain.flops
    again, later = trained(held, name, cache, low)
    assert_close(again, true, tolerance)
    assert later.found == ROWS * PASSES
    # All that is saved, and nothing else, is missing in what was computed.
    assert later.flops + later.saved == pytest.approx(plain.flops, rel=1e-6)


@pytest.mark.parametrize(
    "how", [Step(micro_batch=2), Step(checkpointing=True), Step(precision="bfloat16")]
)
def test_every_way_to_compute_a_step_works_with_it(how: Step) -> None:
    held = resident("vit")
    low = held.layers.num_blocks - 2
    true, _ = trained(held, "vit", None, low, how=how)
    found, result = trained(held, "vit", PrefixCache(held, 1e7), low, how=how)
    assert result.found
    if how.precision == "float32":
        assert_close(found, true)


def moved(held: ResidentModel, layer: str) -> None:
    """Give a layer other weights, as a message does."""
    before = {name: held.tensors[name].detach().numpy() for name in held.layers[layer].tensors}
    arrays = {name: np.array(1.5 * array, array.dtype) for name, array in before.items()}
    digests = {**held._digests, layer: f"after {held._digests[layer]}"}
    held.move_to(Manifest(held.base, {n: str(d) for n, d in digests.items()}), arrays)


def test_a_changed_block_of_the_prefix_makes_what_was_kept_invalid() -> None:
    held = resident("vit")
    low, cache = held.layers.num_blocks - 1, PrefixCache(held, 1e7)
    trained(held, "vit", cache, low)
    moved(held, f"blocks.{low}")
    assert trained(held, "vit", cache, low)[1].found == ROWS * PASSES  # it is not in the prefix
    moved(held, "blocks.0")

    true, _ = trained(held, "vit", None, low)
    found, result = trained(held, "vit", cache, low)

    assert result.found == ROWS * (PASSES - 1)
    assert_close(found, true)


def test_an_evaluation_begins_at_the_lowest_block_that_changed() -> None:
    held = resident("vit")
    cache, last = PrefixCache(held, 1e7), held.layers.num_blocks - 1
    moved(held, f"blocks.{last}")
    batch = rows("vit")[0]
    with torch.no_grad():
        true = scores(held.model, batch)
        first = cache.evaluating(scores)(held.model, batch)
        seen: list[str] = []
        for name in (f"blocks.{last - 1}", f"blocks.{last}"):
            module = held.model.get_submodule(held.layers[name].modules[0])
            inner = next(m for m in module.modules() if isinstance(m, nn.Linear))
            inner.register_forward_hook(lambda *_, name=name: seen.append(name))  # type: ignore[misc]
        again = cache.evaluating(scores)(held.model, batch)
    assert seen == [f"blocks.{last}"]
    torch.testing.assert_close(first, true, rtol=5e-3, atol=5e-3)
    torch.testing.assert_close(again, first)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_probe_begins_where_nothing_measured_or_changed_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefix, "TYPE", torch.float32)
    held = resident(name)
    count, cache = held.layers.num_blocks, PrefixCache(held, 1e8)
    low = count - 2
    several = ("grad_norm_sq", "snr", "fisher", "loss_decrease")
    top = [i >= low for i in range(count)]

    def probed(blocks: list[bool], kept: PrefixCache | None) -> tuple[np.ndarray, float]:
        found, flops = probe_layers(
            held.model, held.layers, rows(name), loss, several, blocks=blocks, cache=kept
        )
        return np.array([found[statistic] for statistic in several]), flops

    true, whole = probed(top, None)
    first, _ = probed(top, cache)
    again, flops = probed(top, cache)
    # One of them is a small difference of losses.
    near = partial(np.testing.assert_allclose, rtol=1e-2, atol=1e-7)
    near(first, true)
    np.testing.assert_array_equal(again, first)
    assert flops < 0.8 * whole

    # Above a block that changes, nothing is kept, since the next round has another one.
    moved(held, held.layers.blocks[low - 1].name)
    near(probed(top, cache)[0], probed(top, None)[0])
    moved(held, held.layers.blocks[low - 1].name)
    cache.kept.add = lambda *_: pytest.fail("more is kept")  # type: ignore[method-assign]
    near(probed(top, cache)[0], probed(top, None)[0])


class Leaking(TinyNet):
    """A network whose head reads the output of the first block too."""

    def forward(self, x: Tensor) -> Tensor:
        x = first = self.blocks[0](self.embed(x))
        for block in self.blocks[1:]:
            x = block(x)
        return self.head(self.norm(x + 1e-3 * first))  # type: ignore[no-any-return]


def test_a_model_that_cannot_be_cut_is_trained_as_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(MODELS, "tiny", Leaking)
    held = resident("tiny")
    cache = PrefixCache(held, 1e7)
    true, _ = trained(held, "tiny", None, 2)
    caplog.clear()
    for _ in range(2):
        found, result = trained(held, "tiny", cache, 2)
        assert all(np.array_equal(found[name], true[name]) for name in true)
        assert result.found == 0
    assert set(cache.refused) == {2}
    # The output of the first block itself does reach the rest only through it.
    assert trained(held, "tiny", cache, 1)[1].found


class Padding(nn.Module):
    """Says which tokens are padding: a module without weights that all blocks hear of."""

    def forward(self, x: Tensor) -> Tensor:
        return x == 0


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        scores = (self.query(x) @ x.mT).masked_fill(padding[:, None], -1e9)
        return x + scores.softmax(-1) @ self.value(x)  # type: ignore[no-any-return]


class Padded(nn.Module):
    """A network of tokens whose blocks attend to those that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.padding, self.embed = Padding(), nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(Attending() for _ in range(4))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        padding, x = self.padding(x), self.embed(x)
        for block in self.blocks:
            x = block(x, padding)
        return self.head(x.mean(1))  # type: ignore[no-any-return]


def test_a_mask_that_the_first_batch_does_not_need_is_seen() -> None:
    """False stands in for a skipped mask, and nothing is True without padding."""
    words = torch.randint(1, 20, (8, 10), generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 3
    held = ResidentModel(
        Padded, lambda model: LayerMap.from_model(model, forward=lambda net: net(words)), CPU
    )
    cache, mask = PrefixCache(held, 1e7), [False, False, False, True]
    found = []
    for kept in (None, cache):
        first = {"image": words, "label": labels}
        padded = {"image": words.masked_fill(torch.arange(10) > 2, 0), "label": labels}
        for batch in (first, padded):
            make = partial(LocalSGD, lr=0.1)
            update, result = train_update(held, mask, [batch], loss, make, cache=kept)
        found.append(update)
    assert result.examples == 8
    assert cache.splits
    assert_close(found[1], found[0])


def test_a_group_of_few_rows_takes_little_room() -> None:
    kept = Kept(1e6)
    for width in range(1, 30):
        kept.add(("all", width), [b"a", b"b", b"c"], torch.zeros(3, width))
    assert kept.nbytes == sum(2 * 3 * width for width in range(1, 30))
    keys = [bytes([i]) for i in range(60)]
    values = torch.arange(60.0).reshape(60, 1)
    for i in range(0, 60, 4):
        kept.add(("many", 1), keys[i : i + 4], values[i : i + 4])
    found = kept.find(("many", 1), keys)
    assert [float(found[i]) for i in range(60)] == list(range(60))


def test_a_prefix_that_saves_little_is_not_kept() -> None:
    held = resident("vit")
    cache = PrefixCache(held, 1e7)
    assert trained(held, "vit", cache, 0)[1].found == 0
    assert set(cache.refused) == {0}


def test_a_prefix_begins_where_no_block_ever_changed() -> None:
    """Blocks that change make what is above them invalid, and leave what is below them."""
    held = resident("vit")
    last, cache = held.layers.num_blocks - 1, PrefixCache(held, 1e7)
    moved(held, f"blocks.{last - 2}")
    trained(held, "vit", cache, last)
    moved(held, f"blocks.{last - 2}")

    true, plain = trained(held, "vit", None, last)
    found, result = trained(held, "vit", cache, last)

    assert_close(found, true)
    assert result.found == ROWS * (PASSES - 1)
    # Two of twelve blocks are computed again, of a single pass.
    assert result.saved > 0.9 * plain.flops * (last - 2) / (last + 3)


def test_a_pass_that_begins_lower_than_before_is_counted_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All blocks of a ViT have one width, so the shapes do not tell where the work begins."""
    said: list[tuple[float, int]] = []
    plain = prefix.counted

    def counted(*arguments: Any) -> tuple[Any, float]:
        with TotalFlops() as true:
            result, flops = plain(*arguments)
        said.append((flops, true.total))
        return result, flops

    monkeypatch.setattr(prefix, "counted", counted)
    held = resident("vit")
    last, cache = held.layers.num_blocks - 1, PrefixCache(held, 1e8)
    for block in (last - 2, last - 4, last - 6):
        moved(held, f"blocks.{block}")
        trained(held, "vit", cache, block)
        trained(held, "vit", cache, last)
    assert len(said) > 3
    assert all(flops == true for flops, true in said)


def test_blocks_that_are_called_embeddings_are_kept_too() -> None:
    held = resident("vit")
    held.layers = LayerMap.from_model(
        held.model, blocks="blocks.9, blocks.10, blocks.11", head="norm, head"
    )
    held._digests = held._base = held._versions()
    true, _ = trained(held, "vit", None, 0)
    found, result = trained(held, "vit", PrefixCache(held, 1e7), 0)
    assert_close(found, true)
    assert result.found == ROWS * (PASSES - 1)


def test_outputs_too_large_for_half_precision_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Large(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            with torch.no_grad():
                self.embed.weight.mul_(1e6)

    monkeypatch.setitem(MODELS, "tiny", Large)
    held = resident("tiny")
    cache = PrefixCache(held, 1e7)
    true, _ = trained(held, "tiny", None, 2)
    found, result = trained(held, "tiny", cache, 2)
    assert set(cache.refused) == {2}
    assert result.found == 0
    assert all(np.array_equal(found[name], true[name]) for name in true)


def test_what_is_kept_is_bounded_and_the_older_version_goes_first() -> None:
    kept = Kept(8 * 64)
    keys = [bytes([i]) for i in range(12)]
    values = torch.arange(12.0).half().reshape(12, 1).expand(12, 32)

    kept.add(("old", ()), keys[:4], values[:4])
    assert set(kept.find(("old", ()), keys)) == {0, 1, 2, 3}
    kept.add(("new", ()), keys, values)

    assert kept.nbytes == 8 * 64
    assert not kept.find(("old", ()), keys)
    found = kept.find(("new", ()), keys)
    assert sorted(found) == list(range(8))
    assert all(torch.equal(row, values[i]) for i, row in found.items())


def test_training_goes_on_when_the_room_ends() -> None:
    held = resident("vit")
    low = held.layers.num_blocks - 1
    true, _ = trained(held, "vit", None, low)
    below = PrefixCache(held, 1e7).below(low)
    assert below is not None
    width = 2 * below.joined(held.model, rows("vit")[0], loss)["prefix"].shape[1]
    cache = PrefixCache(held, 3 * width)
    found, result = trained(held, "vit", cache, low)
    assert_close(found, true)
    assert cache.kept.nbytes <= 3 * width
    assert result.found == 3 * (PASSES - 1)


def test_nothing_is_kept_when_examples_are_changed_at_random(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Shifted(TinyTask):
        def augment(self, batch: Batch) -> Batch:
            return {**batch, "x": batch["x"] + torch.randn(5)}

    monkeypatch.setattr(workbench, "load_task", Shifted)

    def bench(*settings: str) -> Workbench:
        return Workbench(configured(*settings))

    assert bench("train.prefix-cache=1").prefix is not None
    assert bench().prefix is None
    assert bench("train.prefix-cache=1", "train.augment=light").prefix is None


@pytest.mark.usefixtures("tiny_task")
def test_the_clients_of_a_run_keep_what_they_need_again_in_later_rounds() -> None:
    settings = (
        "strategy.name=top",
        "train.local-epochs=2",
        "train.local-steps=0",
        "train.batch-size=32",
    )
    true = run(configured(*settings), 3)
    found = run(configured(*settings, "train.prefix-cache=1"), 3)

    assert [r.metrics["flops_saved"] for r in true.rounds] == [0, 0, 0]
    hits = [record.metrics["prefix_hits"] for record in found.rounds]
    # Half of two passes in the first round; later also what clients have kept from earlier rounds.
    assert hits[0] is not None
    assert hits[0] == pytest.approx(0.5, abs=0.05)
    assert all(later is not None and later > hits[0] for later in hits[1:])
    assert all(record.metrics["flops_saved"] for record in found.rounds)
    for before, after in zip(true.rounds, found.rounds, strict=True):
        assert before.metrics["train_loss"] == pytest.approx(after.metrics["train_loss"], rel=1e-2)
    for name, array in true.after.items():
        np.testing.assert_allclose(found.after[name], array, rtol=1e-2, atol=5e-3)
