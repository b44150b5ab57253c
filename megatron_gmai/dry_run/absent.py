"""Devices that do not exist: a device type without memory, and any rank of any world.

torch lets a Python program register a device type ("gpu" here) for which FakeTensorMode computes
shapes, dtypes and devices and nothing else. Host tensors stay real, so what the program decides by
reading them (the lengths of segments, say) is decided as always.
"""

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

# It makes a tensor when it is imported, which would be counted for the step that comes first.
import megatron.core.transformer.multi_token_prediction  # noqa: F401
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import random as megatron_random
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from megatron_gmai.config import Config
from megatron_gmai.runtime import cpu
from megatron_gmai.runtime.cpu import is_cuda
from megatron_gmai.runtime.device import DTYPES, Device
from megatron_gmai.runtime.groups import destroy_groups
from megatron_gmai.runtime.implementation import PLAIN, Implementation, why_no_torch_varlen
from megatron_gmai.runtime.world import World, lay_out

NAME = "gpu"  # of the device type; "cuda" needs torch's CUDA build even for tensors without data


class _DeviceModule:
    """What torch asks `torch.cuda` about a GPU: one device, and autocast when checkpoints rerun."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False  # but during a dry run: others would ask for streams (torch's checkpoints do)

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@functools.cache  # torch takes the name once a process
def absent_device() -> torch.device:
    """The device type, registered."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_DeviceModule())
    return torch.device(NAME, 0)


def implementation_of(device: Device) -> Implementation:
    """What torch can compute shapes of: not the kernels of other packages. Those of flash-attn and
    Transformer Engine keep the same tensors as torch's varlen attention."""
    if device.is_cuda and device.dtype is not torch.float32 and why_no_torch_varlen() is None:
        return Implementation(attention="torch_varlen")
    return PLAIN


def device_of(kind: str) -> torch.device:
    """Where the tensors of a dry run on the path of `kind` are."""
    return absent_device() if kind == "cuda" else cpu.CPU


@contextlib.contextmanager
def world_of(
    config: Config, rank: int, world_size: int, kind: str, synchronize: Callable[[], None]
) -> Iterator[World]:
    """Rank `rank` of a world of absent processes, its code on the path of `kind` ("cuda", "cpu").

    `synchronize` is called for torch.cuda.synchronize.
    Megatron's `torch.cuda` calls and its choice of kernels see a GPU where `kind` is "cuda"; the
    processes answer every collective at once, with nothing.
    """
    dtype = config.run.dtype
    name = ("bf16" if kind == "cuda" else "fp32") if dtype == "auto" else dtype
    device_type = device_of(kind)
    join_absent_processes(rank, world_size)
    with (
        stand_in(device_type, synchronize),
        # Compiled functions run as they are written: nothing is compiled for an absent device.
        torch.compiler.set_stance("force_eager"),
        # Backward passes in this thread, so that the host's waits in them have a place.
        torch.autograd.set_multithreading_enabled(False),
    ):
        try:
            device = Device(kind, device_type, "fake", DTYPES[name])
            yield lay_out(device, config, implementation_of(device))
        finally:
            destroy_groups()


def join_absent_processes(rank: int, world_size: int) -> None:
    """Initialise torch.distributed as one of `world_size` processes, of which only this exists."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    absent_device()
    backends = f"cpu:fake,{NAME}:fake"
    dist.init_process_group(backends, rank=rank, world_size=world_size, store=FakeStore())


@contextlib.contextmanager
def stand_in(device: torch.device, synchronize: Callable[[], None]) -> Iterator[None]:
    """`torch.cuda` means `device` in this block: the CPU, or the absent device."""
    assert not cpu.installed(), "torch.cuda means the CPU already"
    replaced = cpu.Installation()
    try:
        replaced.replace(dist, {"all_gather_object": _gather_own_object})
        replaced.replace(
            torch.autograd, {"backward": functools.partial(_backward, torch.autograd.backward)}
        )
        # Megatron keeps a scale for losses that this model lacks from run to run of a process.
        replaced.replace(MoEAuxLossAutoScaler, {"main_loss_backward_scale": None})
        if device == cpu.CPU:
            cpu.install()
            with _ReadConstants():
                yield
            return
        replaced.replace(getattr(torch, NAME), {"is_available": lambda: True})
        replaced.replace(torch.cuda, _torch_cuda(device, synchronize))
        replaced.replace(torch.cuda.nvtx, cpu.TORCH_CUDA_NVTX)
        replaced.replace(megatron_random, _MEGATRON_RANDOM)
        replaced.replace(megatron_random.CudaRNGStatesTracker, {"fork": _fork, "add": _nothing})
        for module, names in cpu.plain_megatron():
            replaced.replace(module, names)
        # The optimizer takes whole lists of tensors, as on a GPU, if it knows their type.
        optimizers = importlib.import_module("torch.optim.optimizer")
        known = [*optimizers._foreach_supported_types, FakeTensor]
        replaced.replace(optimizers, {"_foreach_supported_types": known})
        with _CudaMeansAbsent(device), _ReadConstants():
            yield
    finally:
        cpu.uninstall()
        replaced.restore()


class _CudaMeansAbsent(cpu.CudaMeans):
    """Sends what was meant for a GPU to the absent device, which answers as a GPU would."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func == _IS_CUDA:  # a new object at each access
            return args[0].device.type == NAME
        if func is torch.tensor and kwargs and kwargs.get("device") is not None:
            # torch copies a constant to its device below the level at which devices are absent.
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(self.device if is_cuda(device) else device)
        if func is torch.Tensor.tolist and args[0].device.type == NAME:
            return args[0].cpu().tolist()  # one wait, not one for each element
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _flash_attention(*args, **(kwargs or {}))
        result = super().__torch_function__(func, types, args, kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace(f"torch.{NAME}.", "torch.").replace("cuda.gpu", "cuda")
        return result


class _ReadConstants(TorchFunctionMode):
    """torch.tensor reads tensors inside its data below the level at which devices are absent."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.tensor:
            args = (_read(args[0]), *args[1:])
        return func(*args, **(kwargs or {}))


def _read(data: Any) -> Any:
    if isinstance(data, list | tuple):
        return [_read(x) for x in data]
    return data.tolist() if isinstance(data, torch.Tensor) else data


_IS_CUDA = torch.Tensor.is_cuda.__get__  # type: ignore[attr-defined]


def _flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """What torch runs on a GPU in half precision; elsewhere it would choose the plain formula,
    whose scores of all queries by all keys exist on no GPU."""
    assert mask is None, "training has no attention masks"
    attention = torch.ops.aten._scaled_dot_product_flash_attention
    return attention(query, key, value, dropout_p, is_causal)[0]


def _torch_cuda(device: torch.device, synchronize: Callable[[], None]) -> dict[str, Any]:
    """The names that Megatron uses, of a GPU without random states."""
    state = cpu.answering(torch.zeros(1, dtype=torch.uint8))
    return cpu.TORCH_CUDA | {
        "current_device": cpu.answering(device),
        "synchronize": synchronize,
        "manual_seed": cpu.answering(),
        "get_rng_state": state,
        "set_rng_state": cpu.answering(),
    }


_nothing = cpu.answering()
_fork = cpu.answering(contextlib.nullcontext())
_MEGATRON_RANDOM = {
    "_get_cuda_rng_state": cpu.answering(),
    "_set_cuda_rng_state": cpu.answering(),
}


def _backward(
    backward: Callable[..., None], tensors: Any, grad_tensors: Any = None, **options: Any
) -> None:
    """torch.autograd.backward by the edges of the graph: given tensors, torch hands the call to the
    modes of this file, and what is recomputed inside would then not see them."""
    outputs = (tensors,) if isinstance(tensors, torch.Tensor | GradientEdge) else tensors
    edges = [x if isinstance(x, GradientEdge) else get_gradient_edge(x) for x in outputs]
    backward(edges, grad_tensors, **options)


def _gather_own_object(found: list[Any], own: Any, group: Any = None) -> None:
    found[:] = [own] * len(found)
