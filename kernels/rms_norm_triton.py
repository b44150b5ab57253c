"""RMSNorm on a GPU: the formulas of rms_norm.py as Triton kernels.

Forward: one program a row, which stays in registers between the sum of squares and the scaling.
Backward: a fixed set of programs, each walking over every P-th row with its share of dweight in
registers; the [P, H] shares are added afterwards, in one order, so two runs agree bitwise (atomic
additions would not).

Registers decide the backward pass: its share of dweight, the weight, x and dy of a row all live
across the row's sum. 8 elements a thread (one 128-bit access of bf16 each) need 48 to 62 registers.
16 elements would need 80 to 99, with spills in some widths, and hide less latency: half the
threads, and no more programs fit. Only above 8192 columns, where a program has no further threads,
a thread holds 16; the weight is then read again for each row, from the cache, to make room.
Legend: R rows, H hidden size, P programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gmai_kernels.dispatch import on_device_of


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, y_ptr, r_ptr, x_stride, hidden, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)  # rows * stride may pass 2**31
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    r = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + eps)
    tl.store(r_ptr + row, r)
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    y = x * r * weight
    tl.store(y_ptr + row * hidden + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    x_ptr,
    r_ptr,
    weight_ptr,
    dx_ptr,
    share_ptr,
    dy_stride,
    x_stride,
    rows,
    hidden,
    inverse_hidden,
    BLOCK: tl.constexpr,
    WEIGHT_GRAD: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    mask = cols < hidden
    weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
    share = tl.zeros([BLOCK], dtype=tl.float32)
    step = tl.num_programs(0)
    # LICM is off: hoisted out of the loop, the weight's fp32 copy would hold registers throughout.
    for row in tl.range(program, rows, step, disable_licm=True):
        start = tl.cast(row, tl.int64)
        r = tl.load(r_ptr + row)
        x = tl.load(x_ptr + start * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(dy_ptr + start * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
        normed = x * r
        if WEIGHT_GRAD:
            share += normed * g
        if WIDE:
            weight = tl.load(weight_ptr + cols, mask=mask, other=0.0)
        g *= weight.to(tl.float32)
        mean = tl.sum(normed * g, axis=0) * inverse_hidden
        dx = (g - normed * mean) * r
        tl.store(dx_ptr + start * hidden + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if WEIGHT_GRAD:
        tl.store(share_ptr + program * hidden + cols, share, mask=mask)


FORWARD_ELEMENTS = 16  # of a thread: two 128-bit loads of bf16 under way
FORWARD_THREADS = 512  # at most, as the wait at the row's sum grows with the warps
BACKWARD_ELEMENTS = 8
BACKWARD_THREADS = 1024  # the most a program can have
# Two programs share a multiprocessor, one waiting at its sum while the other loads, as long as the
# registers of both fit; more would only add shares.
TWO_FIT = BACKWARD_THREADS // 2
PROGRAMS_ON_CPU = 8  # under the interpreter


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return (y, r fp32 [R, 1]) for `x` [R, H]."""
    rows, hidden = x.shape
    y = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    r = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(hidden)
    with on_device_of(x):
        _forward_kernel[(rows,)](
            x,
            weight,
            y,
            r,
            x.stride(0),
            hidden,
            eps,
            BLOCK=block,
            num_warps=_warps(min(block // FORWARD_ELEMENTS, FORWARD_THREADS)),
        )
    return y, r


def backward(
    dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, weight_grad: bool
) -> tuple[Tensor, Tensor]:
    """Return (dx [R, H], dweight [H]) with the forward pass's r; dweight is [0] if not wanted."""
    rows, hidden = x.shape
    block = triton.next_power_of_2(hidden)
    threads = min(block // BACKWARD_ELEMENTS, BACKWARD_THREADS)
    programs = min(rows, _programs(x, threads))
    dx = torch.empty(rows, hidden, dtype=x.dtype, device=x.device)
    shares = torch.empty(
        programs, hidden if weight_grad else 0, dtype=torch.float32, device=x.device
    )
    with on_device_of(x):
        _backward_kernel[(programs,)](
            dy,
            x,
            r,
            weight,
            dx,
            shares,
            dy.stride(0),
            x.stride(0),
            rows,
            hidden,
            1 / hidden,
            BLOCK=block,
            WEIGHT_GRAD=weight_grad,
            WIDE=block > BACKWARD_THREADS * BACKWARD_ELEMENTS,
            num_warps=_warps(threads),
        )
    return dx, shares.sum(0).to(weight.dtype)


def _warps(threads: int) -> int:
    lanes = triton.runtime.driver.active.get_current_target().warp_size  # 32, on AMD 64
    return max(threads // lanes, 1)


def _programs(x: Tensor, threads: int) -> int:
    if not x.is_cuda:
        return PROGRAMS_ON_CPU
    multiprocessors = torch.cuda.get_device_properties(x.device).multi_processor_count
    return multiprocessors * (2 if threads <= TWO_FIT else 1)
