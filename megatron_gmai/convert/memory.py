"""Memory for large tensors."""

import math
import mmap
import threading
import weakref
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class ReusedMemory:
    """Memory for tensors that are made one after the other: what nobody uses any more is given out
    again. The kernel would have to clear new memory for each, and on a virtual machine to fetch it
    from the host, which takes longer than all that a conversion does with the bytes.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lock = threading.Lock()

    def new_tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """As `torch.empty`; the memory comes back when the last tensor that shares it is gone."""
        count = dtype.itemsize * math.prod(shape)
        memory = self._take(count)
        values = memory[:count]
        weakref.finalize(values, lambda: self._free.append(memory))
        return torch.from_numpy(values).view(dtype).view(shape)

    def _take(self, count: int) -> np.ndarray:
        """The smallest free memory of that many bytes; without one, all of it is let go."""
        with self._lock:  # not needed where memory comes back: list.append is one step
            fitting = sorted((m for m in self._free if m.nbytes >= count), key=lambda m: m.nbytes)
            self._free = fitting[1:]
        # Not numpy's own: that asks for huge pages, which a virtual machine is slow to fetch.
        return fitting[0] if fitting else torch.empty(count, dtype=torch.uint8).numpy()


def mapped(path: Path, start: int, count: int) -> np.ndarray:
    """uint8 [count] of a file, from byte `start`: read when they are looked at. What is written to
    them stays in memory.

    Pages of a mapping count as memory of the process until it ends, so map a tensor, not a file.
    """
    page = start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as file:
        length = start + count - page
        pages = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY, offset=page)
    return np.frombuffer(pages, np.uint8, count, start - page)


def aligned(values: np.ndarray, dtype: torch.dtype, memory: ReusedMemory) -> Tensor:
    """uint8 [count] as [count / itemsize] of `dtype`: the same memory, unless it begins where no
    number of that dtype may."""
    found = torch.from_numpy(values)
    if found.data_ptr() % dtype.itemsize:
        found = memory.new_tensor((len(found),), torch.uint8).copy_(found)
    return found.view(dtype)
