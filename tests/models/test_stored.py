"""Frozen weights held in fewer bytes: what a model computes with them, and what it cannot do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from layerfed.client.base import on_disk
from layerfed.client.memory import LiveBytes
from layerfed.config import Storage
from layerfed.models.stored import Decoded, Stored, as_stored, decoded, is_lossy, owners, put

CPU = torch.device("cpu")
HALVES = ("bfloat16", "float16")


class Kinds(nn.Module):
    """Every way in which models read their weights: modules, loose parameters, tied and packed ones."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.recurrent = nn.GRU(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down.weight = self.up.weight
        self.project = nn.Parameter(torch.randn(16, 3))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.place
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.conv(x.transpose(1, 2)).transpose(1, 2)
        x = self.norm(self.recurrent(x)[0])
        return (self.up(x) + self.down(x)).mean(1) @ self.project


def held(model: nn.Module, storage: Storage) -> nn.Module:
    for places in owners(model).values():
        module, attribute = places[0]
        put(places, as_stored(getattr(module, attribute), storage, CPU))
    return model


def rounded(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))
            parameter.requires_grad_(False)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(10).view(2, 5)


def kinds() -> nn.Module:
    torch.manual_seed(0)
    return Kinds().eval()


@pytest.mark.parametrize("storage", HALVES)
def test_a_model_computes_with_the_rounded_weights(storage: Storage, ids: Tensor) -> None:
    model = held(kinds(), storage)
    assert all(isinstance(p, Stored) and p.dtype == torch.float32 for p in model.parameters())
    same = rounded(kinds(), getattr(torch, storage))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), same(ids))
    assert sum(p.nbytes for p in model.parameters()) * 2 == sum(p.nbytes for p in same.parameters())


@pytest.mark.parametrize("storage", HALVES)
def test_gradients_go_through_frozen_weights(storage: Storage) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
    expected = rounded(plain, getattr(torch, storage))
    x = torch.randn(3, 6, requires_grad=True)
    expected(x).sum().backward()
    gradient, x.grad = x.grad, None
    held(plain, storage)(x).sum().backward()
    assert gradient is not None
    torch.testing.assert_close(x.grad, gradient)


def test_autograd_keeps_the_stored_weights_and_no_cast() -> None:
    model = held(nn.Linear(64, 64, bias=False), "bfloat16")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(torch.randn(2, 64, requires_grad=True))
    assert kept
    assert all(isinstance(tensor, Stored) for tensor in kept if tensor.numel() == 64 * 64)


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.01), ("4bit", 0.15)])
def test_eight_and_four_bits_are_near(storage: Storage, most: float) -> None:
    torch.manual_seed(0)
    weights = torch.randn(64, 128)
    coded = as_stored(weights, storage, CPU)
    assert isinstance(coded, Stored)
    worst = float((decoded(coded) - weights).abs().max() / weights.abs().max())
    assert 0 < worst < most
    x = torch.randn(3, 128)
    torch.testing.assert_close(functional.linear(x, coded), x @ decoded(coded).t())
    assert coded.nbytes < weights.nbytes * {"int8": 0.27, "4bit": 0.15}[storage]


def test_tables_and_small_tensors_are_not_quantised() -> None:
    weights = torch.randn(64, 128)
    for tensor, table in ((weights, True), (torch.randn(8), False), (torch.randn(2, 2), False)):
        found = as_stored(tensor, "int8", CPU, table=table)
        assert torch.equal(decoded(found), tensor.bfloat16().float())
    count = torch.tensor(3)
    assert torch.equal(as_stored(count, "int8", CPU), count)


def test_stored_weights_cannot_be_written() -> None:
    weights = as_stored(torch.randn(4, 4), "bfloat16", CPU)
    with torch.no_grad(), pytest.raises(RuntimeError, match="would write to frozen weights"):
        weights.add_(1)


def test_mixed_precision_reads_half_precision_as_it_is(ids: Tensor) -> None:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(
            held(kinds(), "bfloat16")(ids), rounded(kinds(), torch.bfloat16)(ids)
        )


def test_mixed_precision_copies_no_frozen_weight() -> None:
    """Else autograd would keep a second copy of every frozen layer above the lowest one in training."""
    model = held(nn.Linear(64, 64, bias=False), "bfloat16")
    there = model.weight.held.values.data_ptr()
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t)
    x = torch.randn(2, 64, requires_grad=True)
    with hooks, torch.autocast("cpu", torch.bfloat16), LiveBytes((model.weight, x)) as live:
        out = model(x)
    assert any(tensor.data_ptr() == there for tensor in kept)
    assert live.phases(0.0).activations == (x.numel() + out.numel()) * 2  # each in bfloat16
    other = model.weight.to(torch.float16)
    assert other.data_ptr() != there
    assert torch.equal(other, decoded(model.weight).half())


def test_what_is_lossy() -> None:
    half, single = torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2)
    assert not is_lossy(half, "checkpoint")
    assert not is_lossy(single, "float32")
    assert not is_lossy(as_stored(half, "checkpoint", CPU), "bfloat16")
    assert is_lossy(half, "float16")
    assert is_lossy(single, "bfloat16")
    assert is_lossy(half, "int8")


def test_exact_weights_wait_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tensors = {
        "a": torch.randn(3, 5),
        "b": torch.tensor(2.5),
        "c": torch.randn(7, dtype=torch.bfloat16),
        "d": as_stored(torch.randn(2, 3, dtype=torch.bfloat16), "checkpoint", CPU),
    }
    found = on_disk(tensors, mapped=False)
    assert list((tmp_path / "layerfed").iterdir()) == []
    for name, value in Decoded(tensors).items():
        assert torch.equal(Decoded(found)[name], value), name
