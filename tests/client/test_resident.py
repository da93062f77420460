"""Server and client models stay in step by moving only the layers that differ."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from layerfed.client.resident import MissingLayers, ResidentModel
from layerfed.exchange import Manifest
from layerfed.models.layers import LayerMap
from layerfed.server.global_model import GlobalModel
from tests.conftest import TinyNet

CPU = torch.device("cpu")


def build(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return TinyNet()


@pytest.fixture
def server() -> GlobalModel:
    model = build()
    return GlobalModel(LayerMap.from_model(model), ArrayRecord(model.state_dict()))


class Counted:
    """Builds the base and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> nn.Module:
        self.times += 1
        return build()


@pytest.fixture
def builder() -> Counted:
    return Counted()


@pytest.fixture
def client(builder: Counted) -> ResidentModel:
    return ResidentModel(builder, LayerMap.from_model, CPU)


def moved(model: GlobalModel, layer: str, by: int = 1) -> dict[str, np.ndarray]:
    """Another version of a layer."""
    return {name: np.asarray(values + by) for name, values in model.layer(layer).items()}


def change(model: GlobalModel, *layers: str, by: int = 1) -> None:
    for layer in layers:
        model.replace(layer, moved(model, layer, by))


def sync(client: ResidentModel, server: GlobalModel) -> None:
    client.move_to(server.manifest(), server.payload(server.changed))


def same(client: ResidentModel, server: GlobalModel) -> bool:
    return all(
        np.array_equal(tensor.detach().numpy(), server.tensors[name])
        for name, tensor in client.tensors.items()
    )


def watch_loads(client: ResidentModel, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that are written from now on."""
    loaded: list[str] = []
    original = client._load

    def load(layer: str, values: dict[str, Tensor]) -> None:
        loaded.append(layer)
        original(layer, values)

    monkeypatch.setattr(client, "_load", load)
    return loaded


# --------------------------------------------------------------------------------- the server
def test_a_fresh_model_has_nothing_to_send(server: GlobalModel) -> None:
    assert server.changed == ()
    assert len(server.payload(server.changed)) == 0
    assert set(server.manifest().digests) == set(server.layers.names)


def test_only_layers_that_changed_are_sent(server: GlobalModel) -> None:
    change(server, "blocks.2", "head")
    assert server.changed == ("blocks.2", "head")
    due = {name for layer in ("blocks.2", "head") for name in server.layers[layer].tensors}
    assert set(server.payload(server.changed)) == due
    assert server.bytes(server.changed) == sum(server.tensors[name].nbytes for name in due)


def test_a_layer_put_back_to_its_base_is_no_longer_sent(server: GlobalModel) -> None:
    base = {name: values.copy() for name, values in server.layer("head").items()}
    change(server, "head")
    server.replace("head", base)
    assert server.changed == ()


def test_a_manifest_does_not_change_when_the_model_does(server: GlobalModel) -> None:
    before = server.manifest()
    digests = dict(before.digests)
    change(server, "blocks.0")
    assert before.digests == digests
    after = server.manifest()
    assert after.base == before.base
    assert {n for n in digests if after.digests[n] != digests[n]} == {"blocks.0"}


def test_the_whole_model_is_handed_out_by_state_dict_name(server: GlobalModel) -> None:
    change(server, "blocks.1")
    record = server.record()
    assert set(record) == set(TinyNet().state_dict())
    for name, array in record.items():
        np.testing.assert_array_equal(array.numpy(), server.tensors[name])


def test_layers_are_read_only(server: GlobalModel) -> None:
    with pytest.raises(ValueError, match="read-only"):
        server.layer("head")["head.bias"][...] = 0


def test_initial_arrays_that_lack_tensors_are_an_error() -> None:
    state = build().state_dict()
    del state["head.bias"]
    with pytest.raises(ValueError, match=r"lack tensors of the model: head\.bias$"):
        GlobalModel(LayerMap.from_model(TinyNet()), ArrayRecord(state))


# --------------------------------------------------------------------------------- the client
def test_server_and_client_name_the_same_base_alike(
    server: GlobalModel, client: ResidentModel
) -> None:
    assert client.base == server.manifest().base
    change(server, "head")
    sync(client, server)
    assert client.base == server.manifest().base, "the base is not the present version"


def test_the_client_follows_every_version_touching_only_layers_that_differ(
    server: GlobalModel, client: ResidentModel, monkeypatch: pytest.MonkeyPatch, builder: Counted
) -> None:
    loaded = watch_loads(client, monkeypatch)
    sync(client, server)
    assert loaded == []
    change(server, "blocks.1", "head")
    sync(client, server)
    assert loaded == ["blocks.1", "head"]
    assert same(client, server)

    loaded.clear()
    sync(client, server)
    assert loaded == [], "it was there already"
    change(server, "head")
    sync(client, server)
    assert loaded == ["head"], "blocks.1 came too, but was known"
    assert same(client, server)
    assert builder.times == 1


def test_arrays_of_layers_that_do_not_differ_are_not_believed(
    server: GlobalModel, client: ResidentModel
) -> None:
    before = client.tensors["blocks.0.linear.weight"].clone()
    client.move_to(server.manifest(), moved(server, "blocks.0"))
    assert torch.equal(client.tensors["blocks.0.linear.weight"], before)


def test_the_module_itself_has_the_new_weights(server: GlobalModel, client: ResidentModel) -> None:
    x = torch.randn(4, 5)
    client.model.eval()
    before = client.model(x)
    change(server, "head")
    sync(client, server)
    assert not torch.equal(client.model(x), before)
    for name, tensor in client.model.state_dict().items():
        np.testing.assert_array_equal(tensor.numpy(), server.tensors[name])


def test_going_back_to_the_base_builds_it_again_once(
    server: GlobalModel, client: ResidentModel, builder: Counted
) -> None:
    """A process serves a second run; the base is not kept beside the model."""
    fresh = server.manifest()
    change(server, "blocks.0", "blocks.3", "head")
    sync(client, server)
    assert builder.times == 1

    client.move_to(fresh, {})
    assert builder.times == 2
    for name, tensor in build().state_dict().items():
        assert torch.equal(client.tensors[name], tensor), name
    client.move_to(fresh, {})
    assert builder.times == 2


def test_another_base_is_an_error_that_names_both(server: GlobalModel) -> None:
    other = ResidentModel(lambda: build(seed=1), LayerMap.from_model, CPU)
    with pytest.raises(ValueError, match="same weights, with the same seed") as caught:
        sync(other, server)
    assert server.manifest().base in str(caught.value)
    assert other.base in str(caught.value)


def test_a_layer_that_is_nowhere_is_an_error_that_names_it(
    server: GlobalModel, client: ResidentModel
) -> None:
    change(server, "blocks.2", "head")
    arrays = server.payload(server.changed)
    del arrays["blocks.2.linear.bias"]
    before = {name: tensor.clone() for name, tensor in client.tensors.items()}
    with pytest.raises(
        MissingLayers, match=r"no arrays for layers blocks\.2, unknown here"
    ) as caught:
        client.move_to(server.manifest(), arrays)
    assert caught.value.layers == ("blocks.2",)
    assert all(torch.equal(tensor, before[name]) for name, tensor in client.tensors.items())
    sync(client, server)
    assert same(client, server), "the next complete message sets it right"


def test_the_base_can_be_read_whatever_the_present_version(
    server: GlobalModel, client: ResidentModel
) -> None:
    expected = {name: tensor.numpy() for name, tensor in build().state_dict().items()}
    for _ in range(2):
        found = client.base_state()
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values)
        change(server, "blocks.1")
        sync(client, server)


# ------------------------------------------------------------------------------------ lending
def spoil(client: ResidentModel, layers: list[str]) -> None:
    with torch.no_grad():
        for layer in layers:
            for name in client.layers[layer].tensors:
                client.tensors[name].add_(1)


@pytest.mark.parametrize("fails", [False, True])
def test_lent_layers_come_back_bit_for_bit_also_when_training_fails(
    server: GlobalModel, client: ResidentModel, fails: bool
) -> None:
    """Defect 3 of the released code: one client's state leaked into the next."""
    change(server, "blocks.1", "head")
    sync(client, server)
    names = ["blocks.1", "blocks.3", "head"]

    def train() -> None:
        with client.borrowed(names) as before:
            assert set(before) == {t for n in names for t in client.layers[n].tensors}
            spoil(client, names)
            for name, start in before.items():
                np.testing.assert_array_equal(start.numpy(), server.tensors[name])
                assert not torch.equal(client.tensors[name], start)
            if fails:
                raise RuntimeError("out of memory")

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            train()
    else:
        train()
    assert same(client, server)


def test_a_lent_layer_counts_as_unknown_and_a_returned_one_as_known(
    server: GlobalModel, client: ResidentModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync(client, server)
    with client.borrowed(["blocks.2"]):
        spoil(client, ["blocks.2"])
        sync(client, server)  # a message that arrives meanwhile must not trust what is there
        assert same(client, server)
    loaded = watch_loads(client, monkeypatch)
    sync(client, server)
    assert loaded == []
    assert same(client, server)


def test_a_client_that_was_interrupted_in_loading_knows_that_it_does_not_know(
    server: GlobalModel, client: ResidentModel
) -> None:
    fresh = server.manifest()
    change(server, "blocks.0")
    broken = moved(server, "blocks.0", by=0)
    broken["blocks.0.norm.running_var"] = np.zeros(99, np.float32)
    with pytest.raises(RuntimeError):
        client.move_to(server.manifest(), broken)
    client.move_to(fresh, {})  # some of its tensors are new, though the version that was is asked
    for name, tensor in build().state_dict().items():
        assert torch.equal(client.tensors[name], tensor), name


def test_manifests_of_equal_content_are_equal(server: GlobalModel) -> None:
    manifest = server.manifest()
    assert manifest == Manifest(manifest.base, dict(manifest.digests))
    change(server, "head")
    assert manifest != server.manifest()
