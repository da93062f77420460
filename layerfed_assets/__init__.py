"""Data that ships with LayerFed: a small pretrained ViT, and handwritten digits.

A package of its own because Flower's app bundle (FAB) leaves out every binary file and then shadows
the installed `layerfed` package with the bundled one; weights beside that code would not be found.
The bundle excludes this package, so it is always imported from the environment.
"""

from __future__ import annotations

from pathlib import Path

from layerfed_assets.vit import VisionTransformer

__all__ = ["BACKBONE", "DIGITS", "backbone"]

BACKBONE = Path(__file__).with_name("vit_cifar100.safetensors")
DIGITS = Path(__file__).with_name("digits.npz")


def backbone(num_classes: int) -> VisionTransformer:
    """Build the shipped architecture with random weights: 12 blocks, width 80, input 3×32×32.

    Twelve blocks because that is L for the paper's ViT-B/32 and XLM-R base, so budgets, costs and
    heat maps read the same; patches of 8×8 because they quarter the tokens and cost little accuracy
    at this size.
    """
    return VisionTransformer(size=32, patch=8, width=80, depth=12, heads=4, classes=num_classes)
