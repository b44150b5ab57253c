"""The stored values of a DICOM frame, whatever its compression (transfer syntax, PS3.5 annex A).

pydicom would try every decoder that is installed. Here each compression has one, so that all
machines get the same values, and GDCM is not among them: a damaged frame makes it end the process.
"""

from typing import Any

import numpy as np

from megatron_gmai.data.images.deep import imagecodecs, jpeg_2000_head, jpeg_2000_size
from megatron_gmai.data.images.jpeg import check_scans
from megatron_gmai.data.images.jpeg_head import decoders_size, frame_size
from megatron_gmai.data.images.sizes import check_size
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
    from pydicom.encaps import get_frame
    from pydicom.pixels import pixel_array

    syntax = file.file_meta.TransferSyntaxUID
    if syntax in CODECS or syntax in PLUGINS:
        frames = int(file.get("NumberOfFrames", 1) or 1)
        frame = get_frame(
            file.PixelData, number, extended_offsets=_offsets(file), number_of_frames=frames
        )
        if syntax != RLE:  # whose rows and columns are the file's
            _check_frame(frame, int(file.Columns), int(file.Rows))
        if syntax in CODECS:
            return _by_imagecodecs(file, frame, CODECS[syntax])
    if syntax.is_compressed and not syntax.is_deflated and syntax not in PLUGINS:
        raise BadSample(f"DICOM compressed as {syntax.name}, which nothing here reads")
    return pixel_array(file, index=number, decoding_plugin=PLUGINS.get(syntax, ""))


def _offsets(file: Any) -> tuple[bytes, bytes] | None:
    """Where the frames lie by the file's own table, which pydicom goes by (PS3.3, C.7.6.3.1.8): the
    frame that is checked has to be the one that is decoded."""
    if "ExtendedOffsetTable" not in file or "ExtendedOffsetTableLengths" not in file:
        return None
    return file.ExtendedOffsetTable, file.ExtendedOffsetTableLengths


def _check_frame(frame: bytes, width: int, height: int) -> None:
    """Raises BadSample if a JPEG of any kind has another size than the file says, or too many
    scans: its decoder would believe it, however much memory and time that takes."""
    if jpeg_2000_head(frame) >= 0:
        sizes = [jpeg_2000_size(frame)]
    else:
        sizes = [frame_size(frame), decoders_size(frame) or (width, height)]
        check_scans(frame, width, height)
    for size in sizes:
        if size != (width, height):
            raise BadSample(f"a DICOM frame of {size[0]} x {size[1]}, not {width} x {height}")
        check_size(*size)


def _by_imagecodecs(file: Any, frame: bytes, codec: str) -> np.ndarray:
    library = imagecodecs(f"DICOM compressed as {file.file_meta.TransferSyntaxUID.name}")
    values = getattr(library, codec)(frame)
    return _signed(values, int(file.BitsStored)) if file.PixelRepresentation == 1 else values


def _signed(values: np.ndarray, bits: int) -> np.ndarray:
    """The codecs know no signs: the upper one of the stored bits is it."""
    wide = values.astype(np.int32)
    return np.where(wide >= 1 << (bits - 1), wide - (1 << bits), wide)
