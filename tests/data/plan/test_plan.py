"""The plan: a pure function of seed, epoch, index and settings; every sample as often as it should.

Lengths here encode nothing but themselves: the plan never looks at samples.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_gmai.data.plan.order import permutation, random_words
from megatron_gmai.data.plan.packing import Packs, Piece
from megatron_gmai.data.plan.plan import Plan
from megatron_gmai.data.plan.windows import PlanSettings, Windows
from megatron_gmai.data.shards.lengths import LENGTH_ROW

SHARD_SIZES = [40, 40, 13, 40, 40, 40, 7]
SHARD_SOURCES = [0, 0, 0, 1, 1, 1, 1]
SAMPLES = sum(SHARD_SIZES)
LIMIT = 64


class RecordedWindows(Windows):
    """Keeps what was planned, as planning is what takes the time."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.planned: list[tuple[int, int]] = []

    def plan(self, epoch: int, window: int) -> Packs:
        self.planned.append((epoch, window))
        return super().plan(epoch, window)


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
    windows = RecordedWindows(lengths, first_rows, SHARD_SOURCES, ratios, PlanSettings(**settings))
    return Plan(windows, cache)


def planned(plan: Plan) -> list[tuple[int, int]]:
    """The windows, (epoch, window), that have been planned so far."""
    assert isinstance(plan.windows, RecordedWindows)
    return plan.windows.planned


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


def test_counts_are_kept_for_the_next_start(tmp_path: Path) -> None:
    plan = make_plan(window=10, cache=tmp_path / "plan")
    expected = plan.counts(2)
    again = make_plan(window=10, cache=tmp_path / "plan")
    assert again.counts(2).tolist() == expected.tolist()
    assert not planned(again)
    (tmp_path / "plan-epoch2.npy").unlink()
    assert make_plan(window=10, cache=tmp_path / "gone" / "plan").total(2) == plan.total(2)


class TestBookmark:
    """Where nobody has left counts, the windows before the bookmark are not planned."""

    @pytest.mark.parametrize("done", [0, 37, 300, 301, 555])
    def test_leads_to_the_same_packs_and_plans_only_their_windows(self, done: int) -> None:
        plan = make_plan(window=10)
        expected = all_packs(plan, done, done + 9)
        bookmark = plan.bookmark(done, "plan")
        resumed = make_plan(window=10)
        resumed.open_at(bookmark)
        assert all_packs(resumed, done, done + 9) == expected
        assert planned(resumed)[0] == (bookmark.epoch, bookmark.window)
        assert len(planned(resumed)) <= 4

    def test_of_a_run_of_some_epochs_holds_its_length(self) -> None:
        plan = make_plan(window=10)
        totals = [plan.total(epoch) for epoch in range(4)]
        resumed = make_plan(window=10)
        resumed.open_at(plan.bookmark(400, "plan"))
        assert [resumed.total(epoch) for epoch in range(4)] == totals
        assert not planned(resumed)

    def test_of_a_resumed_run_is_that_of_the_whole_run(self) -> None:
        whole, resumed = make_plan(window=10), make_plan(window=10)
        resumed.open_at(whole.bookmark(200, "plan"))
        for plan in (whole, resumed):
            plan.packs(200, 700)
        assert resumed.bookmark(650, "plan") == whole.bookmark(650, "plan")

    def test_keeps_what_lies_before_it_within_reach(self) -> None:
        plan, resumed = make_plan(window=10), make_plan(window=10)
        resumed.open_at(plan.bookmark(600, "plan"))
        for start in (600, 10, 590, 300, 0, 900):
            assert all_packs(resumed, start, start + 30) == all_packs(plan, start, start + 30)

    def test_is_at_hand_for_packs_that_have_just_been_left(self) -> None:
        plan = make_plan(window=10)
        plan.packs(0, 500)  # as workers do that are ahead of the training
        before = len(planned(plan))
        plan.bookmark(450, "plan")
        assert len(planned(plan)) <= before + 1


def test_a_stream_without_packs_is_empty() -> None:
    plan = make_plan(unusable=SAMPLES)
    assert plan.total(0) == plan.total(3) == 0
    for start in (0, 5):
        for stream in (plan, make_plan(unusable=SAMPLES)):
            assert len(stream.packs(start, start + 10)) == 0


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
