"""What a node makes of its frozen layers changes nothing in what travels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from layerfed.client.resident import ResidentModel
from layerfed.client.workbench import workbench
from layerfed.config import ConfigError, ModelConfig, NodeConfig, RunConfig, Storage
from layerfed.digests import digest
from layerfed.doctor.job import look
from layerfed.engine import choose_engine
from layerfed.models.layers import LayerMap
from layerfed.models.stored import Stored
from layerfed.models.text import build_choice_model, build_text_classifier
from layerfed.server.global_model import GlobalModel
from tests.conftest import BLOCKS, TinyNet
from tests.task import hub
from tests.tiny_task import TinyTask, configured, run

CPU = torch.device("cpu")
FROZEN = ("embeddings", *(f"blocks.{i}" for i in range(BLOCKS - 1)))


def build() -> nn.Module:
    torch.manual_seed(0)
    return TinyNet()


def resident(storage: Storage, half: torch.dtype | None = None) -> ResidentModel:
    return ResidentModel(
        lambda: build() if half is None else build().to(half), LayerMap.from_model, CPU, storage
    )


class RoundedTask(TinyTask):
    """The tiny task, the frozen layers of which are rounded to bfloat16."""

    def build_model(self) -> nn.Module:
        model = super().build_model()
        layers = LayerMap.from_model(model)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if layers.layer_of(name).name in FROZEN:
                    parameter.copy_(parameter.bfloat16())
        return model


def test_twenty_rounds_equal_those_in_float32() -> None:
    """Updates of 2e-5 would vanish in bfloat16, so what is trained must not be in it."""
    common = ("strategy.name=top", "train.lr=1e-4", "federation.clients-per-round=2")
    found = run(
        configured("task.name=tests.tiny_task:TinyTask", "model.storage=bfloat16", *common), 20
    )
    expected = run(configured("task.name=tests.client.test_storage:RoundedTask", *common), 20)
    layers = LayerMap.from_model(build())
    moved = 0
    for layer in ("blocks.3", "head"):
        for name in layers[layer].parameters:
            np.testing.assert_allclose(found.after[name], expected.after[name], rtol=0, atol=1e-7)
            change = np.abs(found.after[name] - found.before[name])
            moved += int(np.sum((change > 0) & (change < 2e-3 * np.abs(found.before[name]))))
    assert moved > 20, "steps too small for bfloat16 have added up"
    for layer in FROZEN:
        for name in layers[layer].tensors:
            np.testing.assert_array_equal(found.after[name], build().state_dict()[name].numpy())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_all_storages_agree_on_the_base(half: torch.dtype) -> None:
    kinds: tuple[Storage, ...] = (
        "checkpoint",
        "float32",
        "bfloat16",
        "float16",
        "int8",
        "4bit",
    )
    found = {kind: resident(kind, half) for kind in kinds}
    assert len({client.base for client in found.values()}) == 1
    server = GlobalModel(found["int8"].layers, found["int8"].base_arrays())
    for client in found.values():
        client.move_to(server.manifest(), {})
        for name, values in client.base_state().items():
            exact = build().to(half).state_dict()[name]
            expected = exact.float() if exact.is_floating_point() else exact
            np.testing.assert_array_equal(values, expected.numpy())
    assert found["checkpoint"].nbytes < found["float32"].nbytes


def test_only_frozen_layers_are_held_in_less() -> None:
    client = resident("bfloat16")
    kinds = {name: isinstance(tensor, Stored) for name, tensor in client.tensors.items()}
    assert kinds["blocks.0.linear.weight"]
    assert not kinds["head.weight"]
    assert not kinds["blocks.0.norm.running_var"]
    with client.borrowed(["blocks.1", "head"]) as before:
        trained = client.tensors["blocks.1.linear.weight"]
        assert type(trained) is nn.Parameter
        assert dict(client.model.named_parameters())["blocks.1.linear.weight"] is trained
        exact = build().state_dict()["blocks.1.linear.weight"]
        assert torch.equal(trained, exact)
        assert torch.equal(before["blocks.1.linear.weight"], exact)
    assert isinstance(client.tensors["blocks.1.linear.weight"], Stored)


@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_layer_that_changed_is_in_float32_and_goes_back(storage: Storage) -> None:
    client, other = resident(storage), resident("float32")
    server = GlobalModel(other.layers, other.base_arrays())
    fresh = server.manifest()
    values = {n: np.asarray(v + 2e-5).astype(v.dtype) for n, v in server.layer("blocks.2").items()}
    server.replace("blocks.2", values)
    for model in (client, other):
        model.move_to(server.manifest(), server.payload(server.changed))
        for name in model.layers["blocks.2"].tensors:
            np.testing.assert_array_equal(model.tensors[name].detach().numpy(), values[name])
        model.move_to(fresh, {})
        with model.borrowed(["blocks.2"]):
            for name in model.layers["blocks.2"].tensors:
                assert torch.equal(model.tensors[name], build().state_dict()[name])


@pytest.mark.parametrize("tuning", ["layers", "lora"])
@pytest.mark.parametrize("storage", ["bfloat16", "int8"])
def test_a_step_costs_the_same_memory_whatever_frozen_layers_are_in(
    storage: Storage, tuning: str
) -> None:
    tuned = ("task.name=tests.tiny_task:TinyTask", f"model.tuning={tuning}", "run.device=cpu")
    exact, stored = (
        workbench(configured(*tuned, f"model.storage={kind}").to_flat())
        for kind in ("float32", storage)
    )
    for found, expected in zip(stored.costs(0, "memory"), exact.costs(0, "memory"), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert stored.head_memory(0) == exact.head_memory(0)
    less = exact.resident.nbytes - stored.resident.nbytes
    assert less > 0
    assert stored.memory_needed(0) == exact.memory_needed(0) - less


def test_an_engine_is_chosen_and_a_job_is_looked_at_with_frozen_layers_in_bfloat16() -> None:
    config = configured("task.name=tests.tiny_task:TinyTask", "model.storage=bfloat16")
    assert choose_engine(config, "auto")[0] == "inprocess"
    assert [each for each in look(config) if each.status == "wrong"] == []


def test_the_server_reads_the_base_and_copies_nothing() -> None:
    client = resident("float32")
    arrays = client.base_arrays()
    name = "blocks.0.linear.weight"
    assert np.shares_memory(arrays[name].values, client.tensors[name].detach().numpy())  # type: ignore[attr-defined]
    before = arrays[name].numpy()
    server = GlobalModel(client.layers, arrays)
    server.replace("blocks.0", {n: np.asarray(v + 1) for n, v in server.layer("blocks.0").items()})
    client.move_to(server.manifest(), server.payload(server.changed))
    np.testing.assert_array_equal(arrays[name].numpy(), before)


def test_a_nodes_own_storage_replaces_the_runs() -> None:
    node = {"partition-id": 0, "num-partitions": 2}
    config = NodeConfig.read({**node, "storage": "int8"}).applied_to(RunConfig())
    assert config.model.storage == "int8"
    assert NodeConfig.read(node).applied_to(RunConfig()).model.storage == "checkpoint"
    with pytest.raises(ConfigError, match="storage"):
        NodeConfig.read({**node, "storage": "int3"})


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shape = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=40,
        pad_token_id=0,
    )
    torch.manual_seed(3)
    model = transformers.LlamaForCausalLM(shape).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def llama(folder: Path, storage: Storage) -> ResidentModel:
    section = ModelConfig(name="transformers/llama", weights=str(folder))
    return ResidentModel(
        lambda: build_text_classifier(section, 3, 0, pad_token=0), LayerMap.from_model, CPU, storage
    )


def test_a_checkpoint_in_half_precision_stays_mapped(saved: Path) -> None:
    client = llama(saved, "checkpoint")
    weight = client.tensors["model.layers.0.mlp.up_proj.weight"]
    assert isinstance(weight, Stored)
    maps = Path("/proc/self/maps").read_text()
    places = [line.split()[0] for line in maps.splitlines() if str(saved) in line]
    address = weight.held.values.data_ptr()  # type: ignore[attr-defined]
    ranges = [[int(x, 16) for x in place.split("-")] for place in places]
    assert any(low <= address < high for low, high in ranges)


def test_the_head_does_not_depend_on_the_storage(saved: Path) -> None:
    clients = [llama(saved, kind) for kind in ("checkpoint", "float32")]
    half, single = (client.tensors["score.weight"] for client in clients)
    assert half.dtype == torch.float32
    assert torch.equal(half, single)
    assert not torch.equal(half, half.bfloat16().float())
    assert clients[0].base == clients[1].base


def test_the_digests_of_a_file_are_computed_once(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[str] = []
    original = ResidentModel._digest

    def digest(self: ResidentModel, layer: str) -> str:
        computed.append(layer)
        return original(self, layer)

    monkeypatch.setattr(ResidentModel, "_digest", digest)
    first = llama(saved, "checkpoint").base
    assert len(computed) == 4
    computed.clear()
    assert llama(saved, "int8").base == first
    assert computed == ["head"], "which is not in the file"

    computed.clear()
    file = saved / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    changed = llama(saved, "checkpoint").base
    assert changed != first
    assert len(computed) == 4
    for remembered in saved.parent.glob("cache/layerfed/bases/*.json"):
        assert set(json.loads(remembered.read_text())) == {"embeddings", "blocks.0", "blocks.1"}


def test_heads_of_other_rows_have_other_digests(tmp_path: Path) -> None:
    """What the cache remembers of a file is not what a head took from it."""
    section = ModelConfig(name="transformers/llama", weights=str(hub.llama(tmp_path / "llama")))

    def choosing(rows: list[int]) -> ResidentModel:
        return ResidentModel(
            lambda: build_choice_model(section, rows, 0),
            lambda model: LayerMap.from_model(
                model, forward=lambda m: m(input_ids=torch.tensor([[1, 2, 3]])).logits
            ),
            CPU,
        )

    first, second, again = (choosing(rows) for rows in ([3, 4, 5], [6, 7, 8], [3, 4, 5]))
    assert first.base == again.base
    assert first.base != second.base
    for client in (first, second):
        head = {name: client.tensors[name].detach() for name in client.layers.head.tensors}
        assert client.base_version("head") == digest(head)
