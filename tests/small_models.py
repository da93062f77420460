"""Small models of every shape, for tests of the split into layers."""

from __future__ import annotations

import open_clip
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer


def timm_vit(**options: object) -> nn.Module:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**{"depth": 3, **sizes, **options})


def clip() -> nn.Module:
    return open_clip.model.CLIP(
        embed_dim=16,
        vision_cfg={
            "layers": 3,
            "width": 64,
            "patch_size": 8,
            "image_size": 32,
            "head_width": 32,
        },
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2},
    )


class Block(nn.Module):
    def __init__(self, experts: int = 0) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(experts))


class OtherBlock(Block):
    pass


class Net(nn.Module):
    """The parts, by name, in this order."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def stack(*members: nn.Module) -> nn.ModuleList:
    return nn.ModuleList(members)


def blocks(number: int) -> nn.ModuleList:
    return stack(*(Block() for _ in range(number)))


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def mlp(depth: int) -> nn.Module:
    return nn.Sequential(*(m for _ in range(depth) for m in (linear(), nn.ReLU())))


def two_stacks(encoder: type[Block] = Block, decoder: type[Block] = Block) -> nn.Module:
    return Net(
        embed=linear(),
        encoder=Net(layers=stack(*(encoder() for _ in range(3)))),
        decoder=Net(layers=stack(*(decoder() for _ in range(2)))),
        head=linear(),
    )


def swin() -> nn.Module:
    return SwinTransformer([2, 2], 8, [1, 2, 1], [1, 2, 2], [4, 4], num_classes=3)


def tied(first: str, second: str) -> nn.Module:
    """Three blocks, with one parameter in two places."""
    model = Net(
        lm_head=linear(), embed=linear(), blocks=blocks(3), norm=nn.LayerNorm(4), out=linear()
    )
    model.get_submodule(second).weight = model.get_submodule(first).weight
    return model
