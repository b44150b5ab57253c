"""The kernels as torch operators: `torch.ops.gmai_kernels.*`, one name for all devices.

An operator of torch's registry has a name in profiles, a rule for the shapes of its results (used
by FakeTensorMode and torch.compile, which have no data) and a count of floating-point operations
(used by FlopCounterMode). Gradients are not registered: the autograd functions of rms_norm.py,
cross_entropy.py and linear_cross_entropy.py call these operators.
Every operator takes `implementation`, "torch" or "triton": the caller's choice (see dispatch.py).
Legend: R rows, H hidden size, T tokens, V columns, N true columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from gmai_kernels import cross_entropy_torch, rms_norm_torch

NAMESPACE = "gmai_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
LIBRARY.define(
    "rms_norm(Tensor x, Tensor weight, float eps, str implementation) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor r, Tensor weight, bool weight_grad, "
    "str implementation) -> (Tensor, Tensor)"
)
LIBRARY.define(
    "cross_entropy_statistics(Tensor logits, Tensor target, int columns, str implementation) "
    "-> Tensor"
)
LIBRARY.define(
    "cross_entropy_gradient_(Tensor(a!) logits, Tensor target, Tensor lse, Tensor scale, "
    "int columns, str implementation) -> ()"
)
LIBRARY.define("add_product_(Tensor(a!) total, Tensor left, Tensor right) -> ()")


def rms_norm(x: Tensor, weight: Tensor, eps: float, implementation: str) -> tuple[Tensor, Tensor]:
    """Return (y [R, H], r fp32 [R, 1]) for `x` [R, H] with unit stride in a row."""
    if implementation == "torch":
        return rms_norm_torch.forward(x, weight, eps)
    from gmai_kernels import rms_norm_triton  # only here: triton is optional on a CPU machine

    return rms_norm_triton.forward(x, weight, eps)


def rms_norm_backward(
    dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, weight_grad: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    """Return (dx [R, H], dweight [H]) from the forward pass's r; dweight is [0] if not wanted."""
    if implementation == "torch":
        return rms_norm_torch.backward(dy, x, r, weight, weight_grad)
    from gmai_kernels import rms_norm_triton

    return rms_norm_triton.backward(dy, x, r, weight, weight_grad)


def cross_entropy_statistics(
    logits: Tensor, target: Tensor, columns: int, implementation: str
) -> Tensor:
    """Return [T, 3]: maximum, sum of exp(x - maximum), label logit (0 where it is not here)."""
    if implementation == "torch":
        return cross_entropy_torch.statistics(logits, target, columns)
    from gmai_kernels import cross_entropy_triton

    return cross_entropy_triton.statistics(logits, target, columns)


def cross_entropy_gradient_(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, columns: int, implementation: str
) -> None:
    """Set logits [T, V] to scale * (exp(logits - lse) - one-hot(target)), padding columns to 0."""
    if implementation == "torch":
        return cross_entropy_torch.gradient_(logits, target, lse, scale, columns)
    from gmai_kernels import cross_entropy_triton

    return cross_entropy_triton.gradient_(logits, target, lse, scale, columns)


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left right to `total`, fp32, inside the product, whatever the dtype of left and right.

    An operator of its own because FlopCounterMode stumbles over addmm's `out_dtype`.
    """
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif torch.__version__ < "2.10.0":  # pre-releases of it too: NVIDIA's container 25.11 has one
        total += torch.mm(left, right, out_dtype=torch.float32)  # addmm refuses an fp32 `total`
    else:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


# CompositeExplicitAutograd: one function for every device, below autograd.
IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    f"{NAMESPACE}::{function.__name__}": function
    for function in (
        rms_norm,
        rms_norm_backward,
        cross_entropy_statistics,
        cross_entropy_gradient_,
        add_product_,
    )
}
for _name, _function in IMPLEMENTATIONS.items():
    LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")


@torch.library.register_fake("gmai_kernels::rms_norm", lib=LIBRARY)
def _(x: Tensor, weight: Tensor, eps: float, implementation: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.register_fake("gmai_kernels::rms_norm_backward", lib=LIBRARY)
def _(
    dy: Tensor, x: Tensor, r: Tensor, weight: Tensor, weight_grad: bool, implementation: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if weight_grad else 0)


@torch.library.register_fake("gmai_kernels::cross_entropy_statistics", lib=LIBRARY)
def _(logits: Tensor, target: Tensor, columns: int, implementation: str) -> Tensor:
    return logits.new_empty(logits.shape[0], 3, dtype=torch.float32)


@torch.library.register_fake("gmai_kernels::cross_entropy_gradient_", lib=LIBRARY)
def _(
    logits: Tensor, target: Tensor, lse: Tensor, scale: Tensor, columns: int, implementation: str
) -> None:
    return None


@torch.library.register_fake("gmai_kernels::add_product_", lib=LIBRARY)
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    return None


# Operations an element, an exponential counted as one.
@register_flop_formula(torch.ops.gmai_kernels.rms_norm)
def _(x: torch.Size, *_: Any, **__: Any) -> int:
    return 4 * x.numel()  # square, sum; two products


@register_flop_formula(torch.ops.gmai_kernels.rms_norm_backward)
def _(
    dy: torch.Size, x: torch.Size, r: Any, weight: Any, weight_grad: bool, *_: Any, **__: Any
) -> int:
    return (9 if weight_grad else 7) * x.numel()


@register_flop_formula(torch.ops.gmai_kernels.cross_entropy_statistics)
def _(logits: torch.Size, target: Any, columns: int, *_: Any, **__: Any) -> int:
    return 4 * logits[0] * columns  # maximum, difference, exponential, sum


@register_flop_formula(torch.ops.gmai_kernels.cross_entropy_gradient_)
def _(
    logits: torch.Size, target: Any, lse: Any, scale: Any, columns: int, *_: Any, **__: Any
) -> int:
    return 4 * logits[0] * columns  # difference, exponential, label, scale


@register_flop_formula(torch.ops.gmai_kernels.add_product_)
def _(total: torch.Size, left: torch.Size, right: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * total.numel() * left[1]
