"""fp32 matrix products of a CPU by oneDNN, where it is faster than the library that torch takes.

torch gives them to Intel's MKL, which does without AVX-512 on AMD's processors; oneDNN, which torch
brings along for other operators, uses it there and takes a tenth less time.
"""

import warnings
from pathlib import Path

import torch
from torch import Tensor
from torch.library import Library

SMALLEST = 1 << 24  # multiplications of a product that is worth a call from Python, 5 µs


def onednn_is_faster() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has both libraries."""
    described = Path("/proc/cpuinfo")
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and described.exists()
        and "AuthenticAMD" in described.read_text()
    )


def use_onednn() -> Library:
    """Replace aten::mm on CPUs; `_destroy()` of what is returned puts torch's own back."""
    library = Library("aten", "IMPL")
    with warnings.catch_warnings():  # that it is replaced
        warnings.simplefilter("ignore")
        library.impl("mm", product, "CPU")
    return library


def product(left: Tensor, right: Tensor) -> Tensor:
    """[M, K] x [K, N] -> [M, N], as aten::mm.

    oneDNN copies a left matrix whose columns are in a row, as those of weight gradients are; that
    does not pay where it is the larger one.
    """
    rows, columns = left.size(0), right.size(1)
    is_large = left.numel() * columns >= SMALLEST
    pays = left.is_contiguous() or left.numel() < right.numel()
    if left.dtype is torch.float32 and is_large and pays:
        linear = torch.ops.mkldnn._linear_pointwise
        return linear(left, right.T, None, "none", [], "")  # left (right^T)^T
    return torch.mm(left, right, out=left.new_empty(rows, columns))
