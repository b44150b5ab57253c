"""Which data-parallel rank runs which packs of a step, so that all have the same work.

A step's set of packs is the plan's business; here only its order changes, so the gradient of the
step is the same whatever comes out. Packs have equal token counts but not equal work: attention
grows with the square of each segment, and the vision tower runs per image.
"""

import numpy as np

from megatron_gmai.data.plan.packing import Packs

SWAPS = 128
SHIFTS = (0, 1, -1, 2, -2)  # micro-steps between the packs of a swap
EVEN = 1.002  # most over mean attention of a rank that needs no more swaps
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
    the attention without touching that, those with the largest differences first.
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
    """Swaps packs with equally many images while that makes the ranks' attention more alike: packs
    of one micro-step if any will do, else of neighbouring ones, which hold similar packs."""
    costs, counts = attention[dealt], images[dealt]  # [micro-steps, dp_size, micro batch]
    for _ in range(SWAPS):
        loads = costs.sum(axis=(0, 2))
        if loads.max() <= EVEN * loads.mean():
            return
        for shift in SHIFTS:
            swaps = [
                _best_swap(costs, counts, loads, int(rank), shift)
                for rank in (loads.argmax(), loads.argmin())
            ]
            better, here, there = min(swaps)
            if better < 0:
                break
        else:
            return
        for table in (dealt, costs, counts):
            table[here], table[there] = table[there], table[here]


def _best_swap(
    costs: np.ndarray, counts: np.ndarray, loads: np.ndarray, rank: int, shift: int
) -> tuple[int, Place, Place]:
    """What the best swap of a pack of `rank` for one `shift` micro-steps away changes the sum of
    the ranks' squared loads by (halved), and the places of the two packs."""
    others = np.clip(np.arange(len(costs)) + shift, 0, len(costs) - 1)
    gains = costs[others] - costs[:, rank : rank + 1]
    change = gains * (gains + (loads[rank] - loads)[:, None])
    change[counts[others] != counts[:, rank : rank + 1]] = 0
    step, other, place = map(int, np.unravel_index(int(change.argmin()), change.shape))
    return int(change[step, other, place]), (step, rank, place), (int(others[step]), other, place)
