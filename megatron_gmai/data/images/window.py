"""Deep values, of more than 8 bits, become 8 bits by a window that keeps the order of all values.

A plain conversion would turn nearly all of a 16-bit image white, and one that keeps the top 8 bits
would turn 12-bit values in 16-bit files black.
"""

import numpy as np

# CLIP's mean (.48145466, .4578275, .40821073) in levels: invisible after normalisation.
MEAN_COLOUR = (122, 116, 104)
WINDOW_PERCENTILES = (0.5, 99.5)
# Levels left for what lies outside the window on either side, so that nothing is clipped.
WINDOW_MARGIN = 8
STRIP = 2**21  # values handled at once: their float64 copies stay small beside the image
SAMPLED = 2**22  # values that percentiles are taken from; larger images give every n-th


def window_to_8_bits(values: np.ndarray, window: tuple[float, float] | None = None) -> np.ndarray:
    """Maps values of any depth and shape to uint8 without ever exchanging the order of two values.

    Values inside `window` (default: the 0.5 and 99.5 percentiles) spread evenly over the middle
    levels; those outside share WINDOW_MARGIN levels at either end. The colours of an image share
    one window, so hues stay. A constant image gives mid-grey. NaN counts as the smallest value.
    """
    flat = np.ascontiguousarray(values).reshape(-1)
    smallest, largest = value_range(flat)
    if smallest == largest:
        return np.full(values.shape, 128, dtype=np.uint8)
    low, high = window or percentile_window(flat)
    low, high = max(low, smallest), min(high, largest)
    if low >= high:
        low, high = smallest, largest
    knees = _knees(smallest, low, high, largest)
    levels = np.empty(flat.shape, dtype=np.uint8)
    for start in range(0, flat.size, STRIP):
        strip = flat[start : start + STRIP].astype(np.float64)
        if flat.dtype.kind == "f":
            strip = np.nan_to_num(strip, nan=smallest, posinf=largest, neginf=smallest)
        levels[start : start + STRIP] = np.rint(np.interp(strip, *knees))
    return levels.reshape(values.shape)


def value_range(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest of the finite values, 0 and 0 if there are none."""
    flat = values.reshape(-1)
    if flat.dtype.kind == "f":
        finite = np.isfinite(flat)
        flat = flat if finite.all() else flat[finite]
    return (float(flat.min()), float(flat.max())) if flat.size else (0.0, 0.0)


def percentile_window(values: np.ndarray) -> tuple[float, float]:
    """The window of values whose file names none."""
    flat = values.reshape(-1)
    step = 1 + flat.size // SAMPLED
    step += step > 1 and step % 3 == 0  # values of colours take turns: all have to be met
    sample = flat[::step].astype(np.float64)
    sample = sample[np.isfinite(sample)]
    if not sample.size:
        return 0.0, 0.0
    low, high = np.percentile(sample, WINDOW_PERCENTILES)
    return float(low), float(high)


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


def flatten(values: np.ndarray, opaque: float) -> np.ndarray:
    """Deep [h, w] or [h, w, 1 to 4 samples] to uint8 [h, w] or [h, w, 3].

    A second or fourth sample is alpha, `opaque` its largest value: the window is that of the
    colours, and what is transparent becomes the mean colour. Alpha that is the same everywhere says
    nothing and is ignored.
    """
    if values.ndim == 2:
        return window_to_8_bits(values)
    samples = values.shape[2]
    colours = values[:, :, : samples - 1 + samples % 2]
    levels = window_to_8_bits(colours[:, :, 0] if samples < 3 else colours)
    if samples % 2:
        return levels
    alpha = values[:, :, -1]
    return levels if alpha.min() == alpha.max() else blend(levels, alpha, opaque)


def blend(levels: np.ndarray, alpha: np.ndarray, opaque: float) -> np.ndarray:
    """uint8 [h, w] or [h, w, 3] over the mean colour: uint8 [h, w, 3]."""
    blended = np.empty((*alpha.shape, 3), dtype=np.uint8)
    ground = np.array(MEAN_COLOUR, dtype=np.float32)
    for row, share in enumerate(alpha):  # row by row: floats of the whole image are too many
        colours = levels[row].reshape(len(share), -1).astype(np.float32)
        part = (share.astype(np.float32) / opaque).clip(0, 1)[:, None]
        blended[row] = np.rint(ground + (colours - ground) * part)
    return blended
