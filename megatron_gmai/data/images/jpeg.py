"""JPEG, the format of most data sets, decoded faster than by Pillow to the same pixels."""

import numpy as np
import simplejpeg

from megatron_gmai.data.images.orientation import jpeg_orientation, turn
from megatron_gmai.data.images.sizes import check_size, is_huge
from megatron_gmai.data.ledger import BadSample

# A scan is decoded over the whole image, however few bytes it has; real files have about ten.
MAX_SCANS = 500
MAX_SCANNED_PIXELS = 2 * 10**9


def check_scans(data: bytes, width: int, height: int) -> None:
    """Raises BadSample for a JPEG that would take minutes. The mark cannot stand inside a scan."""
    scans = data.count(b"\xff\xda")
    if scans > MAX_SCANS:
        raise BadSample(f"a JPEG of more than {MAX_SCANS} scans")
    if scans * width * height > MAX_SCANNED_PIXELS:
        raise BadSample(f"a JPEG of {scans} scans over {width} x {height} pixels")


def decode_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels that Pillow gives, faster, and without its silence about lost data.

    None for the rare kinds (CMYK, odd sampling, padded segments) that are left to Pillow.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # its own error for headers it does not know
        return None
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    check_size(width, height)
    check_scans(data, width, height)
    # Half the size in the decoder itself: whole, 100 megapixels need 300 MB.
    least = (-(-height // 2), -(-width // 2)) if is_huge(width, height) else (0, 0)
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False,
            min_height=least[0], min_width=least[1], strict=True,
        )  # fmt: skip
    except ValueError as error:
        if "extraneous bytes" in str(error):  # padding between segments: all pixels are there
            return None
        raise BadSample(f"cannot decode: {error}") from error
    return turn(pixels, jpeg_orientation(data))
