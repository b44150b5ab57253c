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
from megatron_gmai.data.images.sizes import check_size, is_huge, strips
from megatron_gmai.data.images.window import MEAN_COLOUR, blend, window_to_8_bits
from megatron_gmai.data.ledger import BadSample

DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
# Bytes a pixel that decoding holds at once. Pillow stores colours in 4; the rest are planes and
# canvases of the decoders, and numpy's copy of what is deep.
OF_MODES = {"1": 1, "L": 1, "P": 1, "I": 9, "F": 9, **dict.fromkeys(DEEP_MODES - {"I", "F"}, 5)}
OF_FORMATS = {"WEBP": 16, "AVIF": 12, "HEIC": 12, "JPEG2000": 16}
OF_ANIMATIONS = 12
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
            check_size(*image.size, _cost(kind, image, count))
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


def _cost(kind: str, image: Image.Image, count: int) -> int:
    cost = OF_FORMATS.get(kind) or OF_MODES.get(image.mode, 4)
    if count > 1:
        return max(cost, OF_ANIMATIONS)
    return cost // 4 if kind == "JPEG2000" and is_huge(*image.size) else cost


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
    has_alpha = image.has_transparency_data and not _is_even(image)
    mode = "RGBA" if has_alpha else "L" if image.mode == "L" else "RGB"
    if not is_huge(*image.size):
        return _flat(image, mode)
    # Strip by strip: a converted copy of the whole would double the memory.
    return np.concatenate([_flat(part, mode, 2) for part in _parts(image)])


def _parts(image: Image.Image) -> Iterator[Image.Image]:
    for rows in strips(image.height):
        yield image.crop((0, rows.start, image.width, rows.stop))


def _flat(image: Image.Image, mode: str, factor: int = 1) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3] by way of `mode`, averaged over `factor` x `factor` pixels."""
    image = image if image.mode == mode else image.convert(mode)
    image = image.reduce(factor) if factor > 1 else image
    if mode != "RGBA":
        return np.array(image)
    ground = Image.new("RGB", image.size, MEAN_COLOUR)
    ground.paste(image.convert("RGB"), mask=image.getchannel("A"))
    return np.array(ground)


def _is_even(image: Image.Image) -> bool:
    """Whether alpha is the same everywhere: then it says nothing, and is ignored."""
    alphas = (part.convert("RGBA").getchannel("A").getextrema() for part in _parts(image))
    lowest, highest = zip(*alphas, strict=True)
    return bool(min(lowest) == max(highest))


def values_of(image: Image.Image) -> np.ndarray:
    """[h, w] of a deep picture, with no more than one copy on the way."""
    values = np.empty((image.height, image.width), dtype=np.asarray(image.crop((0, 0, 1, 1))).dtype)
    for rows, part in zip(strips(image.height), _parts(image), strict=True):
        values[rows] = np.asarray(part)
    return values


def _deep_grey(image: Image.Image) -> Picture:
    values = values_of(image)
    key = image.info.get("transparency")  # of PNG: the one value that is transparent
    if image.format == "PNG" and isinstance(key, int) and (values == key).any():
        return blend(window_to_8_bits(values), values != key, 1)
    return Grey(values)


def heic(data: bytes) -> Iterator[Picture]:
    """The main picture of a HEIC file (extra `heic`), turned as the file says: its EXIF block
    repeats what was done already."""
    try:
        import pillow_heif
    except ImportError as error:
        raise needs("HEIC", "pillow-heif", "heic") from error
    file = pillow_heif.open_heif(data, convert_hdr_to_8bit=True)
    width, height = file.size
    check_size(width, height, OF_FORMATS["HEIC"])
    yield to_picture(file.to_pillow())
