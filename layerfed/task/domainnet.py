"""DomainNet, one domain a client [S, section V]: the hub's copy, or folders `domain/class/image`.

Of its 345 classes the ten that the authors' code uses are kept unless `task.classes` says otherwise.
On the hub as `wltjr1007/DomainNet` (image, label, domain; with the official train and test splits); of
folders, which do not say what is for testing, `task.test-share` is held out.
"""

from __future__ import annotations

from typing import ClassVar

from layerfed.task.images import ImageTask


class DomainNet(ImageTask):
    """DomainNet; the columns are those of the hub's copy."""

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
