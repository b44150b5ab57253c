"""DICOM files as pictures (optional: `pip install megatron-gmai[dicom]`).

Follows DICOM PS3.3: stored values are rescaled (C.11.1), shown through the window that the file
names (C.11.2), inverted where the smallest value is white (MONOCHROME1, C.7.6.3.1.2), and coloured
by the file's palette (PALETTE COLOR, C.7.9).
"""

import io
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from megatron_gmai.data.images.dicom_pixels import stored_values
from megatron_gmai.data.images.formats import MAX_VOLUME, needs
from megatron_gmai.data.images.grey import Grey, Picture, Window
from megatron_gmai.data.images.sizes import check_size
from megatron_gmai.data.images.window import window_to_8_bits
from megatron_gmai.data.ledger import BadSample

# What pydicom gives as RGB, whatever the file holds.
COLOURS = {"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_RCT", "YBR_ICT"}
DEFLATED = b"1.2.840.10008.1.2.1.99"  # transfer syntax


def frames(data: bytes) -> Iterator[Picture]:
    """Each frame. Without a window in the file, deep grey values are windowed by percentiles, frame
    by frame."""
    file = _read(data)
    for number in range(_count(file)):
        yield _frame(file, number)


def count_frames(data: bytes) -> int:
    """How many frames there are."""
    return _count(_read(data))


def _count(file: Any) -> int:
    count = int(file.get("NumberOfFrames", 1) or 1)
    if count < 1:
        raise BadSample(f"a DICOM file of {count} frames")
    return count


def _read(data: bytes) -> Any:
    try:
        import pydicom
    except ImportError as error:
        raise needs("DICOM", "pydicom", "dicom") from error
    if DEFLATED in data:
        data = _inflated(data)
    file = pydicom.dcmread(io.BytesIO(data), force=True)  # force: also without a preamble
    if "Rows" not in file or "Columns" not in file:
        raise BadSample("a DICOM file without an image")
    if "TransferSyntaxUID" not in file.file_meta:
        implicit, little = map(bool, file.original_encoding)
        names = {(True, True): pydicom.uid.ImplicitVRLittleEndian,
                 (False, False): pydicom.uid.ExplicitVRBigEndian}  # fmt: skip
        file.file_meta.TransferSyntaxUID = names.get(
            (implicit, little), pydicom.uid.ExplicitVRLittleEndian
        )
    return file


def _inflated(data: bytes) -> bytes:
    """The data set of a deflated file (PS3.5, A.5). pydicom would unpack it whole, however large it
    is, so what it gets here never has this syntax, and is plain explicit little endian instead."""
    from pydicom.filereader import read_dataset, read_preamble

    file = io.BytesIO(data)
    read_preamble(file, True)
    # Elements of group 2 name the syntax; the data set begins behind them (PS3.10, 7.1).
    meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag.group != 2)
    if meta.get("TransferSyntaxUID") != DEFLATED.decode():
        raise BadSample("a DICOM file that is deflated, or not, by how its head is read")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    plain = unpacker.decompress(data[file.tell() :], MAX_VOLUME + 1)
    if len(plain) > MAX_VOLUME:
        raise BadSample(f"unpacks to more than {MAX_VOLUME} bytes")
    if not unpacker.eof or DEFLATED in plain:
        raise BadSample("a damaged deflated DICOM file")
    return plain


def _frame(file: Any, number: int) -> Picture:
    from pydicom.pixels import apply_color_lut

    height, width = int(file.Rows), int(file.Columns)
    samples, value = int(file.SamplesPerPixel), -(-int(file.BitsAllocated) // 8)
    # As stored and as an array, in which colours are converted; rescaled; levels.
    rescaled = 8 if "RescaleSlope" in file else 0
    check_size(width, height, 2 * samples * value + rescaled + samples)
    pixels, colours = stored_values(file, number), file.PhotometricInterpretation
    if colours == "PALETTE COLOR":
        return _upper_8_bits(apply_color_lut(pixels, file))
    if pixels.shape == (height, width, 3):
        if colours not in COLOURS:
            raise BadSample(f"a DICOM file of {colours} colours")
        return pixels if pixels.dtype == np.uint8 else window_to_8_bits(pixels)
    if pixels.shape != (height, width):
        raise BadSample(f"a DICOM file of shape {pixels.shape}, not {height} x {width}")
    window, inverted = _window(file), colours == "MONOCHROME1"
    if pixels.dtype == np.uint8 and file.BitsStored == 8 and window is None:
        return 255 - pixels if inverted else pixels
    return Grey(_rescaled(pixels, file), window, inverted)


def _rescaled(pixels: np.ndarray, file: Any) -> np.ndarray:
    """By the file's table or its straight line (C.11.1.1.2), the latter in place."""
    from pydicom.pixels import apply_modality_lut

    slope, intercept = file.get("RescaleSlope"), file.get("RescaleIntercept")
    if file.get("ModalityLUTSequence") or slope is None or intercept is None:
        return apply_modality_lut(pixels, file)
    values = pixels.astype(np.float64)
    values *= float(slope)
    values += float(intercept)
    return values


def _upper_8_bits(colours: np.ndarray) -> np.ndarray:
    """Of a palette: a fixed scale, which keeps its colours. Some files put 8 bits into 16."""
    if colours.dtype == np.uint8 or colours.max() < 256:
        return colours[:, :, :3].astype(np.uint8)
    return (colours[:, :, :3] >> 8).astype(np.uint8)


def _window(file: Any) -> Window | None:
    """Lower and upper end of the first window of the file."""
    centre, width = file.get("WindowCenter"), file.get("WindowWidth")
    if centre is None or width is None:
        return None
    centre, width = (
        float(v if isinstance(v, str | float | int) else v[0]) for v in (centre, width)
    )
    return (centre - width / 2, centre + width / 2) if width > 1 else None
