"""SwiGLU on a CPU (Shazeer, arXiv 2002.05202), from the joined output of the first matrix.

    y = silu(gate) · up        silu(x) = x · sigmoid(x)

Legend: F feed-forward size of this rank; a row is a token.
"""

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn.functional import silu


class SwiGLU(torch.nn.Module):
    """For the slot of the activation; on a GPU Megatron compiles its own."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, gate_and_up: Tensor) -> Tensor:  # [T, 1, 2F] -> [T, 1, F]
        out: Tensor = _SwiGLU.apply(gate_and_up)
        return out


class _SwiGLU(torch.autograd.Function):
    """Writes both gradients where they lie together; autograd's own would join copies."""

    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor) -> Tensor:
        gate, up = gate_and_up.chunk(2, dim=-1)
        opened = silu(gate)
        ctx.save_for_backward(gate_and_up, opened)
        return opened * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate_and_up, opened = ctx.saved_tensors
        gate, up = gate_and_up.chunk(2, dim=-1)
        joined = torch.empty_like(gate_and_up)
        of_gate, of_up = joined.chunk(2, dim=-1)
        torch.mul(gradient, opened, out=of_up)
        torch.mul(gradient, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return joined
