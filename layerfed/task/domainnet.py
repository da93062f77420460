"""DomainNet, one domain a client [S, section V]: the hub's copy, or folders `domain/class/image`.

The task keeps the ten of its 345 classes that the authors' code uses [C], unless `task.classes` says
otherwise. The hub's copy is `wltjr1007/DomainNet` (image, label, domain; with the official train and
test splits). Folders have no test split, so `task.test-share` of their images is held out.
"""

from __future__ import annotations

from typing import ClassVar

from layerfed.task.images import ImageTask


class DomainNet(ImageTask):
    """DomainNet, with the columns of the hub's copy."""

    hub: ClassVar[str] = "wltjr1007/DomainNet"
    group_columns: ClassVar[tuple[tuple[str, ...], ...]] = (("domain",),)
    default_groups: ClassVar[tuple[str, ...]] = (
        "clipart",
        "infograph",
        "painting",
        "quickdraw",
        "real",
        "sketch",
    )
    default_classes: ClassVar[tuple[str, ...]] = (
        "bird",
        "feather",
        "headphones",
        "ice_cream",
        "teapot",
        "tiger",
        "whale",
        "windmill",
        "wine_glass",
        "zebra",
    )
