"""The processes of a run: opened in one place, by training, tools and tests alike."""

import datetime
from dataclasses import dataclass
from functools import cached_property

import torch.distributed as dist

from megatron_gmai.config import Config
from megatron_gmai.layout import Chunk, ImageShare, Layout, chunks_of_rank, encodes_ahead
from megatron_gmai.runtime.device import Device, choose_device
from megatron_gmai.runtime.groups import (
    Groups,
    build_groups,
    initialize_distributed,
    seed_everything,
)
from megatron_gmai.runtime.implementation import PLAIN, Implementation, choose_implementation

# Ranks that have read or written wait for the slowest storage of all, far longer than a step may
# take.
_LONGEST_WAIT = datetime.timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This process among the others: its device, its groups and what it holds of the model."""

    device: Device
    groups: Groups
    layout: Layout
    chunks: tuple[Chunk, ...]
    encodes_ahead: bool  # all pipeline ranks encode images, before the step's micro-batches
    implementation: Implementation = PLAIN

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_first_rank(self) -> bool:
        return dist.get_rank() == 0

    @cached_property
    def storage(self) -> dist.ProcessGroup:
        """All ranks, over gloo and in host memory, to agree about what they read and write: its
        messages never come between the collectives of training. All have to ask for it first at
        the same place."""
        return dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)

    @property
    def image_share(self) -> ImageShare | None:
        """The images that are encoded here; None if none ever are."""
        if not self.chunks[0].has_vision:
            return None
        images, pp = self.groups.images, self.groups.pp
        if not self.encodes_ahead:
            return ImageShare(images.rank(), images.size())
        # PP running slowest: what the pipeline ranks of a column encode are its own images of the
        # micro-batch, which its first rank gathers with those of the other columns.
        return ImageShare(pp.rank() * images.size() + images.rank(), pp.size() * images.size())

    @property
    def holds_last_chunk(self) -> bool:
        """Whether the loss is taken here."""
        return self.chunks[-1].is_last


def open_world(config: Config) -> World:
    """Choose the device, join the processes that torchrun started, and build the groups.

    Raises:
        ValueError: a device or an implementation that is not there, or a layout that does not
            divide.
    """
    run = config.run
    device = choose_device(run.device, run.dtype)
    implementation = choose_implementation(device, run.transformer_impl, run.attention_backend)
    initialize_distributed(device, run.distributed_timeout_minutes)
    return lay_out(device, config, implementation)


def lay_out(device: Device, config: Config, implementation: Implementation = PLAIN) -> World:
    """The world of `config`'s layout, over processes that have joined already."""
    parallel, num_layers = config.parallel, config.model.language.num_layers
    layout = Layout.of(parallel, dist.get_world_size())
    groups = build_groups(parallel, num_layers, config.run.distributed_timeout_minutes)
    seed_everything(config.train.seed, groups)
    chunks = chunks_of_rank(parallel, num_layers, groups.pp.rank())
    return World(device, groups, layout, chunks, encodes_ahead(parallel), implementation)


def close_world() -> None:
    """Leave together: a rank that left early could end the others in the middle of their work."""
    dist.barrier()
    dist.destroy_process_group()
