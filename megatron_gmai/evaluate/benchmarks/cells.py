"""Image cells of a benchmark's table: base64, a reference to another row, or a list of them."""

import ast
import base64
import binascii
from pathlib import Path

import numpy as np

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.dicom import decode_dicom, is_dicom
from megatron_gmai.data.ledger import BadSample

MAX_REFERENCE = 64  # characters; VLMEvalKit takes longer cells for base64
MAX_IMAGE_BYTES = 64 * 1024**2
MAX_IMAGES = 64


def split_cell(cell: str) -> list[str]:
    """The entries of a cell: those of a Python list literal, else the cell itself.

    A literal is parsed, never evaluated. Raises BadSample for lists of anything but text.
    """
    if not (len(cell) > 1 and cell[0] == "[" and cell[-1] == "]"):
        return [cell] if cell else []
    try:
        entries = ast.literal_eval(cell)
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise BadSample("the image cell is not a list") from error
    if not entries or not all(isinstance(entry, str) and entry for entry in entries):
        raise BadSample("the image cell is not a list of texts")
    if len(entries) > MAX_IMAGES:
        raise BadSample(f"{len(entries)} images, more than {MAX_IMAGES}")
    return list(entries)


def to_bytes(cell: str) -> bytes:
    """Decodes base64. Raises BadSample."""
    if len(cell) > MAX_IMAGE_BYTES * 4 // 3 + 4:
        raise BadSample(f"an image of more than {MAX_IMAGE_BYTES} bytes")
    try:
        return base64.b64decode(cell, validate=True)
    except (binascii.Error, ValueError) as error:
        raise BadSample("the image cell is not base64") from error


def to_cell(images: list[bytes]) -> str:
    """The cell that holds these image files."""
    texts = [base64.b64encode(data).decode() for data in images]
    return texts[0] if len(texts) == 1 else repr(texts)


def read_file(path: Path) -> bytes:
    """An image file of bounded size. Raises BadSample."""
    try:
        if path.stat().st_size > MAX_IMAGE_BYTES:
            raise BadSample(f"image {path.name}: larger than {MAX_IMAGE_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadSample(f"image {path.name}: {error.strerror}") from error


def to_pixels(data: bytes) -> np.ndarray:
    """uint8 [height, width, 3] as training sees the image: deep ones windowed. Raises BadSample."""
    pixels = decode_dicom(data) if is_dicom(data) else decode(data)
    return pixels if pixels.ndim == 3 else np.repeat(pixels[:, :, None], 3, axis=2)
