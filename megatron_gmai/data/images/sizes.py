"""How large a picture may be, and what happens to huge ones."""

import numpy as np
from PIL import Image

from megatron_gmai.data.ledger import BadSample

MAX_PIXELS = 100_000_000
MAX_SIDE = 12_000  # its square, which padding makes, has to fit in memory too
# Larger pictures are halved on both sides, by the decoder itself where the format allows it. The
# vision tower sees 336 x 336, so what is lost would be lost a step later.
HUGE_PIXELS = 32_000_000
MAX_BYTES = 2**30  # of undecoded values, which may have many samples of many bytes


def check_size(width: int, height: int, bytes_a_pixel: int = 1) -> None:
    """Raises BadSample for sizes that no medical image has and that would exhaust memory."""
    if width < 1 or height < 1:
        raise BadSample(f"image size {width} x {height}")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSample(
            f"image size {width} x {height} exceeds {MAX_PIXELS} pixels or {MAX_SIDE} a side"
        )
    if width * height * bytes_a_pixel > MAX_BYTES:
        raise BadSample(f"image size {width} x {height} of {bytes_a_pixel} bytes a pixel")


def is_huge(width: int, height: int) -> bool:
    """Whether the picture is decoded at half its size."""
    return width * height > HUGE_PIXELS


def halved_if_huge(pixels: np.ndarray) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3], averaged over 2 x 2 pixels if there are too many of them."""
    height, width = pixels.shape[:2]
    if not is_huge(width, height):
        return pixels
    return np.asarray(Image.fromarray(pixels).reduce(2))
