"""Slices of NIfTI volumes as pictures (optional: `pip install megatron-gmai[nifti]`).

A volume has no picture of its own, so the list file, or a record, states a rule:

    AXIS            the middle slice; AXIS is axial, coronal or sagittal
    AXIS:N          N slices, evenly spaced: the middles of N equal parts of the volume
    AXIS:all        every slice
    AXIS:@K         slice K alone, counted from 0 at the inferior, posterior or left end

Slices lie as radiologists view them: the patient's right is at the left of axial and coronal ones,
anterior is at the top of axial and at the left of sagittal ones, superior at the top of the others.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from megatron_gmai.data.images.formats import needs, unpacked
from megatron_gmai.data.images.sizes import check_size
from megatron_gmai.data.images.window import window_to_8_bits
from megatron_gmai.data.ledger import BadSample

AXES = {"sagittal": 0, "coronal": 1, "axial": 2}  # of a volume whose axes run to R, A and S
MAX_SLICES = 256
# To which thick slices are stretched, unless more is stored; the vision tower sees 336 x 336.
MAX_STRETCHED_SIDE = 2048
RULE = re.compile(r"(axial|coronal|sagittal)(?::(all|@?\d{1,5}))?")
EXAMPLE = '"nifti_slices": "axial", "axial:3", "coronal:all" or "sagittal:@57"'


def parse_rule(rule: Any) -> tuple[str, str | None]:
    """Axis and choice. Raises ValueError for a rule that is none."""
    match = RULE.fullmatch(rule) if isinstance(rule, str) else None
    if match is None or match[2] == "0":
        raise ValueError(f"nifti_slices {rule!r} is no rule; write {EXAMPLE}")
    return match[1], match[2]


def slices(data: bytes, rule: Any) -> Iterator[np.ndarray]:
    """uint8 [h, w] of each slice that the rule takes, with square pixels.

    Each is windowed as a file of its own, by the range that the header names for display, else by
    percentiles. Raises BadSample for rules and volumes that cannot be used.
    """
    if rule is None:
        raise BadSample(f"a volume: say which slices are its images, as by {EXAMPLE}")
    try:
        axis, choice = parse_rule(rule)
    except ValueError as error:
        raise BadSample(str(error)) from error
    volume = _volume(unpacked(data))
    header = volume.header
    low, high = float(header["cal_min"]), float(header["cal_max"])
    window = (low, high) if np.isfinite([low, high]).all() and low < high else None
    stored = _stored_axes(volume)
    count = volume.shape[stored[AXES[axis]][0]]
    spacings = [float(header.get_zooms()[along]) for along, _ in stored]
    across, down = (spacings[world] for world in range(3) if world != AXES[axis])
    for number in _chosen(count, choice):
        levels = window_to_8_bits(_plane(volume, stored, AXES[axis], number), window)
        # Columns run to the patient's left or back, rows to the feet or back: see above.
        yield _square(levels[::-1, ::-1].T, across, down)


def _stored_axes(volume: Any) -> list[tuple[int, bool]]:
    """For R, A and S: the axis of the stored array that runs along it, and whether backwards."""
    from nibabel.orientations import io_orientation

    turns = io_orientation(volume.affine)
    if not np.isfinite(turns).all():
        raise BadSample("a NIfTI file whose axes lie nowhere")
    found = {int(world): (axis, sign < 0) for axis, (world, sign) in enumerate(turns)}
    return [found[world] for world in range(3)]


def _plane(
    volume: Any, stored: Sequence[tuple[int, bool]], dimension: int, number: int
) -> np.ndarray:
    """[h, w] along the other two of R, A, S in this order. Only these values are read."""
    along, backwards = stored[dimension]
    cut: list[Any] = [slice(None)] * 3
    cut[along] = volume.shape[along] - 1 - number if backwards else number
    values = np.asarray(volume.dataobj[tuple(cut)])
    values = values.reshape(np.delete(volume.shape[:3], along))
    (first, flip_first), (second, flip_second) = (
        axis for world, axis in enumerate(stored) if world != dimension
    )
    values = values if first < second else values.T
    return values[:: -1 if flip_first else 1, :: -1 if flip_second else 1]


def _volume(data: bytes) -> Any:
    """A volume of three dimensions and plain numbers."""
    try:
        import nibabel
    except ImportError as error:
        raise needs("NIfTI", "nibabel", "nifti") from error
    image = nibabel.Nifti2Image if data[4:7] == b"n+2" else nibabel.Nifti1Image
    volume = image.from_bytes(data)
    shape = volume.shape
    if len(shape) < 3 or any(size != 1 for size in shape[3:]):
        raise BadSample(f"a NIfTI file of shape {' x '.join(map(str, shape))}, not one volume")
    if volume.get_data_dtype().kind not in "iuf":
        raise BadSample(f"a NIfTI file of {volume.get_data_dtype()} values")
    for width, height in ((shape[0], shape[1]), (shape[0], shape[2]), (shape[1], shape[2])):
        check_size(width, height, 17)  # float64, a copy in rows, levels
    return volume


def _chosen(count: int, choice: str | None) -> list[int]:
    if choice is not None and choice.startswith("@"):
        if int(choice[1:]) >= count:
            raise BadSample(f"slice {choice[1:]} of a volume of {count}")
        return [int(choice[1:])]
    wanted = count if choice == "all" else int(choice or 1)
    if wanted > min(count, MAX_SLICES):
        raise BadSample(f"{wanted} slices of a volume of {count}; at most {MAX_SLICES} are taken")
    return [(2 * part + 1) * count // (2 * wanted) for part in range(wanted)]


def _square(levels: np.ndarray, across: float, down: float) -> np.ndarray:
    """Resized so that a pixel is as high as wide; thick slices would look squashed otherwise."""
    usable = min(across, down) > 0 and np.isfinite([across, down]).all()
    if not usable or across == down or not 0.05 < across / down < 20:
        return levels
    height, width = levels.shape
    longest = max(MAX_STRETCHED_SIDE, width, height)
    finest = max(min(across, down), width * across / longest, height * down / longest)
    size = (max(1, round(width * across / finest)), max(1, round(height * down / finest)))
    check_size(*size)
    return np.asarray(Image.fromarray(levels).resize(size, Image.Resampling.BICUBIC))
