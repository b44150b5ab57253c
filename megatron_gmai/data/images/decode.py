"""Image bytes become the square uint8 picture that the vision tower takes.

Medical images are often 16 bits deep: their range is mapped to 8 bits by a window that keeps the
order of all values, where a plain conversion would turn nearly all of them white.
"""

import io
import warnings

import numpy as np
import simplejpeg
import torch
from PIL import Image, UnidentifiedImageError

from megatron_gmai.data.ledger import BadSample

MAX_PIXELS = 100_000_000
MAX_SIDE = 12_000  # its square, which padding makes, has to fit in memory too
# CLIP's mean (.48145466, .4578275, .40821073) in levels: invisible after normalisation.
MEAN_COLOUR = (122, 116, 104)
WINDOW_PERCENTILES = (0.5, 99.5)
# Levels left for what lies outside the window on either side, so that nothing is clipped.
WINDOW_MARGIN = 8
DEEP_MODES = {"I", "F", "I;16", "I;16L", "I;16B", "I;16N"}
JPEG_MAGIC = b"\xff\xd8\xff"


def decode(data: bytes) -> np.ndarray:
    """Decodes an image file of any format to RGB, uint8 [height, width, 3].

    Deep images are windowed (see `window_to_8_bits`). Raises BadSample for files that are
    truncated, unknown, of no size, or larger than MAX_PIXELS or MAX_SIDE.
    """
    if data.startswith(JPEG_MAGIC):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
    try:
        return _decode_any(data)
    except BadSample:
        raise
    except UnidentifiedImageError as error:
        raise BadSample("not an image of a known format") from error
    except MemoryError as error:
        raise BadSample("the image needs more memory than there is") from error
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise BadSample(f"cannot decode: {error}") from error


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """The pixels that Pillow gives, faster, and without its silence about lost data.

    None for the rare kinds (CMYK, odd sampling, padded segments) that are left to Pillow.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # its own error for headers it does not know
        return None
    if colours not in ("YCbCr", "RGB", "Gray"):
        return None
    check_size(width, height)
    try:
        return simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
    except ValueError as error:
        if "extraneous bytes" in str(error):  # padding between segments: all pixels are there
            return None
        raise BadSample(f"cannot decode: {error}") from error


def _decode_any(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        # Pillow's own size limit is replaced by check_size, which knows no warning zone.
        warnings.simplefilter("ignore")
        image = Image.open(io.BytesIO(data))
        check_size(*image.size)
        image.load()
        if image.mode in DEEP_MODES:
            grey = window_to_8_bits(np.asarray(image))
            return np.repeat(grey[:, :, None], 3, axis=2)
        return np.array(image.convert("RGB"))


def check_size(width: int, height: int) -> None:
    """Raises BadSample for sizes that no medical image has and that would exhaust memory."""
    if width < 1 or height < 1:
        raise BadSample(f"image size {width} x {height}")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise BadSample(
            f"image size {width} x {height} exceeds {MAX_PIXELS} pixels or {MAX_SIDE} a side"
        )


def window_to_8_bits(values: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """Maps grey values of any depth to uint8 without ever exchanging the order of two values.

    Values inside `window` (default: the 0.5 and 99.5 percentiles) spread evenly over the middle
    levels; those outside share WINDOW_MARGIN levels at either end. A constant image gives mid-grey.
    NaN counts as the smallest value.
    """
    numbers = values.astype(np.float32)
    finite = np.isfinite(numbers)
    if not finite.all():
        smallest, largest = _range(numbers[finite])
        numbers = np.nan_to_num(numbers, nan=smallest, posinf=largest, neginf=smallest)
    smallest, largest = _range(numbers)
    if smallest == largest:
        return np.full(values.shape, 128, dtype=np.uint8)
    low, high = window or tuple(np.percentile(numbers, WINDOW_PERCENTILES))
    low, high = max(low, smallest), min(high, largest)
    if low >= high:
        low, high = smallest, largest
    knees = _knees(smallest, low, high, largest)
    levels = np.interp(numbers, *knees)
    return np.rint(levels).astype(np.uint8)


def _range(numbers: np.ndarray) -> tuple[float, float]:
    return (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 0.0)


def _knees(
    smallest: float, low: float, high: float, largest: float
) -> tuple[list[float], list[float]]:
    """Corners of the piecewise linear map; a side without values outside the window needs none."""
    inputs, levels = [low, high], [0.0, 255.0]
    if smallest < low:
        inputs, levels = [smallest, *inputs], [0.0, float(WINDOW_MARGIN), *levels[1:]]
    if largest > high:
        levels[-1] = 255.0 - WINDOW_MARGIN
        inputs, levels = [*inputs, largest], [*levels, 255.0]
    return inputs, levels


def load_image(
    data: bytes, side: int, pad: bool = True, out: np.ndarray | None = None
) -> np.ndarray:
    """Image file to uint8 [3, side, side]: `decode`, then `to_square`. Raises BadSample."""
    return to_square(decode(data), side, pad, out)


def to_square(
    pixels: np.ndarray, side: int, pad: bool = True, out: np.ndarray | None = None
) -> np.ndarray:
    """Resizes uint8 [height, width, 3] to [3, side, side], bicubic with antialiasing.

    Stays within 2 levels of Pillow's bicubic, which CLIP's processor uses. With `pad` the image is
    centred on a square of CLIP's mean colour first; without, its shorter edge becomes `side` and
    the middle is cut out. The result is a view of `out`, contiguous uint8 [side, side, 3], or of
    new memory of that form: the colours of a pixel stay together, as the decoders deliver them.
    """
    if out is None:
        out = np.empty((side, side, 3), dtype=np.uint8)
    if pad:
        _resize(_padded(pixels, side), out)
    else:
        out[:] = _cropped(pixels, side)
    return out.transpose(2, 0, 1)


def _padded(pixels: np.ndarray, side: int) -> np.ndarray:
    """The square [n, n, 3], or [n, side, 3] for a wide image: the resize works along rows first, as
    Pillow's does, so rows that are all padding can be added after it."""
    height, width = pixels.shape[:2]
    if height == width:
        return pixels
    square = np.empty((max(height, width), side if height < width else height, 3), dtype=np.uint8)
    square[0] = MEAN_COLOUR
    if height < width:
        top = (width - height) // 2
        square[1:top] = square[0]  # whole rows at a time: ten times faster than pixel by pixel
        square[top + height :] = square[0]
        _resize(pixels, square[top : top + height])
    else:
        left = (height - width) // 2
        square[1:] = square[0]
        square[:, left : left + width] = pixels
    return square


def _cropped(pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    size = (side * height // shorter, side * width // shorter)
    check_size(size[1], size[0])
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    resized = np.empty((*size, 3), dtype=np.uint8)
    _resize(pixels, resized)
    return resized[top : top + side, left : left + side]


def _resize(pixels: np.ndarray, out: np.ndarray) -> None:
    """uint8 [h, w, 3] into `out`, contiguous [height, width, 3].

    torch's kernel for uint8 works like Pillow's: rows first, rounded in between. Only the operator
    below `torch.nn.functional.interpolate` can write into memory that is there.
    """
    if pixels.shape == out.shape:
        out[:] = pixels
        return
    source, target = (torch.from_numpy(a)[None].permute(0, 3, 1, 2) for a in (pixels, out))
    size = out.shape[:2]
    torch.ops.aten._upsample_bicubic2d_aa.out(source, size, False, None, None, out=target)
