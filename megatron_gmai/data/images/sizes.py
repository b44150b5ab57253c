"""How large a picture may be, and what happens to huge ones."""

from collections.abc import Iterator

import numpy as np
from PIL import Image

from megatron_gmai.data.ledger import BadSample

MAX_PIXELS = 100_000_000
MAX_SIDE = 12_000  # its square, which padding makes, has to fit in memory too
# Larger pictures are halved on both sides, by the decoder itself where the format allows it. The
# vision tower sees 336 x 336, so what is lost would be lost a step later.
HUGE_PIXELS = 32_000_000
STRIP = 512  # rows
# Of memory while a picture of any format is decoded: values as its decoder holds them, and copies.
MAX_BYTES = 2**29


def check_size(width: int, height: int, bytes_a_pixel: int = 1) -> None:
    """Raises BadSample for sizes that no medical image has and that would exhaust memory.

    `bytes_a_pixel` is what decoding holds at once, counted before anything is decoded.
    """
    if width < 1 or height < 1:
        raise BadSample(f"image size {width} x {height}")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSample(
            f"image size {width} x {height} exceeds {MAX_PIXELS} pixels or {MAX_SIDE} a side"
        )
    if width * height * bytes_a_pixel > MAX_BYTES:
        raise BadSample(
            f"image size {width} x {height} at {bytes_a_pixel} bytes a pixel takes more than "
            f"{MAX_BYTES} bytes to decode"
        )


def is_huge(width: int, height: int) -> bool:
    """Whether the picture is decoded at half its size."""
    return width * height > HUGE_PIXELS


def strips(height: int) -> Iterator[slice]:
    """Rows of a picture, some at a time, in strips that begin at even rows."""
    yield from (slice(row, min(row + STRIP, height)) for row in range(0, height, STRIP))


def halved_if_huge(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3], averaged over 2 x 2 pixels if there are too many of them."""
    height, width = pixels.shape[:2]
    if not is_huge(width, height):
        return pixels
    return np.asarray(Image.fromarray(pixels).reduce(2))
