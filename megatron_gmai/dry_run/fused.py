"""The fused kernels as a GPU runs them: they allocate their results and nothing else.

The torch path of `gmai_kernels`, which a device without Triton gets, works in blocks for a CPU's
cache; those must not be counted for a GPU.
"""

from typing import Any

import torch
from torch import Tensor

from gmai_kernels import cross_entropy_torch, rms_norm_torch
from megatron_gmai.runtime.cpu import Installation


def install(replaced: Installation) -> None:
    """Put shapes in the place of the torch path, until `replaced.restore()`."""
    replaced.replace(rms_norm_torch, {"forward": _norm, "backward": _norm_backward})
    replaced.replace(cross_entropy_torch, {"statistics": _statistics, "gradient_": _gradient})


def _norm(x: Tensor, residual: Tensor | None, *unused: Any) -> tuple[Tensor, Tensor, Tensor]:
    r = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    return torch.empty_like(x), x if residual is None else torch.empty_like(x), r


def _norm_backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, r: Tensor, weight: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    return torch.empty_like(x), torch.empty_like(weight) if weight_grad else None


def _statistics(logits: Tensor, *unused: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], 3, dtype=torch.float32)


def _gradient(*unused: Any) -> None: ...
