"""Cuts crops out of the sources: what a crop shows is recorded with it, never guessed later.

Training and held-out crops come from disjoint slices (brain), frames (ultrasound) or image
regions (all else). A detail that a question may ask for (plane, display window, ...) is either
how the crop was cut or rendered, or measured from its pixels with a margin.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from PIL import Image

from examples.quickstart import sources

Box = tuple[int, int, int, int]  # top, left, bottom, right in source pixels

TRAIN, HELD_OUT = "train", "held_out"

# Hounsfield units at black and white: level +- width / 2 of the usual presets.
CT_WINDOWS = {"soft tissue": (-160.0, 240.0), "lung": (-1350.0, 150.0), "bone": (-450.0, 1050.0)}
CHANNELS = {"grey": (1, 1, 1), "green": (0, 1, 0), "blue": (0.1, 0.3, 1), "red": (1, 0, 0)}
# Quarter turns, counter-clockwise, of a frame whose transducer is at the top.
PROBE_SIDES = ("top", "left", "bottom", "right")
# Of 14 neighbouring slices: 9 to train, 2 dropped, 2 held out, 1 dropped.
_SLICE_BLOCK, _TRAIN_SLICES, _HELD_SLICES = 14, range(9), range(11, 13)
_HELD_FRAMES, _TRAIN_FRAMES = range(100, 120), range(0, 95)


@dataclass(frozen=True)
class Crop:
    """One rendered image, `pixels` float32 in [0, 1], `[h, w]` or `[h, w, 3]`."""

    kind: str
    pixels: np.ndarray
    section: str  # slice or frame of a stack, "" for a single image
    box: Box  # in that section, before any turn
    details: dict[str, str] = field(default_factory=dict)  # question type -> true answer


@dataclass(frozen=True)
class Region:
    """Where crops of a single image may lie, in fractions of its height and width."""

    rows: tuple[float, float]
    columns: tuple[float, float]


@dataclass(frozen=True)
class SingleImage:
    """A source of one image: how large crops are and where each split may take them."""

    load: Callable[[], np.ndarray]
    sides: tuple[float, float]  # of a crop, in fractions of the image's smaller side
    regions: dict[str, tuple[Region, ...]]


SINGLE_IMAGES = {
    "abdominal_ct": SingleImage(
        sources.abdominal_ct,
        (0.38, 0.50),
        {
            TRAIN: (Region((0.22, 0.80), (0.08, 0.53)),),
            HELD_OUT: (Region((0.22, 0.80), (0.535, 0.93)),),
        },
    ),
    "chest_xray": SingleImage(
        sources.chest_xray,
        (0.30, 0.40),
        {
            TRAIN: (Region((0.02, 0.98), (0.04, 0.55)),),
            HELD_OUT: (Region((0.02, 0.98), (0.56, 0.96)),),
        },
    ),
    "colon_histology": SingleImage(
        sources.colon_histology,
        (0.18, 0.32),
        {TRAIN: (Region((0.0, 0.60), (0.0, 1.0)),), HELD_OUT: (Region((0.61, 1.0), (0.0, 1.0)),)},
    ),
    "fundus": SingleImage(
        sources.retina,
        (0.22, 0.34),
        {
            TRAIN: (Region((0.03, 0.59), (0.05, 0.95)),),
            HELD_OUT: (Region((0.60, 0.95), (0.08, 0.92)),),
        },
    ),
    "nuclei": SingleImage(
        sources.nuclei,
        (0.24, 0.33),
        {TRAIN: (Region((0.0, 0.64), (0.0, 1.0)),), HELD_OUT: (Region((0.65, 1.0), (0.0, 1.0)),)},
    ),
}
KINDS = ("brain_mr", "echo", *SINGLE_IMAGES)


def crops(kind: str, split: str, seed: int) -> Iterator[Crop]:
    """An endless stream of crops, the same for the same arguments.

    Args:
        kind: one of `KINDS`.
        split: `TRAIN` or `HELD_OUT`.
        seed: of the places, sizes and renderings.
    """
    rng = np.random.default_rng([seed, KINDS.index(kind), split == HELD_OUT])
    if kind == "brain_mr":
        volume = sources.brain_volume()
        draw = partial(_brain, volume, _brain_slices(volume, split))
    elif kind == "echo":
        draw = partial(_echo, sources.echo_frames(), split)
    else:
        single = SINGLE_IMAGES[kind]
        draw = partial(_single, kind, single.load(), single, split)
    while True:
        crop = draw(rng)
        if _informative(crop.pixels):
            yield crop


def resize(pixels: np.ndarray, longest: int) -> np.ndarray:
    """Scale to the given longest side, keeping the aspect ratio; float32 in [0, 1]."""
    height, width = pixels.shape[:2]
    scale = longest / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    method = Image.Resampling.BOX if scale < 0.5 else Image.Resampling.BICUBIC
    planes = pixels[..., None] if pixels.ndim == 2 else pixels
    scaled = [
        np.asarray(Image.fromarray(np.ascontiguousarray(plane)).resize(size, method))
        for plane in np.moveaxis(planes.astype(np.float32), 2, 0)
    ]
    stacked = np.clip(np.stack(scaled, axis=2), 0, 1)
    return stacked[..., 0] if pixels.ndim == 2 else stacked


# One small image has few distinct crops. Turned and mirrored ones are added where no question
# depends on the orientation; the other kinds keep theirs.
_ANY_WAY_UP = ("abdominal_ct", "colon_histology", "fundus", "nuclei")
_PLANES = ("sagittal", "coronal", "axial")  # by the axis that stays fixed


def _brain_slices(volume: np.ndarray, split: str) -> list[list[int]]:
    """For each axis the slices of a split that show enough brain to tell the plane."""
    wanted = _HELD_SLICES if split == HELD_OUT else _TRAIN_SLICES
    slices = []
    for axis in range(3):
        other = tuple(a for a in range(3) if a != axis)
        share = (volume > 0.1).mean(axis=other)  # [slices]
        slices.append([int(i) for i in np.flatnonzero(share > 0.2) if i % _SLICE_BLOCK in wanted])
    return slices


def _brain(volume: np.ndarray, slices: list[list[int]], rng: np.random.Generator) -> Crop:
    axis = int(rng.integers(3))
    plane, index = _PLANES[axis], int(rng.choice(slices[axis]))
    # Superior (or, in axial slices, anterior) is up, as the slices are usually read.
    image = np.moveaxis(volume, axis, 0)[index].T[::-1]
    box = _bounding_box(image)
    side = int(max(box[2] - box[0], box[3] - box[1]) * rng.uniform(0.72, 1.0))
    box = _box_inside(rng, box, side)
    return Crop("brain_mr", _cut(image, box), f"{plane} {index}", box, {"plane": plane})


def _echo(frames: np.ndarray, split: str, rng: np.random.Generator) -> Crop:
    index = int(rng.choice(_HELD_FRAMES if split == HELD_OUT else _TRAIN_FRAMES))
    height, width = frames.shape[1:]
    bottom = int(height * rng.uniform(0.75, 1.0))
    box = (0, int(width * rng.uniform(0, 0.12)), bottom, int(width * rng.uniform(0.88, 1.0)))
    turns = int(rng.integers(4))
    # The recording is dark: brightened as a reader would turn up the gain.
    pixels = np.rot90(_cut(frames[index], box) ** 0.6, turns)
    return Crop("echo", pixels, f"frame {index}", box, {"probe": PROBE_SIDES[turns]})


def _single(
    kind: str, image: np.ndarray, source: SingleImage, split: str, rng: np.random.Generator
) -> Crop:
    height, width = image.shape[:2]
    region = source.regions[split][int(rng.integers(len(source.regions[split])))]
    limits = (
        int(region.rows[0] * height),
        int(region.columns[0] * width),
        int(region.rows[1] * height),
        int(region.columns[1] * width),
    )
    box = _box_inside(rng, limits, int(min(height, width) * rng.uniform(*source.sides)))
    pixels, details = _RENDER.get(kind, _plain)(_cut(image, box), box, height, rng)
    if kind in _ANY_WAY_UP:
        pixels = np.rot90(pixels if rng.random() < 0.5 else pixels[::-1], int(rng.integers(4)))
    return Crop(kind, pixels, "", box, details)


Rendered = tuple[np.ndarray, dict[str, str]]


def _plain(pixels: np.ndarray, box: Box, height: int, rng: np.random.Generator) -> Rendered:
    return pixels, {}


def _windowed(pixels: np.ndarray, box: Box, height: int, rng: np.random.Generator) -> Rendered:
    name = str(rng.choice(list(CT_WINDOWS)))
    black, white = CT_WINDOWS[name]
    return np.clip((pixels - black) / (white - black), 0, 1), {"window": name}


def _chest_zone(pixels: np.ndarray, box: Box, height: int, rng: np.random.Generator) -> Rendered:
    if box[2] < 0.48 * height:
        return pixels, {"zone": "upper"}
    return pixels, {"zone": "lower"} if box[0] > 0.52 * height else {}


def _stain(pixels: np.ndarray, box: Box, height: int, rng: np.random.Generator) -> Rendered:
    red, blue = pixels[..., 0], pixels[..., 2]
    brown = float(np.mean(red > blue + 0.1))
    if brown > 0.65:
        return pixels, {"stain": "brown"}
    return pixels, {"stain": "blue"} if brown < 0.35 else {}


def _pseudo_colour(pixels: np.ndarray, box: Box, height: int, rng: np.random.Generator) -> Rendered:
    name = str(rng.choice(list(CHANNELS)))
    bright = np.sqrt(pixels)
    if name == "grey":
        return bright, {"channel": name}
    return bright[..., None] * np.array(CHANNELS[name], dtype=np.float32), {"channel": name}


_RENDER: dict[str, Callable[[np.ndarray, Box, int, np.random.Generator], Rendered]] = {
    "abdominal_ct": _windowed,
    "chest_xray": _chest_zone,
    "colon_histology": _stain,
    "nuclei": _pseudo_colour,
}


def _box_inside(rng: np.random.Generator, limits: Box, side: int) -> Box:
    """A box within `limits`, at most 4:3, its longer side `side` where that fits."""
    short = int(side * rng.uniform(0.75, 1.0))
    height, width = (side, short) if rng.random() < 0.5 else (short, side)
    height, width = min(height, limits[2] - limits[0]), min(width, limits[3] - limits[1])
    top = int(rng.integers(limits[0], limits[2] - height + 1))
    left = int(rng.integers(limits[1], limits[3] - width + 1))
    return top, left, top + height, left + width


def _bounding_box(image: np.ndarray) -> Box:
    rows, columns = np.nonzero(image > 0.1)
    return int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1


def _cut(image: np.ndarray, box: Box) -> np.ndarray:
    return image[box[0] : box[2], box[1] : box[3]]


def _informative(pixels: np.ndarray) -> bool:
    """False for a crop of little but background: nobody could answer about it."""
    step = max(1, min(pixels.shape[:2]) // 64)
    sampled = pixels[::step, ::step]
    grey = sampled if sampled.ndim == 2 else sampled.max(axis=2)
    return float(grey.std()) > 0.03 and float(np.mean(grey < 0.03)) < 0.75
