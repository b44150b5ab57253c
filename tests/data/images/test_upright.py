"""Orientation and alpha, in every format that has them."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.privacy import stored_image
from megatron_gmai.data.images.window import MEAN_COLOUR, window_to_8_bits
from tests.data.files import png_16, tiff
from tests.data.images.test_formats import heic
from tests.data.world import encoded

# Four quarters of different brightness: each orientation looks different.
QUARTERS = np.repeat(np.repeat(np.array([[0, 80], [160, 240]], np.uint8), 32, 0), 48, 1)
CORNERS = Image.fromarray(np.stack([QUARTERS, 255 - QUARTERS, QUARTERS // 2], axis=2))


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


def upright(orientation: int) -> np.ndarray:
    turned = CORNERS.copy()
    turned.getexif()[274] = orientation
    return np.asarray(ImageOps.exif_transpose(turned)).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIC"])
def test_pictures_are_turned_upright_and_stay_so_in_a_shard(kind: str, orientation: int) -> None:
    tags = exif(orientation)
    if kind == "TIFF":
        data = encoded(CORNERS, kind, tiffinfo={274: orientation})
    elif kind == "HEIC":
        data = heic(CORNERS, exif=tags.tobytes())
    else:
        data = encoded(CORNERS, kind, exif=tags, quality=100)
    found, expected = decode(data).astype(int), upright(orientation)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 4
    _, bare = stored_image(data)
    assert np.array_equal(decode(bare), decode(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pictures_are_turned_too(orientation: int) -> None:
    deep = np.asarray(CORNERS).astype(np.uint16) * 16
    expected = window_to_8_bits(upright(orientation).astype(np.uint16) * 16)
    assert np.array_equal(decode(tiff(deep, 2, orientation=orientation)), expected)
    chunk = exif(orientation).tobytes().removeprefix(b"Exif\0\0")
    assert np.array_equal(decode(png_16(deep, eXIf=chunk)), expected)
    grey = decode(tiff(deep[:, :, :1], 1, orientation=orientation))[:, :, 0]
    assert np.array_equal(grey, window_to_8_bits(upright(orientation)[:, :, 0] * 16))


def test_damaged_exif_is_no_damage_to_the_picture() -> None:
    data = encoded(CORNERS, "JPEG", exif=exif(6))
    place = data.index(b"Exif\0\0") + 6
    broken = data[:place] + b"XX" + data[place + 2 :]
    assert decode(broken).shape == (64, 96, 3)
    assert np.array_equal(decode(stored_image(broken)[1]), decode(broken))


def drawing(colour: int, mode: str) -> Image.Image:
    """A line of one colour on a transparent ground that is black where nobody looks."""
    values = np.zeros((20, 30, 4), dtype=np.uint8)
    values[8:12] = (colour, colour, colour, 255)
    image = Image.fromarray(values)
    return image.convert(mode) if mode != "P" else image.quantize(4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "AVIF", "GIF"])
@pytest.mark.parametrize("colour", [0, 255])
def test_drawings_stand_on_the_mean_colour(kind: str, mode: str, colour: int) -> None:
    """On black a black one is lost, on white a white one."""
    if (kind, mode) in {("TIFF", "P"), ("GIF", "LA"), ("GIF", "P"), ("AVIF", "LA"), ("AVIF", "P")}:
        mode = "RGBA"
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(drawing(colour, mode), kind, **options)
    found = decode(data).astype(int)
    assert np.abs(found[2, 2] - MEAN_COLOUR).max() <= 3
    assert np.abs(found[10, 10] - colour).max() <= 8
    assert np.array_equal(decode(stored_image(data)[1]), decode(data))


def test_half_transparent_pixels_are_halfway() -> None:
    values = np.zeros((4, 4, 4), dtype=np.uint8)
    values[:, :2, 3] = 128
    found = decode(encoded(Image.fromarray(values)))
    assert np.abs(found[0, 0].astype(int) - np.array(MEAN_COLOUR) // 2).max() <= 1


def test_alpha_that_is_the_same_everywhere_is_ignored() -> None:
    for alpha in (0, 100, 255):
        data = encoded(Image.merge("RGBA", [*CORNERS.split(), Image.new("L", CORNERS.size, alpha)]))
        assert np.array_equal(decode(data), np.asarray(CORNERS))


def test_a_colour_key_is_transparent() -> None:
    found = decode(encoded(CORNERS, "PNG", transparency=CORNERS.getpixel((0, 0))))
    assert tuple(found[0, 0]) == MEAN_COLOUR and tuple(found[0, 90]) == CORNERS.getpixel((90, 0))
