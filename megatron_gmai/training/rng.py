"""Random-number states in a checkpoint: restored where the layout is the one that saved them.

Only `--lora-dropout` draws random numbers in training (data order is a function of the seed); with
the states a resumed run draws what the uninterrupted one would have.
"""

import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from torch import Tensor

from megatron_gmai.runtime.groups import Groups
from megatron_gmai.training.pieces import Piece


def rng_piece(groups: Groups) -> Piece:
    """This rank's states as one row of a [pipeline, tensor, replica, bytes] table, named by its
    shape."""
    states = torch.cat(_states())
    pp, tp, replicas = groups.pp, groups.tp, groups.dp_cp
    shape = (pp.size(), tp.size(), replicas.size(), states.numel())
    name = f"rng.{'x'.join(map(str, shape))}"
    offset = (pp.rank(), tp.rank(), replicas.rank(), 0)
    return Piece(name, shape, offset, states.view(1, 1, 1, -1))


def restore_rng(saved: Tensor) -> None:
    """Put back what `rng_piece` took."""
    default, device, *tracked = saved.flatten().split([state.numel() for state in _states()])
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
