"""Grey values apart from their window: what is shown by default is what training decodes."""

import io

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.images.decode import decode, decode_grey, to_rgb
from megatron_gmai.data.images.window import window_to_8_bits
from megatron_gmai.data.ledger import BadSample
from tests.data.files import dicom, png_16, tiff

VALUES = np.linspace(0, 4095, 60 * 80).astype(np.uint16).reshape(60, 80)
SAMPLE = VALUES[:, :, None]
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1


def pillow(values: np.ndarray, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind)
    return buffer.getvalue()


DEEP = {
    "PNG": pillow(VALUES, "PNG"),
    "PGM": pillow(VALUES.astype(np.int32), "PPM"),
    "JPEG 2000": pillow(VALUES, "JPEG2000"),
    "TIFF": tiff(SAMPLE, BLACK_IS_ZERO),
    "TIFF, white is zero": tiff(SAMPLE, WHITE_IS_ZERO),
    "TIFF on its side": tiff(SAMPLE, BLACK_IS_ZERO, orientation=6),
    "TIFF of 64-bit floats": tiff(SAMPLE.astype(np.float64), BLACK_IS_ZERO, orientation=6),
    "DICOM": dicom(VALUES),
    "DICOM, white is zero": dicom(VALUES, PhotometricInterpretation="MONOCHROME1"),
    "DICOM with a window": dicom(VALUES, WindowCenter=40, WindowWidth=80),
}


@pytest.mark.parametrize("name", DEEP)
def test_the_usual_window_shows_what_training_decodes(name: str) -> None:
    grey = decode_grey(DEEP[name])
    assert grey is not None and grey.range == (0, 4095)
    expected = (0.0, 80.0) if name == "DICOM with a window" else (20.5, 4074.5)
    assert grey.window == pytest.approx(expected, abs=1)
    for levels in (grey.levels(), grey.levels(grey.window)):
        assert np.array_equal(to_rgb(levels), decode(DEEP[name]))


@pytest.mark.parametrize("name", DEEP)
def test_another_window_keeps_what_else_the_file_says(name: str) -> None:
    grey = decode_grey(DEEP[name])
    assert grey is not None
    levels = window_to_8_bits(VALUES, (1000, 1400))
    levels = 255 - levels if "white" in name else levels
    levels = np.rot90(levels, -1) if grey.values.shape == (80, 60) else levels
    assert ("side" in name or "64" in name) == (grey.values.shape == (80, 60))
    assert np.array_equal(grey.levels((1000, 1400)), levels)


def test_what_is_no_number_is_outside_of_the_range() -> None:
    values = SAMPLE.astype(np.float32)
    values[1, 0], values[1, 1] = np.nan, np.inf
    grey = decode_grey(tiff(values, BLACK_IS_ZERO))
    assert grey is not None and grey.range == (0, 4095)
    assert np.isfinite(grey.window).all()


BITS = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
NOT_DEEP = {
    "PNG": pillow(VALUES.astype(np.uint8), "PNG"),
    "JPEG": pillow(VALUES.astype(np.uint8), "JPEG"),
    "PNG of deep colours": png_16(np.repeat(SAMPLE, 3, axis=2)),
    "DICOM": dicom(VALUES, PixelData=VALUES.astype(np.uint8).tobytes(), **BITS),
}


@pytest.mark.parametrize("name", NOT_DEEP)
def test_colours_and_8_bits_have_no_window(name: str) -> None:
    decode(NOT_DEEP[name])
    assert decode_grey(NOT_DEEP[name]) is None


@pytest.mark.parametrize("data", [b"", b"text", DEEP["PNG"][:200], DEEP["DICOM"][:700]])
def test_what_cannot_be_decoded_is_refused(data: bytes) -> None:
    with pytest.raises(BadSample):
        decode_grey(data)
