"""Damaged images of every format: each ends in pixels or in a reason, soon and in little memory.

Some 5,000 mutations: bits flipped, parts cut out, doubled, or overwritten, and heads alone.
"""

import gzip
import itertools
import resource
import time

import imagecodecs
import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.uid import RLELossless

from megatron_gmai.data.images import sizes
from megatron_gmai.data.images.decode import count_pages, decode, decode_pages, decode_slices
from megatron_gmai.data.images.formats import is_volume
from megatron_gmai.data.images.pages import split_pages
from megatron_gmai.data.images.privacy import stored_image, strip_metadata
from megatron_gmai.data.ledger import BadSample
from tests.data.files import dicom, png_16, tiff
from tests.data.images.test_dicom import published
from tests.data.images.test_formats import heic
from tests.data.test_fuzz import mutations
from tests.data.world import encoded, picture

MUTATIONS = 150  # of each file
MEMORY_LIMIT_KB = 1_500_000
TIME_LIMIT_S = 5.0  # of one file; most take a millisecond
SMALL = picture(40, 30)
FRAMES = [picture(40, 30, seed) for seed in (1, 2)]
DEEP = np.arange(3600, dtype=np.uint16).reshape(30, 40, 3) * 17
GREY = Image.fromarray(DEEP[:, :, 0])


def moving(kind: str) -> bytes:
    return encoded(SMALL, kind, save_all=True, append_images=FRAMES)


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[274], tags[270] = 6, "DOE^JANE"
    return tags


def volume() -> bytes:
    return nibabel.Nifti1Image(DEEP.astype(np.int16), np.eye(4)).to_bytes()


FILES: dict[str, bytes] = {
    "JPEG": encoded(SMALL, "JPEG", exif=exif()),
    "progressive JPEG": encoded(SMALL, "JPEG", progressive=True),
    "CMYK JPEG": encoded(SMALL.convert("CMYK"), "JPEG"),
    "PNG": encoded(SMALL, exif=exif()),
    "palette PNG": encoded(SMALL.convert("P"), transparency=0),
    "grey deep PNG": encoded(GREY),
    "deep PNG": png_16(DEEP),
    "animated PNG": moving("PNG"),
    "TIFF": encoded(SMALL, "TIFF", compression="tiff_lzw"),
    "JPEG TIFF": encoded(SMALL, "TIFF", compression="jpeg"),
    "pages": moving("TIFF"),
    "grey deep TIFF": encoded(GREY, "TIFF", compression="tiff_deflate"),
    "deep TIFF": tiff(DEEP, 2, orientation=5),
    "deep TIFF in tiles": bytes(
        imagecodecs.tiff_encode(DEEP, photometric="rgb", compression="lzw", tile=(16, 16))
    ),
    "WebP": encoded(SMALL, "WEBP", exif=exif()),
    "lossless WebP": encoded(SMALL, "WEBP", lossless=True),
    "animated WebP": moving("WEBP"),
    "GIF": moving("GIF"),
    "BMP": encoded(SMALL, "BMP"),
    "JPEG 2000": encoded(SMALL, "JPEG2000"),
    "deep JPEG 2000": bytes(imagecodecs.jpeg2k_encode(DEEP, level=0)),
    "AVIF": encoded(SMALL, "AVIF", exif=exif()),
    "animated AVIF": moving("AVIF"),
    "HEIC": heic(SMALL),
    "PPM": encoded(SMALL, "PPM"),
    "deep PPM": b"P6 40 30 65535\n" + DEEP.astype(">u2").tobytes(),
    "DICOM": dicom(DEEP[:, :, 0]),
    "DICOM frames": dicom(DEEP[:, :, 0], NumberOfFrames=2, Rows=15),
    "DICOM without preamble": dicom(DEEP[:, :, 0])[132:],
    "DICOM of RLE": published("MR_small_RLE.dcm"),
    "DICOM of JPEG": published("SC_rgb_small_odd_jpeg.dcm"),
    "DICOM of JPEG 2000": published("MR_small_jp2klossless.dcm"),
    "DICOM of JPEG-LS": published("MR_small_jpeg_ls_lossless.dcm"),
    "DICOM of lossless JPEG": published("SC_rgb_jpeg_gdcm.dcm"),
    "DICOM of 12-bit JPEG": published("JPGExtended.dcm"),
    "NIfTI": volume(),
    "packed NIfTI": gzip.compress(volume()),
}


def use(data: bytes) -> int:
    """Everything that is done with an image file; how many pictures came out."""
    if is_volume(data):
        return sum(levels.dtype == np.uint8 for levels in decode_slices(data, "axial:3"))
    pixels = decode(data)
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert np.array_equal(decode(stored_image(data)[1]), pixels)
    strip_metadata(data)
    if count_pages(data, 10) > 1:
        pages = list(itertools.islice(decode_pages(data), 10))
        return len(split_pages(data)) if len(pages) < 10 else 10
    return 1


@pytest.mark.parametrize("name", FILES)
def test_damaged_files(name: str) -> None:
    assert use(FILES[name]) >= 1
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = 0
    for data in mutations(FILES[name], MUTATIONS):
        start = time.process_time()
        try:
            use(data)
        except BadSample as error:
            assert str(error)
            refused += 1
        assert time.process_time() - start < TIME_LIMIT_S
    assert refused
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_LIMIT_KB


def test_what_decoding_holds_is_bounded_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours take 3 bytes a pixel at least, and deep values have copies, in every format."""
    of_one_byte = {name for name in FILES if "JPEG" in name.split() or "palette" in name}
    for name in FILES.keys() - of_one_byte - {"NIfTI", "packed NIfTI"}:
        height, width, _ = decode(FILES[name]).shape
        with monkeypatch.context() as patch:
            patch.setattr(sizes, "MAX_BYTES", 2 * height * width)
            with pytest.raises(BadSample, match="bytes a pixel takes more than"):
                print(name, decode(FILES[name]).shape)


def test_these_are_enough() -> None:
    assert len(FILES) * MUTATIONS >= 2500
    assert RLELossless in FILES["DICOM of RLE"].decode("latin-1")
