"""Packing methods: nothing lost, nothing over the limit, no image cut."""

from collections.abc import Callable

import numpy as np
import pytest

from megatron_gmai.data.plan.packing import (
    ImageCap,
    Packs,
    pack_best_fit,
    pack_hard,
    pack_none,
    pack_soft,
)

LIMIT = 100
METHODS = {
    "soft": lambda lengths: pack_soft(lengths, LIMIT),
    "best-fit": lambda lengths: pack_best_fit(lengths, LIMIT),
    "none": pack_none,
    "hard": lambda lengths: pack_hard(lengths, np.zeros_like(lengths), LIMIT),
}


def random_lengths(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, LIMIT + 1, count).astype(np.int32)


def sizes(packs: Packs) -> list[int]:
    tokens = np.concatenate([[0], np.cumsum(packs.stops - packs.starts)])
    return np.diff(tokens[packs.bounds]).tolist()


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("count", [0, 1, 2, 50, 999])
def test_every_token_is_in_one_pack_and_no_pack_is_too_long(
    method: Callable[[np.ndarray], Packs], count: int
) -> None:
    lengths = random_lengths(count, seed=count)
    packs = method(lengths)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for sample, start, stop in zip(packs.samples, packs.starts, packs.stops, strict=True):
        seen[sample][start:stop] += 1
    assert all((tokens == 1).all() for tokens in seen)
    assert all(0 < size <= LIMIT for size in sizes(packs))


def test_soft_keeps_the_order_and_closes_a_pack_at_the_first_misfit() -> None:
    packs = pack_soft(np.array([60, 40, 1, 99, 2, 50]), LIMIT)
    assert packs.samples.tolist() == [0, 1, 2, 3, 4, 5]
    assert packs.bounds.tolist() == [0, 2, 4, 6]


def test_best_fit_chooses_the_tightest_room() -> None:
    packs = pack_best_fit(np.array([70, 80, 20, 30]), LIMIT)
    groups = [
        set(packs.samples[a:b].tolist())
        for a, b in zip(packs.bounds[:-1], packs.bounds[1:], strict=True)
    ]
    assert sorted(map(sorted, groups)) == [[0, 3], [1, 2]]


def test_best_fit_leaves_almost_nothing_free_where_soft_leaves_a_fifth() -> None:
    lengths = random_lengths(5000, seed=1)
    fill = {name: lengths.sum() / (LIMIT * len(METHODS[name](lengths))) for name in METHODS}
    assert fill["best-fit"] > 0.99 > fill["soft"] > fill["none"]
    assert fill["hard"] > 0.999


def test_hard_fills_every_pack_but_the_last() -> None:
    packs = METHODS["hard"](random_lengths(300, seed=2))
    assert set(sizes(packs)[:-1]) == {LIMIT}


def test_hard_never_cuts_before_the_end_of_the_last_image() -> None:
    lengths = random_lengths(500, seed=3) + 60
    images_end = np.random.default_rng(4).integers(0, 60, 500)
    packs = pack_hard(lengths, images_end, LIMIT)
    first = packs.starts == 0
    assert (packs.stops[first] >= images_end[packs.samples[first]]).all()
    assert max(sizes(packs)) <= LIMIT


def test_reordering_moves_whole_packs() -> None:
    packs = pack_soft(np.array([60, 40, 1, 99, 2, 50]), LIMIT).reordered(np.array([2, 0, 1]))
    assert packs.samples.tolist() == [4, 5, 0, 1, 2, 3]
    assert packs.bounds.tolist() == [0, 2, 4, 6]


class TestImageCap:
    MOST = 3
    CAPPED = {
        "soft": lambda lengths, cap: pack_soft(lengths, LIMIT, cap),
        "best-fit": lambda lengths, cap: pack_best_fit(lengths, LIMIT, cap),
        "hard": lambda lengths, cap: pack_hard(lengths, np.zeros_like(lengths), LIMIT, cap),
    }

    @pytest.mark.parametrize("method", CAPPED.values(), ids=CAPPED)
    def test_no_pack_has_more_images_and_no_sample_is_lost(self, method: Callable) -> None:
        lengths = random_lengths(700, seed=5) // 8 + 1
        images = np.random.default_rng(6).integers(0, self.MOST + 1, 700)
        packs = method(lengths, ImageCap(images, self.MOST))
        first = np.where(packs.starts == 0, images[packs.samples], 0)
        per_pack = np.add.reduceat(first, packs.bounds[:-1])
        assert per_pack.max() == self.MOST and per_pack.sum() == images.sum()
        assert (packs.stops - packs.starts).sum() == lengths.sum()
        assert sorted(packs.samples[packs.starts == 0]) == list(range(700))
        assert max(sizes(packs)) <= LIMIT

    @pytest.mark.parametrize("method", CAPPED.values(), ids=CAPPED)
    def test_a_limit_that_is_never_reached_changes_nothing(self, method: Callable) -> None:
        lengths = random_lengths(300, seed=7)
        free, capped = method(lengths, None), method(lengths, ImageCap(np.ones(300, int), 100))
        assert sizes(free) == sizes(capped)

    def test_best_fit_puts_text_beside_the_images(self) -> None:
        lengths, images = np.full(40, LIMIT // 4), np.repeat([1, 0], 20)
        assert len(pack_best_fit(lengths, LIMIT, ImageCap(images, 2))) == 10
