"""Which formats are opened, by their contents; what is said of others; no program is started."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import Image
from pydicom.uid import DeflatedExplicitVRLittleEndian

from megatron_gmai.data.images import dicom as dicom_module
from megatron_gmai.data.images import jpeg as jpeg_module
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.formats import IMAGE_SUFFIXES, kind_of
from megatron_gmai.data.images.privacy import stored_image
from megatron_gmai.data.ledger import BadSample
from tests.data.files import dicom
from tests.data.world import encoded, picture

EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 40 30
%%EndComments
(made) print flush
showpage
%%EOF
"""


def heic(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    pillow_heif.from_pillow(image).save(buffer, quality=-1, chroma=444, **options)
    return buffer.getvalue()


SMOOTH = Image.fromarray(np.add.outer(np.arange(64), np.arange(96)).astype(np.uint8)).convert("RGB")


PREVIEW_HEAD = b"\xc5\xd0\xd3\xc6" + struct.pack("<7I", 32, len(EPS), 0, 0, 0, 0, 0xFFFF)


@pytest.mark.parametrize("start", [b"", PREVIEW_HEAD])
def test_a_postscript_file_starts_no_program(start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow hands it to Ghostscript, whatever its name is."""
    started: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        started.append(arguments)
        raise OSError("a program was started")

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse)
    with pytest.raises(BadSample, match="PostScript"):
        decode(start + EPS)
    assert not started


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "an empty file"),
        (b"%PDF-1.7", "a PDF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html><p>404", "web page"),
        (b"\n<svg>", "SVG"),
        (b"PK\x03\x04", "zip"),
        (b"NRRD0004", "NRRD volume; convert it to NIfTI"),
        (b"\0\0\0\x20ftypisom", "video"),
        (b"\0\0\0\x0cJXL \r\n", "JPEG XL image; convert it to PNG"),
        (b"8BPS", "not an image of a known format"),
        (b"\x1f\x8b", "gzip"),
        (bytes(400), "not an image of a known format"),
    ],
)
def test_other_files_are_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(BadSample, match=reason):
        decode(data)


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "SGI", "DDS", "XBM"])
def test_formats_that_no_medical_image_has_are_not_opened(kind: str) -> None:
    image = picture().convert("1") if kind == "XBM" else picture()
    with pytest.raises(BadSample, match="not an image of a known format"):
        decode(encoded(image, kind))


@pytest.mark.parametrize("name", ["a.jp2", "b.j2k", "c.avif", "d.heic", "e.ppm", "f.pgm", "g.bmp"])
def test_formats_of_photographs_are_read(name: str) -> None:
    suffix = name[2:]
    options: dict[str, dict] = {
        "avif": {"quality": 100, "subsampling": "4:4:4"},
        "j2k": {"no_jp2": True},
    }
    kinds = {"jp2": "JPEG2000", "j2k": "JPEG2000", "avif": "AVIF", "ppm": "PPM", "bmp": "BMP"}
    kinds["pgm"] = "PPM"
    image = SMOOTH.convert("L") if suffix == "pgm" else SMOOTH
    if suffix == "heic":
        data = heic(image)
    else:
        data = encoded(image, kinds[suffix], **options.get(suffix, {}))
    difference = decode(data).astype(int) - np.asarray(SMOOTH)
    assert np.abs(difference).max() <= 4
    assert suffix in IMAGE_SUFFIXES
    stored, bare = stored_image(data)
    assert stored == "png" and np.array_equal(decode(bare), decode(data))


def test_without_its_reader_the_reason_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {"heic": heic(SMOOTH), "dicom": dicom(np.arange(64).reshape(8, 8))}
    for module in ("pillow_heif", "pydicom"):
        monkeypatch.setitem(sys.modules, module, None)
    for extra, data in files.items():
        with pytest.raises(BadSample, match=rf"pip install 'megatron-gmai\[{extra}\]'"):
            decode(data)


def test_the_kind_is_told_by_the_contents(tmp_path: Path) -> None:
    assert kind_of(encoded(picture(), "PNG")) == "PNG"
    assert kind_of(heic(SMOOTH)) == "HEIC"
    assert kind_of(encoded(SMOOTH, "AVIF", save_all=True, append_images=[SMOOTH])) == "AVIF"
    assert kind_of(b"II*\0" + bytes(124) + b"DICM") == "DICOM"  # as scanners of slides write them


class TestBombs:
    def png(self, width: int, height: int, body: bytes = b"") -> bytes:
        data = bytearray(encoded(picture(), "PNG"))
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)

    @pytest.mark.parametrize("size", [(11_000, 11_000), (12_001, 1), (2**31, 2**31)])
    def test_sizes_are_checked_before_anything_is_decoded(self, size: tuple[int, int]) -> None:
        with pytest.raises(BadSample, match=r"exceeds|damaged"):
            decode(self.png(*size))

    def test_a_jpeg_of_very_many_scans_is_refused(self) -> None:
        data = encoded(picture(90, 70), "JPEG", progressive=True)
        scan = data.index(b"\xff\xda")
        with pytest.raises(BadSample, match="more than 500 scans"):
            decode(data[:scan] + data[scan : data.index(b"\xff\xc4", scan)] * 600)

    @pytest.mark.parametrize("mode", ["L", "CMYK"])  # of the fast decoder, and of Pillow
    def test_the_larger_a_jpeg_is_the_fewer_scans_it_may_have(
        self, mode: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = encoded(Image.new(mode, (90, 70)), "JPEG", progressive=True)
        scans = data.count(b"\xff\xda")
        monkeypatch.setattr(jpeg_module, "MAX_SCANNED_PIXELS", scans * 90 * 70)
        assert decode(data).shape == (70, 90, 3)
        monkeypatch.setattr(jpeg_module, "MAX_SCANNED_PIXELS", scans * 90 * 70 - 1)
        with pytest.raises(BadSample, match=f"a JPEG of {scans} scans over 90 x 70 pixels"):
            decode(data)

    def test_a_deflated_dicom_file_may_not_unpack_without_end(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(dicom_module, "MAX_VOLUME", 2**24)
        sound = dicom(np.arange(64).reshape(8, 8), syntax=DeflatedExplicitVRLittleEndian)
        assert decode(sound).shape == (8, 8, 3)
        head = sound[: 144 + struct.unpack_from("<I", sound, 140)[0]]
        packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
        body = b"".join(packer.compress(bytes(2**20)) for _ in range(33)) + packer.flush()
        assert len(body) < 2**20
        # A long element before the one that says how the rest is packed, and a length that lies.
        version = b"\x02\0\x01\0OB\0\0" + struct.pack("<I", 4096) + bytes(4096)
        lying = head[:140] + struct.pack("<I", 16) + version + head[144:]
        for start in (head, lying):
            with pytest.raises(BadSample, match="unpacks to more"):
                decode(start + body)
