"""The collectives of a step at this run's sizes: whether they answer, and how long they take."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_gmai.config import Config
from megatron_gmai.preflight.check import FAIL, PASS, WARN, Check
from megatron_gmai.runtime.device import Device
from megatron_gmai.runtime.groups import Groups

REPEATS = 5
BUCKET = 40_000_000  # elements: Megatron reduces gradients in buckets of about this size
CPU_LIMIT = 4_000_000  # elements on a CPU, where it is the answer that counts
# Bytes a second of bus bandwidth below which a GPU's link is not what its node should have.
SLOW = {"TP": 50e9, "DP": 5e9, "PP": 2e9, "world": 0.0}


@dataclass(frozen=True)
class Collective:
    """One call. `moved` is what each link carries, as NCCL's tests count it (bus bandwidth)."""

    name: str
    group: str  # a key of SLOW
    call: Callable[[], Any]
    moved: float  # bytes
    right: Callable[[], bool]


def collectives(config: Config, device: Device, groups: Groups) -> Iterator[Check]:
    """Times every collective of this layout; all ranks call it together."""
    for one in _of_layout(config, device, groups):
        seconds = _time(one.call, device)
        ok = one.right()
        speed = one.moved / seconds
        status = FAIL if not ok else WARN if device.is_cuda and speed < SLOW[one.group] else PASS
        detail = f"{seconds * 1e3:,.2f} ms, {one.moved / 1e6:,.1f} MB at {speed / 1e9:,.2f} GB/s"
        remedy = "NCCL_DEBUG=INFO shows the links; see docs/cluster.md"
        yield Check(one.name, status, detail if ok else "wrong result", remedy)


def _time(call: Callable[[], Any], device: Device) -> float:
    """Median seconds of a call; the first, which opens connections, does not count."""
    seconds = []
    for _ in range(REPEATS + 1):
        began = time.perf_counter()
        call()
        if device.is_cuda:
            torch.cuda.synchronize(device.torch_device)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _of_layout(config: Config, device: Device, groups: Groups) -> Iterator[Collective]:
    yield _all_reduce("all-reduce of all", "world", 1, dist.group.WORLD, device)
    rows = config.train.micro_batch_size * config.data.max_length
    activation = rows * config.model.language.hidden_size
    for name, group, elements in (("TP", groups.tp, activation), ("DP", groups.dp_cp, BUCKET)):
        size = group.size()
        if size == 1:
            continue
        elements = elements if device.is_cuda else min(elements, CPU_LIMIT)
        elements -= elements % size
        yield _all_reduce(f"{name} all-reduce", name, elements, group, device)
        yield _gather(f"{name} all-gather", name, elements, group, device)
        yield _scatter(f"{name} reduce-scatter", name, elements, group, device)
    if groups.pp.size() > 1:
        elements = activation // groups.tp.size()
        yield _to_next_stage(min(elements, CPU_LIMIT) if not device.is_cuda else elements,
                             groups.pp, device)  # fmt: skip


def _filled(elements: int, value: float, device: Device) -> torch.Tensor:
    return torch.full((elements,), value, dtype=device.dtype, device=device.torch_device)


def _summand(group: Any) -> int:
    """1 and -1 in turns: bf16, which has no 257, could not count the ranks of a large world."""
    return 1 - 2 * (dist.get_rank(group) % 2)


def _all_reduce(name: str, kind: str, elements: int, group: Any, device: Device) -> Collective:
    own, size = _summand(group), dist.get_world_size(group)
    tensor = _filled(elements, own, device)

    def call() -> None:
        tensor.fill_(own)
        dist.all_reduce(tensor, group=group)

    moved = 2 * (size - 1) / size * tensor.nbytes
    return Collective(name, kind, call, moved, lambda: bool((tensor == size % 2).all()))


def _gather(name: str, kind: str, elements: int, group: Any, device: Device) -> Collective:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    part, whole = _filled(elements // size, rank, device), _filled(elements, -1, device)
    expected = torch.arange(size, dtype=device.dtype, device=device.torch_device)
    return Collective(
        name,
        kind,
        lambda: dist.all_gather_into_tensor(whole, part, group=group),
        (size - 1) / size * whole.nbytes,
        lambda: torch.equal(whole.view(size, -1)[:, 0], expected),
    )


def _scatter(name: str, kind: str, elements: int, group: Any, device: Device) -> Collective:
    size = dist.get_world_size(group)
    part, whole = _filled(elements // size, -1, device), _filled(elements, _summand(group), device)
    return Collective(
        name,
        kind,
        lambda: dist.reduce_scatter_tensor(part, whole, group=group),
        (size - 1) / size * whole.nbytes,
        lambda: bool((part == size % 2).all()),
    )


def _to_next_stage(elements: int, group: Any, device: Device) -> Collective:
    """Every stage sends to the next one, the last to the first, all at once."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    sent, received = _filled(elements, rank, device), _filled(elements, -1, device)
    following = dist.get_global_rank(group, (rank + 1) % size)
    before = dist.get_global_rank(group, (rank - 1) % size)

    def call() -> None:
        transfers = [
            dist.P2POp(dist.isend, sent, following, group),
            dist.P2POp(dist.irecv, received, before, group),
        ]
        for work in dist.batch_isend_irecv(transfers):
            work.wait()

    def right() -> bool:
        return bool((received == (rank - 1) % size).all())

    return Collective("PP send to the next stage", "PP", call, sent.nbytes, right)
