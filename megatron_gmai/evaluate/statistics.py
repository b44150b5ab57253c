"""Intervals and tests over images: answers about one image are not independent of each other.

Images are drawn, not questions. Many images are alike (same number of questions, same sum of
scores), so what is drawn is how often each kind occurs: the same distribution at a small part of
the cost.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2_000
PERMUTATIONS = 10_000
_AT_ONCE = 1_000  # permutations drawn together: bounds the memory where all sums differ
SEED = 0
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Paired:
    """Two models on the same questions: mean of B minus mean of A."""

    difference: float
    interval: Interval
    p_value: float
    images: int


def bootstrap(scores: Sequence[float], images: Sequence[str]) -> Interval:
    """The 95 % percentile interval of the mean score, images being drawn with replacement."""
    sums, counts = _by_image(scores, images)
    means = _resampled_means(sums, counts)
    return _interval(means)


def paired_test(first: Sequence[float], second: Sequence[float], images: Sequence[str]) -> Paired:
    """A permutation test: under the null hypothesis the models may be exchanged for any image.

    The p-value is two-sided, with the observed case counted as one of the permutations, so it is
    never 0.
    """
    difference = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    sums, counts = _by_image(difference, images)
    sizes, occurrences = np.unique(np.abs(sums).round(9), return_counts=True)
    rng = np.random.default_rng(SEED)
    as_far = 0
    for _ in range(PERMUTATIONS // _AT_ONCE):
        swapped = rng.binomial(occurrences, 0.5, size=(_AT_ONCE, len(sizes)))
        drawn = (occurrences - 2 * swapped) @ sizes
        as_far += int(np.count_nonzero(np.abs(drawn) >= abs(sums.sum()) - 1e-6))
    return Paired(
        difference=float(difference.mean()),
        interval=_interval(_resampled_means(sums, counts)),
        p_value=(as_far + 1) / (PERMUTATIONS + 1),
        images=len(sums),
    )


def _by_image(
    scores: Sequence[float] | np.ndarray, images: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of scores and number of questions of each image."""
    _, groups = np.unique(np.asarray(images), return_inverse=True)
    counts = np.bincount(groups)
    return np.bincount(groups, weights=np.asarray(scores, dtype=np.float64)), counts


def _resampled_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    pairs = np.stack([sums.round(9), counts], axis=1)
    kinds, occurrences = np.unique(pairs, axis=0, return_counts=True)
    images = len(sums)
    rng = np.random.default_rng(SEED)
    drawn = rng.multinomial(images, occurrences / images, size=RESAMPLES)
    return (drawn @ kinds[:, 0]) / (drawn @ kinds[:, 1])


def _interval(values: np.ndarray) -> Interval:
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Interval(float(low), float(high))
