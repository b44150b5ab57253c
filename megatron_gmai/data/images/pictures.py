"""Formats that Pillow reads, and HEIC: frames of 8 bits, and grey values of any depth."""

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image

from megatron_gmai.data.images.deep import read_deep
from megatron_gmai.data.images.formats import needs
from megatron_gmai.data.images.grey import Grey, Picture
from megatron_gmai.data.images.jpeg import check_scans
from megatron_gmai.data.images.orientation import orientation_of, turn
from megatron_gmai.data.images.sizes import check_size, is_huge
from megatron_gmai.data.images.window import MEAN_COLOUR, blend, window_to_8_bits
from megatron_gmai.data.ledger import BadSample

DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
ANIMATED = {"PNG", "WEBP", "GIF", "AVIF"}  # a JPEG's further pictures are previews


def frames(kind: str, data: bytes) -> Iterator[Picture]:
    """Each frame, upright."""
    deep = read_deep(kind, data)
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        count = _count(kind, image)
        if deep is not None:
            yield turn(deep, orientation_of(image))
            if count > 1:
                raise BadSample("an animation of deep colours")
            return
        for number in range(count):
            if number:
                image.seek(number)
            check_size(*image.size)
            if kind == "JPEG":
                check_scans(data, *image.size)
            _load(image)
            picture, orientation = to_picture(image), orientation_of(image)
            if isinstance(picture, Grey):
                yield picture.turned(orientation)
            else:
                yield turn(picture, orientation)


def count_frames(kind: str, data: bytes) -> int:
    """How many frames there are."""
    if kind not in ANIMATED:
        return 1
    with Image.open(io.BytesIO(data), formats=(kind,)) as image:
        return _count(kind, image)


def _count(kind: str, image: Image.Image) -> int:
    return int(getattr(image, "n_frames", 1)) if kind in ANIMATED else 1


def _load(image: Image.Image) -> None:
    """Decodes, huge pictures at half their size where the format allows it."""
    if is_huge(*image.size):
        if image.format == "JPEG2000":
            image.reduce = 1  # type: ignore[method-assign, assignment]  # resolution levels to drop
        else:
            image.draft(None, (image.width // 2, image.height // 2))
    image.load()


def to_picture(image: Image.Image) -> Picture:
    """A loaded picture with palettes applied and alpha blended on the mean colour."""
    if image.mode in DEEP_MODES:
        return _deep_grey(image)
    if image.has_transparency_data:
        return _blended(image.convert("RGBA"))
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return np.array(image.reduce(2) if is_huge(*image.size) else image)


def _deep_grey(image: Image.Image) -> Picture:
    values = np.asarray(image)
    key = image.info.get("transparency")  # of PNG: the one value that is transparent
    if image.format == "PNG" and isinstance(key, int) and (values == key).any():
        return blend(window_to_8_bits(values), values != key, 1)
    return Grey(values)


def _blended(image: Image.Image) -> np.ndarray:
    """RGBA over the mean colour. Alpha that is the same everywhere says nothing: it is ignored."""
    if is_huge(*image.size):
        image = image.reduce(2)
    alpha, colours = image.getchannel("A"), image.convert("RGB")
    lowest, highest = alpha.getextrema()
    if lowest == highest:
        return np.array(colours)
    ground = Image.new("RGB", image.size, MEAN_COLOUR)
    ground.paste(colours, mask=alpha)
    return np.array(ground)


def heic(data: bytes) -> Iterator[Picture]:
    """The main picture of a HEIC file (extra `heic`), turned as the file says: its EXIF block
    repeats what was done already."""
    try:
        import pillow_heif
    except ImportError as error:
        raise needs("HEIC", "pillow-heif", "heic") from error
    file = pillow_heif.open_heif(data, convert_hdr_to_8bit=True)
    check_size(*file.size)
    yield to_picture(file.to_pillow())
