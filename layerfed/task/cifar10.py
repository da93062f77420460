"""CIFAR-10 with Dirichlet label skew, as in the paper [S, section V].

50,000 training and 10,000 test photographs of 32×32 in ten classes; on the hub as `uoft-cs/cifar10`.
"""

from __future__ import annotations

from typing import ClassVar

from layerfed.task.images import ImageTask


class Cifar10(ImageTask):
    """CIFAR-10, with images kept at 32×32 and enlarged on the device to the model's input size."""

    hub: ClassVar[str] = "uoft-cs/cifar10"
    inputs: ClassVar[tuple[tuple[str, ...], ...]] = (("img",), ("image",))
    default_classes: ClassVar[tuple[str, ...]] = (
        "airplane",
        "automobile",
        "bird",
        "cat",
        "deer",
        "dog",
        "frog",
        "horse",
        "ship",
        "truck",
    )
    image_size: ClassVar[int] = 32
