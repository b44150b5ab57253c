"""Process groups: Megatron's `parallel_state` is initialised here and read nowhere else."""

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    model_parallel_cuda_manual_seed,
)
from torch.distributed.rendezvous import rendezvous

from megatron_gmai.config import ParallelConfig
from megatron_gmai.layout import encodes_ahead, virtual_stages
from megatron_gmai.runtime.device import Device

# Random states in Megatron's tracker, see `seed_everything`.
OF_TOKENS, OF_RANK = "of-tokens", "of-rank"
_STOPPED = "megatron_gmai/stopped"
_OFFSET = 1_000_000  # from the seeds that Megatron itself makes of ours


@dataclass(frozen=True)
class Groups:
    """The groups that this rank belongs to.

    `solo` holds this rank alone: the vision tower is built on it, since every rank that has one
    runs it whole on its own share of the images.
    """

    mcore: ProcessGroupCollection
    solo: dist.ProcessGroup

    @property
    def tp(self) -> dist.ProcessGroup:
        return self.mcore.tp

    @property
    def cp(self) -> dist.ProcessGroup:
        return self.mcore.cp

    @property
    def pp(self) -> dist.ProcessGroup:
        return self.mcore.pp

    @property
    def dp(self) -> dist.ProcessGroup:
        return self.mcore.dp

    @property
    def dp_cp(self) -> dist.ProcessGroup:
        """Ranks between which gradients of the language model are summed."""
        return self.mcore.dp_cp

    @property
    def images(self) -> dist.ProcessGroup:
        """Ranks that see the same micro-batch and share its images: TP x CP, TP running fastest."""
        return self.mcore.tp_cp

    @property
    def vision(self) -> dist.ProcessGroup:
        """Ranks that hold a copy of the tower: all of the first stage, or all there are."""
        return self.mcore.expt_dp

    def own_tokens(self, total: int) -> slice:
        """The tokens of a micro-batch that this context-parallel rank embeds and has losses of."""
        length = total // self.cp.size()
        return slice(self.cp.rank() * length, (self.cp.rank() + 1) * length)

    def for_vision(self) -> ProcessGroupCollection:
        """Megatron's collection for a tower that is neither tensor- nor pipeline-parallel."""
        return ProcessGroupCollection(tp=self.solo, cp=self.solo, pp=self.solo)


def initialize_distributed(device: Device, timeout_minutes: float) -> None:
    """Join the world that torchrun set up; without torchrun, a world of one.

    Every collective of the world has the given time-out, so a lost rank ends the others.
    """
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store: dist.Store
    if "RANK" not in os.environ:
        store, rank, size = dist.HashStore(), 0, 1
    else:
        found, rank, size = next(rendezvous("env://", timeout=timeout))
        # torchrun's agent keeps its store over restarts, with the addresses of ended processes.
        store = dist.PrefixStore(f"restart-{restarts()}", found)
    dist.init_process_group(
        device.backend,
        timeout=timeout,
        store=store,
        rank=rank,
        world_size=size,
        device_id=device.torch_device if device.is_cuda else None,
    )


def note_stop() -> None:
    """Tell the restarts of this torchrun that the run has stopped on purpose: to torchrun, any
    status but 0 is a failure. Its agent keeps the store over restarts."""
    _store().set(_STOPPED, "1")


def was_stopped() -> bool:
    """Whether this is a restart of processes that have called `note_stop`."""
    return restarts() > 0 and bool(_store().check([_STOPPED]))


def _store() -> dist.Store:
    """The store of all processes, under the prefixes of groups and attempts."""
    store: Any = dist.group.WORLD.get_group_store()  # type: ignore[union-attr]
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    return store


def restarts() -> int:
    """How often torchrun (`--max-restarts`) has started the processes of this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def build_groups(parallel: ParallelConfig, num_layers: int, timeout_minutes: float) -> Groups:
    """Create all process groups of the layout; call once, after `initialize_distributed`."""
    virtual = virtual_stages(parallel, num_layers)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=timeout_minutes,
        create_gloo_process_groups=False,
    )
    solo = dist.new_group(
        [dist.get_rank()],
        timeout=datetime.timedelta(minutes=timeout_minutes),
        use_local_synchronization=True,
    )
    mcore = ProcessGroupCollection.use_mpu_process_groups()
    # Megatron reduces parameters marked `allreduce = False` (the experts of mixture-of-experts
    # models) over a group of their own, in buckets of their own, with their optimizer state sharded
    # over that group. The vision tower needs just that: it has copies on the TP ranks too, and
    # with --vision-phase all-ranks on those of all stages.
    mcore.expt_dp = dist.group.WORLD if encodes_ahead(parallel) else mcore.tp_dp_cp
    mcore.tp_ep_pp = mcore.mp  # one group for the gradient norm of both kinds
    return Groups(mcore, solo)


def seed_everything(seed: int, groups: Groups) -> None:
    """Seed torch, Megatron's random-state tracker and two states of our own in it.

    Megatron's states are those of a model-parallel rank, the same on all data-parallel ones: good
    for start weights, wrong for dropout. Ours differ between ranks that hold different tokens;
    `OF_TOKENS` is the same on the tensor-parallel ranks of a group, `OF_RANK` is not.
    """
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    replica = groups.dp_cp.rank() * groups.pp.size() + groups.pp.rank()
    first = seed + _OFFSET + replica * (groups.tp.size() + 1)
    tracker = get_cuda_rng_tracker()
    tracker.add(OF_TOKENS, first)
    tracker.add(OF_RANK, first + 1 + groups.tp.rank())


def destroy_groups() -> None:
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
