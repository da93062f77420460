"""The predicted memory of a step, against the step that runs, on models of every kind."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from layerfed.client.local_optimizers import LocalSGD
from layerfed.client.prediction import masks_named, predicted_step
from layerfed.client.resident import ResidentModel
from layerfed.client.training import Step, train_layers
from layerfed.config import RunConfig, Storage
from layerfed.models.layers import LayerMap
from layerfed.task import load_task
from layerfed.task.base import Batch

CPU = torch.device("cpu")
ROWS, TOKENS = 4, 24
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 500,
    "pad_token_id": 0,
    "num_labels": 5,
}


def text(model: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
    ).logits
    return scores


def image(model: nn.Module, batch: Batch) -> Tensor:
    scores: Tensor = model(batch["image"])
    return scores


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT))


def llama() -> nn.Module:
    return transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**TEXT, num_key_value_heads=2)
    )


def vit() -> nn.Module:
    return load_task(RunConfig()).build_model()


def efficientnet() -> nn.Module:
    return timm.create_model("efficientnet_lite0", num_classes=5)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Batch], Tensor]]] = {
    "the shipped ViT": (vit, image),
    "BERT": (bert, text),
    "LLaMA": (llama, text),
    "EfficientNet": (efficientnet, image),
}


def batch_for(logits: Callable[..., Tensor]) -> Batch:
    labels = torch.arange(ROWS) % 5
    if logits is image:
        return {"image": torch.rand(ROWS, 3, 32, 32), "label": labels}
    ids = torch.randint(1, 500, (ROWS, TOKENS))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "label": labels}


@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_the_prediction_is_within_15_percent(name: str, storage: Storage) -> None:
    """Without the weights, which are known, since they would hide an error of the rest."""
    build, logits = MODELS[name]
    batch = batch_for(logits)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(logits(model, batch), batch["label"])

    def split(model: nn.Module) -> LayerMap:
        return LayerMap.from_model(model, forward=lambda model: logits(model, batch))

    resident = ResidentModel(build, split, CPU, storage)
    layers, plain = resident.layers, build().to("meta")
    off = {}
    for trained, mask in masks_named(layers.num_blocks).items():
        sgd = partial(LocalSGD, lr=0.01)
        with resident.borrowed(layers.trained(mask)):
            measured = train_layers(resident.model, layers, mask, [batch], loss, sgd).memory
        on_meta = {key: tensor.to("meta") for key, tensor in batch.items()}
        found = predicted_step(plain, layers, mask, on_meta, loss, sgd, how=Step(), storage=storage)
        assert found.weights == pytest.approx(measured.weights, rel=0.01)
        off[trained] = (found.peak - found.weights) / (measured.peak - measured.weights)
    assert all(0.9 < ratio < 1.1 for ratio in off.values()), off
