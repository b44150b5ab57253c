"""Uploaded images as the model will see them, with the window that a user may move.

Without a window deep images are shown as training windows them. The page sends what it shows, so a
moved window is what the model gets.
"""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from megatron_gmai.data.images.decode import decode, decode_grey, to_rgb
from megatron_gmai.data.images.grey import Window
from megatron_gmai.data.images.privacy import encode_png
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.evaluate.server.parsing import BadRequest

MOST_SIDE = 2048  # of what is sent back; the model takes far less


def preview(data: bytes, query: Mapping[str, str]) -> dict[str, Any]:
    """`{"image": data URL, "range": [least, greatest], "window": [low, high]}`, the last two null
    for images that have no window; `low` and `high` in the query are another window. Raises
    BadRequest."""
    try:
        grey = decode_grey(data)
        window = None if grey is None else _window(query) or grey.window
        pixels = decode(data) if grey is None else to_rgb(grey.levels(window))
    except BadSample as error:
        raise BadRequest(str(error)) from error
    image = Image.fromarray(pixels)
    image.thumbnail((MOST_SIDE, MOST_SIDE), Image.Resampling.LANCZOS)
    encoded = base64.b64encode(encode_png(np.asarray(image))).decode()
    return {
        "image": f"data:image/png;base64,{encoded}",
        "range": None if grey is None else list(grey.range),
        "window": None if window is None else list(window),
    }


def _window(query: Mapping[str, str]) -> Window | None:
    if not query.keys() & {"low", "high"}:
        return None
    try:
        low, high = float(query["low"]), float(query["high"])
    except (KeyError, ValueError) as error:
        raise BadRequest("a window needs the numbers low and high") from error
    if not (np.isfinite(low) and np.isfinite(high) and low < high):
        raise BadRequest("the window's low must be below its high")
    return low, high
