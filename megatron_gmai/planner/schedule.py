"""Megatron's pipeline schedules: the order of a stage's work, and when all of it is done.

Chunks are counted in the order of the model; stage p of PP holds chunks p, p + PP, ...
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One chunk's forward or backward pass of one micro-batch."""

    forward: bool
    chunk: int
    micro_batch: int


class Interval(NamedTuple):
    """When a stage runs a pass."""

    stage: int
    work: Pass
    begin: float
    end: float


def order(stage: int, stages: int, virtual: int, count: int) -> list[Pass]:
    """What a stage runs for `count` micro-batches: warm-up, one forward one backward, cool-down.

    1F1B (arXiv 2006.09503), or interleaved with `virtual` chunks a stage (arXiv 2104.04473), where
    micro-batches go through a chunk in groups of PP.
    """
    total = count * virtual
    forwards = [_nth(True, k, stage, stages, virtual) for k in range(total)]
    backwards = [_nth(False, k, stage, stages, virtual) for k in range(total)]
    ahead = stages - stage - 1
    warmup = min(total, ahead if virtual == 1 else 2 * ahead + (virtual - 1) * stages)
    steady = [
        work
        for pair in zip(forwards[warmup:], backwards[: total - warmup], strict=True)
        for work in pair
    ]
    return forwards[:warmup] + steady + backwards[total - warmup :]


def _nth(forward: bool, k: int, stage: int, stages: int, virtual: int) -> Pass:
    """The k-th forward (backward) pass of a stage."""
    group, within = divmod(k, stages * virtual)
    index, offset = divmod(within, stages)
    if not forward:
        index = virtual - 1 - index
    return Pass(forward, index * stages + stage, group * stages + offset)


@dataclass(frozen=True)
class Timeline:
    """A simulated step of the pipeline."""

    intervals: list[Interval]
    stages: int

    @property
    def seconds(self) -> float:
        return max(interval.end for interval in self.intervals)

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        busy = sum(interval.end - interval.begin for interval in self.intervals)
        return 1 - busy / (self.stages * self.seconds)

    def last_end(self, stage: int) -> float:
        return max(x.end for x in self.intervals if x.stage == stage)


def simulate(
    stages: int,
    virtual: int,
    count: int,
    forward: Sequence[float],
    backward: Sequence[float],
    transfer: float = 0.0,
    orders: Callable[[int, int, int, int], list[Pass]] = order,
) -> Timeline:
    """Run the schedule with the seconds of each chunk's passes and of a transfer between stages."""
    queues = [orders(stage, stages, virtual, count) for stage in range(stages)]
    last = stages * virtual - 1
    done: dict[Pass, float] = {}
    now, next_up = [0.0] * stages, [0] * stages
    intervals: list[Interval] = []
    while len(intervals) < sum(map(len, queues)):
        before = len(intervals)
        for stage, queue in enumerate(queues):
            while next_up[stage] < len(queue):
                work = queue[next_up[stage]]
                needed = _needed(work, last)
                if needed is not None and needed not in done:
                    break
                arrives = 0.0 if needed is None else done[needed]
                if needed is not None and needed.chunk != work.chunk:
                    arrives += transfer
                begin = max(now[stage], arrives)
                seconds = (forward if work.forward else backward)[work.chunk]
                done[work] = now[stage] = begin + seconds
                intervals.append(Interval(stage, work, begin, now[stage]))
                next_up[stage] += 1
        assert len(intervals) > before, "the schedule waits for itself"
    return Timeline(intervals, stages)


def _needed(work: Pass, last: int) -> Pass | None:
    """The pass whose result this one takes."""
    if work.forward:
        return None if work.chunk == 0 else Pass(True, work.chunk - 1, work.micro_batch)
    if work.chunk == last:
        return Pass(True, last, work.micro_batch)
    return Pass(False, work.chunk + 1, work.micro_batch)
