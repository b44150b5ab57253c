"""Augmentation that no label depends on: brightness and contrast, a tenth up or down.

Nothing is flipped, turned, cut or moved, because answers name sides, places and counts. The change
is a pure function of the run's seed, the pack's number in the stream and the sample, so it differs
from epoch to epoch and is the same in any layout and after any interruption.
"""

from typing import NamedTuple

import numpy as np

from megatron_gmai.data.plan.order import random_words

STRENGTH = 0.1
TONE = 5  # what these random words are for; the plan's permutations use the numbers below


class Tone(NamedTuple):
    """Grey levels become `(level - 128) * contrast + 128 + shift`."""

    contrast: float
    shift: float

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        """uint8 of any shape to the same shape."""
        levels = (np.arange(256) - 128) * self.contrast + 128 + self.shift
        return np.rint(levels).clip(0, 255).astype(np.uint8)[pixels]


def choose_tone(seed: int, pack: int, sample: int) -> Tone:
    """The tone of one sample's images in one pack."""
    words = random_words(2, seed, 0, TONE, pack, sample)
    contrast, shift = (words / 2.0**63 - 1) * STRENGTH
    return Tone(1 + float(contrast), 128 * float(shift))
