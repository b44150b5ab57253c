"""Uploaded images as the model will see them, with the window that a user may move.

Without a window deep images are shown as training windows them. The page sends what it shows, so a
moved window is what the model gets.
"""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from megatron_gmai.data.images.decode import (
    DEEP_MODES,
    WINDOW_PERCENTILES,
    check_size,
    window_to_8_bits,
)
from megatron_gmai.data.images.dicom import file_window, is_dicom
from megatron_gmai.data.images.privacy import encode_png
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.benchmarks.cells import to_pixels
from megatron_gmai.evaluate.server.parsing import BadRequest

MOST_SIDE = 2048  # of what is sent back; the model takes far less


def preview(data: bytes, query: Mapping[str, str]) -> dict[str, Any]:
    """`{"image": data URL, "range": [least, greatest], "window": [low, high]}`, the last two null
    for images that have no window; `low` and `high` in the query are another window. Raises
    BadRequest."""
    try:
        deep = _deep_values(data)
        if deep is None or "low" not in query:
            pixels = to_pixels(data)
        else:
            deep = replace(deep, window=_window(query))
            levels = window_to_8_bits(deep.values, deep.window)
            pixels = 255 - levels if deep.inverted else levels
    except BadSample as error:
        raise BadRequest(str(error)) from error
    image = Image.fromarray(pixels)
    image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    encoded = base64.b64encode(encode_png(np.asarray(image))).decode()
    return {
        "image": f"data:image/png;base64,{encoded}",
        "range": [float(deep.values.min()), float(deep.values.max())] if deep else None,
        "window": list(deep.window) if deep else None,
    }


def _window(query: Mapping[str, str]) -> tuple[float, float]:
    try:
        low, high = float(query["low"]), float(query["high"])
    except (KeyError, ValueError) as error:
        raise BadRequest("a window needs the numbers low and high") from error
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise BadRequest("the window's low must be below its high")
    return low, high


@dataclass(frozen=True)
class _Deep:
    """Grey values, the window that training shows them in, and whether the smallest is white."""

    values: np.ndarray
    window: tuple[float, float]
    inverted: bool = False


def _deep_values(data: bytes) -> _Deep | None:
    """None for images of 8 bits."""
    if is_dicom(data):
        return _dicom_values(data)
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_size(*image.size)
            values = np.asarray(image) if image.mode in DEEP_MODES else None
    except BadSample:
        raise
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise BadSample(f"cannot decode: {error}") from error
    if values is None:
        return None
    numbers = np.nan_to_num(values.astype(np.float32))
    return _Deep(numbers, _usual_window(numbers))


def _usual_window(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, WINDOW_PERCENTILES)
    return float(low), float(high)


def _dicom_values(data: bytes) -> _Deep | None:
    to_pixels(data)  # refuses what training refuses: sizes, frames, damage
    import pydicom
    from pydicom.pixels import apply_modality_lut

    file = pydicom.dcmread(io.BytesIO(data))
    pixels = file.pixel_array
    if pixels.ndim != 2:
        return None
    inverted = file.PhotometricInterpretation == "MONOCHROME1"
    values = apply_modality_lut(pixels, file).astype(np.float32)
    return _Deep(values, file_window(file) or _usual_window(values), inverted)
