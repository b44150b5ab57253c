"""Colours of more than 8 bits, of which Pillow keeps only the upper 8.

imagecodecs (extra `deep`) reads them whole: it wraps libpng, libtiff and OpenJPEG for the images of
microscopes and scanners. Grey values need it only in rare layouts.
"""

import re
import struct
from types import ModuleType

import numpy as np

from megatron_gmai.data.images.formats import needs
from megatron_gmai.data.images.sizes import check_size
from megatron_gmai.data.images.window import flatten
from megatron_gmai.data.ledger import BadSample

PPM_HEAD = re.compile(rb"P6(?:\s+|\s*#[^\n]*\n)+(\d{1,9})\s+(\d{1,9})\s+(\d{1,5})\s")
CODESTREAM = b"\xff\x4f\xff\x51"  # JPEG 2000's SOC and SIZ markers (ISO 15444-1, A.5.1)


def imagecodecs(what: str) -> ModuleType:
    """The library. Raises BadSample where it is not installed."""
    try:
        import imagecodecs
    except ImportError as error:
        raise needs(what, "imagecodecs", "deep") from error
    return imagecodecs


def read_deep(kind: str, data: bytes) -> np.ndarray | None:
    """uint8 [h, w] or [h, w, 3] of a file of deep colours; None for any other."""
    reader = {"PNG": _png, "JPEG2000": _jpeg_2000, "PPM": _ppm}.get(kind)
    return reader(data) if reader else None


def _cost(samples: int) -> int:
    """Bytes a pixel that decoding 16-bit samples holds at once: levels and, where alpha is one of
    the samples, copies without it."""
    colours = samples - 1 + samples % 2
    return 3 * samples if samples % 2 else 2 * samples + 2 * colours + 2 * max(colours, 3)


def _png(data: bytes) -> np.ndarray | None:
    width, height, bits, colours = struct.unpack_from(">IIBB", data, 16)
    if bits != 16 or colours not in (2, 4, 6):  # 0 is grey, which Pillow reads whole
        return None
    check_size(width, height, _cost({4: 2, 2: 3, 6: 4}[colours]))
    codec = imagecodecs("a PNG of 16-bit colours or alpha")
    # libpng does not look behind the last row that it needs, and cut files have no end.
    if b"IEND" not in data[-64:] and b"IEND" not in data:
        raise BadSample("a truncated PNG")
    return flatten(codec.png_decode(data), 65_535)


def jpeg_2000_head(data: bytes) -> int:
    """Where the codestream begins, -1 in other data."""
    return data.find(CODESTREAM) if data[4:8] == b"jP  " or data[:4] == CODESTREAM else -1


def jpeg_2000_size(data: bytes) -> tuple[int, int]:
    """Width and height by the SIZ segment."""
    start = jpeg_2000_head(data) + 8
    right, lower, left, upper = struct.unpack_from(">IIII", data, start)
    return right - left, lower - upper


def _jpeg_2000(data: bytes) -> np.ndarray | None:
    start = jpeg_2000_head(data)
    if start < 0:
        return None
    samples, depth = struct.unpack_from(">HB", data, start + 40)
    bits = (depth & 0x7F) + 1
    if bits <= 8 or samples == 1:
        return None
    if samples > 4:
        raise BadSample(f"a JPEG 2000 of {samples} samples a pixel")
    check_size(*jpeg_2000_size(data), 4 * samples + _cost(samples))  # OpenJPEG's own 32 bits
    codec = imagecodecs(f"a JPEG 2000 of {bits}-bit colours")
    return flatten(codec.jpeg2k_decode(data), 2**bits - 1)


def _ppm(data: bytes) -> np.ndarray | None:
    """Netpbm's binary colours: a header in ASCII, then two bytes a value, the higher one first."""
    head = PPM_HEAD.match(data)
    if head is None or int(head[3]) < 256:
        return None
    width, height = int(head[1]), int(head[2])
    check_size(width, height, _cost(3))
    values = np.frombuffer(data, ">u2", offset=head.end())
    if values.size < width * height * 3:
        raise BadSample("a truncated PPM")
    return flatten(values[: width * height * 3].reshape(height, width, 3), 65_535)
