"""RMSNorm on the CPU: the formulas of rms_norm.py over blocks of rows that stay in the cache.

The backward pass forms p = x * dy once; both sums are then matrix-vector products:
mean(x * w * dy) is p w / H, and dw is p^T r.
Legend: R rows, H hidden size, B rows of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 19  # fp32 values of a block; with its scratch they fit a core's own cache


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (y, x + residual), or (y, x) without a residual, for `x` [R, H]."""
    total = x if residual is None else x + residual
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = weight.float()
    for rows, out in zip(_blocks(total), _blocks(y), strict=True):
        r = _reciprocal_rms(rows, eps)  # [B, 1]
        if x.dtype == torch.float32:
            torch.mul(rows, r, out=out).mul_(scale)
        else:
            out.copy_(rows.float().mul_(r).mul_(scale))
    return y, total


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (dx [R, H], dweight [H] or None); `dtotal` is added to dx."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    scale = weight.float()
    dweight = torch.zeros_like(scale) if weight_grad else None
    extras = [None] * len(_blocks(x)) if dtotal is None else _blocks(dtotal)
    for rows, grad, out, extra in zip(_blocks(x), _blocks(dy), _blocks(dx), extras, strict=True):
        r = _reciprocal_rms(rows, eps)
        wide, g = rows.float(), grad.float()  # [B, H]
        product = wide * g
        if dweight is not None:
            dweight.addmv_(product.T, r[:, 0])
        slope = (product @ scale)[:, None].mul_(r.pow(3)).div_(-x.shape[1])
        result = torch.mul(g, scale, out=out if out.dtype == torch.float32 else product)
        result.mul_(r).addcmul_(wide, slope)
        if extra is not None:
            result.add_(extra)
        if result is not out:
            out.copy_(result)
    return dx, None if dweight is None else dweight.to(weight.dtype)


def _blocks(x: Tensor) -> tuple[Tensor, ...]:
    return x.split(max(1, BLOCK_ELEMENTS // x.shape[1]))


def _reciprocal_rms(rows: Tensor, eps: float) -> Tensor:
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(rows.shape[1]).add_(eps).rsqrt_()
