"""Process groups: Megatron's `parallel_state` is initialised here and read nowhere else."""

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_gmai.config import ParallelConfig
from megatron_gmai.runtime.device import Device


@dataclass(frozen=True)
class Groups:
    """The groups that this rank belongs to.

    `solo` holds this rank alone: the vision tower is built on it, since every rank of the first
    stage runs a whole tower on its own share of the images.
    """

    mcore: ProcessGroupCollection
    solo: dist.ProcessGroup

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.mcore.tp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.mcore.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.mcore.dp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        return self.mcore.dp_cp

    @property
    def is_first_stage(self) -> bool:
        return self.pp.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        return self.pp.rank() == self.pp.size() - 1

    def for_vision(self) -> ProcessGroupCollection:
        """Megatron's collection for a tower that is neither tensor- nor pipeline-parallel."""
        return ProcessGroupCollection(tp=self.solo, cp=self.solo, pp=self.solo)


def initialize_distributed(device: Device, timeout_minutes: float) -> None:
    """Join the world that torchrun set up; without torchrun, a world of one.

    Every collective of the world has the given time-out, so a lost rank ends the others.
    """
    alone = "RANK" not in os.environ
    dist.init_process_group(
        device.backend,
        timeout=datetime.timedelta(minutes=timeout_minutes),
        store=dist.HashStore() if alone else None,
        rank=0 if alone else -1,
        world_size=1 if alone else -1,
        device_id=device.torch_device if device.is_cuda else None,
    )


def build_groups(parallel: ParallelConfig, timeout_minutes: float) -> Groups:
    """Create all process groups of the layout; call once, after `initialize_distributed`."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    solo = dist.new_group(
        [dist.get_rank()],
        timeout=datetime.timedelta(minutes=timeout_minutes),
        use_local_synchronization=True,
    )
    return Groups(ProcessGroupCollection.use_mpu_process_groups(), solo)


def seed_everything(seed: int) -> None:
    """Seed torch and Megatron's random-state tracker (model-parallel ranks differ on purpose)."""
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def destroy_groups() -> None:
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
