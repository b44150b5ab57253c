"""Images: the pixels of CLIP's processor for 8 bits, order-keeping windows for more."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.images.decode import decode, load_image
from megatron_gmai.data.images.resize import to_square
from megatron_gmai.data.images.window import MEAN_COLOUR, window_to_8_bits
from megatron_gmai.data.ledger import BadSample
from tests.data.world import encoded, picture

RAMP = np.linspace(0, 40950, 256 * 256).reshape(256, 256)


def pad_then_resize(image: Image.Image, side: int) -> np.ndarray:
    """The reference: the whole square first, then Pillow's bicubic."""
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), MEAN_COLOUR)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    resized = square.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


@pytest.mark.parametrize(
    "size", [(56, 56), (200, 120), (120, 200), (30, 17), (17, 30), (1, 90), (500, 3)]
)
def test_padding_and_resizing_is_pillows_to_two_levels(size: tuple[int, int]) -> None:
    image = picture(*size, seed=3)
    found, expected = to_square(np.array(image), 56), pad_then_resize(image, 56)
    assert found.shape == (3, 56, 56) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 2


def test_without_padding_the_middle_is_cut_out() -> None:
    image = picture(112, 56)
    expected = np.asarray(image.crop((28, 0, 84, 56))).transpose(2, 0, 1)
    assert np.array_equal(to_square(np.array(image), 56, pad=False), expected)


def test_grey_palette_and_alpha_become_rgb() -> None:
    for mode in ("L", "P", "LA", "RGBA", "1", "CMYK"):
        kind = "TIFF" if mode == "CMYK" else "PNG"
        assert load_image(encoded(picture().convert(mode), kind), 28).shape == (3, 28, 28)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    "dtype", [np.uint16, np.int32, np.float32], ids=["16 bits", "32 bits", "float"]
)
def test_deep_pixels_keep_their_order_and_do_not_turn_white(kind: str, dtype: type) -> None:
    if kind == "PNG" and dtype != np.uint16:
        kind = "TIFF"
    image = Image.fromarray(RAMP.astype(dtype))
    levels = np.asarray(decode(encoded(image, kind)))[:, :, 0]
    assert (np.diff(levels.ravel().astype(int)) >= 0).all()
    assert (levels == 255).mean() < 0.01
    assert len(np.unique(levels)) > 200


def test_big_endian_16_bits() -> None:
    ramp = Image.frombytes("I;16B", (256, 256), RAMP.astype(">u2").tobytes())
    levels = np.asarray(decode(encoded(ramp, "TIFF")))[:, :, 0]
    assert (np.diff(levels.ravel().astype(int)) >= 0).all() and (levels == 255).mean() < 0.01


def test_a_few_bright_pixels_do_not_darken_the_rest() -> None:
    values = np.linspace(0, 1000, 10_000)
    values[-10:] = 65_535
    levels = window_to_8_bits(values)
    assert levels[9_000] > 200
    assert levels[-1] > levels[-11]


def test_a_given_window_is_spread_over_the_levels_and_nothing_is_clipped() -> None:
    values = np.arange(-1000, 3001)
    levels = window_to_8_bits(values, (0, 80)).astype(int)
    assert levels[1080] - levels[1000] >= 255 - 2 * 8
    assert (np.diff(levels) >= 0).all()
    assert levels[0] < levels[999] and levels[1081] < levels[-1]


def test_flat_and_not_finite_images() -> None:
    assert (window_to_8_bits(np.full((4, 4), 7)) == 128).all()
    levels = window_to_8_bits(np.array([np.nan, 1.0, 2.0, np.inf, -np.inf]))
    assert levels[0] == levels[1] == levels[4] < levels[2] == levels[3]


def jpeg() -> bytes:
    return encoded(picture(200, 200), "JPEG")


@pytest.mark.parametrize("kept", [0, 2, 100, 1000, -400, -30])
def test_a_truncated_jpeg_is_refused(kept: int) -> None:
    with pytest.raises(BadSample):
        decode(jpeg()[:kept])


def test_a_jpeg_with_a_lost_middle_and_a_proper_end_is_refused() -> None:
    whole = jpeg()
    with pytest.raises(BadSample):
        decode(whole[: len(whole) // 2] + b"\xff\xd9")


def test_a_truncated_png_and_tiff_are_refused() -> None:
    for kind in ("PNG", "TIFF", "WEBP"):
        whole = encoded(picture(100, 100), kind)
        with pytest.raises(BadSample):
            decode(whole[: len(whole) // 2])


def test_a_decompression_bomb_is_refused_unopened() -> None:
    bomb = bytearray(encoded(picture(), "PNG"))
    bomb[16:24] = struct.pack(">II", 11_000, 11_000)
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    with pytest.raises(BadSample, match="11000 x 11000 exceeds"):
        decode(bytes(bomb))


def test_a_jpeg_has_pillows_pixels() -> None:
    for mode in ("RGB", "L", "CMYK"):
        data = encoded(picture(65, 43).convert(mode), "JPEG")
        assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_jpeg_with_padding_before_its_end_is_whole() -> None:
    assert np.array_equal(decode(jpeg()[:-2] + b"padding\xff\xd9"), decode(jpeg()))
