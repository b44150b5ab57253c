"""RMSNorm, alone and fused with the residual addition.

    r = 1 / sqrt(mean(x^2) + eps)        y = x * r * w
    dx = r * (w * dy - x * r^2 * mean(x * w * dy))        dw = sum over rows of dy * x * r

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019. Statistics and sums are in fp32.
The backward pass keeps x, the weight and r, 4 bytes a row.
Legend: R rows (all leading dimensions), H hidden size.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from gmai_kernels import rms_norm_torch
from gmai_kernels.checks import check_dtype, check_same, check_weight
from gmai_kernels.dispatch import chosen_implementation

MAX_HIDDEN = 16384


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise rows of `x` [..., H] by their root mean square and scale them by `weight` [H].

    x and weight share dtype (fp32, bf16, fp16) and device; the result is contiguous, of x's shape
    and dtype. H is at most 16384 on a GPU. Raises ValueError for any other input.
    """
    implementation = _check("x", x, weight, eps)
    if implementation == "reference":
        return rms_norm_reference(x, weight, eps)
    y: Tensor = _RMSNorm.apply(x, weight, eps, _backend(implementation))
    return y


def rms_norm_residual(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (rms_norm(x + residual), x + residual), reading both inputs once.

    Shapes and errors as in `rms_norm`; `residual` has x's shape, dtype and device. The sum is
    rounded to x's dtype before it is normalised, so the result equals the two separate steps.
    """
    implementation = _check("x", x, weight, eps)
    if residual.shape != x.shape:
        raise ValueError(
            f"residual: shape {tuple(residual.shape)} differs from x's {tuple(x.shape)}"
        )
    check_same("residual", residual, "x", x)
    if implementation == "reference":
        total = x + residual
        return rms_norm_reference(total, weight, eps), total
    y, total = _RMSNormResidual.apply(x, residual, weight, eps, _backend(implementation))
    return y, total


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula in plain torch, at least in fp32 and in fp64 for fp64 input."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    r = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * r * weight.to(wide.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, backend: ModuleType) -> Tensor:
        rows = _rows(x)
        y: Tensor
        y, _, r = backend.forward(rows, None, weight, eps)
        ctx.save_for_backward(rows, r, weight)
        ctx.backend = backend
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.backend.backward(
            _rows(dy), None, *ctx.saved_tensors, ctx.needs_input_grad[1]
        )
        return dx.view(dy.shape), dweight, None, None


class _RMSNormResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, backend: ModuleType
    ) -> tuple[Tensor, Tensor]:
        y, total, r = backend.forward(_rows(x), _rows(residual), weight, eps)
        ctx.save_for_backward(total, r, weight)
        ctx.backend = backend
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
        dx, dweight = ctx.backend.backward(
            _rows(dy), _rows(dtotal), *ctx.saved_tensors, ctx.needs_input_grad[2]
        )
        dx = dx.view(dy.shape)
        return dx, dx, dweight, None, None


def _rows(x: Tensor) -> Tensor:
    """View [..., H] as [R, H] with unit stride in a row; copies only where no such view exists."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _backend(implementation: str) -> ModuleType:
    if implementation == "torch":
        return rms_norm_torch
    from gmai_kernels import rms_norm_triton  # only here: triton is optional on a CPU machine

    return rms_norm_triton


def _check(name: str, x: Tensor, weight: Tensor, eps: float) -> str:
    implementation = chosen_implementation(x)
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(x.shape)} is empty; skip the call")
    check_dtype(name, x, float64=implementation == "reference")
    check_same("weight", weight, name, x)
    check_weight(weight, (x.shape[-1],))
    if implementation == "triton" and x.shape[-1] > MAX_HIDDEN:
        raise ValueError(
            f"{name}: hidden size {x.shape[-1]} is above {MAX_HIDDEN}; "
            "choose use_implementation('torch')"
        )
    if not eps > 0:
        raise ValueError(f"eps: {eps} is not positive")
    return implementation
