"""DICOM: windows, colours, palettes, frames, files without a preamble; all become levels."""

import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    MPEG2MPML,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
)

from megatron_gmai.data.images.decode import decode, decode_pages
from megatron_gmai.data.ledger import BadSample
from tests.data.files import dicom
from tests.data.world import encoded

PIXELS = np.arange(4096).reshape(64, 64)


def grey(data: bytes) -> np.ndarray:
    """The levels of a grey picture."""
    return decode(data)[:, :, 0]


def published(name: str) -> bytes:
    """A file that comes with pydicom."""
    return Path(str(get_testdata_file(name, download=False))).read_bytes()


class TestGrey:
    def test_order_is_kept_and_nothing_turns_white(self) -> None:
        levels = grey(dicom(PIXELS)).astype(int)
        assert (np.diff(levels.ravel()) >= 0).all() and (levels == 255).mean() < 0.01

    def test_the_window_of_the_file_is_used_on_rescaled_values(self) -> None:
        window = {"WindowCenter": 40, "WindowWidth": 80}
        rescale = {"RescaleSlope": 1, "RescaleIntercept": -1024}
        levels = grey(dicom(PIXELS, **window, **rescale)).ravel().astype(int)
        assert levels[1024] <= 8 and levels[1024 + 80] >= 247
        assert levels[1024 + 40] == pytest.approx(127, abs=3)

    def test_white_for_small_values_is_inverted(self) -> None:
        inverted = grey(dicom(PIXELS, PhotometricInterpretation="MONOCHROME1"))
        assert np.array_equal(255 - inverted, grey(dicom(PIXELS)))

    def test_8_bits_without_a_window_stay_as_they_are(self) -> None:
        bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
        body = (PIXELS % 100).astype(np.uint8)
        data = dicom(PIXELS, PixelData=body.tobytes(), **bits)
        assert np.array_equal(grey(data), body)

    def test_unsigned_values_of_32_bits_keep_their_order(self) -> None:
        values = np.linspace(0, 2**32 - 1, 4096).astype("<u4")
        bits = {"BitsAllocated": 32, "BitsStored": 32, "HighBit": 31}
        levels = grey(dicom(PIXELS, PixelData=values.tobytes(), **bits)).ravel().astype(int)
        assert (np.diff(levels) >= 0).all() and len(np.unique(levels)) > 200

    def test_12_bits_in_a_lossy_jpeg(self) -> None:
        levels = grey(published("JPGExtended.dcm"))
        assert levels.shape == (1024, 256) and len(np.unique(levels)) > 100

    def test_compressed_files_are_read(self) -> None:
        plain = grey(published("MR_small.dcm"))
        for name in ("MR_small_RLE", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"):
            assert np.array_equal(grey(published(f"{name}.dcm")), plain)


class TestColours:
    # All are the same drawing of bars, stored as RGB or YBR, plain or by several compressions.
    @pytest.mark.parametrize(
        ("name", "tolerance"),
        [
            ("SC_rgb_dcmtk_+eb+cr.dcm", 0.2),
            ("SC_rgb_jpeg_dcmtk.dcm", 1),
            ("SC_rgb_dcmtk_+eb+cy+np.dcm", 1),
            ("SC_rgb_dcmtk_+eb+cy+s4.dcm", 1),
            ("SC_ybr_full_422_uncompressed.dcm", 1),
            ("SC_rgb_jpeg_lossy_gdcm.dcm", 1),
            ("SC_rgb_jpeg_gdcm.dcm", 0.2),
            ("SC_rgb_jls_lossy_line.dcm", 1),
            ("SC_rgb_gdcm_KY.dcm", 1),
        ],
    )
    def test_ybr_becomes_rgb_once(self, name: str, tolerance: float) -> None:
        """pydicom converts already; a second conversion turned greys green."""
        expected = decode(published("SC_rgb_rle.dcm")).astype(int)
        difference = np.abs(decode(published(name)).astype(int) - expected)
        assert np.median(difference) <= 1 and difference.mean() <= 3
        means = np.abs(decode(published(name)).mean((0, 1)) - expected.mean((0, 1)))
        assert means.max() <= tolerance

    def test_lossless_jpeg_2000_colours_are_read(self) -> None:
        assert decode(published("examples_jpeg2k.dcm")).shape == (480, 640, 3)

    @pytest.mark.parametrize("name", ["SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm"])
    def test_deep_colours_are_windowed(self, name: str) -> None:
        difference = decode(published(name)).astype(int) - decode(published("SC_rgb_rle.dcm"))
        assert np.abs(difference).max() <= 8

    def test_a_palette_is_applied(self) -> None:
        """Its indices are no brightness: neighbouring colours have far indices."""
        found = decode(published("examples_palette.dcm"))
        assert found.shape == (350, 800, 3)
        assert (found[:, :, 0] != found[:, :, 1]).mean() > 0.1

    def test_each_index_gets_its_colour(self) -> None:
        table = np.zeros((3, 256), dtype="<u2")
        table[:, 0], table[:, 1], table[:, 2] = (0, 0, 0), (65_535, 0, 0), (0, 32_768, 256)
        indices = np.array([[0, 1], [2, 1]], dtype=np.uint8)
        names = ("Red", "Green", "Blue")
        elements = {
            **{f"{n}PaletteColorLookupTableDescriptor": [256, 0, 16] for n in names},
            **{
                f"{n}PaletteColorLookupTableData": row.tobytes()
                for n, row in zip(names, table, strict=True)
            },
        }
        data = dicom(
            indices,
            PhotometricInterpretation="PALETTE COLOR",
            BitsAllocated=8,
            BitsStored=8,
            HighBit=7,
            PixelData=indices.tobytes(),
            **elements,
        )
        red, green = [255, 0, 0], [0, 128, 1]
        assert decode(data).tolist() == [[[0, 0, 0], red], [green, red]]


class TestFiles:
    @pytest.mark.parametrize("name", ["MR_small", "MR_small_implicit", "MR_small_bigendian"])
    def test_without_preamble_and_without_meta_elements(self, name: str) -> None:
        data = published(f"{name}.dcm")
        meta = 144 + struct.unpack_from("<I", data, 140)[0]
        assert np.array_equal(decode(data[132:]), decode(data))
        assert np.array_equal(decode(data[meta:]), decode(data))

    def test_a_plan_without_preamble_has_no_image(self) -> None:
        with pytest.raises(BadSample, match="without an image"):
            decode(published("ExplVR_LitEndNoMeta.dcm"))

    def test_a_damaged_file_is_refused(self) -> None:
        with pytest.raises(BadSample, match="DICOM"):
            decode(dicom(PIXELS)[:3000])
        with pytest.raises(BadSample, match="DICOM"):
            decode(published("MR_truncated.dcm"))

    def test_reports_and_plans_have_no_image(self) -> None:
        with pytest.raises(BadSample, match="a DICOM file without an image"):
            decode(published("test-SR.dcm"))

    @pytest.mark.parametrize("name", ["SC_rgb_jpeg_gdcm", "MR_small_jpeg_ls_lossless"])
    def test_without_its_codec_the_reason_names_what_to_install(
        self, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "imagecodecs", None)
        with pytest.raises(BadSample, match=r"compressed as JPEG.*imagecodecs: pip.*\[deep\]"):
            decode(published(f"{name}.dcm"))

    def test_compressions_that_nothing_reads_are_named(self) -> None:
        data = dicom(PIXELS, PixelData=encapsulate([b"video"]), syntax=MPEG2MPML)
        with pytest.raises(BadSample, match="compressed as MPEG2 Main Profile / Main Level"):
            decode(data)


class TestBombs:
    """Frames that say they are large, in files that say they are small."""

    @pytest.mark.parametrize(
        ("name", "mark", "place"),
        [
            ("SC_rgb_jpeg_dcmtk", b"\xff\xc0", 5),
            ("SC_rgb_jpeg_gdcm", b"\xff\xc3", 5),
            ("MR_small_jpeg_ls_lossless", b"\xff\xf7", 5),
            ("MR_small_jp2klossless", b"\xff\x4f\xff\x51", 8),
        ],
    )
    def test_are_refused_before_they_are_decoded(self, name: str, mark: bytes, place: int) -> None:
        data = bytearray(published(f"{name}.dcm"))
        place += data.index(mark)
        data[place : place + 4] = b"\xf0\xf0\xf0\xf0" if mark[1] != 0x4F else b"\0\0\xf0\xf0"
        with pytest.raises(BadSample, match=r"a DICOM frame of \d+ x \d+, not (64 x 64|100 x 100)"):
            decode(bytes(data))

    def jpeg(self, frame: bytes, syntax: str = JPEGBaseline8Bit) -> bytes:
        bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
        return dicom(PIXELS, PixelData=encapsulate([frame]), syntax=syntax, **bits)

    @pytest.mark.parametrize("stray", [b"\0", b"\xff\x01", b"\xff\xd0", b"\xff\xd0\0\xff"])
    @pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit, JPEGLosslessSV1])
    def test_what_decoders_step_over_hides_no_size(self, stray: bytes, syntax: str) -> None:
        frame = bytearray(encoded(Image.new("L", (64, 64), 128), "JPEG"))
        place = frame.index(b"\xff\xc0") + 5
        frame[place : place + 4] = struct.pack(">HH", 12_000, 12_000)
        frame[2:2] = stray
        with pytest.raises(BadSample, match=r"frame of 12000 x 12000, not 64 x 64|segments end"):
            decode(self.jpeg(bytes(frame), syntax))

    @pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEG2000])
    def test_a_frame_of_another_kind_is_refused(self, syntax: str) -> None:
        with pytest.raises(BadSample, match="a frame that is no JPEG"):
            decode(self.jpeg(encoded(Image.new("L", (64, 64)), "PNG"), syntax))

    def test_the_frame_that_is_checked_is_the_one_that_is_decoded(self) -> None:
        """The table of offsets leads to the second fragment; without it, the first comes first."""
        small, large = (encoded(Image.new("L", (n, n), 128), "JPEG") for n in (64, 640))
        table = struct.pack("<Q", 8 + len(small)), struct.pack("<Q", len(large))
        bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}
        offsets = {"ExtendedOffsetTable": table[0], "ExtendedOffsetTableLengths": table[1]}
        pixels = encapsulate([small, large], has_bot=False)
        data = dicom(PIXELS, PixelData=pixels, syntax=JPEGBaseline8Bit, **bits, **offsets)
        with pytest.raises(BadSample, match="a DICOM frame of 640 x 640, not 64 x 64"):
            decode(data)

    def test_a_frame_of_two_sizes_is_refused(self) -> None:
        frame = encoded(Image.new("L", (64, 64), 128), "JPEG")
        assert grey(self.jpeg(frame)).shape == (64, 64)
        place = frame.index(b"\xff\xc0")
        with pytest.raises(BadSample, match="two sizes"):
            decode(self.jpeg(frame[:place] + frame[place : place + 13] + frame[place:]))

    @pytest.mark.parametrize("syntax", [JPEGBaseline8Bit, JPEGExtended12Bit])
    def test_a_frame_of_very_many_scans_is_refused(self, syntax: str) -> None:
        frame = encoded(Image.new("L", (64, 64), 128), "JPEG", progressive=True)
        assert grey(self.jpeg(frame, syntax)).shape == (64, 64)
        scan = frame.rindex(b"\xff\xda")
        with pytest.raises(BadSample, match="more than 500 scans"):
            decode(self.jpeg(frame[:scan] + frame[scan:-2] * 600 + frame[-2:], syntax))


class TestFrames:
    TWICE = np.concatenate([PIXELS, PIXELS[::-1]])

    def test_the_first_is_the_image_of_the_file(self) -> None:
        data = dicom(self.TWICE, NumberOfFrames=2, Rows=64)
        assert np.array_equal(decode(data), decode(dicom(PIXELS)))

    def test_each_is_a_page(self) -> None:
        pages = list(decode_pages(dicom(self.TWICE, NumberOfFrames=2, Rows=64)))
        assert np.array_equal(pages, [decode(dicom(PIXELS)), decode(dicom(PIXELS[::-1]))])

    def test_compressed_colours(self) -> None:
        pages = list(decode_pages(published("examples_ybr_color.dcm")))
        assert len(pages) == 30 and pages[0].shape == (240, 320, 3)
        assert not np.array_equal(pages[0], pages[29])
