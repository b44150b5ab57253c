"""The size of a JPEG of any kind, told before anything is decoded.

The markers are those of ITU T.81, B.1.1.3, and of T.87 for JPEG-LS. Decoders step over bytes that
belong to no segment, each by its own rules. A reader that steps over others finds another size than
they do, so such files are refused here.
"""

import struct

import simplejpeg

from megatron_gmai.data.ledger import BadSample

START, START_OF_SCAN, FILL = 0xD8, 0xDA, 0xFF
# SOF0 to SOF15 without DHT, JPG and DAC, which have numbers among them; SOF55 of JPEG-LS.
STARTS_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xD8)}  # TEM and the restart marks


def frame_size(data: bytes) -> tuple[int, int]:
    """Width and height by the one start-of-frame segment before the first scan. Raises BadSample if
    there is none or another, or if bytes lie between the segments."""
    if not data.startswith(bytes((0xFF, START))):
        raise BadSample("a frame that is no JPEG")
    found, offset = None, 2
    while offset + 4 <= len(data) and data[offset] == 0xFF:
        marker = data[offset + 1]
        if marker == START_OF_SCAN and found is not None:
            return found
        if marker == FILL:
            offset += 1
            continue
        if marker in WITHOUT_LENGTH:
            offset += 2
            continue
        if marker in STARTS_OF_FRAME:
            if found is not None:
                raise BadSample("a JPEG of two sizes")
            height, width = struct.unpack_from(">HH", data, offset + 5)
            found = width, height
        offset += 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    raise BadSample(f"a JPEG whose segments end at byte {offset}, before its first scan")


def decoders_size(data: bytes) -> tuple[int, int] | None:
    """What libjpeg takes for width and height; None for kinds that it does not know (JPEG-LS)."""
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        return None
    return width, height
