"""Image files of every accepted format become uint8 pictures; docs/images.md tells how."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import UnidentifiedImageError

from megatron_gmai.data.images import dicom, nifti, pictures, tiff
from megatron_gmai.data.images.formats import kind_of
from megatron_gmai.data.images.grey import Grey, Picture
from megatron_gmai.data.images.jpeg import decode_jpeg
from megatron_gmai.data.images.sizes import halved_if_huge
from megatron_gmai.data.ledger import BadSample


def load_image(
    data: bytes, side: int, pad: bool = True, out: np.ndarray | None = None
) -> np.ndarray:
    """Image file to uint8 [3, side, side]: `decode`, then `to_square`. Raises BadSample."""
    # Not at the top: workers that only check files need no torch, which takes seconds to import.
    from megatron_gmai.data.images.resize import to_square

    return to_square(decode(data), side, pad, out)


def decode(data: bytes) -> np.ndarray:
    """Decodes an image file of any format to RGB, uint8 [height, width, 3].

    Of several pages or frames the first is taken. Deep images are windowed (`window.py`), huge ones
    halved (`sizes.py`). Raises BadSample for files that are truncated, of unknown format, of no
    size or too large, and where an optional reader is missing.
    """
    kind = kind_of(data)
    with _only_bad_samples(kind):
        pixels = decode_jpeg(data) if kind == "JPEG" else None
        return to_rgb(next(iter_pages(kind, data)) if pixels is None else pixels)


def decode_grey(data: bytes) -> Grey | None:
    """The deep grey values that `decode` windows; None for colours, and for those of 8 bits. Raises
    BadSample like it."""
    kind = kind_of(data)
    if kind == "JPEG":  # always of 8 bits
        return None
    with _only_bad_samples(kind):
        picture = next(iter_pages(kind, data))
    return picture if isinstance(picture, Grey) else None


def to_rgb(picture: Picture) -> np.ndarray:
    """uint8 [height, width, 3]: deep values windowed, huge pictures halved."""
    levels = halved_if_huge(picture.levels() if isinstance(picture, Grey) else picture)
    return levels if levels.ndim == 3 else np.repeat(levels[:, :, None], 3, axis=2)


def decode_pages(data: bytes) -> Iterator[np.ndarray]:
    """RGB like `decode` of each page or frame."""
    kind = kind_of(data)
    pages = iter_pages(kind, data)
    while True:
        with _only_bad_samples(kind):
            page = next(pages, None)
            if page is None:
                return
            rgb = to_rgb(page)
        yield rgb


def decode_slices(data: bytes, rule: object) -> Iterator[np.ndarray]:
    """uint8 [height, width] of the slices of a NIfTI volume that `rule` takes (`nifti.py`)."""
    slices = nifti.slices(data, rule)
    while True:
        with _only_bad_samples("NIfTI"):
            picture = next(slices, None)
            if picture is None:
                return
        yield picture


def iter_pages(kind: str, data: bytes) -> Iterator[Picture]:
    """Each page or frame, by the reader of the format."""
    if kind == "TIFF":
        return tiff.pages(data)
    if kind == "DICOM":
        return dicom.frames(data)
    if kind == "HEIC":
        return pictures.heic(data)
    if kind == "NIfTI":
        return nifti.slices(data, None)
    return pictures.frames(kind, data)


def count_pages(data: bytes, most: int) -> int:
    """Pages or frames of a file; where there are more than `most`, it may be any such number."""
    kind = kind_of(data)
    with _only_bad_samples(kind):
        if kind == "TIFF":
            return tiff.count_pages(data, most)
        return dicom.count_frames(data) if kind == "DICOM" else pictures.count_frames(kind, data)


@contextmanager
def _only_bad_samples(kind: str) -> Iterator[None]:
    """Whatever a reader raises becomes BadSample; what it warns of is harmless or ends in one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample(f"a damaged {kind}, or one of a layout that is not known") from error
    except MemoryError as error:
        raise BadSample("the image needs more memory than there is") from error
    except Exception as error:  # readers raise anything on damaged files
        raise BadSample(f"cannot decode {kind}: {_line(error)}") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
