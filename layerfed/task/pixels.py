"""Decoding of one image as a person sees it. It needs Pillow alone."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image as Pixels
from PIL import ImageOps

from layerfed.config import ConfigError

__all__ = ["open_image"]


def open_image(cell: dict[str, Any] | None, where: str) -> Pixels.Image:
    """Decode an image from the hub's form: bytes, or the path of a file.

    Raises
    ------
    ConfigError
        If the image is missing or broken, or if the range of its values is unknown.
    """
    if cell is None or not (cell.get("bytes") or cell.get("path")):
        raise ConfigError(f"{where}: the image is missing; leave the row out")
    source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]
    name = cell.get("path") or "without a name"
    try:
        image: Pixels.Image = ImageOps.exif_transpose(Pixels.open(source))
        if image.mode in ("I", "F"):
            raise ConfigError(
                f"{where}: image {name} has values of 32 bits (mode {image.mode}), and the value of "
                "white is unknown; convert it to 8 or 16 bits"
            )
        if image.mode.startswith("I;16"):
            # Conversion alone would turn all values above 255 white.
            image = Pixels.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return _as_seen(image)
    except ConfigError:
        raise
    except Exception as error:  # each decoder has its own
        raise ConfigError(
            f"{where}: image {name} cannot be decoded ({type(error).__name__}); mend it or leave it out"
        ) from error


def _as_seen(image: Pixels.Image) -> Pixels.Image:
    """Return an image in three colours; what is transparent shows white, as on a page."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    page = Pixels.new("RGBA", image.size, "white")
    return Pixels.alpha_composite(page, image.convert("RGBA")).convert("RGB")
