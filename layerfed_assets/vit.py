"""The shipped architecture: a plain pre-norm Vision Transformer (Dosovitskiy et al., arXiv 2010.11929).

Weights, names, initialisation and results are those of timm's `VisionTransformer`, to the bit. It is
written out here since importing timm, with torchvision behind it, takes longer than a round on this
model, and on real devices every message starts a new process.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

__all__ = ["VisionTransformer"]

# timm's; torch's own default is 1e-5.
EPSILON = 1e-6


class PatchEmbed(nn.Module):
    """Cuts an image into patches and projects each: (B, 3, H, W) to (B, tokens, width)."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch, stride=patch)

    def forward(self, image: Tensor) -> Tensor:
        """Return one token a patch, row by row."""
        tokens: Tensor = self.proj(image).flatten(2).transpose(1, 2)
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, shape (B, tokens, width)."""
        batch, tokens, width = x.shape
        heads = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Mlp(nn.Module):
    """Two layers with GELU between, four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform each token by itself."""
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to what came in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=EPSILON)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=EPSILON)
        self.mlp = Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        """Transform tokens, shape (B, tokens, width)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Scores images by the class token of the last block.

    Parameters
    ----------
    size, patch : int
        Sides of the image and of a patch, in pixels.
    width, depth, heads : int
    classes : int
    """

    def __init__(
        self, *, size: int, patch: int, width: int, depth: int, heads: int, classes: int
    ) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(patch, width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=EPSILON)
        self.head = nn.Linear(width, classes)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Draw the weights in timm's order."""
        _normal(self.pos_embed, 0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                _normal(module.weight, 0.02)
                nn.init.zeros_(module.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Return class scores, shape (B, classes)."""
        tokens = self.patch_embed(image)
        first = self.cls_token.expand(len(tokens), -1, -1)
        x = torch.cat([first, tokens], dim=1) + self.pos_embed
        scores: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return scores


def _normal(tensor: Tensor, deviation: float) -> None:
    """Draw from a normal distribution cut off at ±2, by its inverse, as timm does."""
    tensor.uniform_(-1, 1).erfinv_().mul_(deviation * math.sqrt(2)).clamp_(-2, 2)
