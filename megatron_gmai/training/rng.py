"""Random-number states in a checkpoint: restored where the layout is the one that saved them.

Nothing in training draws random numbers today (data order is a function of the seed, and there is
no dropout); the states are kept so that a resumed run stays exact if something does.
"""

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_gmai.runtime.groups import Groups


def sharded_rng(groups: Groups) -> dict[str, ShardedTensor]:
    """This rank's states as one row of a [pipeline, tensor, bytes] table, named by its shape."""
    states = torch.cat(_states())
    pp, tp = groups.pp, groups.tp
    name = f"rng.{pp.size()}x{tp.size()}x{states.numel()}"
    table = ShardedTensor.from_rank_offsets(
        name,
        states,
        (0, pp.rank(), pp.size()),
        (1, tp.rank(), tp.size()),
        prepend_axis_num=2,
        replica_id=groups.dp_cp.rank(),
    )
    return {name: table}


def restore_rng(saved: Tensor) -> None:
    """Put back what `sharded_rng` took."""
    default, device, *tracked = saved.cpu().split([state.numel() for state in _states()])
    torch.set_rng_state(default.clone())
    torch.cuda.set_rng_state(device.clone())
    tracker = get_cuda_rng_tracker()
    names = sorted(tracker.get_states())
    tracker.set_states({n: state.clone() for n, state in zip(names, tracked, strict=True)})


def _states() -> list[Tensor]:
    """uint8 states of the host's generator, the device's, and Megatron's named ones."""
    tracked = get_cuda_rng_tracker().get_states()
    return [
        torch.get_rng_state(),
        torch.cuda.get_rng_state().cpu(),
        *(tracked[name].cpu() for name in sorted(tracked)),
    ]
