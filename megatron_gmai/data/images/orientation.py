"""EXIF's orientation (tag 274): how a picture has to be turned to be seen upright."""

import io
import warnings

import numpy as np
from PIL import Image

TAG = 274
# Value -> whether to exchange rows and columns first, then to reverse rows, then columns (EXIF 2.3,
# 4.6.4: which edge of the picture the first row and the first column are).
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """[h, w] or [h, w, 3] turned upright, contiguous. 1 and unknown values change nothing."""
    if orientation not in TURNS:
        return pixels
    swap, rows, columns = TURNS[orientation]
    pixels = pixels.swapaxes(0, 1) if swap else pixels
    pixels = pixels[::-1] if rows else pixels
    return np.ascontiguousarray(pixels[:, ::-1] if columns else pixels)


def orientation_of(image: Image.Image) -> int:
    """1 where the file says nothing, or nothing that can be read."""
    try:
        value = image.getexif().get(TAG, 1)
    except Exception:  # damaged metadata are no damage to the picture
        return 1
    return value if isinstance(value, int) else 1


def jpeg_orientation(data: bytes) -> int:
    """Of a JPEG file, whose APP1 blocks hold it."""
    if b"\xff\xe1" not in data:
        return 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                return orientation_of(image)
    except Exception:  # as above; the decoder of the pixels has its own say
        return 1
