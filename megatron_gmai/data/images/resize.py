"""Pictures of any size become the square that the vision tower takes."""

import numpy as np

from megatron_gmai.data.images.sizes import check_size
from megatron_gmai.data.images.window import MEAN_COLOUR


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
    # Making shards needs no torch, and importing it takes as long as checking 10,000 JPEGs.
    import torch

    source, target = (torch.from_numpy(a)[None].permute(0, 3, 1, 2) for a in (pixels, out))
    size = out.shape[:2]
    torch.ops.aten._upsample_bicubic2d_aa.out(source, size, False, None, None, out=target)
