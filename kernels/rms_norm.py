"""RMSNorm.

    r = 1 / sqrt(mean(x^2) + eps)        y = x * r * w
    dx = r * (w * dy - x * r^2 * mean(x * w * dy))        dw = sum over rows of dy * x * r

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Statistics and sums are in fp32.
The backward pass keeps x, the weight and r, 4 bytes a row.
Legend: R rows (all leading dimensions), H hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gmai_kernels.ops  # noqa: F401  (registers the operators)
from gmai_kernels.checks import check_dtype, check_same, check_weight
from gmai_kernels.dispatch import chosen_implementation

MAX_HIDDEN = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows of `x` [..., H] by their root mean square and scale them by `weight` [H].

    x and weight share dtype (fp32, bf16, fp16) and device; the result is contiguous, of x's shape
    and dtype. H is at most 16384 on a GPU. Raises ValueError for any other input.
    """
    implementation = _check(x, weight, eps)
    if implementation == "reference":
        return rms_norm_reference(x, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps, implementation)
    return y


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in plain torch, at least in fp32 and in fp64 for fp64 input."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r * weight.to(wide.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, implementation: str) -> Tensor:
        rows = _rows(x)
        y, r = torch.ops.gmai_kernels.rms_norm(rows, weight, eps, implementation)
        ctx.save_for_backward(rows, r, weight)
        ctx.implementation = implementation
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight_grad = ctx.needs_input_grad[1]
        dx, dweight = torch.ops.gmai_kernels.rms_norm_backward(
            _rows(dy), *ctx.saved_tensors, weight_grad, ctx.implementation
        )
        return dx.view(dy.shape), dweight if weight_grad else None, None, None


def _rows(x: Tensor) -> Tensor:
    """View [..., H] as [R, H] with unit stride in a row; copies only where no such view exists."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _check(x: Tensor, weight: Tensor, eps: float) -> str:
    implementation = chosen_implementation(x)
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} is empty; skip the call")
    check_dtype("x", x, float64=implementation == "reference")
    check_same("weight", weight, "x", x)
    check_weight(weight, (x.shape[-1],))
    if implementation == "triton" and x.shape[-1] > MAX_HIDDEN:
        raise ValueError(
            f"x: hidden size {x.shape[-1]} is above {MAX_HIDDEN}; "
            "choose use_implementation('torch')"
        )
    if not eps > 0:
        raise ValueError(f"eps: {eps} is not positive")
    return implementation
