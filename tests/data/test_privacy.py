"""What names a patient stays out of the shards; the pixels stay what they were."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from PIL import Image, PngImagePlugin
from pydicom.data import get_testdata_file
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.privacy import strip_metadata
from megatron_gmai.data.ledger import BadSample
from megatron_gmai.data.shards.build import check_record
from megatron_gmai.data.sources.mixture import Source
from tests.data.world import encoded, picture, record

NAME = b"DOE^JANE"
RAMP = Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64) * 10)


def exif() -> Image.Exif:
    tags = Image.Exif()
    tags[0x010E] = NAME.decode()  # ImageDescription
    tags[0x9C9B] = NAME  # XPTitle
    return tags


def png_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Patient", NAME.decode())
    info.add_itxt("Comment", NAME.decode())
    return info


def two_pages() -> bytes:
    return encoded(
        picture(seed=1),
        "TIFF",
        save_all=True,
        append_images=[picture(seed=2)],
        tiffinfo={270: NAME.decode()},
    )


FILES: dict[str, bytes] = {
    "JPEG with EXIF and a comment": encoded(picture(), "JPEG", exif=exif(), comment=NAME),
    "progressive JPEG": encoded(picture(90, 70), "JPEG", progressive=True, exif=exif()),
    "JPEG with a second file behind it": encoded(picture(), "JPEG")
    + encoded(picture(), "JPEG", comment=NAME),
    "PNG with texts": encoded(picture(), "PNG", pnginfo=png_text(), exif=exif()),
    "16-bit PNG with texts": encoded(RAMP, "PNG", pnginfo=png_text()),
    "palette PNG": encoded(picture().convert("P"), "PNG", pnginfo=png_text(), transparency=0),
    "TIFF with a description": encoded(picture(), "TIFF", tiffinfo={270: NAME.decode()}),
    "16-bit TIFF with a description": encoded(RAMP, "TIFF", tiffinfo={270: NAME.decode()}),
    "TIFF of two pages": two_pages(),
    "WebP with EXIF": encoded(picture(), "WEBP", exif=exif(), xmp=NAME),
    "GIF with a comment": encoded(picture(), "GIF", comment=NAME),
}


@pytest.mark.parametrize("name", FILES)
def test_names_go_and_pixels_stay(name: str) -> None:
    assert NAME in FILES[name]
    suffix, bare = strip_metadata(FILES[name])
    assert NAME not in bare
    assert np.array_equal(decode(bare), decode(FILES[name]))
    assert suffix in ("jpg", "png", "tif", "webp")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_a_file_without_metadata_is_kept_as_it_is(kind: str) -> None:
    data = encoded(picture(), kind)
    assert strip_metadata(data)[1] == data


def grey(data: bytes) -> np.ndarray:
    """The levels of a grey picture."""
    return decode(data)[:, :, 0]


def dicom(pixels: np.ndarray, **elements: Any) -> bytes:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.PatientName = NAME.decode()
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


class TestDicom:
    PIXELS = np.arange(4096).reshape(64, 64)

    def test_order_is_kept_and_nothing_turns_white(self) -> None:
        levels = grey(dicom(self.PIXELS)).astype(int)
        assert (np.diff(levels.ravel()) >= 0).all() and (levels == 255).mean() < 0.01

    def test_the_window_of_the_file_is_used_on_rescaled_values(self) -> None:
        window = {"WindowCenter": 40, "WindowWidth": 80}
        rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
        levels = grey(dicom(self.PIXELS, **window, **rescale)).ravel().astype(int)
        assert levels[1024] <= 8 and levels[1024 + 80] >= 247
        assert levels[1024 + 40] == pytest.approx(127, abs=3)

    def test_white_for_small_values_is_inverted(self) -> None:
        inverted = grey(dicom(self.PIXELS, PhotometricInterpretation="MONOCHROME1"))
        assert np.array_equal(255 - inverted, grey(dicom(self.PIXELS)))

    def test_several_frames_are_refused(self) -> None:
        twice = np.concatenate([self.PIXELS, self.PIXELS])
        with pytest.raises(BadSample, match="2 frames"):
            grey(dicom(twice, NumberOfFrames=2, Rows=64))

    def test_a_damaged_file_is_refused(self) -> None:
        with pytest.raises(BadSample, match="DICOM"):
            grey(dicom(self.PIXELS)[:3000])

    def test_a_compressed_file_is_read(self) -> None:
        path = get_testdata_file("MR_small_RLE.dcm")
        assert grey(Path(str(path)).read_bytes()).shape == (64, 64)

    def test_a_shard_gets_pixels_and_no_name(self, tmp_path: Path) -> None:
        (tmp_path / "slice.dcm").write_bytes(dicom(self.PIXELS))
        source = Source("A", (), (tmp_path,))
        _, [(suffix, data)] = check_record(record("<image>", "yes", "slice.dcm"), source)
        assert suffix == "png" and NAME not in data
        assert np.array_equal(decode(data)[:, :, 0], grey(dicom(self.PIXELS)))
