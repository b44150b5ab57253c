"""Where a step's time goes, by stage, and who holds the others up."""

from collections.abc import Iterator

import pytest

from megatron_gmai.training import timing
from megatron_gmai.training.timing import RankTimes, StepTimers, by_stage, stragglers

EVEN = [RankTimes(rank // 4, 0.01, 1.0, 0.2, 0.1) for rank in range(8)]


class Clock:
    """Stands in for the module `time`: goes on when it is told to."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_parts_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    timers = StepTimers(is_cuda=False)
    for _ in range(2):  # of two steps the second one counts
        timers.begin()
        timers("forward-compute", log_level=2).start()
        assert list(timers.over(iter_slowly(3, clock))) == [0, 1, 2]
        clock.sleep(0.02)
        timers("forward-compute").stop()
        timers("forward-recv").start(barrier=True)
        clock.sleep(0.03)
        timers("forward-recv").stop()
    times = timers.times(stage=1)
    assert times.stage == 1
    assert times.data == pytest.approx(0.03)
    assert times.compute == pytest.approx(0.02)
    assert times.pipeline == pytest.approx(0.03)
    assert times.reduce == 0


def iter_slowly(count: int, clock: Clock) -> Iterator[int]:
    for number in range(count):
        clock.sleep(0.01)
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
