"""The same counting around real CPU tensors of a real gloo world."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_gmai.dry_run.counter import DeviceCounter
from megatron_gmai.dry_run.run import count_step
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
        torch.save(memory_of(report), folder / f"{case.name}-{dist.get_rank()}.pt")
    dist.barrier()


def memory_of(report):
    report = dataclasses.asdict(report)
    return {key: report[key] for key in ("static", "peak", "peak_place", "flops", "collectives")}
