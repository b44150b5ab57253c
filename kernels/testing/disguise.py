"""CPU tensors that take the code paths of GPU tensors.

Launchers and autograd functions choose by device: how many programs to start, whether a matrix
product may write float32 from bfloat16. To count or compile what a GPU would run, its branches must
be taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .inside import InsideMode
from .interpreter import patched

MULTIPROCESSORS = 132  # an H100's


@contextmanager
def looks_like_gpu() -> Iterator[None]:
    """Let every tensor claim to be on `cuda:0`, a GPU of compute capability 9.0, while it stays on
    the CPU.

    New tensors "on that device" are CPU tensors as well, and `mm` and `addmm` take `out_dtype`.
    """
    device = SimpleNamespace(multi_processor_count=MULTIPROCESSORS)
    with ExitStack() as stack:
        for name, value in (
            ("get_device_properties", lambda *_: device),
            ("get_device_capability", lambda *_: (9, 0)),
            ("device", lambda *_: nullcontext()),
        ):
            stack.enter_context(patched(torch.cuda, name, value))
        stack.enter_context(_MixedProducts())
        stack.enter_context(_Disguise())
        yield


class _Disguise(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        attribute = getattr(func, "__self__", None)  # of a property's getter: the property
        if attribute is torch.Tensor.device:
            return torch.device("cuda", 0)
        if attribute is torch.Tensor.is_cuda:
            return True
        kwargs = {name: _on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(_on_cpu, args), **kwargs)


class _MixedProducts(InsideMode):
    """`mm` and `addmm` with `out_dtype`, which torch offers for GPU tensors alone."""

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        if not func.name().startswith(("aten::mm.dtype", "aten::addmm.dtype")):
            return func(*args, **kwargs)
        *operands, out_dtype = args
        wide = [operand.to(out_dtype) for operand in operands]
        product = torch.mm(*wide) if len(wide) == 2 else torch.addmm(*wide)
        out = kwargs.get("out")
        return product if out is None else out.copy_(product)


def _on_cpu(value: Any) -> Any:
    is_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_gpu else value
