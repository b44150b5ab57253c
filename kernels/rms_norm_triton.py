"""RMSNorm on a GPU: the formulas of rms_norm.py as Triton kernels.

Forward: one program a row, which stays in registers between the sum of squares and the scaling.
Backward: a fixed set of programs, each walking over every P-th row with its share of dweight in
registers; the [P, H] shares are added afterwards, in one order, so two runs agree bitwise.
Registers decide how much of a row a thread can hold, and three things keep them few: nothing moves
out of the loop over rows; a wide row keeps x as it was loaded and reads the weight again; and where
it matters the gradient of the sum is loaded late, behind a mask that the row's sum decides.
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
    r_ptr,
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
    tl.store(r_ptr + row, r)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = x * r * weight
    tl.store(y_ptr + row * hidden + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    dtotal_ptr,
    x_ptr,
    r_ptr,
    weight_ptr,
    dx_ptr,
    share_ptr,
    dy_stride,
    dtotal_stride,
    x_stride,
    rows,
    hidden,
    inverse_hidden,
    BLOCK: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    SHORT_OF_REGISTERS: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    share = tl.zeros([BLOCK], dtype=tl.float32)
    step = tl.num_programs(0)
    for row in tl.range(program, rows, step, disable_licm=not SHORT_OF_REGISTERS):
        start = tl.cast(row, tl.int64)
        r = tl.load(r_ptr + row)
        x = tl.load(x_ptr + start * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + start * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        normed = x * r
        if WEIGHT_GRAD:
            share += normed * g
        if SHORT_OF_REGISTERS:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
        g *= weight.to(tl.float32)
        slope = tl.sum(normed * g, axis=0) * inverse_hidden * r
        if SHORT_OF_REGISTERS:
            slope *= r
            normed = x  # kept as it was loaded, in half the registers
        dx = g * r - normed * slope
        if HAS_TOTAL:
            readable = mask
            if SHORT_OF_REGISTERS or not WEIGHT_GRAD:
                readable &= slope == slope  # holds the load, and its registers, until the sum
            total = tl.load(dtotal_ptr + start * dtotal_stride + cols, mask=readable, other=0.0)
            dx += total.to(tl.float32)
        tl.store(dx_ptr + start * hidden + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        tl.store(share_ptr + program * hidden + cols, share, mask=mask)


WIDE = 8192  # columns; above it a thread holds 32 elements, and registers are short
PROGRAMS_PER_MULTIPROCESSOR = 2  # one waits at its sums while the other loads
PROGRAMS_ON_CPU = 8  # under the interpreter


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y, x + residual, r [R, 1]) for `x` [R, H]; without a residual the sum is x."""
    rows, hidden = x.shape
    y = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    r = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(hidden)
    with on_device_of(x):
        _forward_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            y,
            total,
            r,
            x.stride(0),
            0 if residual is None else residual.stride(0),
            hidden,
            eps,
            BLOCK=block,
            HAS_RESIDUAL=residual is not None,
            num_warps=_warps(block),
        )
    return y, total, r


def backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, r: Tensor, weight: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Return (dx [R, H], dweight [H] or None) with the forward pass's r; dx includes `dtotal`."""
    rows, hidden = x.shape
    programs = min(rows, _programs(x))
    dx = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    shares = torch.empty(
        programs if weight_grad else 0, hidden, dtype=torch.float32, device=x.device
    )
    block = triton.next_power_of_2(hidden)
    with on_device_of(x):
        _backward_kernel[(programs,)](
            dy,
            dy if dtotal is None else dtotal,
            x,
            r,
            weight,
            dx,
            shares,
            dy.stride(0),
            0 if dtotal is None else dtotal.stride(0),
            x.stride(0),
            rows,
            hidden,
            1 / hidden,
            BLOCK=block,
            HAS_TOTAL=dtotal is not None,
            WEIGHT_GRAD=weight_grad,
            SHORT_OF_REGISTERS=block > WIDE,
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
