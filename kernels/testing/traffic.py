"""Bytes that an op moves, counted rather than estimated.

`with counted() as traffic:` runs launches in the interpreter and counts

- of each Triton kernel: the active lanes of every load and store, whether a cache would serve them
  or not (a row's weight counts once for every program that loads it);
- of each torch operation: every element of its inputs and outputs once, which is what a fused
  library kernel such as a matrix product must move at least. Views and allocations move nothing.

Count within `with looks_like_gpu():` to count what a GPU would do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .inside import InsideMode
from .interpreter import Launch, Memory, interpret

# In-place operations that overwrite their target without reading it.
_OVERWRITES = {"copy_", "fill_", "zero_"}
# Operations that read only the chosen elements of their first input.
_PICKS = {"gather", "index_select", "index", "embedding"}


@dataclass
class Moved:
    """Bytes read and written by one kernel launch or torch operation, in order of execution."""

    name: str
    is_kernel: bool
    loaded: int = 0
    stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@dataclass
class Traffic:
    """Everything that was moved in a counted block."""

    entries: list[Moved] = field(default_factory=list)

    @property
    def kernels(self) -> int:
        """Bytes moved by Triton kernels."""
        return sum(entry.total for entry in self.entries if entry.is_kernel)

    @property
    def total(self) -> int:
        """Bytes moved by Triton kernels and torch operations."""
        return sum(entry.total for entry in self.entries)


@contextmanager
def counted() -> Iterator[Traffic]:
    """Count what launches and torch operations in the block move."""
    traffic = Traffic()
    with interpret(_Counter(traffic)), _OperationCounter(traffic):
        yield traffic


class _Counter(Memory):
    def __init__(self, traffic: Traffic) -> None:
        self.traffic = traffic

    def begin(self, launch: Launch) -> None:
        self.traffic.entries.append(Moved(launch.kernel, is_kernel=True))

    def load(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        self.traffic.entries[-1].loaded += _active(addresses, mask) * size
        return addresses

    def store(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        self.traffic.entries[-1].stored += _active(addresses, mask) * size
        return addresses

    def atomic(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> np.ndarray:
        self.load(addresses, mask, size)
        return self.store(addresses, mask, size)


class _OperationCounter(InsideMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self.traffic = traffic

    def operation(self, func: Any, args: Any, kwargs: Any) -> Any:
        result = func(*args, **kwargs)
        moved = _moved_by(func, args, kwargs, result)
        if moved.total:
            self.traffic.entries.append(moved)
        return result


def _active(addresses: np.ndarray, mask: np.ndarray) -> int:
    return int(np.count_nonzero(np.broadcast_to(mask, addresses.shape)))


def _moved_by(func: Any, args: Any, kwargs: Any, result: Any) -> Moved:
    """What one aten operation moves at least; nothing if it only allocates or makes a view."""
    moved = Moved(func.name(), is_kernel=False)
    short = func.name().removeprefix("aten::").split(".")[0]
    if "empty" in short or func.is_view:
        return moved
    parameters = {argument.name: argument for argument in func._schema.arguments}
    values = dict(zip(parameters, args, strict=False)) | kwargs
    for position, (name, value) in enumerate(values.items()):
        is_target = parameters[name].is_write
        for tensor in _tensors(value):
            if is_target:
                moved.stored += _bytes(tensor)
            if not is_target or not (short in _OVERWRITES or parameters[name].kwarg_only):
                picked = short in _PICKS and position == 0
                moved.loaded += _bytes(_tensors(result)[0] if picked else tensor)
    if not any(argument.is_write for argument in parameters.values()):
        moved.stored += sum(_bytes(tensor) for tensor in _tensors(result))
    return moved


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


def _bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's distinct elements: an expanded dimension counts once."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (
        math.prod(size for size, stride in sizes if stride != 0 or size == 0)
        * tensor.element_size()
    )
