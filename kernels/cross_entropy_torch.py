"""The two passes of cross-entropy on the CPU, over blocks of rows that stay in the cache.

Legend: T tokens, V columns, N true columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 19  # 2 MiB of fp32: fits the cache, and few blocks mean few barriers


def statistics(logits: Tensor, target: Tensor, columns: int) -> Tensor:
    """Return [T, 3]: maximum, sum of exp(x - maximum), label logit (0 where it is not here).

    The result is fp32, or fp64 for fp64 logits. A slice without true columns has maximum -inf
    and sum 0.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    stats = torch.zeros(logits.shape[0], 3, dtype=dtype, device=logits.device)
    if columns == 0:
        stats[:, 0] = -torch.inf
        return stats
    step = max(1, BLOCK_ELEMENTS // columns)
    for x, out in zip(logits[:, :columns].split(step), stats.split(step), strict=True):
        out[:, 0] = x.amax(1)
        out[:, 1] = torch.sub(x, out[:, :1]).exp_().sum(1)
    label_logit = logits.gather(1, target.clamp_min(0)[:, None])[:, 0]
    stats[:, 2] = torch.where(target >= 0, label_logit.to(dtype), 0.0)
    return stats


def gradient_(logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, columns: int) -> None:
    """Overwrite logits [T, V] with scale * (exp(logits - lse) - one-hot(target)).

    Padding columns get 0.
    """
    logits[:, columns:] = 0.0
    if columns == 0:
        return
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        x, factor, label = logits[rows, :columns], scale[rows, None], target[rows]
        p = torch.sub(x, lse[rows, None], out=x if x.dtype == torch.float32 else None).exp_()
        # One entry a row, 0 where the label is elsewhere: choosing rows would wait for a GPU.
        p.scatter_add_(1, label.clamp_min(0)[:, None], -(label >= 0).to(p.dtype)[:, None])
        x.copy_(p.mul_(factor))
