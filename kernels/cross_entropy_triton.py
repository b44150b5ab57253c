"""The two passes of cross-entropy on a GPU; the formulas are in cross_entropy.py.

One program a row. The main loop has no column mask, so its accesses are 128 bits wide wherever rows
start on 16 elements, also for an odd vocabulary; only the tail after it is masked. Rows that do not
count are masked as a whole, which keeps the width and reads nothing.
Legend: T tokens, V columns, N true columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmai_kernels.dispatch import on_device_of
from gmai_kernels.vocabulary import IGNORED

STATISTICS_BLOCK = 4096  # columns of one step: 16 a thread, two 128-bit loads under way
STATISTICS_WARPS = 8
GRADIENT_BLOCK = 2048  # columns of one step
GRADIENT_COLUMNS = 8  # of them a thread: 128 bits of bf16, and 32 registers fill a multiprocessor
LOWEST = tl.constexpr(-3.4028234663852886e38)  # starts the maximum: -inf - -inf would be NaN


@triton.jit
def _accumulate(x, maximum, total):
    """Take x [lanes, 8] into the running maximum and sum of exp(x - maximum) of each lane."""
    x = x.to(tl.float32)
    new = tl.maximum(maximum, tl.max(x, axis=1))
    total = total * tl.exp(maximum - new) + tl.sum(tl.exp(x - new[:, None]), axis=1)
    return new, total


@triton.jit
def _statistics_kernel(
    logits_ptr, target_ptr, stats_ptr, stride, columns, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    live = target != IGNORED
    base = logits_ptr + row * stride
    cols = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    maximum = tl.full([BLOCK // 8], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK // 8], dtype=tl.float32)
    main = columns // BLOCK * BLOCK
    for start in range(0, main, BLOCK):
        x = tl.load(base + start + cols, mask=live, other=-float("inf"))
        maximum, total = _accumulate(x, maximum, total)
    if main < columns:
        x = tl.load(base + main + cols, mask=live & (main + cols < columns), other=-float("inf"))
        maximum, total = _accumulate(x, maximum, total)
    peak = tl.max(maximum, axis=0)
    tl.store(stats_ptr + row * 3, peak)
    tl.store(stats_ptr + row * 3 + 1, tl.sum(total * tl.exp(maximum - peak), axis=0))
    label_logit = tl.load(base + target, mask=target >= 0, other=0.0)
    tl.store(stats_ptr + row * 3 + 2, label_logit.to(tl.float32))


@triton.jit
def _gradient_kernel(
    logits_ptr, target_ptr, lse_ptr, scale_ptr, stride, columns, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    scale = tl.load(scale_ptr + row)
    live = scale != 0.0
    lse = tl.load(lse_ptr + row, mask=live, other=0.0)
    target = tl.load(target_ptr + row).to(tl.int32)
    base = logits_ptr + row * stride
    cols = tl.arange(0, BLOCK)
    main = columns // BLOCK * BLOCK
    for start in range(0, main, BLOCK):
        x = tl.load(base + start + cols, mask=live, other=-float("inf")).to(tl.float32)
        p = tl.exp(x - lse) - tl.where(cols == target - start, 1.0, 0.0)
        tl.store(base + start + cols, (p * scale).to(logits_ptr.dtype.element_ty))
    if main < columns:
        x = tl.load(base + main + cols, mask=live & (main + cols < columns), other=-float("inf"))
        p = tl.exp(x.to(tl.float32) - lse) - tl.where(cols == target - main, 1.0, 0.0)
        tl.store(
            base + main + cols,
            (p * scale).to(logits_ptr.dtype.element_ty),
            mask=main + cols < columns,
        )


def statistics(logits: Tensor, target: Tensor, columns: int) -> Tensor:
    """Return fp32 [T, 3]: maximum, sum of exp(x - maximum), label logit (0 where not here).

    Rows whose target is IGNORED are not read: their sum is 0.
    """
    stats = torch.empty(logits.shape[0], 3, dtype=torch.float32, device=logits.device)
    with on_device_of(logits):
        _statistics_kernel[(logits.shape[0],)](
            logits,
            target,
            stats,
            logits.stride(0),
            columns,
            IGNORED=IGNORED,
            BLOCK=STATISTICS_BLOCK,
            num_warps=STATISTICS_WARPS,
        )
    return stats


def gradient_(logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, columns: int) -> None:
    """Overwrite logits [T, V] with scale * (exp(logits - lse) - one-hot(target)).

    Padding columns get 0. Rows of scale 0 are not read.
    """
    with on_device_of(logits):
        lanes = triton.runtime.driver.active.get_current_target().warp_size  # 32, on AMD 64
        _gradient_kernel[(logits.shape[0],)](
            logits,
            target,
            lse,
            scale,
            logits.stride(0),
            columns,
            BLOCK=GRADIENT_BLOCK,
            num_warps=GRADIENT_BLOCK // GRADIENT_COLUMNS // lanes,
        )
    if columns < logits.shape[1]:
        logits[:, columns:].zero_()
