"""Where a step's time goes, by stage, and who holds the others up."""

import time
from collections.abc import Iterator

import pytest

from megatron_gmai.training.timing import RankTimes, StepTimers, by_stage, stragglers

EVEN = [RankTimes(rank // 4, 0.01, 1.0, 0.2, 0.1) for rank in range(8)]


def test_parts_are_told_apart() -> None:
    timers = StepTimers(is_cuda=False)
    for _ in range(2):  # of two steps the second one counts
        timers.begin()
        timers("forward-compute", log_level=2).start()
        assert list(timers.over(iter_slowly(3))) == [0, 1, 2]
        time.sleep(0.02)
        timers("forward-compute").stop()
        timers("forward-recv").start(barrier=True)
        time.sleep(0.03)
        timers("forward-recv").stop()
    times = timers.times(stage=1)
    assert times.stage == 1
    assert times.data == pytest.approx(0.03, rel=0.5)
    assert times.compute == pytest.approx(0.02, rel=0.5)
    assert times.pipeline == pytest.approx(0.03, rel=0.5)
    assert times.reduce == 0


def iter_slowly(count: int) -> Iterator[int]:
    for number in range(count):
        time.sleep(0.01)
        yield number


def test_a_stage_is_the_median_of_its_ranks() -> None:
    times = [*EVEN[:7], RankTimes(1, 0.5, 9.0, 0.2, 0.1)]
    first, second = by_stage(times)
    assert (first["stage"], second["stage"]) == (0, 1)
    assert second["compute"] == 1.0 and second["data"] == 0.5


def test_a_straggler_is_named_within_its_stage() -> None:
    assert stragglers(EVEN) == []
    slow_stage = [RankTimes(0, 0, 1, 0, 0)] * 4 + [RankTimes(1, 0, 2, 0, 0)] * 4
    assert stragglers(slow_stage) == []
    times = [*EVEN]
    times[2] = RankTimes(0, 0.01, 1.4, 0, 0)
    times[5] = RankTimes(1, 0.50, 1.0, 0, 0)  # waits for its data
    assert stragglers(times) == [2, 5]
    assert stragglers([RankTimes(0, 0, 0.01, 0, 0), RankTimes(0, 0, 0.04, 0, 0)]) == []
    assert stragglers([RankTimes(0, 0, 1.0, 0, 0), RankTimes(0, 0, 1.5, 0, 0)]) == [1]
