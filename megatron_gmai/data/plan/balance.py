"""Which data-parallel rank runs which packs of a step, so that all have the same work.

A step's set of packs is the plan's business; here only its order changes, so the gradient of the
step is the same whatever comes out. Packs have equal token counts but not equal work: attention
grows with the square of each segment, and the vision tower runs per image. A step is as slow as
its slowest rank, so both sums are evened out over the ranks (two-constraint balancing as in
Entrain, arXiv 2605.27918).
"""

import numpy as np

from megatron_gmai.data.plan.packing import Packs

EVEN = 1.008  # max/mean of a rank's images or attention that needs no more swaps
REACH = 8  # micro-steps between the packs of a swap, at most
PARTNERS = 8  # ranks that a rank may swap with, from the other end
SWAPS_PER_RANK, SWAPS = 4, 128
IMAGE_WEIGHT = 10.0  # of too many images beside uneven attention: images are few, so coarse
Place = tuple[int, int, int]  # micro-step, rank, place in the micro-batch


def pack_costs(packs: Packs, sample_images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Images and attention cost (sum of squared segment lengths) of each pack, int64 [P] each.

    `sample_images` [samples] is the index's image count.
    """
    sizes = packs.stops - packs.starts
    # Images lie before any cut, so they count where their sample begins.
    images = np.where(packs.starts == 0, sample_images[packs.samples].astype(np.int64), 0)
    return _sum_per_pack(images, packs.bounds), _sum_per_pack(sizes * sizes, packs.bounds)


def _sum_per_pack(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    sums = np.concatenate([[0], np.cumsum(values)])
    return sums[bounds[1:]] - sums[bounds[:-1]]


def assign(
    images: np.ndarray, attention: np.ndarray, dp_size: int, micro_batch_size: int
) -> np.ndarray:
    """Order of a step's packs, int64 [micro-steps, dp_size, micro_batch_size].

    Like packs run at the same time: sorted by images, then by attention, and cut into micro-steps.
    Within a micro-step the heaviest pack goes to the rank that has had the least. The few
    micro-steps with differing image counts are dealt first, by images; the others then even out
    the attention without touching that, those with the largest differences first. Swaps mend what
    is left uneven.
    """
    order = np.lexsort((attention, images))[::-1].reshape(-1, micro_batch_size, dp_size)
    if dp_size == 1:
        return order.reshape(-1, 1, micro_batch_size)
    dealt = np.empty((len(order), dp_size, micro_batch_size), dtype=np.int64)
    had = np.zeros((2, dp_size), dtype=np.int64)  # images and attention of each rank so far
    costs = np.stack([images, attention])
    mixed = np.ptp(images[order], axis=(1, 2)) > 0
    spread = np.ptp(attention[order], axis=(1, 2))
    for step in np.lexsort((-spread, ~mixed)):
        for place, packs in enumerate(order[step]):
            keys = (had[1], had[0]) if mixed[step] else (had[0], had[1])
            ranks = np.lexsort(keys)  # the last key decides first
            dealt[step, ranks, place] = packs
            had[:, ranks] += costs[:, packs]
    _even_out(dealt, images, attention)
    return dealt


def _even_out(dealt: np.ndarray, images: np.ndarray, attention: np.ndarray) -> None:
    """Swaps packs between the most and the least loaded ranks until all are `EVEN`, or no swap of
    the first or last of them helps."""
    # [2, micro-steps, dp_size, micro batch], in units of the ranks' mean
    costs = np.stack([images[dealt], attention[dealt]]).astype(np.float64)
    means = np.maximum(costs.sum(axis=(1, 2, 3)) / dealt.shape[1], 1.0)
    costs /= means[:, None, None, None]
    # Images are whole: no deal keeps all ranks below the mean rounded up.
    most_images = max(EVEN, np.ceil(means[0]) / means[0]) + 1e-9
    loads = costs.sum(axis=(1, 3))
    for _ in range(SWAPS + SWAPS_PER_RANK * dealt.shape[1]):
        crowded = loads[0].max() > most_images
        if not crowded and loads[1].max() <= EVEN:
            return
        light_first = np.argsort(loads[0 if crowded else 1], kind="stable")
        heavy_first = light_first[::-1]
        for partners in (light_first, heavy_first):
            ranks = np.array([partners[-1], *partners[: min(PARTNERS, len(partners) - 1)]])
            swap = _best_swap(costs[:, :, ranks], loads[:, ranks], most_images)
            if swap is not None:
                break
        else:
            return
        here, there = ((step, int(ranks[rank]), place) for step, rank, place in swap)
        gain = costs[(slice(None), *there)] - costs[(slice(None), *here)]
        loads[:, here[1]] += gain
        loads[:, there[1]] -= gain
        for table in (dealt, costs[0], costs[1]):
            table[here], table[there] = table[there], table[here]


def _best_swap(
    costs: np.ndarray, loads: np.ndarray, most_images: float
) -> tuple[Place, Place] | None:
    """The places of a pack of the first rank and of one near it in time whose swap evens the ranks
    most; None if no swap does. Packs of one micro-step are preferred: they are alike."""
    steps = costs.shape[1]
    reach = min(REACH, steps - 1)
    shifts = np.arange(-reach, reach + 1)
    near = np.clip(np.arange(steps)[:, None] + shifts, 0, steps - 1)  # [steps, shifts]
    # [2, steps, own place, shifts, ranks, place]: what the first rank gets more
    gains = costs[:, near, 1:][:, :, None] - costs[:, :, 0, :, None, None, None]
    own, their = loads[:, 0], loads[:, 1:, None]
    change = 2 * gains[1] * (gains[1] + (own[1] - their[1]))  # of the sum of squared attention
    crowd, their_crowd = own[0] - most_images, their[0] - most_images
    if crowd > 0 or gains[0].any():
        change += IMAGE_WEIGHT * (_crowd(crowd + gains[0]) - _crowd(crowd))
        change += IMAGE_WEIGHT * (_crowd(their_crowd - gains[0]) - _crowd(their_crowd))
    change /= (1.0 + np.abs(shifts))[:, None, None]
    best = int(change.argmin())
    if change.flat[best] > -1e-9:
        return None
    step, place, shift, rank, other = map(int, np.unravel_index(best, change.shape))
    return (step, 0, place), (int(near[step, shift]), rank + 1, other)


def _crowd(excess: np.ndarray) -> np.ndarray:
    positive = np.maximum(excess, 0.0)
    return positive * positive
