"""Image files written by hand, in layouts that Pillow cannot write or that it changes."""

import io
import struct
import zlib
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian


def png_16(values: np.ndarray, **chunks: bytes) -> bytes:
    """A PNG of uint16 [h, w, 1 to 4]: grey, grey + alpha, RGB or RGBA."""
    height, width, samples = values.shape
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[samples]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8)
    body = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    parts = [(b"IHDR", head), *((name.encode(), data) for name, data in chunks.items())]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [*parts, (b"IDAT", body), (b"IEND", b"")]
    )


def tiff(
    values: np.ndarray, photometric: int, order: Literal["<", ">"] = "<", **more: Any
) -> bytes:
    """An uncompressed TIFF of one strip, [h, w, samples] of any type; `more` are tags by name:
    extra, planar, orientation, palette."""
    height, width, samples = values.shape
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    pixels = np.moveaxis(values, 2, 0) if more.get("planar") else values
    body = pixels.astype(values.dtype.newbyteorder(order)).tobytes()
    plane = len(body) // samples if more.get("planar") else len(body)
    planes = samples if more.get("planar") else 1
    tags: list[tuple[int, str, list[int]]] = [
        (256, "I", [width]),
        (257, "I", [height]),
        (258, "H", [values.dtype.itemsize * 8] * samples),
        (259, "H", [1]),
        (262, "H", [photometric]),
        (273, "I", [8 + plane * number for number in range(planes)]),
        (274, "H", [more.get("orientation", 1)]),
        (277, "H", [samples]),
        (278, "I", [height]),
        (279, "I", [plane] * planes),
        (284, "H", [2 if more.get("planar") else 1]),
        *([(320, "H", more["palette"].ravel().tolist())] if "palette" in more else []),
        *([(338, "H", [more["extra"]])] if "extra" in more else []),
        (339, "H", [kind] * samples),
    ]
    start = 8 + len(body)
    behind, entries = b"", b""
    for tag, letter, numbers in tags:
        data = struct.pack(f"{order}{len(numbers)}{letter}", *numbers)
        if len(data) > 4:
            place = start + 2 + 12 * len(tags) + 4 + len(behind)
            behind, data = behind + data, struct.pack(order + "I", place)
        entries += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[letter], len(numbers))
        entries += data.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    count = struct.pack(order + "H", len(tags))
    return magic + struct.pack(order + "I", start) + body + count + entries + bytes(4) + behind


def dicom(pixels: np.ndarray, **elements: Any) -> bytes:
    """A DICOM file of 16-bit grey values [h, w], or of what `elements` make of them."""
    meta = FileMetaDataset()
    meta.FileMetaInformationGroupLength = 0  # corrected as it is written
    meta.TransferSyntaxUID = elements.pop("syntax", ExplicitVRLittleEndian)
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.PatientName = "DOE^JANE"
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
    file.BitsAllocated = file.BitsStored = 16
    file.HighBit, file.PixelRepresentation = 15, 0
    file.PixelData = pixels.astype("<u2").tobytes()
    for name, value in elements.items():
        setattr(file, name, value)
    buffer = io.BytesIO()
    pydicom.dcmwrite(buffer, file)
    return buffer.getvalue()
