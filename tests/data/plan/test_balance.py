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


@pytest.mark.parametrize(("dp", "micro"), [(1, 1), (1, 4), (8, 1), (8, 4), (16, 2), (512, 1)])
def test_every_pack_of_the_step_is_dealt_once(steps: list, dp: int, micro: int) -> None:
    images, attention = steps[0]
    order = assign(images, attention, dp, micro)
    assert order.shape == (STEP // (dp * micro), dp, micro)
    assert sorted(order.ravel()) == list(range(STEP))


def most_over_mean(cost: np.ndarray, order: np.ndarray) -> float:
    loads = cost[order].sum(axis=(0, 2))
    return float(loads.max() / loads.mean())


def test_eight_ranks_have_the_same_work_over_a_step(steps: list) -> None:
    for images, attention in steps:
        order = assign(images, attention, 8, 1)
        assert most_over_mean(images, order) <= 1.01 and most_over_mean(attention, order) <= 1.01


@pytest.mark.parametrize("micro", [1, 2])
def test_sixty_four_ranks_have_the_same_work_over_a_step(steps: list, micro: int) -> None:
    for (images, attention), more in zip(steps[:4:2], steps[1:4:2], strict=True):
        images = np.concatenate([images, more[0]])
        attention = np.concatenate([attention, more[1]])
        order = assign(images, attention, 64, micro)
        assert most_over_mean(images, order) <= 1.03 and most_over_mean(attention, order) <= 1.03


def test_few_packs_a_rank_get_images_as_even_as_whole_ones_can_be(steps: list) -> None:
    for images, attention in steps[:3]:
        order = assign(images, attention, 64, 1)
        assert images[order].sum(axis=(0, 2)).max() == -(-images.sum() // 64)
        assert most_over_mean(attention, order) <= 1.03


@pytest.mark.parametrize("seed", range(20))
def test_any_costs_are_dealt_whole_and_no_worse_than_in_the_order_of_the_plan(seed: int) -> None:
    draw = np.random.default_rng(seed)
    dp, micro, count = (
        int(draw.choice([2, 3, 8])),
        int(draw.choice([1, 2])),
        int(draw.integers(1, 9)),
    )
    packs = dp * micro * count
    images = draw.integers(0, draw.integers(1, 20), packs)
    attention = draw.integers(0, 10 ** int(draw.integers(1, 8)), packs)
    order = assign(images, attention, dp, micro)
    assert sorted(order.ravel()) == list(range(packs))
    assert (order == assign(images, attention, dp, micro)).all()
    given = np.arange(packs).reshape(count, dp, micro)
    squares = [(attention[o].sum(axis=(0, 2)).astype(float) ** 2).sum() for o in (order, given)]
    assert squares[0] <= squares[1] * 1.25
    most = [images[o].sum(axis=(0, 2)).max() for o in (order, given)]
    assert most[0] <= max(most[1], -(-images.sum() // dp))


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
