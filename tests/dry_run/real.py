"""The same counting around the real CPU tensors of a real gloo world."""

import dataclasses
import importlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

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
        with counter, as_without_values():
            report = count_step(case.config, world, counter, IMAGES)
        torch.save(compared(report), folder / f"{case.name}-{dist.get_rank()}.pt")
    dist.barrier()


@contextmanager
def as_without_values() -> Iterator[None]:
    """A dry run has no labels to sort the unlabelled tokens out by, so all are processed; and no
    numbers, so no step is skipped for those that a world without peers leaves in its buffers."""
    linear = importlib.import_module("gmai_kernels.linear_cross_entropy")
    with (
        mock.patch.object(linear, "readable", lambda tensor: False),
        mock.patch.object(math, "isfinite", lambda number: True),
    ):
        yield


def compared(report: RankReport) -> dict[str, Any]:
    """What has to be the same."""
    tree = dataclasses.asdict(report)
    names = ("static", "peak", "peak_place", "flops", "collectives")
    return {name: tree[name] for name in names}
