"""TIFF files: pages of every depth (TIFF 6.0), read by Pillow, deep colours by imagecodecs."""

import io
from collections.abc import Collection, Iterator

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2 as Directory

from megatron_gmai.data.images import orientation, pictures
from megatron_gmai.data.images.deep import imagecodecs
from megatron_gmai.data.images.grey import Grey, Picture
from megatron_gmai.data.images.orientation import turn
from megatron_gmai.data.images.sizes import check_size
from megatron_gmai.data.images.window import flatten
from megatron_gmai.data.ledger import BadSample

KIND, WIDTH, HEIGHT, BITS, PHOTOMETRIC, SAMPLES = 254, 256, 257, 258, 262, 277
STRIP_ROWS, TILE_WIDTH, TILE_HEIGHT = 278, 322, 323
COLOUR_MAP, EXTRA_SAMPLES, SAMPLE_FORMAT, IMAGE_DEPTH = 320, 338, 339, 32997
NO_PICTURE = 1 | 4  # bits of KIND for a smaller copy and for the mask of another page
WHITE_IS_ZERO, PALETTE = 0, 3
UNSIGNED, SIGNED = 1, 2
COLOUR_SAMPLES = {0: 1, 1: 1, 2: 3, PALETTE: 1}  # by photometric interpretation
PREMULTIPLIED = 1  # of EXTRA_SAMPLES; alpha that is not is 2


def pages(data: bytes) -> Iterator[Picture]:
    """Each page; smaller copies and masks are none."""
    for number, tags in enumerate(_directories(data)):
        if number == 0 or not _first(tags, KIND, 0) & NO_PICTURE:
            yield _page(data, number, tags)


def count_pages(data: bytes, most: int) -> int:
    """Pages that `pages` gives; more than `most` are not counted on."""
    count = 0
    for number, tags in enumerate(_directories(data)):
        count += number == 0 or not _first(tags, KIND, 0) & NO_PICTURE
        if number > most:
            break
    return count


def is_plain(data: bytes, known: Collection[int]) -> bool:
    """Whether the file has one page, values of 8 bits or less, and no tags but `known` ones."""
    for number, tags in enumerate(_directories(data)):
        if number or max(_numbers(tags, BITS, 1)) > 8 or not set(tags) <= set(known):
            return False
    return True


def _directories(data: bytes) -> Iterator[Directory]:
    """The tags of each page, in one object that changes. Circles of pages end after one round."""
    stream, seen = io.BytesIO(data), set[int]()
    tags = Directory(data[:16] if data[2:3] == b"+" or data[3:4] == b"+" else data[:8])
    while tags.next and tags.next not in seen:
        seen.add(tags.next)
        stream.seek(tags.next)
        tags.load(stream)
        yield tags


def _numbers(tags: Directory, tag: int, default: int) -> tuple[int, ...]:
    value = tags.get(tag, default)
    return tuple(map(int, value if isinstance(value, tuple) else (value,)))


def _first(tags: Directory, tag: int, default: int) -> int:
    return _numbers(tags, tag, default)[0]


def _page(data: bytes, number: int, tags: Directory) -> Picture:
    bits = _numbers(tags, BITS, 1)
    samples = _first(tags, SAMPLES, 1)
    size = (_first(tags, WIDTH, 0), _first(tags, HEIGHT, 0))
    check_size(*size, _cost(tags, samples, max(bits)))
    check_size(_first(tags, TILE_WIDTH, 1), _first(tags, TILE_HEIGHT, 1), samples * max(bits) // 8)
    if max(bits) <= 8 or (samples == 1 and _first(tags, PHOTOMETRIC, 1) != PALETTE):
        image = _open(data, number)
        if image is not None:
            return _by_pillow(image, tags)
    picture, upright = _by_imagecodecs(data, number, tags), _first(tags, orientation.TAG, 1)
    return picture.turned(upright) if isinstance(picture, Grey) else turn(picture, upright)


def _cost(tags: Directory, samples: int, bits: int) -> int:
    """Bytes a pixel that decoding holds at once, by the reader that `_page` takes."""
    value = -(-bits // 8)
    if value > 1 and (samples > 1 or _first(tags, PHOTOMETRIC, 1) == PALETTE):
        return 3 * samples * value + 3
    decoded = 2 * value + 1 if value > 1 else 1 if samples == 1 else 4
    # libtiff unpacks a strip whole, and one strip may be the picture.
    is_whole = 2 * _first(tags, STRIP_ROWS, 2**32 - 1) > _first(tags, HEIGHT, 0)
    return decoded + samples * value * is_whole


def _open(data: bytes, number: int) -> Image.Image | None:
    """The page, None where Pillow does not know its layout."""
    try:
        image = Image.open(io.BytesIO(data), formats=("TIFF",))
        image.seek(number)
    except (UnidentifiedImageError, SyntaxError):
        return None
    return image


def _by_pillow(image: Image.Image, tags: Directory) -> Picture:
    signed = _first(tags, SAMPLE_FORMAT, UNSIGNED) == SIGNED
    image.load()  # turns it upright
    if image.mode not in pictures.DEEP_MODES:
        picture = pictures.to_picture(image)
        if signed and image.mode == "L" and isinstance(picture, np.ndarray):
            # Pillow takes signed bytes for unsigned ones: the upper half of the order comes first.
            return picture ^ 0x80
        return picture
    values = pictures.values_of(image)
    if image.mode == "I" and not signed and _first(tags, BITS, 1) == 32:
        values = values.view(np.uint32)  # Pillow has no unsigned mode; the bits are right
    return Grey(values, inverted=_first(tags, PHOTOMETRIC, 1) == WHITE_IS_ZERO)


def _by_imagecodecs(data: bytes, number: int, tags: Directory) -> Picture:
    photometric, samples = _first(tags, PHOTOMETRIC, 1), _first(tags, SAMPLES, 1)
    bits = max(_numbers(tags, BITS, 1))
    colours = COLOUR_SAMPLES.get(photometric)
    if colours is None or samples < colours or _first(tags, IMAGE_DEPTH, 1) != 1:
        raise BadSample(f"a TIFF of {bits} bits, {samples} sample(s), photometric {photometric}")
    values = imagecodecs(f"a TIFF of {samples} sample(s) of {bits} bits").tiff_decode(data, number)
    size = (_first(tags, HEIGHT, 0), _first(tags, WIDTH, 0))
    if values.shape == (samples, *size):
        values = np.moveaxis(values, 0, -1)
    values = values.reshape(*size, samples)
    if photometric == PALETTE:
        return _by_palette(values[:, :, 0], tags)
    # Samples beyond the colours that are not alpha belong to no picture.
    extra = _numbers(tags, EXTRA_SAMPLES, 0)[0]
    values = values[:, :, : colours + (extra in (1, 2) and samples > colours)]
    if values.shape[2] == 1:
        return Grey(values[:, :, 0], inverted=photometric == WHITE_IS_ZERO)
    opaque = float(np.iinfo(values.dtype).max) if values.dtype.kind in "iu" else 1.0
    if extra == PREMULTIPLIED and values.shape[2] > colours:
        values = _divided(values, opaque)
    levels = flatten(values, opaque)
    return 255 - levels if photometric == WHITE_IS_ZERO else levels


def _divided(values: np.ndarray, opaque: float) -> np.ndarray:
    """Colours as they were before they were multiplied by alpha."""
    share = values[:, :, -1:].astype(np.float32) / opaque
    colours = values[:, :, :-1] / np.where(share > 0, share, 1)
    return np.concatenate([colours, values[:, :, -1:]], axis=2).astype(np.float32)


def _by_palette(indices: np.ndarray, tags: Directory) -> np.ndarray:
    """Colours of 16 bits by definition, of which the upper 8 are shown, as Pillow does."""
    table = np.array(_numbers(tags, COLOUR_MAP, 0), dtype=np.uint16).reshape(3, -1)
    return (table.T >> 8).astype(np.uint8)[indices]
