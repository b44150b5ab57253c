"""Which implementation of an op runs: Triton on a GPU, torch elsewhere, with one override.

`auto` picks by the device of the input: `torch` for CPU tensors, `triton` for all others.
The override lives in a context variable, so it is local to a thread and restored on leaving the
block.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

Implementation = Literal["auto", "triton", "torch", "reference"]

_override: ContextVar[Implementation] = ContextVar("gmai_kernels_implementation", default="auto")


@contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Run every op of the block with one implementation.

    `auto` restores the choice by device; `triton` on CPU tensors needs Triton's interpreter;
    `reference` is the plain torch formula, which also takes float64. An op remembers the choice of
    its forward pass for its backward pass. Raises ValueError for any other name.
    """
    if name not in get_args(Implementation):
        choices = ", ".join(get_args(Implementation))
        raise ValueError(f"use_implementation: {name!r} is unknown; choose one of {choices}")
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def chosen_implementation(tensor: Tensor) -> Literal["triton", "torch", "reference"]:
    """Return the implementation that runs for an op whose main input is `tensor`."""
    name = _overriding()
    if name == "auto":
        name = "torch" if tensor.device.type == "cpu" else "triton"
    if name == "triton" and not _has_triton():
        raise ValueError(
            "implementation 'triton' needs the triton package: install the [gpu] extra, "
            "or choose use_implementation('torch')"
        )
    return name


# torch.compile can trace neither: it takes their answers when it compiles.
@torch.compiler.assume_constant_result
def _overriding() -> Implementation:
    return _override.get()


@torch.compiler.assume_constant_result
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which Triton launches on the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
