"""Run Megatron-Core on a CPU: an explicit, reversible stand-in for `torch.cuda`.

Megatron-Core writes `device="cuda"`, `tensor.cuda()` and `torch.cuda.current_device()` throughout.
`install()` answers each of them with the CPU; `uninstall()` restores torch exactly. Nothing here is
active on a machine whose GPU is in use.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library
from torch.overrides import TorchFunctionMode

from megatron_gmai.runtime.products import onednn_is_faster, use_onednn

CPU = torch.device("cpu")


class Stream:
    """Work on a CPU is in order, so waiting is no work."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = CPU

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> "Event":
        return event or Event()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *error: Any) -> None: ...


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class CudaMeans(TorchFunctionMode):
    """Sends what was meant for a GPU to `device`, whichever torch function it is given to."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if kwargs and "device" in kwargs and is_cuda(kwargs["device"]):
            kwargs["device"] = self.device
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        if func is torch.Tensor.to and len(args) > 1 and is_cuda(args[1]):
            args = (args[0], self.device, *args[2:])
        result = func(*args, **(kwargs or {}))
        # The optimizer sorts parameters by the names that CUDA tensors answer.
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


def is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


def answering(value: Any = None) -> Callable:
    """A new function that returns `value` whatever it is given.

    New each time: torch.compile keeps a table of torch's functions and refuses the same object
    under two names.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return value

    return stand_in


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(int(seed))


def _get_rng_state(device: Any = None) -> torch.Tensor:
    return torch.default_generator.get_state()


def _set_rng_state(state: torch.Tensor, device: Any = None, *args: Any, **kwargs: Any) -> None:
    torch.default_generator.set_state(state)


# Every name that the imported parts of Megatron-Core use and that needs a GPU otherwise.
TORCH_CUDA: dict[str, Any] = {
    "current_device": answering(CPU),
    "set_device": answering(),
    "synchronize": answering(),
    "empty_cache": answering(),
    "Stream": Stream,
    "Event": Event,
    "stream": answering(contextlib.nullcontext()),
    "set_stream": answering(),
    "current_stream": Stream,
    "default_stream": Stream,
    "manual_seed": _seed,
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "is_current_stream_capturing": answering(False),
    "memory_allocated": answering(0),
    "memory_reserved": answering(0),
    "memory_stats": answering({}),
}
TORCH_CUDA_NVTX = {
    "range_push": answering(),
    "range_pop": answering(),
    "range": answering(contextlib.nullcontext()),
}
MEGATRON_RANDOM = {
    "_get_cuda_rng_state": lambda device="cuda", clone=False, graph_safe=False: _get_rng_state(),
    "_set_cuda_rng_state": lambda state, device=-1, graph_safe=False: _set_rng_state(state),
}


def plain_megatron() -> list[tuple[Any, dict[str, Any]]]:
    """Megatron-Core's modules and names that would be Transformer Engine's or Apex's, which it
    takes wherever they are installed: their kernels run on GPUs only."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as wrappers
    from megatron.core.transformer import attention

    lists = {
        "multi_tensor_applier": utils.local_multi_tensor_applier,
        "multi_tensor_scale_impl": utils.local_multi_tensor_scale,
    }
    return [
        (optimizer, {"Adam": torch.optim.AdamW, "USING_PYTORCH_OPTIMIZER": True}),
        (wrappers, lists),
        (clip_grads, lists | {"l2_norm_impl": utils.local_multi_tensor_l2_norm}),
        (attention, {"SplitAlongDim": None}),
    ]


class Installation:
    """What `install` replaced, so that `uninstall` can put it back."""

    def __init__(self) -> None:
        self.saved: list[tuple[Any, str, Any]] = []
        self.mode: CudaMeans | None = None
        self.products: Library | None = None

    def replace(self, owner: Any, names: dict[str, Any]) -> None:
        for name, stand_in in names.items():
            if not hasattr(owner, name):
                raise RuntimeError(
                    f"{owner.__name__}.{name} does not exist in this version; "
                    "the CPU emulation must be brought up to date"
                )
            self.saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, stand_in)

    def restore(self) -> None:
        while self.saved:
            owner, name, original = self.saved.pop()
            setattr(owner, name, original)
        if self.products is not None:
            self.products._destroy()
            self.products = None


_installation = Installation()


def installed() -> bool:
    return _installation.mode is not None


def install() -> None:
    """Make `torch.cuda` mean the CPU in this process. A second call does nothing.

    Raises:
        RuntimeError: this torch or Megatron-Core lacks a name that the emulation replaces; nothing
            is replaced then.
    """
    if installed():
        return
    from megatron.core.tensor_parallel import random

    try:
        _installation.replace(torch.cuda, TORCH_CUDA)
        _installation.replace(torch.cuda.nvtx, TORCH_CUDA_NVTX)
        _installation.replace(random, MEGATRON_RANDOM)
        for module, names in plain_megatron():
            _installation.replace(module, names)
    except RuntimeError:
        _installation.restore()
        raise
    # Its tracker warns each time that the host's random state changes, which is the device's here.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    if onednn_is_faster():
        _installation.products = use_onednn()
    _installation.mode = CudaMeans(CPU)
    _installation.mode.__enter__()


def uninstall() -> None:
    """Give torch its own functions back."""
    if _installation.mode is None:
        return
    _installation.mode.__exit__(None, None, None)
    _installation.mode = None
    _installation.restore()
