"""Images of 100 megapixels: halved as they are decoded, so that a worker stays small."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_gmai.data.images import sizes
from megatron_gmai.data.images.decode import decode
from megatron_gmai.data.ledger import BadSample
from tests.data.files import tiff
from tests.data.images.test_upright import CORNERS
from tests.data.world import encoded

# Decodes a file as a worker that makes shards does, then as one that trains does, and prints the
# most memory, in KB, that this took. (`ru_maxrss` would count what its parent had before it.)
PROGRAM = """
import sys
from pathlib import Path
from megatron_gmai.data.images.decode import load_image
from megatron_gmai.data.shards.build import check_record
from megatron_gmai.data.sources.mixture import Source
place = Path(sys.argv[1])
turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "yes"}]
record = {"image": place.name, "conversations": turns}
_, [(_, data)] = check_record(record, Source("A", (), (place.parent,)))
assert load_image(data, 336).shape == (3, 336, 336)
status = Path("/proc/self/status").read_text()
print(status.split("VmHWM:")[1].split()[0])
"""


def peak_mb(file: Path) -> float:
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, str(file)],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(run.stdout) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_worker_stays_below_500_mb_with_a_jpeg_of_100_megapixels(tmp_path: Path) -> None:
    slope = np.add.outer(np.arange(10_000), np.arange(10_000)).astype(np.uint8)
    tags = Image.Exif()
    tags[274] = 6  # the worst: turned pixels are a second picture
    image = Image.fromarray(slope).convert("RGB")
    image.save(tmp_path / "slide.jpg", quality=80, exif=tags)
    assert peak_mb(tmp_path / "slide.jpg") <= 500


def kinds() -> dict[str, bytes]:
    deep = np.asarray(CORNERS).astype(np.uint16) * 256
    return {
        "JPEG": encoded(CORNERS, "JPEG", quality=100, subsampling=0),
        "CMYK JPEG": encoded(CORNERS.convert("CMYK"), "JPEG", quality=100),
        "PNG": encoded(CORNERS),
        "palette": encoded(CORNERS.convert("P", palette=Image.Palette.ADAPTIVE)),
        "alpha": encoded(Image.merge("RGBA", [*CORNERS.split(), CORNERS.getchannel(0)])),
        "JPEG 2000": encoded(CORNERS, "JPEG2000"),
        "deep TIFF": tiff(deep, 2),
        "WebP": encoded(CORNERS, "WEBP", lossless=True),
    }


@pytest.mark.parametrize("kind", kinds())
def test_huge_pictures_of_every_kind_are_halved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode(kinds()[kind])
    monkeypatch.setattr(sizes, "HUGE_PIXELS", 5000)
    found = decode(kinds()[kind])
    assert found.shape == (32, 48, 3)
    average = np.asarray(Image.fromarray(whole).reduce(2)).astype(int)
    assert np.abs(found - average)[2:-2, 2:-2].mean() < 3


def test_a_picture_that_is_not_huge_keeps_its_pixels() -> None:
    """The largest photographs of common cameras."""
    data = encoded(CORNERS.resize((6400, 5000)), "JPEG", quality=50)
    assert np.array_equal(decode(data), np.asarray(Image.open(io.BytesIO(data))))


def test_a_damaged_huge_jpeg_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizes, "HUGE_PIXELS", 5000)  # CORNERS has 6144
    data = kinds()["JPEG"]
    for kept in (len(data) // 2, len(data) - 40):
        with pytest.raises(BadSample):
            decode(data[:kept])
