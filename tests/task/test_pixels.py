"""Single images of every kind become three colours and a middle square; broken ones are refused."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image as Pixels

from layerfed.config import ConfigError
from layerfed.task import images
from tests.task import hub


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_three_colours(mode: str) -> None:
    image = hub.noise(0, (40, 30), "RGB").convert(mode)
    file = BytesIO()
    image.save(file, "JPEG" if mode == "CMYK" else "PNG")
    opened = images._open({"bytes": file.getvalue(), "path": None}, "here")
    assert images._square(opened, 16).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_keep_their_upper_eight(mode: str) -> None:
    """Scans and X-rays are like this; they would come out white."""
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 100
    ordered = values.astype(">u2" if mode == "I;16B" else "<u2")
    file = BytesIO()
    Pixels.frombytes(mode, (16, 16), ordered.tobytes()).save(file, "TIFF")
    opened = images._open({"bytes": file.getvalue(), "path": None}, "here")
    np.testing.assert_array_equal(np.asarray(opened), np.repeat(values[..., None] >> 8, 3, axis=2))
    with pytest.raises(ConfigError, match="cannot be decoded"):
        images._open({"bytes": file.getvalue()[:400], "path": None}, "here")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_white_are_refused(mode: str) -> None:
    file = BytesIO()
    Pixels.new(mode, (8, 8), 1).save(file, "TIFF")
    with pytest.raises(ConfigError, match=rf"here: image x\.tif has .*mode {mode}.*8 or 16 bits"):
        images._open({"bytes": file.getvalue(), "path": "x.tif"}, "here")


def test_an_image_too_large_to_decode_is_named() -> None:
    file = BytesIO()
    Pixels.new("L", (8, 8)).save(file, "BMP")
    header = bytearray(file.getvalue())
    header[18:26] = (50_000).to_bytes(4, "little") * 2  # its width and height
    with pytest.raises(ConfigError, match=r"here: image x\.bmp cannot be decoded \(Decompression"):
        images._open({"bytes": bytes(header), "path": "x.bmp"}, "here")


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (64, 64), (8, 500)])
def test_the_middle_square_is_kept(size: tuple[int, int]) -> None:
    pixels = np.zeros((*size, 3), np.uint8)
    middle = tuple(slice(side // 2 - 1, side // 2 + 1) for side in size)
    pixels[middle] = 255
    kept = images._square(Pixels.fromarray(pixels), 32).astype(float)[0]
    rows, columns = np.indices(kept.shape)
    centre = (rows * kept).sum() / kept.sum(), (columns * kept).sum() / kept.sum()
    assert centre == pytest.approx((15.5, 15.5), abs=1.5)
