"""The work of a step, dealt to data-parallel ranks: the same packs, as evenly as they allow."""

import numpy as np
import pytest

from megatron_gmai.data.plan.balance import assign, pack_costs
from megatron_gmai.data.plan.packing import Packs, pack_best_fit

STEP, LIMIT = 512, 2048


def mixture_of_lengths(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three quarters with an image (576 tokens and text), a quarter text alone: lengths, images."""
    generator = np.random.default_rng(seed)
    images = (generator.random(count) < 0.75).astype(int)
    mean = np.where(images == 1, 150.0, 300.0)
    text = np.exp(generator.normal(np.log(mean) - 0.18, 0.6))
    return (576 * images + text).astype(int).clip(8, LIMIT), images


@pytest.fixture(scope="module")
def steps() -> list[tuple[np.ndarray, np.ndarray]]:
    """Images and attention cost of the packs of a few steps."""
    lengths, images = mixture_of_lengths(32_768, seed=0)
    packs: Packs = pack_best_fit(lengths, LIMIT)
    packs = packs.reordered(np.random.default_rng(1).permutation(len(packs)))
    starts = range(0, len(packs) - STEP, STEP)
    return [pack_costs(packs.part(start, start + STEP), images) for start in starts]


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (8, 1), (8, 4), (16, 2)])
def test_every_pack_of_the_step_is_dealt_once(steps: list, dp: int, micro: int) -> None:
    images, attention = steps[0]
    order = assign(images, attention, dp, micro)
    assert order.shape == (STEP // (dp * micro), dp, micro)
    assert sorted(order.ravel()) == list(range(STEP))


def test_eight_ranks_have_the_same_work_over_a_step(steps: list) -> None:
    excess: dict[str, list[float]] = {"images": [], "attention": []}
    for images, attention in steps:
        order = assign(images, attention, 8, 1)
        for name, cost in zip(excess, (images, attention), strict=True):
            loads = cost[order].sum(axis=(0, 2))
            excess[name].append(loads.max() / loads.mean())
    assert max(excess["images"]) <= 1.01 and max(excess["attention"]) <= 1.01


def test_the_packs_that_run_at_one_time_are_alike(steps: list) -> None:
    for images, attention in steps:
        order = assign(images, attention, 8, 1)
        for cost in (images, attention):
            loads = cost[order].sum(axis=2)
            assert np.mean(loads.max(axis=1) / np.maximum(loads.mean(axis=1), 1e-9)) <= 1.10


def test_costs_count_images_once_and_segments_squared() -> None:
    packs = Packs(
        samples=np.array([0, 1, 1]),
        starts=np.array([0, 0, 30]),
        stops=np.array([10, 30, 50]),
        bounds=np.array([0, 2, 3, 3]),
    )
    images, attention = pack_costs(packs, np.array([1, 2]))
    assert images.tolist() == [3, 0, 0]
    assert attention.tolist() == [1000, 400, 0]
