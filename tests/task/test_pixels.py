"""Single images of every kind become three colours and a middle square; broken ones are refused."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import ExifTags
from PIL import Image as Pixels

from layerfed.config import ConfigError
from layerfed.task import images
from layerfed.task.pixels import open_image
from tests.task import hub

BICUBIC = Pixels.Resampling.BICUBIC


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_three_colours(mode: str) -> None:
    image = hub.noise(0, (40, 30), "RGB").convert(mode)
    file = BytesIO()
    image.save(file, "JPEG" if mode == "CMYK" else "PNG")
    opened = open_image({"bytes": file.getvalue(), "path": None}, "here")
    assert images._square(opened, 16, 16, BICUBIC, False).shape == (3, 16, 16)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_sixteen_bits_keep_their_upper_eight(mode: str) -> None:
    """Scans and X-rays are like this; they would come out white."""
    values = np.arange(0, 65536, 256, dtype=np.uint16).reshape(16, 16) + 100
    ordered = values.astype(">u2" if mode == "I;16B" else "<u2")
    file = BytesIO()
    Pixels.frombytes(mode, (16, 16), ordered.tobytes()).save(file, "TIFF")
    opened = open_image({"bytes": file.getvalue(), "path": None}, "here")
    np.testing.assert_array_equal(np.asarray(opened), np.repeat(values[..., None] >> 8, 3, axis=2))
    with pytest.raises(ConfigError, match="cannot be decoded"):
        open_image({"bytes": file.getvalue()[:400], "path": None}, "here")


@pytest.mark.parametrize("mode", ["I", "F"])
def test_values_without_a_white_are_refused(mode: str) -> None:
    file = BytesIO()
    Pixels.new(mode, (8, 8), 1).save(file, "TIFF")
    with pytest.raises(ConfigError, match=rf"here: image x\.tif has .*mode {mode}.*8 or 16 bits"):
        open_image({"bytes": file.getvalue(), "path": "x.tif"}, "here")


def test_an_image_too_large_to_decode_is_named() -> None:
    file = BytesIO()
    Pixels.new("L", (8, 8)).save(file, "BMP")
    header = bytearray(file.getvalue())
    header[18:26] = (50_000).to_bytes(4, "little") * 2  # its width and height
    with pytest.raises(ConfigError, match=r"here: image x\.bmp cannot be decoded \(Decompression"):
        open_image({"bytes": bytes(header), "path": "x.bmp"}, "here")


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (64, 64), (8, 500)])
def test_the_middle_square_is_kept(size: tuple[int, int]) -> None:
    pixels = np.zeros((*size, 3), np.uint8)
    middle = tuple(slice(side // 2 - 1, side // 2 + 1) for side in size)
    pixels[middle] = 255
    kept = images._square(Pixels.fromarray(pixels), 32, 32, BICUBIC, False).astype(float)[0]
    rows, columns = np.indices(kept.shape)
    centre = (rows * kept).sum() / kept.sum(), (columns * kept).sum() / kept.sum()
    assert centre == pytest.approx((15.5, 15.5), abs=1.5)


# ------------------------------------------------------------------------ what a person sees
def opened(image: Pixels.Image, kind: str = "PNG", **how: object) -> np.ndarray:
    file = BytesIO()
    image.save(file, kind, **how)
    return np.asarray(open_image({"bytes": file.getvalue(), "path": None}, "here"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_stands_as_its_camera_was_held(kind: str, orientation: int) -> None:
    seen = np.zeros((16, 32, 3), np.uint8)
    seen[:8, :8] = 255  # the top left corner
    exif = Pixels.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    turn = {
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.transpose(1, 0, 2),
        6: lambda x: np.rot90(x),
        7: lambda x: x[::-1, ::-1].transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }.get(orientation, lambda x: x)
    stored = Pixels.fromarray(np.ascontiguousarray(turn(seen)))
    how: dict[str, object] = {"exif": exif} | ({"lossless": True} if kind == "WEBP" else {})
    found = opened(stored, kind, **how)
    assert found.shape == seen.shape
    assert np.abs(found.astype(int) - seen).max() < 40


def test_an_orientation_that_is_damaged_turns_nothing() -> None:
    file = BytesIO()
    exif = Pixels.Exif()
    exif[ExifTags.Base.Orientation] = 77
    hub.noise(0, (8, 12)).save(file, "PNG", exif=exif)
    found = open_image({"bytes": file.getvalue(), "path": None}, "here")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(hub.noise(0, (8, 12))))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode: str) -> None:
    """The colours below it are any: a logo on nothing would stand on black."""
    image = Pixels.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    expected = np.full((8, 8, 3), 255)
    expected[:, :4] = 0
    np.testing.assert_array_equal(opened(image.convert(mode)), expected)


def test_a_colour_that_is_transparent_and_half_of_one() -> None:
    keyed = Pixels.new("RGB", (4, 4), (10, 20, 30))
    assert opened(keyed, transparency=(10, 20, 30)).min() == 255
    half = Pixels.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert set(np.unique(opened(half))) == {127}
