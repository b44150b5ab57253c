"""Where the time of a step goes on each rank: data, computing, other stages, gradient reduction.

Megatron's schedules start and stop timers by name around their parts if the configuration has some;
`StepTimers` are such. Computing contains the tensor- and context-parallel collectives inside the
layers. On GPUs times are those between events on the stream, so that nothing has to be waited for.
"""

import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import torch
import torch.distributed as dist

from megatron_gmai.runtime.groups import Groups

# A rank that computes so much longer than the median of its stage is a straggler, if it is also by
# so many seconds: short steps jitter.
_SLOWER, _AT_LEAST = 1.25, 0.05
Item = TypeVar("Item")


@dataclass(frozen=True)
class RankTimes:
    """Seconds of one step on one rank."""

    stage: int  # of the pipeline
    data: float  # waiting for micro-batches
    compute: float  # forward and backward passes, without `data`
    pipeline: float  # receiving from and sending to other stages: transfers and bubble
    reduce: float  # finishing the reduction of gradients


class _Timer:
    def __init__(self, is_cuda: bool) -> None:
        self.is_cuda = is_cuda
        self.marks: list[Any] = []  # start, stop, start, stop, ...

    def start(self, barrier: bool = False) -> None:
        self._mark()

    def stop(self, barrier: bool = False) -> None:
        self._mark()

    def _mark(self) -> None:
        if self.is_cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> float:
        pairs = zip(self.marks[::2], self.marks[1::2], strict=False)
        if not self.is_cuda:
            return sum(stop - start for start, stop in pairs)
        if self.marks:
            self.marks[-1].synchronize()
        return sum(start.elapsed_time(stop) for start, stop in pairs) / 1e3


class StepTimers:
    """What Megatron calls `config.timers`, for the step in progress."""

    def __init__(self, is_cuda: bool) -> None:
        self.is_cuda = is_cuda
        self.timers: dict[str, _Timer] = {}
        self.data = 0.0

    def __call__(self, name: str, log_level: int = 0) -> _Timer:
        return self.timers.setdefault(name, _Timer(self.is_cuda))

    def begin(self) -> Self:
        """Forget the step before."""
        self.timers, self.data = {}, 0.0
        return self

    def over(self, batches: Iterable[Item]) -> Iterator[Item]:
        """Passes micro-batches on, with the time that each is waited for."""
        source = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            self.data += time.perf_counter() - began
            yield batch

    def times(self, stage: int) -> RankTimes:
        """Of the step since `begin`."""
        sums = {name: timer.seconds() for name, timer in self.timers.items()}
        passes = sums.get("forward-compute", 0.0) + sums.get("backward-compute", 0.0)
        transfers = (s for name, s in sums.items() if name.endswith(("-recv", "-send")))
        return RankTimes(
            stage, self.data, max(0.0, passes - self.data), sum(transfers),
            sums.get("all-grads-sync", 0.0),
        )  # fmt: skip


def gather_times(timers: StepTimers, groups: Groups, device: torch.device) -> list[RankTimes]:
    """The times of all ranks, in their order; a collective of all."""
    times = timers.times(groups.pp.rank())
    mine = torch.tensor([*vars(times).values()], dtype=torch.float64, device=device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(every, mine)
    return [RankTimes(int(stage), *rest) for stage, *rest in (row.tolist() for row in every)]


def by_stage(times: Sequence[RankTimes]) -> list[dict[str, float]]:
    """A row for each pipeline stage: the median of its ranks, of `data` the longest."""
    rows = []
    for stage in sorted({one.stage for one in times}):
        ranks = [one for one in times if one.stage == stage]
        medians = {
            name: statistics.median(getattr(one, name) for one in ranks)
            for name in ("compute", "pipeline", "reduce")
        }
        rows.append({"stage": stage, "data": max(one.data for one in ranks), **medians})
    return rows


def stragglers(times: Sequence[RankTimes]) -> list[int]:
    """Ranks that compute, or wait for data, far longer than the median of their stage."""
    found = []
    medians = {
        stage: statistics.median_low(one.compute + one.data for one in times if one.stage == stage)
        for stage in {one.stage for one in times}
    }
    for rank, one in enumerate(times):
        own, usual = one.compute + one.data, medians[one.stage]
        if own > _SLOWER * usual and own > usual + _AT_LEAST:
            found.append(rank)
    return found
