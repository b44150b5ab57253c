"""Small kernels with a known behaviour: what the proving tools are themselves proven on."""

import torch
import triton
import triton.language as tl


@triton.jit
def _square(x):
    return x * x


@triton.jit
def scale_kernel(x_ptr, y_ptr, factor, n, BLOCK: tl.constexpr):
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + cols, mask=cols < n, other=0.0)
    tl.store(y_ptr + cols, x * factor.to(x.dtype), mask=cols < n)


@triton.jit
def row_norm_kernel(x_ptr, y_ptr, stride, n, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, n, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * stride + cols, mask=cols < n, other=0.0).to(tl.float32)
        total += _square(x)
    tl.store(y_ptr + row, tl.sqrt(tl.sum(total, axis=0)))


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(a_ptr + i[:, None] * N + i[None, :])
    b = tl.load(b_ptr + i[:, None] * N + i[None, :])
    tl.store(c_ptr + i[:, None] * N + i[None, :], tl.dot(a, b).to(a.dtype))


@triton.jit
def bf16_chain_kernel(a_ptr, b_ptr, c_ptr, n, BLOCK: tl.constexpr):
    """a * b + a, |a - b| and max(a, b), all in the dtype of the tensors."""
    i = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + i, mask=i < n)
    b = tl.load(b_ptr + i, mask=i < n)
    tl.store(c_ptr + i, a * b + a, mask=i < n)
    tl.store(c_ptr + n + i, tl.abs(a - b), mask=i < n)
    tl.store(c_ptr + 2 * n + i, tl.maximum(a, b), mask=i < n)
    tl.store(c_ptr + 3 * n + i, tl.where(a < b, a, 1.0).to(tl.bfloat16), mask=i < n)


@triton.jit
def skip_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    """Fills each row with its number, except row 1."""
    row = tl.program_id(0)
    live = row.to(tl.int64) != 1
    cols = tl.arange(0, BLOCK)
    tl.store(y_ptr + row * n + cols, tl.load(x_ptr + row), mask=live & (cols < n))
    tl.store(y_ptr + row * n + cols, tl.load(x_ptr + row), mask=live)


def scale(x: torch.Tensor, factor: float, block: int = 64) -> torch.Tensor:
    """x * factor for contiguous x."""
    y = torch.empty_like(x)
    n = x.numel()
    scale_kernel[(triton.cdiv(n, block),)](x, y, factor, n, BLOCK=block, num_warps=1)
    return y


def row_norm(x: torch.Tensor, block: int = 64) -> torch.Tensor:
    """Euclidean norm of each row of x [R, C] as float32 [R]; rows may be strided."""
    y = torch.empty(x.shape[0], dtype=torch.float32)
    row_norm_kernel[lambda meta: (x.shape[0],)](x, y, x.stride(0), x.shape[1], BLOCK=block)
    return y
