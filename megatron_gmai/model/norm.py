"""The normalisations in Megatron's spec slots: RMSNorm (fused kernel) and CLIP's LayerNorm.

Transformer Engine's two have the same parameters under the same names.
"""

import torch
from megatron.core.extensions.transformer_engine import TENorm
from megatron.core.transformer import TransformerConfig

from gmai_kernels import rms_norm
from megatron_gmai.runtime.implementation import Implementation


class RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, statistics in fp32 (Zhang & Sennrich, 2019).

    The weight is marked `sequence_parallel`, so Megatron sums its gradient over the tensor-parallel
    ranks when each of them sees only its share of the sequence.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(
            torch.empty(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [T, 1, H] -> [T, 1, H]
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with the constructor that Megatron's slots call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__(
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )


def rms_norm_for(implementation: Implementation) -> type:
    """The class for the language model's norms."""
    return TENorm if implementation.is_transformer_engine else RMSNorm


def layer_norm_for(implementation: Implementation) -> type:
    """The class for the vision tower's norms."""
    return TENorm if implementation.is_transformer_engine else LayerNorm
