"""The same counting around the real CPU tensors of a real gloo world."""

import dataclasses
import importlib
import math
import operator
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_iter

from megatron_gmai.dry_run.counter import DeviceCounter
from megatron_gmai.dry_run.run import RankReport, count_step
from tests.parallel.cases import Case, Processes

IMAGES = 2
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor"),
    *("broadcast", "gather", "scatter", "send", "recv"),
)
# Callers have them from the first; those of objects call the second's, with bytes as tensors.
MODULES = (dist, distributed_c10d)


def count_cases(cases: list[Case], folder: Path) -> None:
    """Count a step of each case on every rank and write what it held and sent to a file."""
    processes = Processes()
    for case in cases:
        world = processes.world(case.config)
        counter = DeviceCounter(world.device.torch_device, fake=None)
        with counter, as_without_values(), let_go_at_once():
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


@contextmanager
def let_go_at_once() -> Iterator[None]:
    """A collective that was waited for returns when gloo's thread has let go of its tensors, too.

    The thread does so a moment after it woke the waiter: what the program frees in between would
    be counted as alive, at times.
    """
    with ExitStack() as stack:
        for name in COLLECTIVES:
            until_let_go = _until_let_go(getattr(dist, name))
            for module in MODULES:
                stack.enter_context(mock.patch.object(module, name, until_let_go))
        yield


def _until_let_go(collective: Callable) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
        before = _holders(tensors)
        work = collective(*args, **kwargs)
        deadline = time.monotonic() + 60
        while work is None and any(map(operator.gt, _holders(tensors), before)):
            assert time.monotonic() < deadline, f"{collective.__name__} kept its tensors"
            time.sleep(0.0001)
        return work

    return call


def _holders(tensors: list[Any]) -> list[int]:
    return [tensor._use_count() for tensor in tensors]


def compared(report: RankReport) -> dict[str, Any]:
    """What has to be the same."""
    tree = dataclasses.asdict(report)
    names = ("static", "peak", "peak_place", "flops", "collectives")
    return {name: tree[name] for name in names}
