"""More than 8 bits: one windowing rule for every format, order kept, palettes applied."""

import io
from typing import Literal

import imagecodecs
import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.window import MEAN_COLOUR, WINDOW_MARGIN, window_to_8_bits
from megatron_gmai.data.ledger import BadSample
from tests.data.files import png_16, tiff

TWELVE_BITS = np.linspace(0, 4095, 60 * 80).astype(np.uint16).reshape(60, 80)
# Red rises, green falls, blue is half of red.
COLOURS = np.stack([TWELVE_BITS, 4095 - TWELVE_BITS, TWELVE_BITS // 2], axis=2)
OPAQUE = np.full((60, 80, 1), 65_535, dtype=np.uint16)


def with_alpha(values: np.ndarray, alpha: np.ndarray = OPAQUE) -> np.ndarray:
    return np.concatenate([values.reshape(60, 80, -1), alpha], axis=2)


def ppm(values: np.ndarray) -> bytes:
    return b"P6 # a scanner\n80 60\n65535\n" + values.astype(">u2").tobytes()


DEEP_COLOURS: dict[str, bytes] = {
    "PNG": png_16(COLOURS),
    "PNG with alpha": png_16(with_alpha(COLOURS)),
    "TIFF": tiff(COLOURS, 2),
    "TIFF, big-endian": tiff(COLOURS, 2, ">"),
    "TIFF in planes": tiff(COLOURS, 2, planar=True),
    "TIFF with alpha": tiff(with_alpha(COLOURS), 2, extra=2),
    "TIFF with multiplied alpha": tiff(with_alpha(COLOURS), 2, extra=1),
    "TIFF with another sample": tiff(with_alpha(COLOURS), 2, extra=0),
    "TIFF of floats": tiff(COLOURS.astype(np.float32), 2),
    "compressed TIFF": bytes(
        imagecodecs.tiff_encode(COLOURS, photometric="rgb", compression="lzw")
    ),
    "JPEG 2000": bytes(imagecodecs.jpeg2k_encode(COLOURS, level=0)),
    "PPM": ppm(COLOURS),
}


@pytest.mark.parametrize("name", DEEP_COLOURS)
def test_12_bits_of_colour_fill_the_levels_by_one_window(name: str) -> None:
    """Pillow keeps the upper 8 of 16 bits: values up to 4095 came out as levels up to 15."""
    found = decode(DEEP_COLOURS[name])
    assert np.array_equal(found, window_to_8_bits(COLOURS))
    assert found[:, :, 0].min() <= WINDOW_MARGIN and found[:, :, 0].max() >= 255 - WINDOW_MARGIN
    assert abs(int(found[-1, -1, 2]) - 128) < 16  # blue stays half of red: no colour of its own


@pytest.mark.parametrize(
    "data",
    [
        png_16(with_alpha(TWELVE_BITS)),
        tiff(with_alpha(TWELVE_BITS), 1, extra=2),
        b"P5 80 60 65535\n" + TWELVE_BITS.astype(">u2").tobytes(),
        b"P5 80 60 4095\n" + TWELVE_BITS.astype(">u2").tobytes(),
    ],
    ids=["PNG with alpha", "TIFF with alpha", "PGM", "PGM of 12 bits"],
)
def test_12_bits_of_grey_fill_the_levels(data: bytes) -> None:
    levels = decode(data)[:, :, 0].astype(int)
    assert (np.diff(levels.ravel()) >= 0).all()
    assert len(np.unique(levels)) > 240 and np.ptp(levels) == 255


ORDERED: dict[str, np.ndarray] = {
    "uint32 above 2^31": np.linspace(0, 2**32 - 1, 4800).astype(np.uint32),
    "uint32 of a narrow range": (2**32 - 4800 + np.arange(4800)).astype(np.uint32),
    "int32": np.linspace(-(2**31), 2**31 - 1, 4800).astype(np.int32),
    "int16": np.linspace(-3000, 3000, 4800).astype(np.int16),
    "int8": np.linspace(-128, 127, 4800).astype(np.int8),
    "float16": np.linspace(-5, 5, 4800).astype(np.float16),
    "float64": np.linspace(-1e-9, 1e-9, 4800),
    "uint64": np.linspace(0, 2**63, 4800).astype(np.uint64),
}


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("name", ORDERED)
def test_every_type_of_value_keeps_its_order(name: str, order: Literal["<", ">"]) -> None:
    levels = decode(tiff(ORDERED[name].reshape(60, 80, 1), 1, order))[:, :, 0].ravel().astype(int)
    assert (np.diff(levels) >= 0).all()
    assert len(np.unique(levels)) > 200


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32, np.float32])
def test_where_white_is_zero_small_values_are_bright(dtype: type, order: Literal["<", ">"]) -> None:
    values: np.ndarray = (TWELVE_BITS // 16).astype(dtype)[:, :, None]
    negative, positive = (decode(tiff(values, kind, order)).astype(int) for kind in (0, 1))
    assert np.array_equal(negative, 255 - positive)


def test_a_palette_of_16_bits_is_applied() -> None:
    palette = np.zeros((3, 65_536), dtype=np.uint16)
    palette[:, 7], palette[:, 4000] = (65_535, 0, 0), (0, 0, 32_768)
    indices = np.array([[7, 4000]], dtype=np.uint16)[:, :, None]
    assert decode(tiff(indices, 3, palette=palette)).tolist() == [[[255, 0, 0], [0, 0, 128]]]


def test_transparent_deep_pixels_become_the_mean_colour() -> None:
    alpha = OPAQUE.copy()
    alpha[:, :40] = 0
    for data in (
        png_16(with_alpha(COLOURS, alpha)),
        png_16(with_alpha(TWELVE_BITS, alpha)),
        tiff(with_alpha(COLOURS, alpha), 2, extra=2),
    ):
        found = decode(data)
        assert (found[:, :40] == MEAN_COLOUR).all()
        assert not (found[:, 40:] == MEAN_COLOUR).all(axis=2).any()


def test_the_transparent_value_of_a_deep_grey_png() -> None:
    key = int(TWELVE_BITS[0, 5])
    found = decode(png_16(TWELVE_BITS[:, :, None], tRNS=key.to_bytes(2, "big")))
    assert tuple(found[0, 5]) == MEAN_COLOUR
    assert np.array_equal(found[1:], decode(png_16(TWELVE_BITS[:, :, None]))[1:])


def test_the_transparent_value_of_a_deep_colour_png() -> None:
    key = COLOURS[0, 5].astype(">u2").tobytes()
    found = decode(png_16(COLOURS, tRNS=key))
    assert tuple(found[0, 5]) == MEAN_COLOUR and tuple(found[0, 6]) != MEAN_COLOUR


@pytest.mark.parametrize("name", ["PNG", "TIFF", "compressed TIFF", "PPM"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_truncated_deep_files_are_refused(name: str, kept: float) -> None:
    data = DEEP_COLOURS[name]
    with pytest.raises(BadSample):
        decode(data[: int(len(data) * kept)])


def test_layouts_that_are_no_picture_are_refused_with_the_reason() -> None:
    with pytest.raises(BadSample, match="photometric 5"):
        decode(tiff(with_alpha(COLOURS), 5))


def test_without_its_reader_the_reason_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "imagecodecs", None)
    for name in ("PNG", "TIFF", "JPEG 2000"):
        with pytest.raises(BadSample, match=r"megatron-gmai\[deep\]"):
            decode(DEEP_COLOURS[name])
    # Grey values, the common case, need no more than Pillow.
    assert decode(png_16(TWELVE_BITS[:, :, None])).max() == 255


def test_a_large_image_is_windowed_like_a_small_one() -> None:
    """Strips and sampled percentiles change nothing that can be seen."""
    small = np.random.default_rng(0).gamma(2, 500, (1000, 1200)).astype(np.uint16)
    large = np.tile(small, (4, 2))
    difference = window_to_8_bits(large)[:1000, :1200].astype(int) - window_to_8_bits(small)
    assert np.abs(difference).max() <= 2


def test_a_large_image_is_windowed_by_all_of_its_colours() -> None:
    """Of nine million values every third is taken: not always the red one."""
    values = np.zeros((1500, 2000, 3), dtype=np.uint16)
    values[:, :, 1] = np.linspace(0, 4095, 2000).astype(np.uint16)
    assert window_to_8_bits(values)[0, 1000, 1] == pytest.approx(127, abs=8)


def test_8_bits_stay_as_they_are() -> None:
    levels = np.arange(100, 200, dtype=np.uint8).reshape(10, 10)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, "PNG")
    assert np.array_equal(decode(buffer.getvalue())[:, :, 0], levels)
