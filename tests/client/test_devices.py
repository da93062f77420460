"""Devices that the tests' machine lacks: what can be checked without them."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from layerfed.client import workbench as module
from layerfed.client.devices import choose_device, synchronize, wide
from layerfed.client.local_optimizers import LocalSGD
from layerfed.client.statistics import STATISTICS
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError
from layerfed.models.source import new_weights
from tests.tiny_task import configured


def cards(monkeypatch: pytest.MonkeyPatch, number: int, visible: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize(
    ("number", "visible", "name", "expected"),
    [
        (0, None, "auto", "cpu"),
        (1, None, "auto", "cuda:0"),
        (2, None, "cuda", "cuda:0"),
        (2, None, "cuda:1", "cuda:1"),
        (1, "1", "cuda:1", "cuda:0"),  # a client's process under Ray, which was given card 1
        (2, "2,3", "cuda:3", "cuda:1"),
        (2, "2,3", "cuda:0", "cuda:0"),
        (1, "1", "cpu", "cpu"),
    ],
)
def test_the_card_that_is_named_is_taken(
    number: int, visible: str | None, name: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, number, visible)
    assert str(choose_device(name)) == expected


@pytest.mark.parametrize(
    ("number", "visible", "name", "message"),
    [
        (0, None, "cuda", "there is no CUDA device; use auto or cpu"),
        (1, None, "cuda:1", "this process sees 1 CUDA devices; use run.device=cuda"),
        (1, "0", "cuda:1", r"number 0 of the machine\).*CUDA_VISIBLE_DEVICES=1"),
        (1, "GPU-8a2f", "cuda:1", "number GPU-8a2f of the machine"),
        (0, None, "mps", "there is no such device"),
    ],
)
def test_a_card_that_is_not_there_is_refused(
    number: int, visible: str | None, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards(monkeypatch, number, visible)
    with pytest.raises(ConfigError, match=message):
        choose_device(name)


def test_the_device_that_works_is_the_one_that_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waited.append("mps"))
    for name in ("cpu", "cuda:1", "mps"):
        synchronize(torch.device(name))
    assert waited == [torch.device("cuda:1"), "mps"]


@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_stay_on_the_gradients_device(name: str) -> None:
    with FakeTensorMode():
        gradients = [torch.empty(3, 4, device="cuda:1"), torch.empty(3, device="cuda:1")]
        found = STATISTICS[name](gradients, gradients)
        assert (str(found.device), found.dtype) == ("cuda:1", torch.float64)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_device_without_doubles_computes_in_float32(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert wide(torch.device("mps")) == torch.float32
    gradients = [torch.randn(3, 4), torch.randn(3)]
    expected = STATISTICS[name](gradients, gradients)
    monkeypatch.setattr("layerfed.client.statistics.wide", lambda device: torch.float32)
    found = STATISTICS[name](gradients, gradients)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-6)


def test_a_local_step_stays_on_the_weights_device() -> None:
    with FakeTensorMode():
        layer = torch.nn.Linear(4, 3, device="cuda:1")
        for parameter in layer.parameters():
            parameter.grad = torch.empty_like(parameter)
        LocalSGD(list(layer.parameters()), 0.1, 0.9, 0.01).step()
        assert str(layer(torch.empty(2, 4, device="cuda:1")).device) == "cuda:1"


def test_new_weights_leave_the_generators_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    with new_weights(3):
        first = torch.randn(2)
    with new_weights(3):
        assert torch.equal(torch.randn(2), first)
    assert not seeded


@pytest.mark.usefixtures("tiny_task")
def test_the_memory_a_client_needs_has_all_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = workbench(configured().to_flat())
    layers, head = bench.resident.layers, bench.head_memory(0)
    model = sum(tensor.nbytes for tensor in bench.resident.tensors.values())
    alone = bench.memory_needed(0, [])
    assert alone == model + head + layers.head.bytes
    assert bench.memory_needed(0) > alone + sum(block.bytes for block in layers.blocks)
    adamw = workbench(configured("train.optimizer=adamw").to_flat())
    assert adamw.memory_needed(0, []) == alone + 2 * layers.head.bytes

    def full(*rest: object, **named: object) -> float:
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(module, "step_cost", full)
    assert bench.memory_needed(0) == math.inf
