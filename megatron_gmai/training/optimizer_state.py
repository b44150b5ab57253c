"""The optimizer's part of a checkpoint: one form for every layout, sharded over ranks or not.

Each trainable parameter has fp32 tensors of its own shape: `optimizer.state.exp_avg.NAME`,
`optimizer.state.exp_avg_sq.NAME` and the master `optimizer.state.param.NAME`. These are the keys of
Megatron's "fully_reshardable" format, so its distributed optimizer reads and writes them itself;
the plain optimizers are brought to the same keys here. Rates and decay come from the configuration.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_gmai.runtime.device import Device


def sharded(
    optimizer: MegatronOptimizer, model_state: dict[str, Any], loading: bool
) -> dict[str, Any]:
    """Sharded tensors of the optimizer for saving, or as the places to load into."""
    state: dict[str, Any] = {}
    for index, inner in enumerate(_inner(optimizer)):
        if isinstance(inner, DistributedOptimizer):
            tensors = inner.sharded_param_state_fully_reshardable(
                model_state, is_loading=loading, metadata={}
            )
        else:
            tensors = {
                key: {
                    kind: make_sharded_optimizer_tensor(entry, tensor, f"optimizer.state.{kind}")
                    for kind, tensor in _tensors(inner, entry.data).items()
                }
                for key, entry in model_state.items()
                if _is_updated_by(inner, entry.data)
            }
        state[str(index)] = tensors
        if _scaler(inner) is not None:
            state[f"grad_scaler.{index}"] = _scaler(inner).state_dict()
    return state


def restore(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    loaded: dict[str, Any],
    steps: int,
) -> None:
    """Put loaded tensors and the number of steps into an optimizer that `allocate` prepared."""
    for index, inner in enumerate(_inner(optimizer)):
        if isinstance(inner, DistributedOptimizer):
            inner.load_parameter_state_from_fully_reshardable(loaded[str(index)])
        else:
            for name, entry in model_state.items():
                if _is_updated_by(inner, entry.data):
                    for kind, tensor in _tensors(inner, entry.data).items():
                        tensor.copy_(loaded[str(index)][name][kind])
        _set_steps(inner.optimizer, steps)
        if _scaler(inner) is not None:
            _scaler(inner).load_state_dict(loaded[f"grad_scaler.{index}"])


def allocate(optimizer: MegatronOptimizer) -> None:
    """Create the state that the first step would, so that there is something to load into."""
    for inner in _inner(optimizer):
        inner.init_state_fn(inner.optimizer, inner.config)


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


def _scaler(inner: Any) -> Any:
    """The loss scaler of half-precision training; fp32 has none."""
    return getattr(inner, "grad_scaler", None)


def _is_updated_by(inner: Any, parameter: Tensor) -> bool:
    """Whether this optimizer, of those that share the model, has the parameter or its master."""
    master = getattr(parameter, "main_param", parameter)
    return any(master is own for group in inner.param_groups for own in group["params"])


def _tensors(inner: Any, parameter: Tensor) -> dict[str, Tensor]:
    """fp32 tensors of one parameter in an optimizer that is not sharded."""
    master = getattr(parameter, "main_param", parameter)
    state = inner.optimizer.state[master]
    return {"param": master.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}


def _set_steps(optimizer: torch.optim.Optimizer, steps: int) -> None:
    """torch counts steps for each parameter, the fused optimizers of GPUs for each group."""
    if isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.state[parameter]["step"] = torch.tensor(float(steps))
    else:
        for group in optimizer.param_groups:
            group["step"] = steps
