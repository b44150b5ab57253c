"""The stored values of a DICOM frame, whatever its compression (transfer syntax, PS3.5 annex A).

pydicom would try every decoder that is installed. Here each compression has one, so that all
machines get the same values, and GDCM is not among them: a damaged frame makes it end the process.
"""

from typing import Any

import numpy as np

from megatron_gmai.data.images.deep import imagecodecs
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


def stored_values(file: Any, number: int) -> np.ndarray:
    """[h, w] or [h, w, samples] of one frame, colours as RGB."""
    from pydicom.pixels import pixel_array

    syntax = file.file_meta.TransferSyntaxUID
    if syntax in CODECS:
        return _by_imagecodecs(file, number, CODECS[syntax])
    if syntax.is_compressed and not syntax.is_deflated and syntax not in PLUGINS:
        raise BadSample(f"DICOM compressed as {syntax.name}, which nothing here reads")
    return pixel_array(file, index=number, decoding_plugin=PLUGINS.get(syntax, ""))


def _by_imagecodecs(file: Any, number: int, codec: str) -> np.ndarray:
    from pydicom.encaps import get_frame

    library = imagecodecs(f"DICOM compressed as {file.file_meta.TransferSyntaxUID.name}")
    frames = int(file.get("NumberOfFrames", 1) or 1)
    frame = get_frame(file.PixelData, number, number_of_frames=frames)
    values = getattr(library, codec)(frame)
    shape = (int(file.Rows), int(file.Columns))
    if values.shape[:2] != shape:
        raise BadSample(f"a DICOM frame of shape {values.shape}, not {shape[0]} x {shape[1]}")
    return _signed(values, int(file.BitsStored)) if file.PixelRepresentation == 1 else values


def _signed(values: np.ndarray, bits: int) -> np.ndarray:
    """The codecs know no signs: the upper one of the stored bits is it."""
    wide = values.astype(np.int32)
    return np.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide)
