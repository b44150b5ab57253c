"""Argument checks shared by the ops: a user's mistake becomes a ValueError before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

LOW_AND_SINGLE = (torch.float32, torch.bfloat16, torch.float16)


def check_dtype(argument: str, tensor: Tensor, *, float64: bool) -> None:
    """Raise ValueError unless `tensor` is fp32, bf16 or fp16 (fp64 only for the reference)."""
    allowed = (*LOW_AND_SINGLE, torch.float64) if float64 else LOW_AND_SINGLE
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise ValueError(
            f"{argument}: dtype {tensor.dtype} is not supported; cast to one of {names}"
        )


def check_same(argument: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise ValueError unless both tensors have one dtype and lie on one device."""
    if tensor.dtype != other.dtype:
        raise ValueError(
            f"{argument}: dtype {tensor.dtype} differs from {other_name}'s {other.dtype}; "
            "cast one of them"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{argument}: device {tensor.device} differs from {other_name}'s {other.device}; "
            "move one of them"
        )


def check_matrix(argument: str, tensor: Tensor, legend: str) -> None:
    """Raise ValueError unless `tensor` is a non-empty matrix whose rows are contiguous."""
    if tensor.dim() != 2:
        raise ValueError(
            f"{argument}: shape {tuple(tensor.shape)} is not a matrix {legend}; reshape it"
        )
    if tensor.numel() == 0:
        raise ValueError(f"{argument}: shape {tuple(tensor.shape)} is empty; skip the call")
    if tensor.stride(1) != 1:
        raise ValueError(
            f"{argument}: strides {tensor.stride()} leave gaps in a row; call .contiguous()"
        )


def check_weight(weight: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `weight` is contiguous and of `shape`."""
    if tuple(weight.shape) != shape:
        raise ValueError(f"weight: shape {tuple(weight.shape)} does not match; expected {shape}")
    if not weight.is_contiguous():
        raise ValueError(
            f"weight: strides {weight.stride()} are not contiguous; call .contiguous()"
        )
