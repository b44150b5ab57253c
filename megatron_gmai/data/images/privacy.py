"""Image files as they go into shards: the same pixels, and nothing else.

Cameras, scanners and archives write names, dates and numbers of patients into EXIF blocks, TIFF
tags, PNG texts and DICOM elements. Nothing of that reaches a shard: parts that pixels do not need
are cut out of the file without decoding it. Where that cannot be done, or where pixels depend on
more than these parts (deep values, animations, DICOM), the decoded picture is written as a PNG of
8 bits, without loss.
"""

import io
import struct
import warnings
import zlib

import numpy as np
from PIL import Image

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.formats import TIFF_MAGICS
from megatron_gmai.data.images.orientation import TAG as ORIENTATION
from megatron_gmai.data.images.orientation import jpeg_orientation
from megatron_gmai.data.images.tiff import is_plain
from megatron_gmai.data.ledger import BadSample

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}
# JFIF and Adobe blocks say how colours are stored; all others are free text for applications.
JPEG_BLOCKS = {0xE0, 0xEE}
JPEG_TEXTS = {*range(0xE0, 0xF0), 0xFE} - JPEG_BLOCKS
# Baseline and extension tags that describe pixels (TIFF 6.0): sizes, layout, compression, colours.
TIFF_TAGS = {
    254, 255, 256, 257, 258, 259, 262, 263, 264, 265, 266, 273, 274, 277, 278, 279, 280, 281, 282,
    283, 284, 290, 291, 292, 293, 296, 301, 317, 318, 319, 320, 321, 322, 323, 324, 325, 332, 338,
    339, 340, 341, 342, 347, 512, 513, 514, 515, 519, 520, 521, 529, 530, 531, 532,
}  # fmt: skip
WEBP_TEXTS = {b"EXIF", b"XMP ", b"ICCP"}
WEBP_TEXT_FLAGS = 0x20 | 0x08 | 0x04  # in VP8X: ICC, EXIF, XMP present
WEBP_ANIMATION = 0x02


def stored_image(data: bytes) -> tuple[str, bytes]:
    """File suffix and bytes for a shard; they decode to the pixels of `data`. Raises BadSample if
    the file cannot be decoded."""
    pixels = _checksum(decode(data))  # two pictures of 100 megapixels at once would be too many
    try:
        suffix, bare = strip_metadata(data)
        if bare == data or _checksum(decode(bare)) == pixels:
            return suffix, bare
    except BadSample:
        pass  # the picture is sound, whatever is odd about its file
    return "png", encode_png(decode(data))


def _checksum(pixels: np.ndarray) -> tuple[int, ...]:
    return (*pixels.shape, zlib.crc32(pixels.data))


def strip_metadata(data: bytes) -> tuple[str, bytes]:
    """File suffix and bytes of the same picture without metadata.

    Takes files that have been decoded once, so their structure is known to be sound. Raises
    BadSample if a file decodes and yet cannot be taken apart.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bare = _without_metadata(data)
    except Exception as error:  # readers raise anything on damaged files
        raise BadSample(f"cannot remove metadata: {error}") from error
    return bare or ("png", encode_png(decode(data)))


def _without_metadata(data: bytes) -> tuple[str, bytes] | None:
    """None for files that have to be written anew."""
    if data.startswith(b"\xff\xd8\xff"):
        return "jpg", _strip_jpeg(data)
    if data.startswith(PNG_MAGIC):
        return ("png", _strip_png(data)) if data[24] <= 8 else None
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        animated = data[12:16] == b"VP8X" and data[20] & WEBP_ANIMATION
        return None if animated else ("webp", _strip_webp(data))
    if data[:4] in TIFF_MAGICS and data[128:132] != b"DICM" and is_plain(data, TIFF_TAGS):
        return "tif", data
    return None


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of uint8 [h, w] or [h, w, 3], and nothing else; colours that are all grey as grey."""
    if pixels.ndim == 3 and (pixels[:, :, :1] == pixels).all():
        pixels = np.ascontiguousarray(pixels[:, :, 0])
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _strip_jpeg(data: bytes) -> bytes:
    """Copies segments up to the first scan, then all the rest.

    Of EXIF the orientation is kept, in a block of 34 bytes: pixels cannot be turned without loss in
    a JPEG, and take ten times the space in a PNG.
    """
    kept, offset = [data[:2], _orientation_block(jpeg_orientation(data))], 2
    while data[offset + 1] != 0xDA:
        marker = data[offset + 1]
        if data[offset] != 0xFF:
            raise BadSample("cannot remove metadata: a JPEG marker is missing")
        if marker == 0xFF:  # fill byte
            offset += 1
            continue
        size = 2 + struct.unpack_from(">H", data, offset + 2)[0]
        if marker not in JPEG_TEXTS:
            kept.append(data[offset : offset + size])
        offset += size
    # Scans escape this mark, so it ends the picture; thumbnails and more may follow.
    end = data.find(b"\xff\xd9", offset)
    return b"".join([*kept, data[offset : end if end >= 0 else len(data)], b"\xff\xd9"])


def _orientation_block(orientation: int) -> bytes:
    """An APP1 segment (EXIF 2.3) with this tag alone; nothing for pictures that are upright."""
    if orientation == 1:
        return b""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    body = tags.tobytes()
    return b"\xff\xe1" + struct.pack(">H", 2 + len(body)) + body


def _strip_png(data: bytes) -> bytes:
    kept, offset = [PNG_MAGIC], len(PNG_MAGIC)
    while offset < len(data):
        size, kind = struct.unpack_from(">I4s", data, offset)
        chunk = data[offset : offset + 12 + size]
        if kind in PNG_CHUNKS:
            kept.append(chunk)
        if kind == b"IEND":
            break
        offset += len(chunk)
    return b"".join(kept)


def _strip_webp(data: bytes) -> bytes:
    kept, offset = [], 12
    while offset + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, offset)
        chunk = data[offset : offset + 8 + size + size % 2]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~WEBP_TEXT_FLAGS]) + chunk[9:]
        if kind not in WEBP_TEXTS:
            kept.append(chunk)
        offset += 8 + size + size % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body
