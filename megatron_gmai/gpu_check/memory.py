"""A dry run's peak against the peak of the same step on the device."""

from collections.abc import Iterator

import torch

from megatron_gmai.config import Config
from megatron_gmai.dry_run.absent import implementation_of
from megatron_gmai.dry_run.counter import DeviceCounter
from megatron_gmai.dry_run.packs import made_up
from megatron_gmai.dry_run.run import alive_at_peak, dry_run
from megatron_gmai.gpu_check.finding import Finding
from megatron_gmai.gpu_check.steps import fill_on_device, join, trainer, world_for
from megatron_gmai.runtime.processes import in_processes

# The allocator rounds up, and cuBLAS has its workspace.
ALLOWED = 0.05
MIB = 2**20


def memory(config: Config, device: str, images: int, seconds: float = 120) -> Iterator[Finding]:
    """Peak bytes of a step: by the dry run, by counting tensors, by the allocator."""
    dry = in_processes(1, seconds, dry_peak, config, images, device)
    counted, allocated = in_processes(1, seconds, real_peak, config, images, device)
    for name, real in (("tensors counted", counted), ("allocated", allocated)):
        if real is None:
            continue
        off = abs(dry - real) / real
        note = f"dry run {dry / MIB:,.0f} MiB, real {real / MIB:,.0f} MiB"
        bar = f"at most {ALLOWED:g}"
        yield Finding("memory", name, off, "relative", bar, off <= ALLOWED, note)


def dry_peak(config: Config, images: int, device: str) -> int:
    """Bytes by a dry run of the only rank."""
    return dry_run(config, 0, 1, images, kind=device).peak_bytes


def real_peak(config: Config, images: int, device: str) -> tuple[int, int | None]:
    """Bytes of tensors, and on a GPU of the allocator, at the peak of the second step."""
    chosen = join(device, "bf16" if device == "cuda" else "fp32")
    counter = DeviceCounter(chosen.torch_device, fake=None)
    with counter:
        world = world_for(config, chosen, implementation_of(chosen))
        step = trainer(config, world, fill_on_device)
        packs = made_up(config, images)
        step(packs, config.train.lr)  # makes the optimizer's state
        begin = counter.events
        if chosen.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        step(packs, config.train.lr)
    counted = sum(block.bytes for block in alive_at_peak(counter.blocks, begin))
    return counted, torch.cuda.max_memory_allocated() if chosen.is_cuda else None
