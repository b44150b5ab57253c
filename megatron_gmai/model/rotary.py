"""Rotary embedding of packed tokens (Su et al., arXiv 2104.09864), the halves of a head as pairs.

    y1 = x1 cos - x2 sin        y2 = x2 cos + x1 sin

Legend: T tokens, A heads, D head size.
"""

from typing import Any

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate [T, A, D] by each token's angles, given as their cosines and sines [T, 1, D / 2]."""
    rotated: Tensor = _Rotate.apply(x, cos, sin)
    return rotated


class _Rotate(torch.autograd.Function):
    """Autograd's own would keep and join copies of the halves; the gradient is rotated back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, -sin), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = x * torch.cat([cos, cos], dim=-1)
    (x1, x2), (y1, y2) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    y1.addcmul_(x2, sin, value=-1)
    y2.addcmul_(x1, sin)
    return out
