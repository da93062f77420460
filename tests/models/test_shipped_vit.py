"""The shipped architecture equals timm's, so its weights give the same results there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from layerfed_assets import BACKBONE, backbone


def theirs(classes: int) -> nn.Module:
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=80, depth=12, num_heads=4, num_classes=classes
    )


def drawn(build: type, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build(10)


@pytest.mark.parametrize("seed", [0, 1])
def test_its_weights_are_drawn_as_timm_draws_them(seed: int) -> None:
    ours, other = drawn(backbone, seed).state_dict(), drawn(theirs, seed).state_dict()
    assert list(ours) == list(other)
    for name, tensor in ours.items():
        assert torch.equal(tensor, other[name]), name
    assert float(ours["head.weight"].std()) > 0.01


def gradients(net: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    nn.functional.cross_entropy(net(images), labels).backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def test_it_computes_what_timm_computes() -> None:
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 1])
    ours, other = drawn(backbone, 0), drawn(theirs, 0)
    for net in (ours, other):
        missing, unexpected = net.load_state_dict(load_file(BACKBONE), strict=False)
        assert set(missing) == {"head.weight", "head.bias"}
        assert not unexpected
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(images), other.train(mode)(images))
    found, expected = gradients(ours, images, labels), gradients(other, images, labels)
    assert found.keys() == expected.keys() == dict(ours.named_parameters()).keys()
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name
