"""Single-slice DICOM files as pictures (optional: `pip install megatron-gmai[dicom]`).

Follows DICOM PS3.3: stored values are rescaled (C.11.1), shown through the window that the file
names (C.11.2), and inverted where the smallest value is white (MONOCHROME1, C.7.6.3.1.2).
"""

import io
import warnings
from typing import Any

import numpy as np

from megatron_gmai.data.images.decode import check_size, window_to_8_bits
from megatron_gmai.data.ledger import BadSample


def is_dicom(data: bytes) -> bool:
    """Whether the file has DICOM's preamble (PS3.10)."""
    return data[128:132] == b"DICM"


def decode_dicom(data: bytes) -> np.ndarray:
    """uint8 [height, width] or [height, width, 3].

    Without a window in the file, grey values are windowed by percentiles. Raises BadSample for
    files that cannot be decoded or hold several frames.
    """
    try:
        import pydicom  # noqa: F401  (only whether it is there)
    except ImportError as error:
        raise BadSample("DICOM needs pydicom: pip install 'megatron-gmai[dicom]'") from error
    try:
        # What pydicom warns of is either harmless or ends in an error below.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _decode(data)
    except BadSample:
        raise
    except Exception as error:  # pydicom and its decoders raise anything on damaged files
        raise BadSample(f"cannot decode DICOM: {error}") from error


def _decode(data: bytes) -> np.ndarray:
    import pydicom
    from pydicom.pixels import apply_modality_lut, convert_color_space

    file = pydicom.dcmread(io.BytesIO(data))
    height, width = int(file.Rows), int(file.Columns)
    check_size(width, height)
    frames = int(file.get("NumberOfFrames", 1) or 1)
    if frames != 1:
        raise BadSample(f"a DICOM file of {frames} frames; give each as a file of its own")
    pixels, colours = file.pixel_array, file.PhotometricInterpretation
    if pixels.shape == (height, width, 3):
        return convert_color_space(pixels, colours, "RGB", per_frame=True).astype(np.uint8)
    if pixels.shape != (height, width):
        raise BadSample(f"a DICOM file of shape {pixels.shape}, not {height} x {width}")
    levels = window_to_8_bits(apply_modality_lut(pixels, file), file_window(file))
    return 255 - levels if colours == "MONOCHROME1" else levels


def file_window(file: Any) -> tuple[float, float] | None:
    """Lower and upper end of the first window of the file."""
    centre, width = file.get("WindowCenter"), file.get("WindowWidth")
    if centre is None or width is None:
        return None
    centre, width = (
        float(v if isinstance(v, str | float | int) else v[0]) for v in (centre, width)
    )
    return (centre - width / 2, centre + width / 2) if width > 1 else None
