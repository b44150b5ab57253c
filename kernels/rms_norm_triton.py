"""RMSNorm on a GPU: the formulas of rms_norm.py as Triton kernels.

Forward: one program a row, which stays in registers between the sum of squares and the scaling.
Backward: a fixed set of programs, each walking over every P-th row with its share of dweight in
registers; the [P, H] shares are added afterwards, in one order, so two runs agree bitwise. The
hidden size is a run-time argument: a mask that the compiler cannot fold keeps it from hoisting
loads across rows, which costs 20 registers a thread at 4096.
Legend: R rows, H hidden size, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmai_kernels.dispatch import on_device_of


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    x_stride,
    residual_stride,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + row * residual_stride + cols, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
        tl.store(total_ptr + row * hidden + cols, x, mask=mask)
    x = x.to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = x * r * weight
    tl.store(y_ptr + row * hidden + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    share_ptr,
    dy_stride,
    dtotal_stride,
    x_stride,
    rows,
    hidden,
    eps,
    BLOCK: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    INPUT_GRAD: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    RELOAD: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    share = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        start = tl.cast(row, tl.int64)
        x = tl.load(x_ptr + start * x_stride + cols, mask=mask, other=0.0)
        dy = tl.load(dy_ptr + start * dy_stride + cols, mask=mask, other=0.0)
        x = x.to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
        x *= r
        g = dy.to(tl.float32)
        if WEIGHT_GRAD:
            share += g * x
        if INPUT_GRAD:
            if RELOAD:
                weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
            g *= weight.to(tl.float32)
            dx = (g - x * (tl.sum(x * g, axis=0) / hidden)) * r
            if HAS_TOTAL:
                total = tl.load(dtotal_ptr + start * dtotal_stride + cols, mask=mask, other=0.0)
                dx += total.to(tl.float32)
            tl.store(dx_ptr + start * hidden + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        tl.store(share_ptr + program * hidden + cols, share, mask=mask)


WIDE = 8192  # columns; above it registers are short: the weight is read again for each row
PROGRAMS_PER_MULTIPROCESSOR = 2  # one waits at its sums while the other loads
PROGRAMS_ON_CPU = 8  # under the interpreter


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (y, x + residual), or (y, x) without a residual, for `x` [R, H]."""
    rows, hidden = x.shape
    y = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    block = triton.next_power_of_2(hidden)
    with on_device_of(x):
        _forward_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            y,
            total,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            hidden,
            eps,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=_warps(block),
        )
    return y, total


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (dx [R, H], dweight [H] or None); `dtotal` is added to dx."""
    rows, hidden = x.shape
    programs = min(rows, _programs(x))
    dx = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    shares = torch.empty(
        programs if weight_grad else 0, hidden, dtype=torch.float32, device=x.device
    )
    block = triton.next_power_of_2(hidden)
    # A wide row leaves no registers for dtotal beside the share: each gets its own launch.
    split = block > WIDE and weight_grad and dtotal is not None
    launches = ((True, False), (False, True)) if split else ((True, weight_grad),)
    for input_part, weight_part in launches:
        with on_device_of(x):
            _backward_kernel[(programs,)](
                dy,
                dy if dtotal is None else dtotal,
                x,
                weight,
                dx,
                shares,
                dy.stride(0),
                0 if dtotal is None else dtotal.stride(0),
                x.stride(0),
                rows,
                hidden,
                eps,
                BLOCK=block,
                HAS_TOTAL=dtotal is not None,
                INPUT_GRAD=input_part,
                WEIGHT_GRAD=weight_part,
                RELOAD=block > WIDE,
                num_warps=_warps(block),
            )
    return dx, shares.sum(0).to(weight.dtype) if weight_grad else None


def _warps(block: int) -> int:
    """16 elements a thread: two 128-bit accesses in bf16; 512 threads at most, for registers."""
    return min(max(block // 512, 1), 16)


def _programs(x: Tensor) -> int:
    if not x.is_cuda:
        return PROGRAMS_ON_CPU
    return (
        PROGRAMS_PER_MULTIPROCESSOR
        * torch.cuda.get_device_properties(x.device).multi_processor_count
    )
