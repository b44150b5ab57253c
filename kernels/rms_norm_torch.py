"""RMSNorm on the CPU: the formulas of rms_norm.py in few passes over blocks of rows.

Every pass is one operation that all threads share and wait for, so that few large passes count as
much as the cache does. LayerNorm's backward pass, one operation, gives the gradients of RMSNorm
where it is told that the mean is 0 and the standard deviation 1 / r. Only r * mean(w * dy), which
it takes from dx on account of the mean, has to be added again.
Legend: R rows, H hidden size, B rows of one block.
"""

from __future__ import annotations

import torch
from torch import Tensor

ELEMENTS = 1 << 20  # of a block, for each thread; shared among its fp32 copies in low precision
ROWS = 1024  # of a block, for each thread: the weight gradient sums them one by one


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (y, r fp32 [R, 1]) for `x` [R, H]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    r = torch.empty(x.shape[0], 1, dtype=torch.float32, device=x.device)
    scale, floor = weight.float(), torch.tensor(eps, device=x.device)
    blocks = _blocks(x, copies=1)
    (scratch,) = _scratch(x, blocks, 1)
    for block in blocks:
        rows = x[block]
        wide = _in_fp32(rows, scratch)  # [B, H]
        norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True, out=r[block])
        # mean(x^2) + eps in one pass, where mean(x^2) = norm^2 / H
        torch.addcmul(floor, norm, norm, value=1 / x.shape[1], out=norm).rsqrt_()
        if wide is rows:
            torch.mul(wide, norm, out=y[block]).mul_(scale)
        else:
            y[block] = wide.mul_(norm).mul_(scale)
    return y, r


def backward(
    dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return (dx [R, H], dweight [H]) with the forward pass's r; dweight is [0] if not wanted."""
    scale, low = weight.float(), x.dtype != torch.float32
    mean_scale, zeros = scale / x.shape[1], torch.zeros_like(r)
    blocks = _blocks(x, copies=2)
    scratch = _scratch(x, blocks, 2)
    whole = len(blocks) == 1 and not low  # then LayerNorm's result becomes dx
    dx = torch.empty(x.shape if not whole else 0, dtype=x.dtype, device=x.device)
    dweight = torch.zeros_like(scale if weight_grad else scale[:0])
    for block in blocks:
        g, wide = (_in_fp32(t[block], s) for t, s in zip((dy, x), scratch, strict=True))  # [B, H]
        correction = torch.mv(g, mean_scale)[:, None].mul_(r[block])
        result, share, _ = torch.ops.aten.native_layer_norm_backward(
            g, wide, scale.shape, zeros[block], r[block], scale, None, (True, weight_grad, False)
        )
        result = torch.add(result, correction, out=result if whole or low else dx[block])
        if weight_grad:
            dweight += share
        if low:
            dx[block] = result
    return result if whole else dx, dweight.to(weight.dtype)


def _blocks(x: Tensor, copies: int) -> list[slice]:
    """Slice the rows into blocks, of which low precision makes `copies` in fp32."""
    elements = ELEMENTS if x.dtype == torch.float32 else ELEMENTS // copies
    step = torch.get_num_threads() * max(1, min(ROWS, elements // x.shape[1]))
    return [slice(start, min(start + step, len(x))) for start in range(0, len(x), step)]


def _scratch(x: Tensor, blocks: list[slice], count: int) -> Tensor:
    """Return `count` fp32 buffers [B, H], the same for all blocks; empty ones for fp32 input."""
    rows = 0 if x.dtype == torch.float32 else blocks[0].stop
    return torch.empty(count, rows, x.shape[1], dtype=torch.float32, device=x.device)


def _in_fp32(rows: Tensor, scratch: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float32 else scratch[: len(rows)].copy_(rows)
