"""Every `model.state_dict()` that a user starts from comes back as one that the model loads."""

from __future__ import annotations

import torch
from flwr.app import ArrayRecord
from torch import nn

from layerfed.client.resident import ResidentModel
from layerfed.models.layers import LayerMap
from layerfed.server.global_model import GlobalModel
from tests.conftest import WIDTH, TinyNet


def round_trip(model: nn.Module) -> GlobalModel:
    server = GlobalModel(LayerMap.from_model(model), ArrayRecord(model.state_dict()))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(server.record().to_torch_state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    return server


def transposed() -> nn.Module:
    torch.manual_seed(0)
    model = TinyNet()
    model.embed.weight = nn.Parameter(torch.randn(5, WIDTH).t())
    return model


def test_a_transposed_weight_is_the_same_base_on_both_sides() -> None:
    assert not transposed().embed.weight.is_contiguous()
    server = round_trip(transposed())
    client = ResidentModel(transposed, LayerMap.from_model, torch.device("cpu"))
    assert client.base == server.manifest().base


def test_tied_weights_come_back_under_each_name() -> None:
    model = TinyNet()
    model.tied = model.head
    server = round_trip(model)
    assert "tied.weight" in server.record()
    assert "tied.weight" not in server.tensors
