"""New memory for large tensors."""

import math

import numpy as np
import torch
from torch import Tensor


def new_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """As `torch.empty`, in huge pages where the kernel gives them on request.

    numpy asks for them and torch does not; touching gigabytes for the first time in pages of 4 KB
    takes longer than all that a conversion does with the bytes.
    """
    memory = np.empty(dtype.itemsize * math.prod(shape), np.uint8)
    return torch.from_numpy(memory).view(dtype).view(shape)
