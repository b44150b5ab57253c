"""What names a patient stays out of the shards; the pixels stay what they were."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.images.privacy import stored_image, strip_metadata
from megatron_gmai.data.shards.build import check_record
from megatron_gmai.data.sources.mixture import Source
from tests.data.files import dicom
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


def test_a_turned_jpeg_keeps_its_turn_and_nothing_else() -> None:
    tags = exif()
    tags[274] = 6
    data = encoded(picture(), "JPEG", exif=tags)
    suffix, bare = stored_image(data)
    assert suffix == "jpg" and NAME not in bare and len(bare) < len(data)
    assert np.array_equal(decode(bare), decode(data)) and decode(bare).shape == (20, 14, 3)


def test_what_cannot_be_cut_out_is_written_anew(tmp_path: Path) -> None:
    tags = exif()
    tags[274] = 3
    for kind in ("PNG", "WEBP"):
        data = encoded(picture(), kind, exif=tags)
        suffix, bare = stored_image(data)
        assert suffix == "png" and NAME not in bare
        assert np.array_equal(decode(bare), decode(data))


def test_a_dicom_file_gives_a_shard_pixels_and_no_name(tmp_path: Path) -> None:
    (tmp_path / "slice.dcm").write_bytes(dicom(np.arange(4096).reshape(64, 64)))
    source = Source("A", (), (tmp_path,))
    _, [(suffix, data)] = check_record(record("<image>", "yes", "slice.dcm"), source)
    assert suffix == "png" and NAME not in data
    assert np.array_equal(decode(data), decode((tmp_path / "slice.dcm").read_bytes()))
