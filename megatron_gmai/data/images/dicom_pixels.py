"""The stored values of a DICOM frame, whatever its compression (transfer syntax, PS3.5 annex A).

pydicom would try every decoder that is installed. Here each compression has one, so that all
machines get the same values, and GDCM is not among them: a damaged frame makes it end the process.
"""

import struct
from typing import Any

import numpy as np

from megatron_gmai.data.images.deep import imagecodecs, jpeg_2000_head, jpeg_2000_size
from megatron_gmai.data.ledger import BadSample

BASELINE, EXTENDED = "1.2.840.10008.1.2.4.50", "1.2.840.10008.1.2.4.51"
LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
RLE = "1.2.840.10008.1.2.5"
PLUGINS = {BASELINE: "pillow", **dict.fromkeys(JPEG_2000, "pillow"), RLE: "pydicom"}
CODECS = {
    EXTENDED: "jpeg_decode",
    **dict.fromkeys(LOSSLESS, "jpeg_decode"),
    **dict.fromkeys(JPEG_LS, "jpegls_decode"),
}
# SOF0 to SOF15 without DHT, JPG and DAC, which have numbers among them; SOF55 of JPEG-LS.
STARTS_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def stored_values(file: Any, number: int) -> np.ndarray:
    """[h, w] or [h, w, samples] of one frame, colours as RGB."""
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array

    syntax = file.file_meta.TransferSyntaxUID
    if syntax in CODECS or syntax in PLUGINS:
        frames = int(file.get("NumberOfFrames", 1) or 1)
        frame = get_frame(file.PixelData, number, number_of_frames=frames)
        _check_frame(frame, int(file.Columns), int(file.Rows))
        if syntax in CODECS:
            return _by_imagecodecs(file, frame, CODECS[syntax])
    if syntax.is_compressed and not syntax.is_deflated and syntax not in PLUGINS:
        raise BadSample(f"DICOM compressed as {syntax.name}, which nothing here reads")
    return pixel_array(file, index=number, decoding_plugin=PLUGINS.get(syntax, ""))


def _check_frame(frame: bytes, width: int, height: int) -> None:
    """Raises BadSample if a JPEG of any kind says that it has another size than the file does: its
    decoder would believe it, however much memory and time that takes."""
    size = jpeg_2000_size(frame) if jpeg_2000_head(frame) >= 0 else _jpeg_size(frame)
    if size is not None and size != (width, height):
        raise BadSample(f"a DICOM frame of {size[0]} x {size[1]}, not {width} x {height}")


def _jpeg_size(frame: bytes) -> tuple[int, int] | None:
    """Of the start-of-frame segment (ITU T.81, B.2.2; T.87 for JPEG-LS); None for other data."""
    place = 2
    while frame.startswith(b"\xff\xd8") and frame[place : place + 1] == b"\xff":
        marker = frame[place + 1]
        if marker in STARTS_OF_FRAME:
            height, width = struct.unpack_from(">HH", frame, place + 5)
            return width, height
        if marker == 0xFF:  # fill byte
            place += 1
        else:
            place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None


def _by_imagecodecs(file: Any, frame: bytes, codec: str) -> np.ndarray:
    library = imagecodecs(f"DICOM compressed as {file.file_meta.TransferSyntaxUID.name}")
    values = getattr(library, codec)(frame)
    return _signed(values, int(file.BitsStored)) if file.PixelRepresentation == 1 else values


def _signed(values: np.ndarray, bits: int) -> np.ndarray:
    """The codecs know no signs: the upper one of the stored bits is it."""
    wide = values.astype(np.int32)
    return np.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide)
