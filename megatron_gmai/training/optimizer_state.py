"""The optimizer's part of a checkpoint: one form for every layout, sharded over ranks or not.

Each trainable parameter has fp32 tensors of its own shape: `optimizer.state.exp_avg.NAME`,
`optimizer.state.exp_avg_sq.NAME` and the master `optimizer.state.param.NAME`. A sharded optimizer
has runs of their elements, and each rank writes just its own. Rates and decay come from the
configuration.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

from megatron_gmai.model.gmai_vl import GMAIVL
from megatron_gmai.runtime.device import Device
from megatron_gmai.training.pieces import pieces_of_run
from megatron_gmai.training.shares import Held
from megatron_gmai.training.weights import named_weights

KINDS = ("param", "exp_avg", "exp_avg_sq")


def optimizer_pieces(optimizer: MegatronOptimizer, chunks: Sequence[GMAIVL]) -> Iterator[Held]:
    """This rank's optimizer state as boxes of whole tensors.

    The state must be there (`allocate`).
    """
    tp = chunks[0].groups.tp
    for weight, parameter in named_weights(chunks):
        for inner in _inner(optimizer):
            if (found := _held(inner, parameter)) is None:
                continue
            begin, master = found
            state = {"param": master, **inner.optimizer.state[master]}
            local = tuple(parameter.shape)
            # A sharded optimizer's runs have no copies along the ranks that share it.
            is_sharded = isinstance(inner, DistributedOptimizer)
            is_alone = is_sharded and weight.tower != "language_model"
            for kind in KINDS:
                run = state[kind].detach().view(-1)
                name = f"optimizer.state.{kind}.{weight.name}"
                for piece in pieces_of_run(name, weight, local, tp.rank(), run, begin):
                    yield Held(piece) if is_alone else Held.of(piece, weight, not is_sharded)


def _held(inner: Any, parameter: Parameter) -> tuple[int, Tensor] | None:
    """The run of a parameter's elements that this optimizer updates here: where it begins and its
    fp32 master; None if it updates none of them."""
    if isinstance(inner, DistributedOptimizer):
        index = inner.model_param_group_index_map.get(parameter)
        if index is None:
            return None
        begin = inner._get_model_param_range_map(parameter)["param"].start
        return begin, inner.optimizer.param_groups[index[0]]["params"][index[1]]
    master = getattr(parameter, "main_param", parameter)
    groups = inner.optimizer.param_groups
    is_here = any(master is own for group in groups for own in group["params"])
    return (0, master) if is_here else None


def allocate(optimizer: MegatronOptimizer) -> None:
    """Create the state that the first step would, so that there is something to load into."""
    for inner in _inner(optimizer):
        inner.init_state_fn(inner.optimizer, inner.config)
        if isinstance(inner.optimizer, torch.optim.AdamW):  # Megatron leaves torch's counter out
            for parameter, state in inner.optimizer.state.items():
                state.setdefault("step", _counter(parameter))


def set_steps(optimizer: MegatronOptimizer, steps: int) -> None:
    """Put the number of updates into the optimizer: torch counts them for each parameter, the
    fused optimizers of GPUs for each group."""
    for inner in _inner(optimizer):
        for group in inner.optimizer.param_groups:
            if isinstance(inner.optimizer, torch.optim.AdamW):
                for parameter in group["params"]:
                    inner.optimizer.state[parameter]["step"] = _counter(parameter, steps)
            else:
                group["step"] = steps


def _counter(parameter: Tensor, steps: int = 0) -> Tensor:
    """torch's count of a parameter's updates; its fused AdamW raises it on the device."""
    return torch.full((), float(steps), device=parameter.device)


def steps_taken(optimizer: MegatronOptimizer, device: Device) -> int:
    """Updates that were applied, on any rank: some hold no trainable parameter."""
    steps = [0]
    for inner in _inner(optimizer):
        steps += [int(state["step"]) for state in inner.optimizer.state.values() if "step" in state]
        steps += [int(group["step"]) for group in inner.optimizer.param_groups if "step" in group]
    highest = torch.tensor([max(steps)], dtype=torch.int64, device=device.torch_device)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return int(highest)


def _inner(optimizer: MegatronOptimizer) -> list[Any]:
    """The optimizers that own parameters on this rank."""
    chained = (
        optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]
    )
    return [inner for inner in chained if inner.optimizer is not None]
