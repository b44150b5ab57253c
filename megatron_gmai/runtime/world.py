"""The processes of a run: opened in one place, by training, tools and tests alike."""

from dataclasses import dataclass

import torch.distributed as dist

from megatron_gmai.config import Config
from megatron_gmai.layout import Chunk, Layout, chunks_of_rank
from megatron_gmai.runtime.device import Device, choose_device
from megatron_gmai.runtime.groups import (
    Groups,
    build_groups,
    initialize_distributed,
    seed_everything,
)


@dataclass(frozen=True)
class World:
    """This process among the others: its device, its groups and what it holds of the model."""

    device: Device
    groups: Groups
    layout: Layout
    chunks: tuple[Chunk, ...]

    @property
    def rank(self) -> int:
        return dist.get_rank()

    @property
    def is_first_rank(self) -> bool:
        return dist.get_rank() == 0

    @property
    def holds_first_chunk(self) -> bool:
        """Whether images are encoded here."""
        return self.chunks[0].is_first

    @property
    def holds_last_chunk(self) -> bool:
        """Whether the loss is taken here."""
        return self.chunks[-1].is_last


def open_world(config: Config) -> World:
    """Choose the device, join the processes that torchrun started, and build the groups.

    Raises:
        ValueError: a device that is not there, or a layout that does not divide.
    """
    device = choose_device(config.run.device, config.run.dtype)
    initialize_distributed(device, config.run.distributed_timeout_minutes)
    return lay_out(device, config)


def lay_out(device: Device, config: Config) -> World:
    """The world of `config`'s layout, over processes that have joined already."""
    parallel, num_layers = config.parallel, config.model.language.num_layers
    layout = Layout.of(parallel, dist.get_world_size())
    groups = build_groups(parallel, num_layers, config.run.distributed_timeout_minutes)
    seed_everything(config.train.seed, groups)
    return World(device, groups, layout, chunks_of_rank(parallel, num_layers, groups.pp.rank()))


def close_world() -> None:
    """Leave together: a rank that left early could end the others in the middle of their work."""
    dist.barrier()
    dist.destroy_process_group()
