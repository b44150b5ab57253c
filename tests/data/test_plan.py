"""The plan: a pure function of seed, epoch, index and settings; every sample as often as it should.

Lengths here encode nothing but themselves: the plan never looks at samples.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_gmai.data.lengths import LENGTH_ROW
from megatron_gmai.data.order import permutation, random_words
from megatron_gmai.data.packing import Piece
from megatron_gmai.data.plan import Plan, PlanSettings

SHARD_SIZES = [40, 40, 13, 40, 40, 40, 7]
SHARD_SOURCES = [0, 0, 0, 1, 1, 1, 1]
SAMPLES = sum(SHARD_SIZES)
LIMIT = 64


def make_plan(
    ratios: tuple[float, float] = (1.0, 1.0),
    unusable: int = 0,
    cache: Path | None = None,
    **settings,
) -> Plan:
    lengths = np.zeros(SAMPLES, dtype=LENGTH_ROW)
    lengths["length"] = np.random.default_rng(0).integers(1, LIMIT + 1, SAMPLES)
    lengths["length"][:unusable] = 0
    settings = {"seed": 1, "max_length": LIMIT, "pack_level": "soft", "window": 60, **settings}
    first_rows = np.concatenate([[0], np.cumsum(SHARD_SIZES)])
    return Plan(lengths, first_rows, SHARD_SOURCES, ratios, PlanSettings(**settings), cache)


def epoch_samples(plan: Plan, epoch: int) -> list[int]:
    first = sum(plan.total(before) for before in range(epoch))
    packs = plan.packs(first, first + plan.total(epoch))
    assert len(packs) == plan.total(epoch)
    return packs.samples[packs.starts == 0].tolist()


def all_packs(plan: Plan, start: int, stop: int) -> list[list[Piece]]:
    packs = plan.packs(start, stop)
    return [packs.pieces(number) for number in range(len(packs))]


@pytest.mark.parametrize("level", ["soft", "hard", "none", "best-fit"])
@pytest.mark.parametrize("by_length", [False, True])
def test_each_epoch_holds_each_sample_once(level: str, by_length: bool) -> None:
    plan = make_plan(pack_level=level, group_by_length=by_length, run=4)
    for epoch in range(3):
        assert sorted(epoch_samples(plan, epoch)) == list(range(SAMPLES))


def test_epochs_and_seeds_differ_and_the_same_ones_agree() -> None:
    plan = make_plan()
    first, second = epoch_samples(plan, 0), epoch_samples(plan, 1)
    assert first != second
    assert epoch_samples(make_plan(), 1) == second
    assert epoch_samples(make_plan(seed=2), 0) != first


def test_a_pack_does_not_depend_on_what_was_asked_before() -> None:
    plan, fresh = make_plan(), make_plan()
    packs = all_packs(plan, 0, plan.total(0) + plan.total(1))
    for start in np.random.default_rng(0).permutation(len(packs)):
        assert all_packs(fresh, start, start + 7) == all_packs(plan, start, start + 7)
        assert all_packs(fresh, start, start + 1) == [packs[start]]


def test_counts_are_kept_for_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(window=10, cache=tmp_path / "plan")
    expected = plan.counts(2)
    again = make_plan(window=10, cache=tmp_path / "plan")
    monkeypatch.setattr(again, "_count", lambda epoch: pytest.fail("planned again"))
    assert again.counts(2).tolist() == expected.tolist()
    (tmp_path / "plan-epoch2.npy").unlink()
    assert make_plan(window=10, cache=tmp_path / "gone" / "plan").total(2) == plan.total(2)


def test_unusable_samples_are_never_planned() -> None:
    assert sorted(epoch_samples(make_plan(unusable=5), 0)) == list(range(5, SAMPLES))


class TestRatios:
    def counts(self, ratio: float, epoch: int = 0) -> Counter[int]:
        plan = make_plan(ratios=(1.0, ratio))
        return Counter(s for s in epoch_samples(plan, epoch) if s >= sum(SHARD_SIZES[:3]))

    @pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 0.75])
    def test_below_one_takes_a_part_of_each_at_most_once(self, ratio: float) -> None:
        counts = self.counts(ratio)
        assert sum(counts.values()) == round(ratio * 127)
        assert set(counts.values()) == {1}

    def test_below_one_takes_a_different_part_each_epoch(self) -> None:
        parts = [set(self.counts(0.3, epoch)) for epoch in range(3)]
        assert parts[0] != parts[1] != parts[2]
        assert set(self.counts(0.3, 1)) == parts[1]

    def test_above_one_repeats_all_and_then_takes_a_part(self) -> None:
        counts = self.counts(2.5)
        assert sum(counts.values()) == 2 * 127 + 64
        assert Counter(counts.values()) == {2: 63, 3: 64}

    def test_zero_leaves_a_data_set_out(self) -> None:
        assert not self.counts(0.0)

    def test_over_many_epochs_no_sample_is_preferred(self) -> None:
        plan = make_plan(ratios=(0.0, 0.5))
        counts = Counter(s for epoch in range(40) for s in epoch_samples(plan, epoch))
        assert len(counts) == 127
        assert min(counts.values()) >= 8 and max(counts.values()) <= 32


def test_every_window_has_the_mixture_of_the_whole() -> None:
    plan = make_plan(ratios=(1.0, 1.0), window=40, pack_level="none")
    first = 0
    for window, packs in enumerate(plan.counts(0)):
        samples = plan.packs(first, first + packs).samples
        share = np.mean(samples < 93)
        assert abs(share - 93 / 220) < 0.05, window
        first += packs


def test_group_by_length_puts_like_lengths_into_a_step() -> None:
    def spread(by_length: bool) -> float:
        plan = make_plan(pack_level="none", group_by_length=by_length, run=10, window=1000)
        steps = plan.packs(0, SAMPLES).stops.reshape(-1, 10)
        return float(np.ptp(steps, axis=1).mean())

    assert spread(True) < 0.25 * spread(False)


def test_the_order_is_fixed_for_ever() -> None:
    """A change here breaks the resumption of every run: these numbers come from Philox alone."""
    assert permutation(8, 1, 2, 3).tolist() == [5, 0, 1, 2, 7, 6, 4, 3]
    assert random_words(1, 0).tolist() == [213000021201967259]


def test_permutations_of_neighbouring_places_are_unrelated() -> None:
    orders = {tuple(permutation(20, *place)) for place in np.ndindex(3, 3, 3, 3)}
    assert len(orders) == 81
