"""Image files without what does not belong to their pixels.

Cameras, scanners and archives write names, dates and numbers of patients into EXIF blocks, TIFF
tags, PNG texts and DICOM elements. Nothing of that reaches a shard: parts that pixels do not need
are cut out of the file without decoding it, and formats where that cannot be done are written anew,
without loss. Orientation tags go too; they are not applied, as GMAI-VL does not.
"""

import io
import struct

import numpy as np
from PIL import Image

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
TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two for files above 4 GB
WEBP_TEXTS = {b"EXIF", b"XMP ", b"ICCP"}
WEBP_TEXT_FLAGS = 0x20 | 0x08 | 0x04  # in VP8X: ICC, EXIF, XMP present


def strip_metadata(data: bytes) -> tuple[str, bytes]:
    """File suffix and bytes of the same picture without metadata.

    Takes files that have been decoded once, so their structure is known to be sound. Raises
    BadSample if a file decodes and yet cannot be taken apart.
    """
    try:
        if data.startswith(b"\xff\xd8\xff"):
            return "jpg", _strip_jpeg(data)
        if data.startswith(PNG_MAGIC):
            return "png", _strip_png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return "webp", _strip_webp(data)
        if data[:4] in TIFF_MAGICS:
            return "tif", _strip_tiff(data)
        return "png", encode_png(np.array(Image.open(io.BytesIO(data)).convert("RGB")))
    except (struct.error, IndexError, KeyError, OSError, SyntaxError) as error:
        raise BadSample(f"cannot remove metadata: {error}") from error


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG of grey or RGB pixels, and nothing else."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _strip_jpeg(data: bytes) -> bytes:
    """Copies segments up to the first scan, then all the rest."""
    kept, place = [data[:2]], 2
    while data[place + 1] != 0xDA:
        marker = data[place + 1]
        if data[place] != 0xFF:
            raise BadSample("cannot remove metadata: a JPEG marker is missing")
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        size = 2 + struct.unpack_from(">H", data, place + 2)[0]
        if marker not in JPEG_TEXTS:
            kept.append(data[place : place + size])
        place += size
    # Scans escape this mark, so it ends the picture; thumbnails and more may follow.
    end = data.find(b"\xff\xd9", place)
    return b"".join([*kept, data[place : end if end >= 0 else len(data)], b"\xff\xd9"])


def _strip_png(data: bytes) -> bytes:
    kept, place = [PNG_MAGIC], len(PNG_MAGIC)
    while place < len(data):
        size, kind = struct.unpack_from(">I4s", data, place)
        chunk = data[place : place + 12 + size]
        if kind in PNG_CHUNKS:
            kept.append(chunk)
        if kind == b"IEND":
            break
        place += len(chunk)
    return b"".join(kept)


def _strip_webp(data: bytes) -> bytes:
    kept, place = [], 12
    while place + 8 <= len(data):
        kind, size = struct.unpack_from("<4sI", data, place)
        chunk = data[place : place + 8 + size + size % 2]
        if kind == b"VP8X":
            chunk = chunk[:8] + bytes([chunk[8] & ~WEBP_TEXT_FLAGS]) + chunk[9:]
        if kind not in WEBP_TEXTS:
            kept.append(chunk)
        place += 8 + size + size % 2
    body = b"WEBP" + b"".join(kept)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _strip_tiff(data: bytes) -> bytes:
    """The file itself if it has one page and only tags that pixels need, else its first page."""
    with Image.open(io.BytesIO(data)) as image:
        pages = getattr(image, "n_frames", 1)
        if pages == 1 and set(image.tag_v2) <= TIFF_TAGS:  # type: ignore[attr-defined]
            return data
        return bare_tiff(image)


def bare_tiff(image: Image.Image) -> bytes:
    """The page at which `image` stands as a TIFF of nothing but its pixels, in their own depth."""
    buffer = io.BytesIO()
    image.load()  # may turn the image, so its size is not asked for before
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    if image.palette is not None:
        bare.putpalette(image.palette)
    bare.save(buffer, "TIFF", compression="tiff_deflate")
    return buffer.getvalue()
