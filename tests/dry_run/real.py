"""The same counting around the real CPU tensors of a real gloo world."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_gmai.dry_run.counter import DeviceCounter
from megatron_gmai.dry_run.run import RankReport, count_step
from tests.parallel.cases import Case, Processes

IMAGES = 2


def count_cases(cases: list[Case], folder: Path) -> None:
    """Count a step of each case on every rank and write what it held and sent to a file."""
    processes = Processes()
    for case in cases:
        world = processes.world(case.config)
        counter = DeviceCounter(world.device.torch_device, fake=None)
        with counter:
            report = count_step(case.config, world, counter, IMAGES)
        torch.save(compared(report), folder / f"{case.name}-{dist.get_rank()}.pt")
    dist.barrier()


def compared(report: RankReport) -> dict[str, Any]:
    """What has to be the same."""
    tree = dataclasses.asdict(report)
    names = ("static", "peak", "peak_place", "flops", "collectives")
    return {name: tree[name] for name in names}
